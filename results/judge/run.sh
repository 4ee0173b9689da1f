#!/usr/bin/env bash
# How far can a small model, or a program, tell right answers from wrong ones?
# From the repository's root:  bash results/judge/run.sh MODEL TEST.jsonl [FOLDER] [FLAGS...]
# MODEL answers the first problems of the file and judges its own answers, by one principle a time:
# the same answers, because the seed is the same. What is finished is not run again.
set -euo pipefail
model=$1 test=$2 out=${3:-runs/judge}
flags=("${@:4}")
python=$(command -v python || command -v python3)
mkdir -p "$out"

one() {     # one NAME PRINCIPLE
    echo "$2" > "$out/$1.txt"
    [ -e "$out/$1.json" ] || "$python" judge.py --judge "$model" --principles "$out/$1.txt" \
        --model "$model" --data "$test" --limit 100 --max-new-tokens 512 --temperature 0.7 \
        --json "$out/$1.json" "${flags[@]}" > /dev/null
}
one right       "The answer is right."
one steps       "Each step follows from the steps before it."
one equations   "check: equations"
one consistent  "check: consistent"
one last-result "check: last-result"
