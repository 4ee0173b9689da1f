"""Settings, processes, devices, checkpoints: what lets a program run alone, under torchrun, and after a crash.

Every rank holds the whole model and its own share of the prompts. A loss is divided by a *global* count before
backward, so summing the gradients over ranks gives the gradient of the single-process run: no rank average, no
dependence on how many prompts a rank got. A rank without prompts adds zeros and enters the same collectives.

Backends: HCCL on Ascend, NCCL on CUDA, Gloo on CPU and for host objects everywhere.
Left out as yet: sharding the model over ranks (FSDP2).
"""
import argparse
import inspect
import json
import math
import os
import re
import resource
import shutil
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file


class Parser(argparse.ArgumentParser):
    """argparse, but an error is a ValueError of one line instead of a page of usage."""

    def error(self, message):
        raise ValueError(f"{message}; see --help")


def command_line(config_class, description, argv=None):
    """The flags given on the command line, {field: value}; every field of the dataclass is a flag with dashes."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    comments, group, group_of = {}, parser, {}          # comments become the help, sections its groups
    line = r"^    (?:(\w+): [^#\n]*(?:# (.*))?|# (.*))$"
    for name, comment, section in re.findall(line, inspect.getsource(config_class), re.M):
        group = parser.add_argument_group(section) if section else group
        comments[name], group_of[name] = comment, group
    for f in fields(config_class):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        help_text = f"{comments.get(f.name, '')} [{f.default}]".strip().replace("%", "%%")
        group_of[f.name].add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=help_text, **kind)
    return vars(parser.parse_args(argv))


SHARED_CHOICES = {"device": ("", "cpu", "cuda", "npu"), "dtype": ("", "float32", "bfloat16"),
                  "template": ("auto", "chat", "plain", "reasoning")}        # of fields that several programs have
SHARED_LEAST = {"seed": 0, "threads": 0}


def check_settings(config, choices, least):
    """ValueError, one line, when a field is not among its choices {field: values} or below its bound {field: number}.

    The fields that the programs share (above, and levels) are checked where the config has them."""
    flag = {f.name: "--" + f.name.replace("_", "-") for f in fields(config)}
    choices = {**choices, **{name: allowed for name, allowed in SHARED_CHOICES.items() if name in flag}}
    least = {**least, **{name: low for name, low in SHARED_LEAST.items() if name in flag}}
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{flag[name]} {getattr(config, name)}: choose {', '.join(filter(None, allowed))}")
    for name in flag:
        if isinstance(getattr(config, name), float) and not math.isfinite(getattr(config, name)):
            raise ValueError(f"{flag[name]} {getattr(config, name)}: must be a finite number")
    for name, low in least.items():
        if not getattr(config, name) >= low:
            raise ValueError(f"{flag[name]} {getattr(config, name)}: must be at least {low}")
    if "levels" in flag:
        parse_levels(config.levels)


def refuse_torchrun(program):
    """ValueError when a program of one process was started as one of several."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{program} is one process: start it with python, not torchrun")


def parse_levels(text):
    """"4-6" -> (4, 6), fewest and most steps of a story of the built-in task."""
    low, dash, high = text.partition("-")
    if not (dash and low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise ValueError(f"--levels {text}: give fewest-most steps, such as 4-6")
    return int(low), int(high)


def setup(device_name=""):
    """Join the process group that torchrun describes (none under plain python) and return this rank's device.

    device_name: "cpu", "cuda", "npu" or "" for the accelerator that is here. ValueError when it is absent."""
    found = torch.accelerator.current_accelerator(check_available=True)     # built for one is not having one
    kind = device_name or (found.type if found and found.type in ("cuda", "npu") else "cpu")
    if kind != "cpu" and (found is None or found.type != kind):
        raise ValueError(f"--device {kind}: no such device here (found: {found.type if found else 'cpu only'})")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind != "cpu" and local_rank >= torch.accelerator.device_count():
        raise ValueError(f"local rank {local_rank} has no {kind} device: start at most "
                         f"{torch.accelerator.device_count()} processes a node")
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, local_rank)
    if kind != "cpu":
        torch.accelerator.set_device_index(local_rank)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
        dist.init_process_group(backend)
    return device


