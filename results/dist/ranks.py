r"""train.py on 20 ranks of this machine against one process: the same losses and gradient norms.

    python results/dist/ranks.py --json results/dist/ranks-cpu.json
    python results/dist/ranks.py --json results/dist/ranks-npu.json --device npu --algos grpo \
        --with tests/npu_standin/with_npu

Each run makes 5 steps of a tiny model with 16 prompts (fewer than ranks) of 4 completions. It is
started as one torchrun, and as three that stand for nodes of 8, 8 and 4 devices. A shard size S
means a mesh of (20 / S, S).
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent.parent        # the repository
sys.path.insert(0, str(HERE))
OPTIONS = (
    "--steps 5 --prompts-per-step 16 --group-size 4 --max-new-tokens 8 "
    "--eval-every 5 --eval-problems 8 --eval-samples 2 --save-every 5 "
    "--lr 1e-3 --threads 1 --dtype float32 --watchdog 0"
).split()


def make_start(folder):
    """Writes a tiny model that has learned to guess among three answers, and its problems."""
    import sft
    rows = [{"problem": f"Which one, {i}?", "answer": str(i % 3), "solution": f"#### {i % 3}"}
            for i in range(200)]
    problems = folder / "problems.jsonl"
    problems.write_text("\n".join(map(json.dumps, rows)))

    config = sft.SFTConfig(device="cpu", data=str(problems), out=str(folder / "model"), steps=60,
                           hidden_size=32, layers=2, heads=2, vocab_size=280, lr=8e-3)
    sft.warm_start(config, progress=False)


def run(args, folder, algo, nodes, shard):
    """Returns the log of a run, one dict a step, and its seconds.

    nodes are the ranks of each torchrun; none means one process on the CPU, without torchrun. Ends
    the program if the run does not end well."""
    out = folder / f"{algo}-{'+'.join(map(str, nodes)) or 'one'}-{shard}"
    command = [
        str(HERE / "train.py"),
        "--algo", algo,
        "--model", str(folder / "model"),
        "--data", str(folder / "problems.jsonl"),
        "--out", str(out),
        "--device", args.device if nodes else "cpu",
        *OPTIONS,
    ]
    if nodes:
        command += ["--shard", str(shard)]
    launchers = [launcher(args, nodes, node) for node in range(len(nodes))]

    begin = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NPU_STANDIN_DEVICES": "20"}
    with open(f"{out}.err", "w") as errors:
        processes = [subprocess.Popen([*start, *command], cwd=HERE, stdout=errors, stderr=errors,
                                      env=environment)
                     for start in launchers or [[sys.executable]]]
        codes = [process.wait() for process in processes]

    if any(codes):
        end = "\n".join(open(f"{out}.err").read().splitlines()[-20:])
        sys.exit(f"error: {out.name} ended with {codes}:\n{end}")
    return [json.loads(line) for line in open(out / "log.jsonl")], time.time() - begin


def launcher(args, nodes, node):
    """Returns the torchrun of one of the nodes, all of which are this machine."""
    return [
        *args.prefix, sys.executable, "-m", "torch.distributed.run",
        "--nproc-per-node", str(nodes[node]),
        "--nnodes", str(len(nodes)),
        "--node-rank", str(node),
        "--master-addr", "127.0.0.1",
        "--master-port", str(args.port),
    ]


def deviation(one, many):
    """Returns {key of the log: the largest difference over all steps} between two runs.

    A difference is relative to the value, or to 0.01 where the value is less. Times are left out,
    and so is the deviation of the ratio from 1, which is a rounding error itself."""
    left_out = ("time", "per_s", "memory", "ratio_max_dev", "ratio_mean_dev")
    largest = {}
    for line, other in zip(one, many, strict=True):
        keys = [key for key in line if not any(word in key for word in left_out)]
        for key in keys:
            difference = abs(line[key] - other[key]) / max(1e-2, abs(line[key]))
            largest[key] = max(largest.get(key, 0.0), difference)
    return largest


def compared(args, folder, algo, one, nodes, shard):
    """Returns how far a run on many ranks is from the log of the run in one process."""
    counts = [int(count) for count in nodes.split("+")]
    many, seconds = run(args, folder, algo, counts, shard)
    far = deviation(one, many)

    return {
        "algo": algo,
        "nodes": nodes,
        "mesh": [sum(counts) // shard, shard],
        "steps": many[-1]["step"],
        "loss": far["loss"],
        "grad_norm": far["grad_norm"],
        "largest": max(far.values()),
        "of": max(far, key=far.get),
        "seconds": round(seconds),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", default=["grpo", "gtpo", "offpolicy"])
    parser.add_argument("--shards", nargs="+", type=int, default=[20, 4, 5])
    parser.add_argument("--nodes", nargs="+", default=["20", "8+8+4"], help="ranks of each node")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--with", dest="prefix", nargs="*", default=[],
                        help="a command to run torchrun with")
    parser.add_argument("--port", type=int, default=29555)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_start(folder)
        for algo in args.algos:
            one, _ = run(args, folder, algo, [], 0)
            for nodes in args.nodes:
                for shard in args.shards:
                    rows.append(compared(args, folder, algo, one, nodes, shard))
                    print(json.dumps(rows[-1]), flush=True)

    result = {
        "command": "python " + " ".join(sys.argv),
        "options": " ".join(OPTIONS),
        "runs": rows,
        "largest": max(row["largest"] for row in rows),
    }
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
