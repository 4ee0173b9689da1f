#!/usr/bin/env bash
# The runs behind results/objectives, three seeds each, and then the tables and plots.
# From the repository's root: bash results/objectives/run.sh
# They take some two hours, two at a time on two cores; what is finished is not run again.
# Names: lr2 is --lr 2e-4, lr8 is --lr 8e-4, otherwise it is 1e-4; reuseK is --replay-ratio K;
# staleV is --sync-every V.
set -euo pipefail
jobs=$(mktemp)
add() { for seed in 0 1 2; do echo "$1 $seed ${*:2}" >> "$jobs"; done; }

# the default task, 60 steps
add default-gtpo      --algo gtpo --steps 60 --eval-every 5
add default-offpolicy --algo offpolicy --steps 60 --eval-every 5
add default-grpo      --algo grpo --steps 60 --eval-every 5
# samples: reuse, stale weights, and what GRPO does by other means (learning rate, half the prompts,
# several epochs)
add grpo-lr2     --algo grpo --lr 2e-4 --steps 30 --eval-every 2
add grpo-n16-lr2 --algo grpo --lr 2e-4 --prompts-per-step 16 --steps 50 --eval-every 4
add grpo-e4      --algo grpo --epochs 4 --steps 20 --eval-every 2
add reuse2-lr2   --algo offpolicy --replay-ratio 2 --lr 2e-4 --steps 30 --eval-every 2
add reuse4       --algo offpolicy --replay-ratio 4 --steps 20 --eval-every 2
add reuse8       --algo offpolicy --replay-ratio 8 --steps 12 --eval-every 2
add adaptive8    --algo offpolicy --replay-ratio 8 --adaptive-replay --kl-limit 0.02 --steps 12 \
                 --eval-every 2
add stale2-lr2   --algo offpolicy --replay-ratio 1 --sync-every 2 --lr 2e-4 --steps 30 \
                 --eval-every 2
add stale10-lr2  --algo offpolicy --replay-ratio 1 --sync-every 10 --lr 2e-4 --steps 30 \
                 --eval-every 2
# stability: a high learning rate, longer runs, many updates a rollout
add lr8-grpo     --algo grpo --lr 8e-4 --steps 60 --eval-every 5
add lr8-gtpo     --algo gtpo --lr 8e-4 --steps 60 --eval-every 5
add epochs8-grpo --algo grpo --epochs 8 --lr 2e-4 --steps 20 --eval-every 2
add epochs8-gtpo --algo gtpo --epochs 8 --lr 2e-4 --steps 20 --eval-every 2
add long-grpo    --algo grpo --lr 4e-4 --steps 100 --eval-every 10
add long-gtpo    --algo gtpo --lr 4e-4 --steps 100 --eval-every 10

# one warm start a seed serves all runs
for seed in 0 1 2; do
    [ -e runs/warm-s$seed/model ] ||
        python train.py --seed $seed --threads 1 --steps 1 --out runs/warm-s$seed
done

one() {                     # NAME SEED FLAGS...
    [ -e "runs/$1-s$2/model" ] ||
        python train.py --model "runs/warm-s$2/warm_start" --seed "$2" --threads 1 --lr 1e-4 \
            --out "runs/$1-s$2" "${@:3}"
    cp "runs/$1-s$2/log.jsonl" "results/objectives/$1-s$2.jsonl"
}
export -f one
xargs -P 2 -L 1 bash -c 'one "$@"' one < "$jobs"
bash results/objectives/tables.sh > results/objectives/tables.md
