"""Measurements, each one command that writes its JSON: time and memory on this machine, never a test.

    python bench.py rollout --shape 40m --vs hf        tokens/s beside transformers.generate on the same weights and lengths
    python bench.py train --shape tiny                  a training step; prompts once a group beside once a completion
    python bench.py train --shape tiny --vs trl         a whole GRPO step beside TRL's (pip install trl, in any environment)
    python bench.py memory --shape qwen2.5-0.5b         a whole GRPO step on a random checkpoint of real shape, and its prediction
    python bench.py memory --predict                    bytes a chip for 0.5B to 14B on 1, 8 and 20 chips (also under torchrun)
    torchrun --nproc-per-node 4 bench.py comm           bytes and seconds of each collective of a step; --predict: on 20 x 910B
    python bench.py logps --shape qwen2.5-0.5b          peak memory of the log-probs alone, beside the naive ones
    python bench.py reward --data FOLDER --vs math-verify   the verifier on labelled completions and hostile inputs (measure/verifier.py)

Every comparison alternates between the two in one process and reports the ratio of each round. Weights are random and
rewards drawn at random: random weights answer nothing, and a step without a gradient would measure nothing.
"""
import argparse
import json
import sys
from pathlib import Path

from engine import machine      # first: it tells OpenMP's threads how to wait
import torch

import dist
from config import Config, Parser
from measure import verifier
from measure.common import SHAPES
from measure.learner import logps, train
from measure.sampler import rollout


def memory(args, device):
    from measure import scale
    return scale.predicted_memory(args) if args.predict else scale.memory(args, device)


def comm(args, device):
    from measure import scale
    return scale.predicted_comm(args) if args.predict else scale.comm(args, device)


WHAT = {"rollout": rollout, "train": train, "memory": memory, "comm": comm, "logps": logps, "reward": verifier.reward}


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="longest prompt (rollout, train: from half of it)")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--lengths", choices=["ragged", "equal"], default="ragged")
    parser.add_argument("--rows", type=int, default=0, help="completions in the cache at once; 0: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vs", choices=["", "hf", "trl", "math-verify"], default="")
    parser.add_argument("--data", default="", help="reward: a folder of labelled *.jsonl")
    parser.add_argument("--hf", choices=["dynamic", "static", "continuous"], default="dynamic", help="their cache")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="decode without device graphs")
    parser.add_argument("--micro-batch-tokens", type=int, default=Config.micro_batch_tokens)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="of activations; memory: by default")
    parser.add_argument("--no-files", dest="files", action="store_false", help="memory: random weights, nothing is written")
    parser.add_argument("--steps", type=int, default=2, help="memory: GRPO steps")
    parser.add_argument("--predict", action="store_true", help="memory, comm: the model's figures, nothing is run")
    parser.add_argument("--shard", type=int, default=0, help="memory, comm under torchrun: as of train.py")
    parser.add_argument("--variant", choices=["", "ours", "naive"], default="", help="logps: one of the two only")
    parser.add_argument("--device", default="")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", default="")
    try:
        args = parser.parse_args()
        if args.checkpointing is None:
            args.checkpointing = args.what == "memory"
        if args.vs not in ("", {"rollout": "hf", "train": "trl", "reward": "math-verify"}.get(args.what)):
            raise ValueError(f"--vs {args.vs} has no meaning for {args.what}: rollout --vs hf, train --vs trl, reward --vs math-verify")
        if args.json and Path(args.json).exists():
            raise ValueError(f"--json {args.json} already exists: choose another file, results are never overwritten")
        device = dist.setup(args.device)
        if args.predict and args.what not in ("memory", "comm"):
            raise ValueError(f"--predict has no meaning for {args.what}: memory --predict, comm --predict")
        torch.set_num_threads(args.threads or machine.choose_threads())
        where = f"{device.type}, {torch.get_num_threads()} threads" if device.type != "cuda" else torch.cuda.get_device_name()
        result = WHAT[args.what](args, device)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    ranks, first = dist.world(), dist.rank() == 0
    dist.close()
    if not first:
        return
    if not args.variant:
        launcher = "python" if ranks == 1 else f"torchrun --nproc-per-node {ranks}"
        command = f"{launcher} bench.py " + " ".join(sys.argv[1:])
        result = {"command": command, "ranks": ranks, "torch": torch.__version__, "device": where, **result}
    print(json.dumps(result, indent=None if args.variant else 1))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
