#!/usr/bin/env bash
# How far can a small model, or a program, tell right answers from wrong ones?
# From the repository's root:  bash results/judge/run.sh MODEL TEST.jsonl [FOLDER] [FLAGS...]
# MODEL answers the first 200 problems of the file once, and judges its own answers by each principle.
set -euo pipefail
model=$1 test=$2 out=${3:-runs/judge}
python=$(command -v python || command -v python3)
mkdir -p "$out"

cat > "$out/principles.txt" <<'PRINCIPLES'
The answer is right.
Each step follows from the steps before it.
check: equations
check: consistent
check: last-result
PRINCIPLES

[ -e "$out/results.json" ] || "$python" judge.py --judge "$model" --model "$model" --data "$test" \
    --principles "$out/principles.txt" --limit 200 --samples 1 --max-new-tokens 512 \
    --temperature 0.7 --json "$out/results.json" "${@:4}"
