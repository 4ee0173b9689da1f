#!/usr/bin/env bash
# Self-training beside GRPO, and a ladder of distillation, on the yardstick (docs/tasks.md).
# From the repository's root:  SEEDS="0 1 2" JOBS=2 bash results/companions/run.sh [FOLDER]
# What is finished is not run again. QUICK=1 runs a few steps of everything.
#
# Self-training: 12,288 completions for each way, from the same weak start.
#     grpo          96 steps of 16 x 8 (grpo-1 and grpo-2: the first 32 and 64 of them)
#     rejection     three rounds: draw 512 x 8, keep the right ones, SFT of the start on all so far
#     dpo-st        three rounds: DPO 16 steps of 16 x 8, draw 256 x 8, SFT of the start, as above
# Distillation: a wider teacher, trained by SFT and GRPO; 6,400 sequences for the student.
#     response      SFT on the teacher's right answers
#     logits        the teacher's distribution on them (forward KL)
#     relations     the same, and its attention relations
#     on-policy     its distribution on the student's own completions (reverse KL), 50 steps of 16 x 8
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../jobs.sh"
out=$(realpath -m "${1:-runs/companions}"); python=$(command -v python || command -v python3)
quick=${QUICK:+1}
mkdir -p "$out"

few() { if [ "$quick" ]; then echo "$2"; else echo "$1"; fi; }      # few FULL QUICK
task=arithmetic:2-6
drawing=(--data "$task" --max-new-tokens 128 --threads 1)
training=("${drawing[@]}" --prompts-per-step 16 --problems "$(few 8000 200)" --eval-every 1000000
    --eval-problems 20 --eval-samples 1)
tuning=(--problems "$(few 20000 400)" --threads 1)

once() {    # once FOLDER COMMAND...: unless the folder is there; it appears when it is whole
    [ -e "$1" ] && return
    rm -rf "$1.part"
    "$python" "${@:2}" --out "$1.part" >> "$1.txt" 2>&1
    mv "$1.part" "$1"
}
measure() {     # measure NAME MODEL
    [ -e "$out/$1.json" ] || "$python" evaluate.py --model "$2" "${drawing[@]}" --samples 2 \
        --limit "$(few 500 40)" --json "$out/$1.json" >> "$out/measure.txt" 2>&1
}
corpus() {      # corpus FILE MODEL PROBLEMS SAMPLES SEED
    [ -e "$1" ] || "$python" rejection.py --model "$2" "${drawing[@]}" --problems "$3" \
        --samples "$4" --seed "$5" --out "$1" >> "$out/corpus.txt" 2>&1
}

start() {
    once "$out/weak" sft.py --data "$task" --steps "$(few 330 60)" --terse-steps 50 --lr 4e-3 \
        --muon-lr 0.02 "${tuning[@]}"
    once "$out/teacher-sft" sft.py --data "$task" --steps "$(few 480 60)" --hidden-size 160 \
        --lr 4e-3 --muon-lr 0.02 "${tuning[@]}"
    once "$out/teacher" train.py --model "$out/teacher-sft" "${training[@]}" --steps "$(few 50 2)"
    corpus "$out/teacher.jsonl" "$out/teacher/model" "$(few 3200 60)" 2 0
    measure start "$out/weak"
    measure teacher "$out/teacher/model"
}

rounds() {      # rounds NAME SEED PROBLEMS STEPS_OF_DPO
    local now=$out/weak corpora="" round
    for round in 1 2 3; do
        local here=$out/$1-$round-s$2
        if [ "$4" -gt 0 ]; then
            once "$here-dpo" train.py --model "$now" "${training[@]}" --algo dpo --sft-weight 1 \
                --steps "$4" --seed "$((10 * $2 + round))"
            now=$here-dpo/model
        fi
        corpus "$here.jsonl" "$now" "$3" 8 "$((10 * $2 + round))"
        corpora=${corpora:+$corpora,}$here.jsonl
        once "$here" sft.py --model "$out/weak" --data "$corpora" --steps "$(few 300 5)" \
            --lr 1e-3 --seed "$2" --hold-out 0 "${tuning[@]}"
        now=$here
        measure "$1-$round-s$2" "$now"
    done
}

of_seed() {     # of_seed SEED
    local s=$1 sft=(--model "$out/weak" --data "$out/teacher.jsonl" --steps "$(few 400 5)"
                    --lr 1e-3 --seed "$1" --hold-out 0 "${tuning[@]}")
    for third in 1 2; do
        once "$out/grpo-$third-s$s" train.py --model "$out/weak" "${training[@]}" \
            --steps "$(few "$((32 * third))" 1)" --seed "$s"
        measure "grpo-$third-s$s" "$out/grpo-$third-s$s/model"
    done
    once "$out/grpo-s$s" train.py --model "$out/weak" "${training[@]}" --steps "$(few 96 2)" --seed "$s"
    measure "grpo-s$s" "$out/grpo-s$s/model"
    rounds rejection "$s" "$(few 512 60)" 0
    rounds dpo-st "$s" "$(few 256 60)" "$(few 16 1)"

    once "$out/response-s$s" sft.py "${sft[@]}"
    once "$out/logits-s$s" sft.py "${sft[@]}" --teacher "$out/teacher/model"
    once "$out/relations-s$s" sft.py "${sft[@]}" --teacher "$out/teacher/model" --relations 1
    once "$out/on-policy-s$s" train.py --model "$out/weak" "${training[@]}" --algo distill \
        --teacher "$out/teacher/model" --steps "$(few 50 1)" --seed "$s"
    for name in response logits relations; do
        measure "$name-s$s" "$out/$name-s$s"
    done
    measure "on-policy-s$s" "$out/on-policy-s$s/model"
}

start
for seed in ${SEEDS:-0 1 2}; do
    beside of_seed "$seed"
done
wait_below 1
"$python" results/companions/table.py "$out"
