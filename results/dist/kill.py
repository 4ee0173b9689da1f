"""kill -9 of a random rank at random moments, again and again: the run ends with the weights of an undisturbed one.

    python results/dist/kill.py --kills 20 --json results/dist/kill.json
    python results/dist/kill.py --kills 6 --agents 2 --json results/dist/kill-2-agents.json      two torchruns, as on two nodes

torchrun restarts the ranks (--max-restarts) and train.py goes on from its newest checkpoint by itself. Every second kill waits
until a checkpoint is being written. Compared are all tensors of the last checkpoint, bit for bit, the replay buffer, and the log.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from ranks import HERE, make_start


def command(args, folder, out):
    together = ["--standalone"] if args.agents == 1 else ["--nnodes", str(args.agents), "--rdzv-backend", "c10d", "--rdzv-endpoint",
                                                          "127.0.0.1:29577", "--rdzv-id", out.name]
    return [sys.executable, "-m", "torch.distributed.run", *together, "--nproc-per-node", str(args.ranks), "--max-restarts", "1000",
            "--monitor-interval", "0.1", str(HERE / "train.py"), "--algo", "offpolicy", "--model", str(folder / "model"), "--data",
            str(folder / "problems.jsonl"), "--out", str(out), "--steps", str(args.steps), *(
                "--prompts-per-step 5 --group-size 4 --max-new-tokens 8 --eval-every 1000 --eval-problems 4 --eval-samples 1 "
                "--save-every 2 --lr 1e-3 --device cpu --threads 1 --watchdog 0").split()]


class Run:
    """The torchruns of one run, as one process."""

    def __init__(self, args, command, errors):
        self.agents = [subprocess.Popen(command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=errors, stderr=errors)
                       for _ in range(args.agents)]

    def poll(self):
        codes = [agent.poll() for agent in self.agents]
        return None if None in codes else max(codes)

    def wait(self):
        return max(agent.wait() for agent in self.agents)


def ranks_of(run):
    """Process ids of the ranks that torchrun has started."""
    parents = ",".join(str(agent.pid) for agent in run.agents)
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", parents], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in children.splitlines() if "train.py" in line]


def kill_one(run, out, rng, while_saving, number):
    """Kill a random rank once the run has moved on since the last kill, or while it writes; what it was doing. None: too late."""
    begin, log = time.time(), out / "log.jsonl"
    lines, ranks = len(open(log).readlines()) if log.exists() else 0, []
    while run.poll() is None and time.time() - begin < 120:
        if log.exists() and len(open(log).readlines()) > lines:         # it computes
            break
        time.sleep(0.02)
    time.sleep(0 if while_saving else rng.random())
    ranks = ranks_of(run)
    victim = rng.choice(ranks) if ranks else None
    while while_saving and run.poll() is None and time.time() - begin < 120 and not list((out / "checkpoints").glob(".part-*")):
        time.sleep(0.0002)
    time.sleep(rng.random() * 0.01)
    saving = [p.name for p in (out / "checkpoints").glob(".part-*")]
    if victim is None or run.poll() is not None or not os.path.exists(f"/proc/{victim}"):
        return None
    os.kill(victim, signal.SIGKILL)
    newest = max((p.name for p in (out / "checkpoints").glob("step-*")), default=None)
    return {"kill": number, "rank": ranks.index(victim), "while_writing": saving, "newest": newest}


def stored(out):
    """All tensors of the newest checkpoint, and the rest."""
    path = max((out / "checkpoints").glob("step-*"))
    reader = dcp.FileSystemReader(path)
    tensors = {k: torch.empty(x.size, dtype=x.properties.dtype) for k, x in reader.read_metadata().state_dict_metadata.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return path.name, tensors, torch.load(path / "extra.pt", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def lines_of(out):
    timed = ("time", "per_s", "memory")
    return [{k: v for k, v in json.loads(x).items() if not any(w in k for w in timed)} for x in open(out / "log.jsonl")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2, help="of each torchrun")
    parser.add_argument("--agents", type=int, default=1, help="torchruns")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", required=True)
    args, kills = parser.parse_args(), []
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_start(folder)
        calm, wild = folder / "calm", folder / "wild"
        with open(args.json + ".err", "w") as errors:
            if Run(args, command(args, folder, calm), errors).wait():
                sys.exit("error: the undisturbed run did not end well")
            run = Run(args, command(args, folder, wild), errors)
            while len(kills) < args.kills and run.poll() is None:
                done = kill_one(run, wild, rng, len(kills) % 2 == 1, len(kills) + 1)
                if done:
                    kills.append(done)
                    print(json.dumps(done), flush=True)
            code = run.wait()
        if code:
            sys.exit("error: the run did not end well:\n" + "\n".join(open(args.json + ".err").read().splitlines()[-30:]))
        ends = stored(calm), stored(wild)
        result = {"command": "python " + " ".join(sys.argv), "kills": len(kills), "while_writing": sum(bool(k["while_writing"]) for k in kills),
                  "checkpoint": ends[0][0], "tensors": len(ends[0][1]), "bit_identical": same(ends[0][1], ends[1][1]),
                  "buffer_identical": same(ends[0][2], ends[1][2]), "log_identical": lines_of(calm) == lines_of(wild), "each": kills}
    print(json.dumps({k: v for k, v in result.items() if k != "each"}))
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
