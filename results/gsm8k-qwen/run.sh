#!/usr/bin/env bash
# GRPO on GSM8K from a pretrained model, then 400 test problems before and after.
# From the repository's root:  bash results/gsm8k-qwen/run.sh MODEL TRAIN.jsonl TEST.jsonl [FOLDER]
# Each part goes on where it was stopped, by the same command. PARTS="train after" runs those alone.
set -euo pipefail
model=$1 train=$2 test=$3 out=${4:-runs/gsm8k-qwen}
python=$(command -v python || command -v python3)
mkdir -p "$out"

levels=$out/levels.jsonl
[ -e "$levels" ] || "$python" results/gsm8k-qwen/levels.py "$train" "$levels"

train() {
    local again=()
    if [ -e "$out/grpo/config.json" ]; then again=(--resume); fi
    "$python" train.py --model "$model" --data "$levels" --eval-data "$test" --curriculum adaptive \
        --prompts-per-step 8 --group-size 8 --max-new-tokens 320 --temperature 0.7 \
        --lora-rank 4 --lr 3e-4 --warmup-steps 2 --steps "${STEPS:-16}" --micro-batch-tokens 2048 \
        --eval-every 1000 --eval-problems 1 --eval-samples 1 --save-every 1 --out "$out/grpo" "${again[@]}"
}
measure() {     # measure NAME MODEL
    "$python" evaluate.py --model "$2" --data "$test" --limit 400 --samples 4 --temperature 0.7 \
        --max-new-tokens 640 --also-at 320 --rows-at-once 256 --json "$out/$1.json"
}
for part in ${PARTS:-train after before}; do
    case $part in
        train) train ;;
        after) measure after "$out/grpo/model" ;;
        before) measure before "$model" ;;
    esac
done
