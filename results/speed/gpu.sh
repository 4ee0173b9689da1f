#!/usr/bin/env bash
# Speed and memory on one GPU, in two parts of at most ten minutes each.
#   bash results/speed/gpu.sh 1|2 [FOLDER] [DEVICE]
# Each measurement writes a JSON into FOLDER (results/speed). One that fails leaves its output in a
# .log beside the others. Not yet run on a GPU, but tried at small size:
#   DTYPE=float32 SMALL=1 bash results/speed/gpu.sh 1 /tmp/speed cpu        (then 2)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
part=${1:?1 or 2}; out=${2:-results/speed}; device=${3:-cuda}
python=$(command -v python || command -v python3)

small=qwen3-0.6b; large=qwen3-4b; sizes="qwen2.5-0.5b llama3.2-1b qwen2.5-3b qwen3-8b"
size="--prompts 16 --group-size 16 --prompt-tokens 200 --new-tokens 1024 --rounds 1"
step="--prompts 8 --group-size 8 --prompt-tokens 200 --new-tokens 512"
if [ -n "${SMALL:-}" ]; then
    small=tiny; large=tiny; sizes=tiny
    step="--prompts 2 --group-size 2 --prompt-tokens 8 --new-tokens 12"; size="$step --rounds 1"
fi
mkdir -p "$out"

bench() {       # bench NAME SECONDS ARGUMENTS...
    local name=$1-$device limit=$2 code=0; shift 2
    echo "+ python bench.py $*"
    timeout "$limit" "$python" bench.py "$@" --device "$device" --dtype "${DTYPE:-bfloat16}" \
        --json "$out/$name.json" > "$out/$name.log" 2>&1 || code=$?
    tail -n 3 "$out/$name.log"
    if [ $code = 0 ]; then
        rm "$out/$name.log"
    else
        echo "failed: exit $code (124: after $limit s)"
    fi
}

# drawing with a graph and without, beside transformers' static cache and continuous batching;
# then training and memory
if [ "$part" = 1 ]; then
    bench rollout-$small-continuous 90 rollout --shape $small $size --vs hf --hf continuous
    bench rollout-$small 170 rollout --shape $small $size --vs hf --hf static
    [ $small = $large ] || bench rollout-$large 330 rollout --shape $large $size --vs hf --hf static
else
    bench rollout-$small-no-graph 50 rollout --shape $small $size --no-graph
    if [ $small != $large ]; then
        bench rollout-$large-no-graph 80 rollout --shape $large $size --no-graph
        bench rollout-$large-continuous 110 rollout --shape $large $size --vs hf --hf continuous
        bench train-$large 110 train --shape $large $step --rounds 1 --checkpointing
    fi
    bench train-$small 60 train --shape $small $size --checkpointing

    # The peak memory of GRPO (8 x 8 completions of 512 tokens) is to stay under 25, 38 and 58 GB at
    # 0.5B, 1B and 3B. 8B needs 144 GB, more than an 80 GB card has, and 14B needs 254, more than
    # any (training_phase of bench.py memory --predict).
    for shape in $sizes; do
        bench memory-$shape 45 memory --shape $shape $step --no-files
    done
fi
