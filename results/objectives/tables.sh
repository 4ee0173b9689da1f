#!/usr/bin/env bash
# Plots from the logs in this folder, and the tables on stdout:
#   bash results/objectives/tables.sh > results/objectives/tables.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
compare() { python ../../report.py "$@"; echo; }
of() { for name in "$@"; do ls "$name"-s[0-9].jsonl; done; }

echo "eval_pass@1: at the run's end, mean ± standard error over seeds; commands: run.sh"
echo
default=$(of default-{grpo,gtpo,offpolicy})
compare $default --reach 0.9 0.95 --y eval_pass@1 entropy completion_length --png default.png
samples=$(of default-grpo grpo-lr2 grpo-n16-lr2 grpo-e4 default-offpolicy reuse2-lr2 reuse4 \
    reuse8 adaptive8 stale2-lr2 stale10-lr2)
compare $samples --x num_samples --reach 0.9 0.95
compare $samples --x seconds --reach 0.9 0.95
drawn=$(of default-grpo grpo-lr2 default-offpolicy reuse2-lr2 reuse4 reuse8 stale10-lr2)
compare $drawn --x num_samples --x-max 7680 --y eval_pass@1 ess kl_pi_mu --log kl_pi_mu \
    --png samples.png > /dev/null
compare $drawn --x seconds --x-max 120 --png seconds.png > /dev/null
for name in lr8 epochs8 long; do
    runs=$(of $name-{grpo,gtpo})
    compare $runs --y eval_pass@1 entropy --png $name.png
done
