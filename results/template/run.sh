#!/usr/bin/env bash
# Does GTPO keep a shared beginning that GRPO unlearns? docs/THEORY.md (56 to 58) says where to look.
# From the repository's root:  SEEDS="0 1 2 3 4" JOBS=2 bash results/template/run.sh [FOLDER]
# What is finished is not run again; what was killed begins anew. sequence is GRPO averaged by
# completion (DeepSeekMath's), token by token (DAPO's), both with A = r - mean as GTPO has it.
# Each from three starts, after 700, 1200 and 2500 steps of SFT: the first hardly solves anything.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../jobs.sh"
out=${1:-runs/template}; python=$(command -v python || command -v python3)
mkdir -p "$out"
[ -e "$out/corpus.jsonl" ] || "$python" results/template/make.py "$out/corpus.jsonl"

start() {   # start STEPS
    [ -e "$out/start-$1/tokenizer.json" ] || "$python" sft.py --data "$out/corpus.jsonl" \
        --hold-out 0 --steps "$1" --lr 4e-3 --muon-lr 0.02 --out "$out/start-$1" \
        --threads "${THREADS:-1}" > "$out/sft-$1.txt" 2>&1
}
run() {     # run NAME START SEED FLAGS...
    local folder="$out/$1-$2-s$3"
    [ -e "$folder/model" ] && return
    rm -rf "$folder"
    "$python" train.py --model "$out/start-$2" --data arithmetic --levels 2-4 --seed "$3" \
        --max-new-tokens 128 --prompts-per-step 16 --steps "${STEPS:-60}" --lr 5e-4 \
        --eval-every 10 --eval-problems 200 --eval-samples 2 --threads "${THREADS:-1}" \
        --out "$folder" "${@:4}" > "$folder.txt" 2>&1
}
starts="700 1200 2500"
for steps in $starts; do
    beside start "$steps"
done
wait_below 1
for steps in $starts; do
    for seed in ${SEEDS:-0 1 2 3 4}; do
        beside run sequence "$steps" "$seed" --advantage-scale none --aggregation sequence
        beside run token    "$steps" "$seed" --advantage-scale none --aggregation token
        beside run gtpo     "$steps" "$seed" --algo gtpo
    done
done
wait_below 1
for steps in $starts; do
    "$python" report.py "$out"/*-"$steps"-s? --x num_samples --y eval_pass@1 reward \
        completion_length entropy --png "$out/start-$steps.png" > "$out/start-$steps.txt"
done
"$python" results/template/table.py "$out"
