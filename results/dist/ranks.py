"""train.py on 20 ranks of this machine against one process: the same losses and gradient norms, on every mesh.

    python results/dist/ranks.py --json results/dist/ranks-cpu.json
    python results/dist/ranks.py --json results/dist/ranks-npu.json --device npu --algos grpo --with tests/npu_standin/with_npu

Each run makes 5 steps of a tiny model with 16 prompts (fewer than ranks) of 4 completions: as one torchrun, and as three that
stand for nodes of 8, 8 and 4 devices. A shard size S means a mesh of (20 / S, S).
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(HERE))
OPTIONS = ("--steps 5 --prompts-per-step 16 --group-size 4 --max-new-tokens 8 --eval-every 5 --eval-problems 8 --eval-samples 2 "
           "--save-every 5 --lr 1e-3 --threads 1 --dtype float32 --watchdog 0").split()


def make_start(folder):
    """A tiny model that has learned to guess among three answers, and its problems."""
    import sft
    rows = [{"problem": f"Which one, {i}?", "answer": str(i % 3), "solution": f"#### {i % 3}"} for i in range(200)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sft.warm_start(sft.SFTConfig(device="cpu", data=str(folder / "problems.jsonl"), out=str(folder / "model"), steps=60,
                                 hidden_size=32, layers=2, heads=2, vocab_size=280, lr=8e-3), progress=False)


def run(args, folder, algo, nodes, shard):
    """The log of a run on sum(nodes) ranks (no nodes: one process on the CPU, without torchrun) and its seconds."""
    out = folder / f"{algo}-{'+'.join(map(str, nodes)) or 'one'}-{shard}"
    command = [str(HERE / "train.py"), "--algo", algo, "--model", str(folder / "model"), "--data", str(folder / "problems.jsonl"),
               "--out", str(out), "--device", args.device if nodes else "cpu", *OPTIONS, *(["--shard", str(shard)] if nodes else [])]
    launchers = [[sys.executable]]
    if nodes:
        launchers = [[*args.prefix, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--nnodes",
                      str(len(nodes)), "--node-rank", str(i), "--master-addr", "127.0.0.1", "--master-port", str(args.port)]
                     for i, n in enumerate(nodes)]
    begin, env = time.time(), {**os.environ, "OMP_NUM_THREADS": "1", "NPU_STANDIN_DEVICES": "20"}
    with open(f"{out}.err", "w") as errors:
        processes = [subprocess.Popen([*launcher, *command], cwd=HERE, stdout=errors, stderr=errors, env=env) for launcher in launchers]
        codes = [p.wait() for p in processes]
    if any(codes):
        sys.exit(f"error: {out.name} ended with {codes}:\n" + "\n".join(open(f"{out}.err").read().splitlines()[-20:]))
    return [json.loads(line) for line in open(out / "log.jsonl")], time.time() - begin


def deviation(one, many):
    """{key: the largest difference, relative to the value or 0.01, over all steps}; without times, and without the deviation
    of the ratio from 1, a rounding error itself."""
    out = {}
    for a, b in zip(one, many, strict=True):
        for key in a:
            if not any(word in key for word in ("time", "per_s", "memory", "ratio_max_dev")):
                out[key] = max(out.get(key, 0.0), abs(a[key] - b[key]) / max(1e-2, abs(a[key])))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", default=["grpo", "gtpo", "offpolicy"])
    parser.add_argument("--shards", nargs="+", type=int, default=[20, 4, 5])
    parser.add_argument("--nodes", nargs="+", default=["20", "8+8+4"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--with", dest="prefix", nargs="*", default=[], help="a command to run torchrun with")
    parser.add_argument("--port", type=int, default=29555)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    result = {"command": "python " + " ".join(sys.argv), "options": " ".join(OPTIONS), "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_start(folder)
        for algo in args.algos:
            one, _ = run(args, folder, algo, [], 0)
            for nodes in args.nodes:
                for shard in args.shards:
                    counts = [int(n) for n in nodes.split("+")]
                    many, seconds = run(args, folder, algo, counts, shard)
                    far = deviation(one, many)
                    row = {"algo": algo, "nodes": nodes, "mesh": [sum(counts) // shard, shard], "steps": many[-1]["step"],
                           "loss": far["loss"], "grad_norm": far["grad_norm"], "largest": max(far.values()),
                           "of": max(far, key=far.get), "seconds": round(seconds)}
                    print(json.dumps(row), flush=True)
                    result["runs"].append(row)
    result["largest"] = max(row["largest"] for row in result["runs"])
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
