"""kill -9 of a random rank, again and again: the run ends with the weights of an undisturbed one.

    python results/dist/kill.py --kills 20 --json results/dist/kill.json
    python results/dist/kill.py --kills 6 --agents 2 --json results/dist/kill-2-agents.json

torchrun restarts the ranks (--max-restarts), and train.py goes on from its newest checkpoint by
itself. Every second kill waits until a checkpoint is being written. Compared are all tensors of the
last checkpoint, bit for bit, the replay buffer, and the log. Two agents are two torchruns, as on
two nodes.
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

PATIENCE = 120      # seconds for what a kill waits for
OPTIONS = (
    "--prompts-per-step 5 --group-size 4 --max-new-tokens 8 "
    "--eval-every 1000 --eval-problems 4 --eval-samples 1 --save-every 2 "
    "--lr 1e-3 --device cpu --threads 1 --watchdog 0"
).split()


# ------------------------------------------------------------------------------------------ the run

def command(args, folder, out):
    """Returns the torchrun of train.py; several agents start it once each, and meet by its name."""
    together = ["--standalone"]
    if args.agents > 1:
        together = ["--nnodes", str(args.agents), "--rdzv-backend", "c10d",
                    "--rdzv-endpoint", "127.0.0.1:29577", "--rdzv-id", out.name]

    return [
        sys.executable, "-m", "torch.distributed.run",
        *together,
        "--nproc-per-node", str(args.ranks),
        "--max-restarts", "1000",
        "--monitor-interval", "0.1",
        str(HERE / "train.py"),
        "--algo", "offpolicy",
        "--model", str(folder / "model"),
        "--data", str(folder / "problems.jsonl"),
        "--out", str(out),
        "--steps", str(args.steps),
        *OPTIONS,
    ]


class Run:
    """The torchruns of one run, as one process."""

    def __init__(self, args, command, errors):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.agents = [subprocess.Popen(command, cwd=HERE, env=environment, stdout=errors,
                                        stderr=errors)
                       for _ in range(args.agents)]

    def poll(self):
        """Returns the exit code, or None while one of the torchruns is running."""
        codes = [agent.poll() for agent in self.agents]
        return None if None in codes else max(codes)

    def wait(self):
        """Returns the exit code, once all have ended."""
        return max(agent.wait() for agent in self.agents)


def ranks_of(run):
    """Returns the process ids of the ranks that torchrun has started."""
    parents = ",".join(str(agent.pid) for agent in run.agents)
    listing = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", parents], capture_output=True,
                             text=True)
    children = listing.stdout.splitlines()
    return [int(line.split()[0]) for line in children if "train.py" in line]


# -------------------------------------------------------------------------------------------- kills

def kill_one(run, out, rng, while_saving, number):
    """Kills a random rank once the run has moved on since the last kill, or while it writes.

    Returns what the rank was doing, or None if the run has ended before."""
    begin = time.time()

    def in_time():
        return run.poll() is None and time.time() - begin < PATIENCE

    # a new line of the log says that the ranks compute again
    before = lines_in(out / "log.jsonl")
    while in_time() and lines_in(out / "log.jsonl") <= before:
        time.sleep(0.02)
    time.sleep(0 if while_saving else rng.random())

    ranks = ranks_of(run)
    victim = rng.choice(ranks) if ranks else None
    while while_saving and in_time() and not being_written(out):
        time.sleep(0.0002)
    time.sleep(rng.random() * 0.01)

    written = being_written(out)
    if victim is None or run.poll() is not None or not os.path.exists(f"/proc/{victim}"):
        return None
    os.kill(victim, signal.SIGKILL)
    newest = max((path.name for path in (out / "checkpoints").glob("step-*")), default=None)
    return {"kill": number, "rank": ranks.index(victim), "while_writing": written,
            "newest": newest}


def lines_in(log):
    """Returns the number of lines of a file, 0 if there is none."""
    return len(open(log).readlines()) if log.exists() else 0


def being_written(out):
    """Returns the names of the checkpoints that are not yet whole."""
    return [path.name for path in (out / "checkpoints").glob(".part-*")]


# --------------------------------------------------------------------------------------- comparison

def stored(out):
    """Returns (name, tensors, all else) of the newest checkpoint."""
    path = max((out / "checkpoints").glob("step-*"))
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
               for name, entry in metadata.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return path.name, tensors, torch.load(path / "extra.pt", weights_only=True)


def same(a, b):
    """Returns whether two values are equal, tensors and those in nested dicts bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def lines_of(out):
    """Returns the log of a run, without what depends on the time it took."""
    timed = ("time", "per_s", "memory")
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    return [{key: value for key, value in line.items() if not any(word in key for word in timed)}
            for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2, help="of each torchrun")
    parser.add_argument("--agents", type=int, default=1, help="torchruns")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_start(folder)
        calm, wild = folder / "calm", folder / "wild"
        with open(args.json + ".err", "w") as errors:
            if Run(args, command(args, folder, calm), errors).wait():
                sys.exit("error: the undisturbed run did not end well")
            kills, code = disturbed(args, folder, wild, errors)

        if code:
            end = "\n".join(open(args.json + ".err").read().splitlines()[-30:])
            sys.exit(f"error: the run did not end well:\n{end}")
        result = compared(calm, wild, kills)

    print(json.dumps({name: value for name, value in result.items() if name != "each"}))
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def disturbed(args, folder, out, errors):
    """Makes the run whose ranks are killed. Returns the kills and its exit code."""
    rng = random.Random(args.seed)
    run = Run(args, command(args, folder, out), errors)
    kills = []
    while len(kills) < args.kills and run.poll() is None:
        while_saving = len(kills) % 2 == 1
        done = kill_one(run, out, rng, while_saving, len(kills) + 1)
        if done:
            kills.append(done)
            print(json.dumps(done), flush=True)
    return kills, run.wait()


def compared(calm, wild, kills):
    """Returns how the end of the disturbed run compares with that of the undisturbed one."""
    checkpoint, tensors, rest = stored(calm)
    _, tensors_after_kills, rest_after_kills = stored(wild)

    return {
        "command": "python " + " ".join(sys.argv),
        "kills": len(kills),
        "while_writing": sum(bool(kill["while_writing"]) for kill in kills),
        "checkpoint": checkpoint,
        "tensors": len(tensors),
        "bit_identical": same(tensors, tensors_after_kills),
        "buffer_identical": same(rest, rest_after_kills),
        "log_identical": lines_of(calm) == lines_of(wild),
        "each": kills,
    }


if __name__ == "__main__":
    main()
