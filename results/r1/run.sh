#!/usr/bin/env bash
# The R1 pipeline, whole and with each stage left out once, at as many rollouts of GRPO.
# From the repository's root:  SEEDS="0 1 2" JOBS=2 bash results/r1/run.sh [FOLDER] [FLAGS...]
# What is finished is not run again; what was killed goes on. (Without right-answers there is no
# sft-of-base either, so that is one run.)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../jobs.sh"
out=${1:-runs/r1}; python=$(command -v python || command -v python3)
mkdir -p "$out"
shift || true

one() {     # one STAGE SEED FLAGS...: STAGE is left out, "nothing" none
    local folder="$out/without-$1-s$2" more=()
    [ "$1" = nothing ] || more=(--without "$1")
    [ -e "$folder/table.md" ] && return
    [ -e "$folder/pipeline.json" ] && more+=(--resume)
    "$python" pipeline.py r1 --out "$folder" --seed "$2" --threads 1 "${more[@]}" "${@:3}" \
        >> "$folder.txt" 2>&1
}
for seed in ${SEEDS:-0 1 2}; do
    for stage in nothing cold-start grpo sft-of-base grpo-2; do
        beside one "$stage" "$seed" "$@"
    done
done
wait_below 1
"$python" results/r1/table.py "$out"
