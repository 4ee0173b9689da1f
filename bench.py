"""The command line of the measurements: time and memory on this machine, as JSON on request.

    python bench.py rollout --shape 40m --vs hf     tokens/s, beside transformers.generate on the
                                                    same weights and lengths
    python bench.py rollout --model FOLDER --data FILE.jsonl --vs vllm
                                                    a real checkpoint and real prompts, beside vLLM
                                                    (or --vs llamacpp), in an environment of its own
    python bench.py train --shape tiny              a training step; prompts once a group beside
                                                    once a completion
    python bench.py train --shape tiny --vs trl     a whole GRPO step beside TRL's (pip install
                                                    trl, in any environment)
    python bench.py train --model FOLDER --data FILE.jsonl --lora-rank 16 --vs trl
                                                    the same with a real checkpoint, its own
                                                    template, and adapters (pip install peft)
    python bench.py memory --shape qwen2.5-0.5b     a whole GRPO step on a random checkpoint of
                                                    real shape, and its prediction
    python bench.py memory --predict                bytes a chip for 0.5B to 14B on 1, 8 and 20
                                                    chips (memory also runs under torchrun)
    torchrun --nproc-per-node 4 bench.py comm       bytes and seconds of each collective of a
                                                    step; with --predict: on 20 x 910B
    python bench.py logps --shape qwen2.5-0.5b      peak memory of the log-probs alone, beside
                                                    the naive ones
    python bench.py reward --data FOLDER --vs math-verify
                                                    the verifier on labelled completions and on
                                                    hostile inputs

The measurements are functions in measure/, and their modules are imported only when asked for.
They are never tests. Every comparison alternates between its two sides and reports
the ratio of each round. Without --model weights are random. Rewards never depend on an answer (they
are random; beside TRL the parity of the ids): random weights answer nothing, and a step without a
gradient would measure nothing.
"""
import argparse
import importlib
import json
import sys
from pathlib import Path

from engine import machine      # first: it tells OpenMP's threads how to wait
import torch

import dist
from config import Common, Parser, check_new_file
from measure.common import SHAPES

# command: the module of measure/ that has a function of the command's name, of (args, device)
COMMANDS = {
    "rollout": "sampler",
    "train": "learner",
    "memory": "scale",
    "comm": "scale",
    "logps": "learner",
    "reward": "verifier",
}
OTHER_SIDES = {     # values of --vs
    "rollout": ("hf", "vllm", "llamacpp"),
    "train": ("trl",),
    "reward": ("math-verify",),
}
MEANT_FOR = {       # flag: the commands that read it
    "predict": ("memory", "comm"),
    "model": ("rollout", "train"),
    "data": ("rollout", "train", "reward"),
    "lora_rank": ("train", "memory", "comm"),
}
LEAST = {           # of the numbers that flags may be
    **dict.fromkeys(("prompts", "group_size", "prompt_tokens", "new_tokens", "rounds", "steps",
                     "micro_batch_tokens"), 1),
    **dict.fromkeys(("threads", "rows", "shard", "lora_rank"), 0),
}
WITH_PREDICT = ("what", "predict", "json", "threads", "device")    # flags; its load is fixed


# -------------------------------------------------------------------------------------------- flags

def parser():
    """Returns the parser: first the flags of every command, then those of some, in groups."""
    out = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                 allow_abbrev=False)
    out.add_argument("what", choices=COMMANDS)
    out.add_argument("--shape", choices=SHAPES, default="tiny", help="of the model [tiny]")
    out.add_argument("--model", default="",
                     help="a checkpoint in place of --shape: a folder (rollout, train)")
    out.add_argument("--device", default="", help="cpu, cuda or npu [the one that is here]")
    out.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    out.add_argument("--threads", type=int, default=0, help="0: the fastest number, measured")
    out.add_argument("--json", default="", help="a file for the result, which must not exist yet")

    work = out.add_argument_group("the work: all commands but reward")
    work.add_argument("--prompts", type=int, default=2)
    work.add_argument("--group-size", type=int, default=4)
    work.add_argument("--prompt-tokens", type=int, default=64,
                      help="of the longest random prompt; others have at least half as many")
    work.add_argument("--new-tokens", type=int, default=64, help="of the longest completion")
    work.add_argument("--lengths", choices=["ragged", "equal"], default="ragged")
    work.add_argument("--rows", type=int, default=0,
                      help="completions in the cache at once; 0: all")

    compared = out.add_argument_group("rollout, train, reward")
    sides = [side for known in OTHER_SIDES.values() for side in known]
    compared.add_argument("--vs", choices=["", *sides], default="",
                          help=f"the other side: {known_sides()}")
    compared.add_argument("--data", default="",
                          help="rollout, train: real prompts for --model, as of train.py; "
                               "reward: a folder of labelled *.jsonl")
    compared.add_argument("--rounds", type=int, default=3)

    rollout = out.add_argument_group("rollout")
    rollout.add_argument("--hf", choices=["dynamic", "static", "continuous"], default="dynamic",
                         help="the cache of transformers.generate")
    rollout.add_argument("--no-graph", dest="graph", action="store_false",
                         help="decode without device graphs")
    rollout.add_argument("--vllm-python", default="", help="the Python that has vLLM [this one]")
    rollout.add_argument("--llamacpp-python", default="",
                         help="the Python that has llama-cpp-python, gguf, safetensors [this one]")
    rollout.add_argument("--llamacpp-cache", choices=["split", "unified"], default="split",
                         help="keys and values apart for each row, or in one cache for all")
    rollout.add_argument("--no-flash", dest="flash", action="store_false",
                         help="llama.cpp without its flash attention, which rounds to half "
                              "precision")
    rollout.add_argument("--gguf-dtype", choices=["float32", "float16"], default="float32",
                         help="of llama.cpp's weights, keys and values")
    rollout.add_argument("--gguf", default="", help="a file for llama.cpp [made of the weights]")

    training = out.add_argument_group("train, memory, comm")
    training.add_argument("--micro-batch-tokens", type=int, default=Common.micro_batch_tokens)
    training.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                          help="of activations; memory does so by default")
    training.add_argument("--lora-rank", type=int, default=0,
                          help="of adapters; 0: all weights are trained")

    scale = out.add_argument_group("memory, comm")
    scale.add_argument("--predict", action="store_true",
                       help="the model's figures alone; nothing is run")
    scale.add_argument("--shard", type=int, default=0, help="under torchrun: as of train.py")
    scale.add_argument("--steps", type=int, default=2, help="GRPO steps of memory")
    scale.add_argument("--no-files", dest="files", action="store_false",
                       help="memory starts from random weights and writes nothing")

    logps = out.add_argument_group("logps")
    logps.add_argument("--variant", choices=["", "ours", "naive"], default="",
                       help="one of the two sides only")
    return out


