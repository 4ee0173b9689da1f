"""`bench.py memory` and `bench.py comm`: what a step of a given shape takes, beside capacity.py.

Measured are seconds and peak memory of each phase of a run, and calls, bytes and seconds of each
collective. With --predict nothing is run, and the formulas of capacity.py are printed for models of
published shapes on 1 to 20 chips.
"""
import functools
import itertools
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as c10d

import dist
import grpo
import lora
from config import Config
from engine import machine, weights
from measure import capacity
from measure.common import (config_of, largest_over_ranks, make_learner, one_step, parameter_count,
                            random_model, random_rewards, workload)
from model import Transformer
from policies import write_weights
from rollout import Sampler, empty_rollout

TABLE = ("qwen2.5-0.5b", "llama3.2-1b", "qwen2.5-3b", "qwen3-4b", "qwen3-8b", "qwen3-14b")
# like GSM8K's on 20 chips: a step of 64 groups of 16
USUAL = capacity.Load(prompts=64, group_size=16, prompt_tokens=200, new_tokens=1024, rows=256,
                      micro_batch_tokens=8192, mean_tokens=300)


# ------------------------------------------------------------------------------------ steps of GRPO

class Phases:
    """Seconds and peak memory of each named phase, and the peak of all so far."""

    def __init__(self, device):
        self.device = device
        self.rows = []
        self.peak = 0
        self.begin = time.perf_counter()

    def done(self, name, **more):
        """Ends a phase: it becomes a row, which rank 0 prints, and the next phase begins."""
        seconds = time.perf_counter() - self.begin
        own = round(machine.peak_memory_mb(self.device))
        self.peak = max(self.peak, own)
        row = {"phase": name, "seconds": round(seconds, 2), "peak_memory_mb": self.peak, **more}
        if forget_peak(self.device):
            row["phase_peak_mb"] = own
        self.rows.append(row)
        if dist.rank() == 0:
            print_row(row)
        self.begin = time.perf_counter()


def print_row(row):
    print("  ".join(f"{name} {value}" for name, value in row.items()))


