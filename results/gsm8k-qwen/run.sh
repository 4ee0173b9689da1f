#!/usr/bin/env bash
# GRPO on GSM8K from a pretrained model, then 400 test problems before and after.
# From the repository's root:
#     bash results/gsm8k-qwen/run.sh MODEL TRAIN.jsonl TEST.jsonl [FOLDER] [FLAGS...]
# Each part goes on where it was stopped, by the same command. PARTS="train after" does those alone.
# NAME=gtpo ... FOLDER --algo gtpo is another run, in FOLDER/gtpo.
# Training problems are those of one to three calculations, 64 % of all: the others are hardly ever
# solved at first, and a group without a right answer teaches nothing.
# log.jsonl, config.json and adapter/ here are of an earlier run: levels.py without the 3, --curriculum
# adaptive, 8 prompts a step, 16 steps; lr-3e-4.jsonl is the same at 3e-4. config.json has it all.
set -euo pipefail
model=$1 train=$2 test=$3 out=${4:-runs/gsm8k-qwen} name=${NAME:-grpo}
flags=("${@:5}")
python=$(command -v python || command -v python3)
mkdir -p "$out"

easier=$out/easier.jsonl
[ -e "$easier" ] || "$python" results/gsm8k-qwen/levels.py "$train" "$easier" 3

train() {
    local again=()
    [ -e "$out/$name/model" ] && return
    if [ -e "$out/$name/config.json" ]; then again=(--resume); fi
    "$python" train.py --model "$model" --data "$easier" --eval-data "$test" \
        --prompts-per-step 16 --group-size 8 --max-new-tokens 320 --temperature 0.7 \
        --lora-rank 4 --lr 1e-4 --warmup-steps 2 --steps 24 --micro-batch-tokens 2048 \
        --eval-every 1000 --eval-problems 1 --eval-samples 1 --save-every 1 --keep-checkpoints 24 \
        --out "$out/$name" "${again[@]}" "${flags[@]}"
}
measure() {     # measure FILE MODEL
    [ -e "$1" ] || "$python" evaluate.py --model "$2" --data "$test" --limit 400 --samples 4 \
        --temperature 0.7 --max-new-tokens 640 --also-at 320 --rows-at-once 256 --json "$1"
}
for part in ${PARTS:-train after before}; do
    case $part in
        train) train ;;
        after) measure "$out/$name-after.json" "$out/$name/model" ;;
        before) measure "$out/before.json" "$model" ;;
    esac
done
