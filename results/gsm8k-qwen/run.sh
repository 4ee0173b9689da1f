#!/usr/bin/env bash
# A pretrained model on GSM8K: a short SFT on its solutions, which makes answers two fifths as long
# and so a step two fifths as dear, then GRPO; 400 test problems before and after.
# From the repository's root:
#     bash results/gsm8k-qwen/run.sh MODEL TRAIN.jsonl TEST.jsonl [FOLDER] [FLAGS...]
# Each part goes on where it was stopped, by the same command. PARTS="train after" does those alone,
# STEPS=8 makes as many, THREADS=1 uses as many.
# NAME=gtpo ... FOLDER --algo gtpo is another run from the same start, in FOLDER/gtpo.
# GRPO's problems are those of one to three calculations, 64 % of all: the others are hardly ever
# solved at first, and a group without a right answer teaches nothing.
# cool.jsonl is that with NAME=cool ... FOLDER --temperature 0.6. It was begun with STEPS=40, resumed
# with 32, 28 and 24, and evaluated with one sample a problem, not 4.
# log.jsonl and constant-lr.jsonl are of runs with --eval-every 1000 --eval-problems 1; their eval_*,
# of one problem, are left out, and out of the second a line of the run that it was begun after.
set -euo pipefail
model=$1 train=$2 test=$3 out=${4:-runs/gsm8k-qwen} name=${NAME:-grpo}
flags=("${@:5}")
python=$(command -v python || command -v python3)
threads=(--threads "${THREADS:-2}")
mkdir -p "$out"

easier=$out/easier.jsonl
[ -e "$easier" ] || "$python" results/gsm8k-qwen/levels.py "$train" "$easier" 3

start() {
    # sft.py leaves checkpoints/ there until the model is whole
    if [ -e "$out/start/config.json" ] && [ ! -e "$out/start/checkpoints" ]; then return; fi
    "$python" sft.py --model "$model" --data "$train" \
        --lora-rank 16 --lr 2e-4 --steps 48 --batch-size 16 --micro-batch-tokens 2048 \
        "${threads[@]}" --out "$out/start"
}
train() {
    local again=()
    [ -e "$out/$name/model" ] && return
    if [ -e "$out/$name/config.json" ]; then again=(--resume); fi
    "$python" train.py --model "$out/start" --data "$easier" --eval-data "$test" \
        --prompts-per-step 16 --group-size 8 --max-new-tokens 256 --lora-rank 16 --lr 2e-4 \
        --lr-end 0 --warmup-steps 2 --steps "${STEPS:-40}" --micro-batch-tokens 2048 \
        --eval-every 0 --save-every 1 --keep-checkpoints 3 \
        "${threads[@]}" --out "$out/$name" ${again[@]+"${again[@]}"} ${flags[@]+"${flags[@]}"}
}
measure() {     # measure FILE MODEL SAMPLES
    [ -e "$1" ] || "$python" evaluate.py --model "$2" --data "$test" --limit 400 --samples "$3" \
        --max-new-tokens 640 --also-at 256 --rows-at-once 256 "${threads[@]}" --json "$1"
}
for part in ${PARTS:-start train after before base}; do
    case $part in
        start) start ;;
        train) train ;;
        after) measure "$out/$name-after.json" "$out/$name/model" 4 ;;
        before) measure "$out/before.json" "$out/start" 4 ;;
        base) measure "$out/base.json" "$model" 1 ;;          # its answers are 2.5 times as long
    esac
done