def close():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def split(count):
    """This rank's range of `count` items: contiguous, sizes differ by at most one, any world size; rank 0 has the most."""
    return range(-(-count * rank() // world()), -(-count * (rank() + 1) // world()))


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_reduce(values, device, op="sum"):
    """A list of numbers, reduced over ranks ("sum" or "max"), as floats. float32: counts stay exact to 16 million."""
    t = torch.tensor(values, dtype=torch.float32, device=device)
    if dist.is_initialized():
        dist.all_reduce(t, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return t.tolist()


def broadcast_object(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value):
    """Every rank's value, in a list by rank, on every rank. Between our own processes only: it pickles."""
    box = [value]
    if dist.is_initialized():
        box = [None] * world()
        dist.all_gather_object(box, value)
    return box


def sum_gradients(params):
    """Sum .grad over ranks; a parameter without a gradient counts as zero."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    sum_tensors([p.grad for p in params])


def sum_tensors(tensors):
    """Sum each tensor over ranks in place, in one buffer."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))


class Master:
    """float32 weights for the optimizer beside a bfloat16 model for compute (rollouts and training alike).

    bfloat16 has 8 bits of mantissa: an update of 1e-6 relative size would vanish in it. Gradients are added up in
    float32 over micro-batches. With float32 compute the master *is* the model."""

    def __init__(self, model, dtype=torch.float32):
        """model: float32; it is rounded to dtype in place, after its weights have been copied."""
        self.model, self.separate = model, dtype != torch.float32
        self.names = [name for name, _ in model.named_parameters()]
        self.params = list(model.parameters())
        if self.separate:
            self.params = []
            for p in model.parameters():        # tensor by tensor: the float32 weights never exist twice
                m = torch.nn.Parameter(p.data)
                p.data = p.data.to(dtype)
                self.params.append(m)
                p.register_post_accumulate_grad_hook(lambda p, m=m: self._collect(p, m))

    @staticmethod
    def _collect(p, m):
        m.grad = p.grad.float() if m.grad is None else m.grad.add_(p.grad)
        p.grad = None

    @torch.no_grad()
    def publish(self):
        """Round the master weights into the compute model; call after every optimizer step."""
        if self.separate:
            for p, m in zip(self.model.parameters(), self.params):
                p.copy_(m)


# ------------------------------------------------------------------------------------------------------ run folder

def open_run(c):
    """The run's folder, not yet written to; ValueError when it holds another run."""
    c.out = c.out or f"runs/{c.algo}-{Path(c.data).stem}-seed{c.seed}"
    folder = Path(c.out)
    if not c.resume and folder.exists() and any(folder.iterdir()):
        hint = f"python train.py --resume --out {c.out}" if (folder / "config.json").exists() else "an empty one"
        raise ValueError(f"--out {c.out} is not empty: choose another folder, or go on with it: {hint}")
    c.threads = c.threads or choose_threads()
    return folder


def agree_on_run(c):
    """Rank 0 looks at the folder; every rank gets the same settings, or the same error."""
    outcome = None
    if rank() == 0:
        try:
            outcome = (open_run(c), asdict(c))
        except (ValueError, OSError) as error:
            outcome = (None, str(error))
    folder, settings = broadcast_object(outcome)
    if folder is None:
        raise ValueError(settings)
    return type(c)(**settings), folder


def claim(c, folder):
    """Write config.json: from here on the folder is this run's. Only after the input has proved readable."""
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".config.json").write_text(json.dumps({**asdict(c), "resume": False}, indent=2) + "\n")
        os.replace(folder / ".config.json", folder / "config.json")         # never half a file


# ----------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(folder, step, master, optimizer, state, extra=None, keep=2):
    """Write folder/step-NNNNNN, whole or not at all: into a hidden folder first, renamed when complete and on disk.

    state: a JSON-able dict; extra: a dict of tensors, lists and numbers (the replay buffer). Rank 0 writes (all ranks
    hold the same); the newest `keep` checkpoints stay."""
    if rank() == 0:
        final, part = Path(folder) / f"step-{step:06d}", Path(folder) / f".part-{step:06d}"
        for left_over in Path(folder).glob(".part-*"):       # of a crash while saving
            shutil.rmtree(left_over)
        part.mkdir(parents=True)
        weights = {n: p.detach().cpu().contiguous() for n, p in zip(master.names, master.params)}
        save_file(weights, part / "weights.safetensors")
        torch.save(optimizer.state_dict(), part / "optimizer.pt")
        torch.save(extra or {}, part / "extra.pt")
        (part / "state.json").write_text(json.dumps({**state, "step": step}))
        for path in (*part.iterdir(), part):
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(part, final)
        sync(folder)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    barrier()


def sync(path):
    """Wait until a file or folder is on disk: a rename must not get there before what it names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def checkpoints(folder):
    """The whole checkpoints of a folder, oldest first."""
    return sorted(Path(folder).glob("step-*"))


@torch.no_grad()
def load_checkpoint(path, master, optimizer):
    """Restore weights and optimizer in place; returns (state, extra). ValueError when a file does not fit."""
    try:
        with safe_open(Path(path) / "weights.safetensors", framework="pt") as file:
            for name, p in zip(master.names, master.params):
                p.copy_(file.get_tensor(name))
        stored, extra = (torch.load(Path(path) / name, map_location="cpu", weights_only=True)
                         for name in ("optimizer.pt", "extra.pt"))
        optimizer.load_state_dict(stored)
        state = json.loads((Path(path) / "state.json").read_text())
    except Exception as error:   # truncated, foreign or misshapen files raise many types; all mean the same here
        raise ValueError(f"checkpoint {path} cannot be read ({(str(error) or type(error).__name__).splitlines()[0]}); "
                         "remove that folder to resume from the one before") from None
    master.publish()
    return state, extra


# --------------------------------------------------------------------------------------------------------- machine

def peak_memory_mb(device):
    """Largest memory so far in MB: of the accelerator's allocator, or of the process on CPU."""
    if device.type == "cpu":
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10         # macOS counts bytes, Linux kilobytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return torch.accelerator.max_memory_allocated() / 2 ** 20


def choose_threads():
    """The fastest CPU thread count, by a short measurement: on a busy machine two threads can be slower than one.

    At most PyTorch's own choice, which follows OMP_NUM_THREADS (torchrun sets it to 1)."""
    limit = torch.get_num_threads()
    x, w = torch.randn(2048, 128), torch.randn(128, 384)
    best, best_time = 1, float("inf")
    for threads in sorted({1, *(2 ** k for k in range(1, 7) if 2 ** k <= limit), limit}):
        torch.set_num_threads(threads)
        times = []
        for _ in range(12):
            start = time.perf_counter()
            for _ in range(4):
                (torch.nn.functional.silu(x @ w) @ w.T).softmax(-1)
            times.append(time.perf_counter() - start)
        median = sorted(times[2:])[5]
        if median < 0.75 * best_time:        # more threads only for a clear gain: they lose most when others compute
            best, best_time = threads, median
    torch.set_num_threads(best)
    return best
