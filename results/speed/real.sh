#!/usr/bin/env bash
# A real checkpoint and real prompts, beside transformers, vLLM, llama.cpp and TRL, on two threads.
#   VLLM=PYTHON LLAMACPP=PYTHON TRL=FOLDER bash results/speed/real.sh MODEL DATA.jsonl [FOLDER]
# VLLM and LLAMACPP: the Pythons that have them (measure/vllm.py and measure/llamacpp.py say how to
# get them). TRL: a folder named site-packages with trl, peft, datasets and what they need. Each
# line writes NAME.json into FOLDER (results/speed/real), and fails where it is there already. One
# that fails leaves its output in NAME.log. ONLY=rollout-* makes those alone. All of it takes an hour
# and a half, with TOKENS=128 ROUNDS=3 a fifth of that; SMALL=1 tries it at the smallest size.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
model=${1:?a checkpoint folder}; data=${2:?a jsonl file}; out=${3:-results/speed/real}
python=$(command -v python || command -v python3)
real="--model $model --data $data --threads ${THREADS:-2}"
tokens=${TOKENS:-256} rounds=${ROUNDS:-6}
draw="--prompts 8 --group-size 8 --new-tokens $tokens --rounds $rounds"
few="--prompts 1 --group-size 8 --new-tokens $tokens --rounds $rounds"
step="--prompts 4 --group-size 8 --new-tokens 128 --rounds $rounds"
if [ -n "${SMALL:-}" ]; then
    draw="--prompts 2 --group-size 2 --new-tokens 8 --rounds 1"; few=$draw; step=$draw
fi
vllm="--vs vllm ${VLLM:+--vllm-python $VLLM}"
llama="--vs llamacpp ${LLAMACPP:+--llamacpp-python $LLAMACPP}"
mkdir -p "$out"

bench() {       # bench NAME ARGUMENTS...
    local name=$1; shift
    [ -z "${ONLY:-}" ] || [[ $name == $ONLY ]] || return 0
    echo "+ python bench.py $*"
    "$python" bench.py "$@" --json "$out/$name.json" > "$out/$name.log" 2>&1 \
        && rm "$out/$name.log" || tail -n 3 "$out/$name.log"
}

bench rollout-hf                rollout $real $draw --vs hf
bench rollout-vllm              rollout $real $draw $vllm
bench rollout-vllm-equal        rollout $real $draw $vllm --lengths equal
bench rollout-vllm-few          rollout $real $few $vllm
bench rollout-llamacpp          rollout $real $draw $llama
bench rollout-llamacpp-equal    rollout $real $draw $llama --lengths equal
bench rollout-llamacpp-few      rollout $real $few $llama
bench rollout-llamacpp-half     rollout $real $draw $llama --gguf-dtype float16
bench rollout-llamacpp-unified  rollout $real $draw $llama --llamacpp-cache unified
bench rollout-llamacpp-no-flash rollout $real $draw $llama --no-flash
bench train                     train $real $step
bench train-lora                train $real $step --lora-rank 16
export PYTHONPATH=${TRL:-}
bench train-trl                 train $real $step --vs trl
bench train-trl-lora            train $real $step --vs trl --lora-rank 16
