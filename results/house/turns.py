"""Two checkouts in turns: is sampling or training slower in one of them?

    python results/house/turns.py --old /tmp/old --rounds 4 --json results/house/turns.json

Each round runs bench.py of the old checkout and of this one, one process after the other, the first
of them in turns. The ratio of a round is new over old: tokens/s of sampling, updates/s of training.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
CASES = {
    "rollout, tiny": "rollout --shape tiny --prompts 32 --group-size 8 --rounds 3",
    "rollout, 40m": "rollout --shape 40m --prompts 8 --group-size 8 --new-tokens 32 --rounds 1",
    "train, tiny": "train --shape tiny --prompts 16 --group-size 8 --rounds 3",
    "train, 40m": "train --shape 40m --prompts 4 --group-size 4 --new-tokens 32 --rounds 1",
}


def rate(checkout, options):
    """The best rate of the rounds of one process: of tokens or of updates."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "bench.py", *options.split(), "--threads", "2", "--json", str(file)]
        subprocess.run(command, cwd=checkout, check=True, capture_output=True)
        result = json.loads(file.read_text())
    if "tokens_per_s" in result:
        return max(result["tokens_per_s"]["ours"]["rounds"])
    return 1 / min(result["seconds"]["shared"]["rounds"])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the old commit")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    result = {}
    for case, options in CASES.items():
        ratios = []
        for i in range(args.rounds):
            order = [args.old, HERE] if i % 2 == 0 else [HERE, args.old]
            rates = {checkout: rate(checkout, options) for checkout in order}
            ratios.append(rates[HERE] / rates[args.old])

        mean = statistics.mean(ratios)
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        result[case] = {"options": options, "ratios": ratios, "mean": mean, "standard_error": error}
        print(f"{case}: {mean:.3f} +- {error:.3f}", flush=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
