#!/usr/bin/env bash
# Does GTPO keep a shared beginning that GRPO unlearns? docs/THEORY.md (56 to 58) says where to look.
# From the repository's root: SEEDS="0 1 2 3 4" bash results/template/run.sh [FOLDER]
# Not run yet: there are no results beside it. What is finished is not run again. sequence is GRPO
# averaged by completion (DeepSeekMath's), token by token (DAPO's), both with A = r - mean as GTPO
# has it.
set -euo pipefail
out=${1:-runs/template}; python=$(command -v python || command -v python3)
mkdir -p "$out"
[ -e "$out/corpus.jsonl" ] || "$python" results/template/make.py "$out/corpus.jsonl"
[ -e "$out/start" ] || "$python" sft.py --data "$out/corpus.jsonl" --steps 700 --lr 4e-3 \
    --muon-lr 0.02 --out "$out/start" --threads "${THREADS:-1}"

run() {     # run NAME SEED FLAGS...
    local folder="$out/$1-s$2"
    [ -e "$folder/model" ] && return
    "$python" train.py --model "$out/start" --data arithmetic --levels 2-4 --seed "$2" \
        --max-new-tokens 128 --prompts-per-step 16 --steps 60 --lr 5e-4 --eval-every 10 \
        --eval-problems 100 --eval-samples 2 --threads "${THREADS:-1}" --out "$folder" "${@:3}"
}
for seed in ${SEEDS:-0 1 2 3 4}; do
    run sequence "$seed" --advantage-scale none --aggregation sequence
    run token    "$seed" --advantage-scale none --aggregation token
    run gtpo     "$seed" --algo gtpo
done
