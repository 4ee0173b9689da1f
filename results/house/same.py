"""Two checkouts side by side: does train.py log the same numbers, bit for bit?

    git worktree add /tmp/old 1cb287f
    python results/house/same.py --old /tmp/old --start runs/NAME/warm_start \
        --json results/house/same.json

Each case makes 5 steps from the same checkpoint in both: in one process, on two ranks, and stopped
after 3 steps and resumed. Compared is every key that the old log has, but for times and memory.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
TIMES = {"rollout_time", "rollout_tokens_per_s", "train_time", "step_time", "peak_memory_mb"}
OPTIONS = ("--steps 5 --eval-every 5 --eval-problems 20 --eval-samples 2 --save-every 3 "
           "--threads 1 --device cpu --prompts-per-step 8 --group-size 4").split()
WAYS = ("one", "two", "resumed")
CASES = {
    "grpo": "--algo grpo",
    "gtpo": "--algo gtpo",
    "offpolicy": "--algo offpolicy",
    "grpo, KL, epochs and minibatches":
        "--algo grpo --beta 0.05 --epochs 2 --minibatches 3 --kl-kind k3_is --clip-high 0.28",
    "grpo, other averages, variance":
        "--algo grpo --advantage-scale batch --aggregation sequence --variance-every 2 "
        "--zero-variance keep --format-reward 0.3 --consistency-reward 0.7",
    "grpo, sequence level, temperature":
        "--algo grpo --ratio-level sequence --dual-clip 3 --temperature 0.8 --mask-truncated "
        "--advantage-scale loo --micro-batch-tokens 300 --epochs 2",
    "grpo, bfloat16": "--algo grpo --dtype bfloat16 --activation-checkpointing",
    "gtpo, the official code": "--algo gtpo --gtpo-official --gtpo-gamma 0.1 --zero-variance keep",
    "gtpo, several updates": "--algo gtpo --epochs 2 --minibatches 2",
    "offpolicy, stale weights": "--algo offpolicy --replay-ratio 1 --sync-every 3",
    "offpolicy, everything adaptive":
        "--algo offpolicy --replay-ratio 4 --adaptive-replay --adaptive-clip --kl-limit 1e-3 "
        "--priority 0.6 --correction bypass --trust-region second_moment",
    "offpolicy, self-normalized":
        "--algo offpolicy --replay-ratio 3 --importance self_normalized --min-ess 0.5 --beta 0.02 "
        "--max-reuse 2 --buffer-groups 20 --sync-every 2",
    "offpolicy, token level":
        "--algo offpolicy --importance clipped --importance-level token --trust-region token "
        "--importance-normalize group --minibatches 2",
}


def run(checkout, out, *arguments, ranks=1):
    """Run train.py of a checkout."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(checkout / "train.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stderr[-3000:]}")


def log_of(out):
    """The lines of a run's log, without times and memory."""
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def logs(checkout, start, folder, options, ways):
    """{way of running: log} of one case."""
    arguments = ["--model", start, *OPTIONS, *options.split()]
    found = {}
    if "one" in ways:
        run(checkout, folder / "one", *arguments)
        found["one process"] = log_of(folder / "one")
    if "two" in ways:
        run(checkout, folder / "two", *arguments, ranks=2)
        found["two ranks"] = log_of(folder / "two")
    if "resumed" in ways:
        run(checkout, folder / "resumed", *arguments, "--steps", "3")
        run(checkout, folder / "resumed", "--resume", "--steps", "5")
        found["resumed"] = log_of(folder / "resumed")
    return found


def differences(old, new):
    """[(step, key, old value, new value)] where the new log has another number than the old."""
    found = []
    for a, b in zip(old, new, strict=True):
        for key, value in a.items():
            if b.get(key) != value:
                found.append((a["step"], key, value, b.get(key)))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the old commit")
    parser.add_argument("--start", required=True, help="the checkpoint that all runs start from")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--keep", type=Path, help="a folder for the old logs, to be read again")
    args = parser.parse_args()
    start = str(Path(args.start).resolve())

    def commit(checkout):
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout,
                              capture_output=True, text=True).stdout.strip()

    result = {"old": commit(args.old), "new": commit(HERE), "options": " ".join(OPTIONS),
              "cases": {}}
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            kept = args.keep and args.keep / f"{case}.json"
            if kept and kept.exists():
                old = json.loads(kept.read_text())
            else:
                old = logs(args.old.resolve(), start, Path(folder) / "old", CASES[case], args.ways)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(old))
            new = logs(HERE, start, Path(folder) / "new", CASES[case], args.ways)

        compared = {}
        for way in new:
            numbers = sum(map(len, old[way]))
            compared[way] = {"numbers": numbers, "different": differences(old[way], new[way])}
            print(f"{case}, {way}: {len(compared[way]['different'])} of {numbers} numbers differ",
                  *compared[way]["different"][:5], flush=True)
        result["cases"][case] = {"options": CASES[case], **compared}

    args.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(way["different"] for case in result["cases"].values()
                 for way in case.values() if isinstance(way, dict)))


if __name__ == "__main__":
    main()