def known_sides():
    """Returns what --vs may be, as one line."""
    return ", ".join(f"{command} --vs {side}"
                     for command, sides in OTHER_SIDES.items() for side in sides)


def arguments():
    """Returns the checked arguments of this process. Raises ValueError with one line."""
    flags = parser()
    args = flags.parse_args()
    reads = WITH_PREDICT + (("lora_rank",) if args.what == "comm" else ())
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if name in LEAST and value < LEAST[name]:
            raise ValueError(f"{flag} {value}: must be at least {LEAST[name]}")
        if args.predict and name not in reads and value != flags.get_default(name):
            raise ValueError(f"{flag} does nothing with --predict, which is of one load and of all "
                             "shapes: leave it out")
    if args.what == "train" and args.group_size < 2:
        raise ValueError("train --group-size 1: a group of one has no gradient, so nothing would "
                         "be trained")
    if args.checkpointing is None:
        args.checkpointing = args.what == "memory"

    if args.vs and args.vs not in OTHER_SIDES.get(args.what, ()):
        raise ValueError(f"--vs {args.vs} has no meaning for {args.what}: {known_sides()}")
    check_model(args)

    check_new_file("--json", args.json)

    for flag, commands in MEANT_FOR.items():
        if getattr(args, flag) and args.what not in commands:
            name = "--" + flag.replace("_", "-")
            known = ", ".join(f"{command} {name}" for command in commands)
            raise ValueError(f"{name} has no meaning for {args.what}: {known}")
    return args


def check_model(args):
    """Raises ValueError for --data and --model of rollout and train that do not go together."""
    if args.what not in MEANT_FOR["model"]:
        return
    if args.data and not args.model:
        raise ValueError("--data needs --model: the prompts are written in the checkpoint's own "
                         "template and vocabulary")
    if args.model and not Path(args.model).is_dir():
        raise ValueError(f"--model {args.model} is no folder: give that of a checkpoint")
    if args.vs == "trl" and args.model and not args.data:
        raise ValueError("train --vs trl --model needs --data: TRL takes prompts as text")


# ------------------------------------------------------------------------------------------ program

def measurement(command):
    """Returns the function behind a command. Its module is imported now: some need a lot."""
    module = importlib.import_module(f"measure.{COMMANDS[command]}")
    return getattr(module, command)


def circumstances(device):
    """Returns what a reader of the result needs to repeat it: command, ranks, versions, device."""
    ranks = dist.world()
    launcher = "python" if ranks == 1 else f"torchrun --nproc-per-node {ranks}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = f"{device.type}, {torch.get_num_threads()} threads"

    return {
        "command": f"{launcher} bench.py " + " ".join(sys.argv[1:]),
        "ranks": ranks,
        "torch": torch.__version__,
        "device": where,
    }


def main():
    try:
        args = arguments()
        device = dist.setup(args.device)
        torch.set_num_threads(args.threads or machine.choose_threads())

        around = circumstances(device)          # before the measurement, which may change threads
        result = measurement(args.what)(args, device)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    first = dist.rank() == 0
    dist.close()
    if not first:
        return

    # with --variant this process is one side of `logps`, which reads the result as one line
    if not args.variant:
        result = {**around, **result}
    text = json.dumps(result, indent=None if args.variant else 1)
    try:
        if args.json:       # before it is shown, which may fail
            file = Path(args.json)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        print(text)
        sys.exit(f"error: --json {args.json}: {error}; the result stands above")
    print(text)


if __name__ == "__main__":
    main()
