#!/usr/bin/env bash
# Speed and memory on one GPU, in two parts of at most ten minutes each: bash results/speed/gpu.sh 1|2 [FOLDER] [DEVICE]
# One JSON a measurement in FOLDER (results/speed); a measurement that fails leaves its error beside the others.
# Not yet run on a GPU: tried at small size with DEVICE=cpu SHAPES="tiny" SIZES="tiny" SMALL=1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
part=${1:?1 or 2}; out=${2:-results/speed}; device=${3:-cuda}
shapes=${SHAPES:-qwen3-0.6b qwen3-4b}; sizes=${SIZES:-qwen2.5-0.5b llama3.2-1b qwen2.5-3b qwen3-8b qwen3-14b}
size="--prompts 16 --group-size 16 --prompt-tokens 200 --new-tokens 1024"
[ -n "${SMALL:-}" ] && size="--prompts 2 --group-size 2 --prompt-tokens 8 --new-tokens 12"
mkdir -p "$out"

bench() {       # bench NAME SECONDS ARGUMENTS...
    local name=$1 limit=$2; shift 2
    echo "+ python bench.py $*"
    timeout "$limit" python bench.py "$@" --device "$device" --dtype bfloat16 --json "$out/$name.json" > "$out/$name.log" 2>&1 \
        && tail -n 3 "$out/$name.log" && rm "$out/$name.log" || { echo "failed:"; tail -n 3 "$out/$name.log"; }
}

if [ "$part" = 1 ]; then        # drawing: graph on and off, beside transformers' static cache and continuous batching
    for shape in $shapes; do
        bench "rollout-$shape-$device" 150 rollout --shape "$shape" $size --rounds 1 --vs hf --hf static
        bench "rollout-$shape-$device-no-graph" 50 rollout --shape "$shape" $size --rounds 1 --no-graph
        bench "rollout-$shape-$device-continuous" 80 rollout --shape "$shape" $size --rounds 1 --vs hf --hf continuous
    done
else                            # training: a step, and the peak memory of GRPO by size (8 x 8 completions of 512 tokens);
                                # 8B and 14B need 18 bytes a parameter: more than one card has
    for shape in $shapes; do
        bench "train-$shape-$device" 60 train --shape "$shape" $size --rounds 2 --checkpointing
    done
    [ -n "${SMALL:-}" ] || size="--prompts 8 --group-size 8 --prompt-tokens 200 --new-tokens 512"
    for shape in $sizes; do
        bench "memory-$shape-$device" 90 memory --shape "$shape" $size --no-files
    done
fi