def forget_peak(device):
    """Let the peak memory begin anew from what is held now. Returns whether that can be done."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")       # Linux: VmHWM, which ru_maxrss reads
    except OSError:
        return False
    return True


def steps(args, model, phases, count):
    """Makes `count` GRPO steps on this rank's share of a batch.

    The batch is that of one process, whatever the number of ranks."""
    config = Config(group_size=args.group_size, prompts_per_step=args.prompts, lr=1e-6,
                    micro_batch_tokens=args.micro_batch_tokens)
    learner = make_learner(model, config)
    prompts, lengths = workload(args, model.config)
    sampler = Sampler(model, [], args.rows or len(lengths))

    mine = dist.split(len(prompts))
    first, last = mine.start * args.group_size, mine.stop * args.group_size
    prompts, lengths = prompts[mine.start:mine.stop], lengths[first:last]
    rewards = random_rewards(args, model.device)[mine.start:mine.stop]

    for _ in range(count):
        with sampler.loaded():          # every rank gathers the weights, also one without prompts
            out = empty_rollout(model.device)
            if prompts:
                out = sampler.generate(prompts, args.group_size, lengths)
        phases.done("rollout", tokens=sum(lengths))

        one_step(learner, grpo.prepare(out, rewards, config), list(range(len(lengths))))
        phases.done("train", tokens=int(out.lengths.sum()))


# ------------------------------------------------------------------------------------------- memory

def memory(args, device):
    """Returns time and peak memory of each phase: load, --steps steps, save.

    The result also says how far the predicted peak is off. A CPU process counts in full, so what
    Python and PyTorch take alone is added to the prediction there. With --predict nothing is run
    (predicted_memory)."""
    if args.predict:
        return predicted_memory(args)

    phases = Phases(device)
    place = dist.Sharding(device, getattr(torch, args.dtype), args.shard)
    phases.done("start")
    alone = phases.rows[0]["peak_memory_mb"] if device.type == "cpu" else 0

    model = build(args, device, place, phases)
    model.activation_checkpointing = args.checkpointing
    parameters = parameter_count(model)
    phases.done("load", parameters=parameters)

    steps(args, model, phases, args.steps)
    if args.files:
        save(args, model, phases)
    peak = largest_over_ranks(phases.rows[-1]["peak_memory_mb"], device)

    world = dist.world()
    parts = capacity.memory(model.config, load_of(args), world, args.shard or world,
                            size_of(args), whole=not place.active, on_cpu=device.type == "cpu")
    parts = {name: round(value / capacity.MB) for name, value in parts.items()}
    state = parts["weights"] + parts["moments"] + parts["gradients"]
    predicted = parts["peak"] + alone

    if dist.rank() == 0:
        print(f"weights, gradients and Adam state: {state} MB, beside them {peak - state:.0f} MB; "
              f"predicted peak {predicted} MB, off by {(predicted / peak - 1):.1%}")
    return {
        "parameters": parameters,
        "state_mb": state,
        "beside_state_mb": peak - state,
        "process_alone_mb": alone,
        "peak_mb": peak,
        "predicted_mb": predicted,
        "off": predicted / peak - 1,
        "parts_mb": parts,
        "phases": phases.rows,
    }


def build(args, device, place, phases):
    """Returns the model to be trained, read from files as a run does; the files are gone then.

    With --no-files its weights are random at once. Raises ValueError for files on several ranks:
    the rank that wrote them would have its peak there."""
    if not args.files and args.lora_rank:
        raise ValueError("memory --lora-rank begins with files: leave --no-files out")
    if not args.files:
        return random_model(args, device, place)
    if dist.world() > 1:
        raise ValueError("memory on several ranks needs --no-files")

    with tempfile.TemporaryDirectory() as folder:
        weights.SHARD_BYTES = 3 * 10 ** 8           # several files, as a large checkpoint has
        written = random_model(args, device).to("cpu", torch.bfloat16)
        written.save_pretrained(folder, torch.bfloat16)
        del written         # its memory is free again before the files are read
        phases.done("write", shards=len(list(Path(folder).glob("*.safetensors"))))
        model = Transformer.from_pretrained(folder, place.home, shard=place,
                                            adapt=adapting(args, place))
        return lora.reset(model) if args.lora_rank else model


def adapting(args, place):
    """Returns what adds the adapters of --lora-rank to an empty model, or None for rank 0."""
    if args.lora_rank:
        return functools.partial(lora.attach, rank=args.lora_rank, dtype=place.dtype)
    return None


def save(args, model, phases):
    """Saves the model as a run does, into a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        write_weights(args, model, Path(folder) / "out", Path(folder) / "adapter", "")
        phases.done("save")


def load_of(args):
    """Returns the workload of this command as a capacity.Load."""
    prompts, lengths = workload(args, config_of(args.shape))
    return capacity.Load(
        prompts=args.prompts,
        group_size=args.group_size,
        prompt_tokens=max(len(prompt) for prompt in prompts),
        new_tokens=max(lengths),
        rows=args.rows or len(lengths),
        micro_batch_tokens=args.micro_batch_tokens,
        mean_tokens=sum(lengths) / len(lengths),
        checkpointing=args.checkpointing,
        lora_rank=args.lora_rank,
    )


def size_of(args):
    """Returns the bytes of a number in the compute dtype."""
    return 4 if args.dtype == "float32" else 2


def predicted_memory(args):
    """Returns GB a chip at the USUAL load: bfloat16 with float32 masters, fully sharded.

    It is that of full fine-tuning and of LoRA, each without and with checkpointing."""
    printed = ("shape", "chips", "lora_rank", "checkpointing", "rollout_phase", "training_phase",
               "peak")
    rows = []
    for shape, chips, lora_rank, checkpointing in itertools.product(
            TABLE, (1, 8, 20), (0, 16), (False, True)):
        c = config_of(shape)
        load = replace(USUAL, lora_rank=lora_rank, checkpointing=checkpointing)
        parts = capacity.memory(c, load, world=chips, shard=chips, size=2)
        gigabytes = {name: round(value / capacity.GB, 2) for name, value in parts.items()}
        row = {"shape": shape, "parameters": capacity.counts(c).everything, "chips": chips,
               "lora_rank": lora_rank, "checkpointing": checkpointing, **gigabytes}
        print_row({name: row[name] for name in printed})
        rows.append(row)
    return {"load": vars(USUAL), "unit": "GB a chip", "rows": rows}


# ------------------------------------------------------------------------------------ communication

# functions of torch.distributed that FSDP2 calls, by version: the collective that each one is
KINDS = {
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
}


@contextmanager
def counted(log):
    """Counts the collectives of this process while open, and waits for each of them.

    log receives {kind: {"calls", "bytes", "seconds"}}; the bytes are those of the full tensors."""
    originals = {name: getattr(c10d, name) for name in KINDS if hasattr(c10d, name)}
    for name, function in originals.items():
        setattr(c10d, name, watched(function, KINDS[name], log))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(c10d, name, function)


def watched(function, kind, log):
    """Returns a collective that is waited for, and counted in the log."""
    def call(*tensors, **options):
        begin = time.perf_counter()
        work = function(*tensors, **options)
        if work is not None:
            work.wait()
        spent = time.perf_counter() - begin

        given = [value for value in (*tensors, *options.values()) if torch.is_tensor(value)]
        row = log.setdefault(kind, {"calls": 0, "bytes": 0, "seconds": 0.0})
        row["calls"] += 1
        row["bytes"] += max(tensor.numel() * tensor.element_size() for tensor in given)
        row["seconds"] += spent
        return work
    return call


def comm(args, device):
    """Returns calls, bytes and seconds of each collective of one GRPO step.

    Beside them are the bytes that capacity.py predicts. With --predict nothing is run
    (predicted_comm). Raises ValueError on an accelerator and in a single process."""
    if args.predict:
        return predicted_comm(args)
    if device.type != "cpu":
        raise ValueError("comm waits for each collective, which on an accelerator measures "
                         "nothing: --device cpu")
    if dist.world() == 1:
        raise ValueError("comm measures several processes: torchrun --nproc-per-node 4 bench.py "
                         "comm, or comm --predict")

    place = dist.Sharding(device, getattr(torch, args.dtype), args.shard)
    model = random_model(args, device, place, adapting(args, place))
    model.activation_checkpointing = args.checkpointing
    phases = Phases(device)
    log = {}

    steps(args, model, phases, 1)               # warms up: the first step allocates
    begin = time.perf_counter()
    with counted(log):
        steps(args, model, phases, 1)
    spent = time.perf_counter() - begin

    # a micro-batch reduces the gradients of each block, and of the weights outside of them, which
    # LoRA does not train
    micro_batches = 1
    if "reduce_scatter" in log:
        groups = model.config.num_hidden_layers + (0 if args.lora_rank else 1)
        micro_batches = log["reduce_scatter"]["calls"] // groups

    world = dist.world()
    shard = args.shard or world
    expected = {}
    for one in capacity.traffic(model.config, world, shard, micro_batches, size_of(args),
                                args.lora_rank):
        expected[one.kind] = expected.get(one.kind, 0) + one.times * one.tensor_bytes

    collectives = {kind: {**row, "predicted_bytes": expected.get(kind)}
                   for kind, row in log.items()}
    return {
        "step_s": spent,
        "share": sum(row["seconds"] for row in log.values()) / spent,
        "mesh": [world // shard, shard],
        **collectives,
        "micro_batches": micro_batches,
    }


def predicted_comm(args):
    """Returns the part of a step that is communication on 20 x 910B, for each mesh.

    The meshes are those that keep or break nodes of 8, 8 and 4."""
    rows = []
    load = replace(USUAL, lora_rank=args.lora_rank)
    for shape in ("qwen3-4b", "qwen3-8b", "qwen3-14b"):
        for shard in (20, 10, 5, 4, 2):
            step = capacity.step(config_of(shape), load, 20, shard)
            rounded = {name: round(value, 3) if isinstance(value, float) else value
                       for name, value in step.items()}
            rows.append({"shape": shape, **rounded})
            print_row(rows[-1])

    return {
        "load": vars(load),
        "assumed": capacity.ASSUMED,
        "bus_inside_gb_s": {ranks: rate for ranks, rate in capacity.INSIDE.items() if ranks > 1},
        "bus_between_gb_s": capacity.BETWEEN,
        "chip": capacity.CHIP,
        "rows": rows,
    }
