"""`bench.py memory` and `bench.py comm`: what capacity.py predicts, and what a run of that shape really takes."""
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed

from measure import capacity, common
import dist
import grpo
from engine import machine, weights
from config import Config
from model import ModelConfig, Transformer
from rollout import Sampler, empty_rollout
from learner import update

TABLE = ("qwen2.5-0.5b", "llama3.2-1b", "qwen2.5-3b", "qwen3-4b", "qwen3-8b", "qwen3-14b")
# prompts, completions, rows at once, tokens: GSM8K-like on 20 chips; a step of 64 groups of 16
USUAL = capacity.Load(64, 16, 200, 1024, 256, 8192, mean_tokens=300)


# ---------------------------------------------------------------------------------------------------------- memory

class Phases:
    """Seconds and the process's peak memory after each named phase."""

    def __init__(self, device):
        self.device, self.rows, self.begin = device, [], time.perf_counter()

    def done(self, name, **more):
        row = {"phase": name, "seconds": round(time.perf_counter() - self.begin, 2),
               "peak_memory_mb": round(machine.peak_memory_mb(self.device)), **more}
        self.rows.append(row)
        if dist.rank() == 0:
            print("  ".join(f"{k} {v}" for k, v in row.items()))
        self.begin = time.perf_counter()


def build(args, device, place, phases):
    """The model to be trained, from files as a run has them; the files' folder is gone afterwards."""
    if not args.files:
        return common.random_model(args, device, place)
    if dist.world() > 1:        # whoever wrote the files would have the peak of that
        raise ValueError("memory on several ranks needs --no-files")
    with tempfile.TemporaryDirectory() as folder:
        weights.SHARD_BYTES = 3 * 10 ** 8              # several files, as a large checkpoint has
        common.random_model(args, device).to("cpu", torch.bfloat16).save_pretrained(folder, torch.bfloat16)
        phases.done("write", shards=len(list(Path(folder).glob("*.safetensors"))))
        return Transformer.from_pretrained(folder, place.home, shard=place)


def steps(args, model, phases, count):
    """`count` GRPO steps of this rank's share; the batch is that of one process on any number of ranks."""
    c = Config(group_size=args.group_size, prompts_per_step=args.prompts, lr=1e-6, micro_batch_tokens=args.micro_batch_tokens)
    run, (prompts, lengths) = common.make_run(model, c), common.workload(args, model.config)
    sampler = Sampler(model, [], args.rows or len(lengths))
    mine = dist.split(len(prompts))
    own = slice(mine.start * args.group_size, mine.stop * args.group_size)
    rewards = common.random_rewards(args, model.device)[mine.start:mine.stop]
    for _ in range(count):
        with sampler.loaded():
            out = empty_rollout(model.device)
            if len(mine):
                out = sampler.generate(prompts[mine.start:mine.stop], args.group_size, lengths[own])
        phases.done("rollout", tokens=sum(lengths[own]))
        update(run, grpo.prepare(out, rewards, c), [list(range(len(lengths[own])))], c)
        phases.done("train", tokens=int(out.lengths.sum()))


def load_of(args):
    """The workload of bench.py as capacity.py describes it."""
    prompts, lengths = common.workload(args, ModelConfig.from_dict(common.SHAPES[args.shape]))
    longest = max(len(p) for p in prompts)
    return capacity.Load(args.prompts, args.group_size, longest, max(lengths), args.rows or len(lengths), args.micro_batch_tokens,
                         sum(lengths) / len(lengths), args.checkpointing)


def memory(args, device):
    """Load, sample and train --steps steps, save: time and peak of each; and how far
    the predicted peak is off. A CPU process counts in full, so what Python and PyTorch take alone is added there."""
    phases, place = Phases(device), dist.Sharding(device, getattr(torch, args.dtype), args.shard)
    phases.done("start")
    alone = phases.rows[0]["peak_memory_mb"] if device.type == "cpu" else 0
    model = build(args, device, place, phases)
    model.activation_checkpointing = args.checkpointing
    parameters = sum(p.numel() for p in model.parameters())
    phases.done("load", parameters=parameters)
    steps(args, model, phases, args.steps)
    with tempfile.TemporaryDirectory() as target:
        if args.files:
            model.save_pretrained(Path(target) / "out", write=dist.rank() == 0)
            phases.done("save")
    peak = dist.all_reduce([phases.rows[-1]["peak_memory_mb"]], device, "max")[0]
    size, world = (4 if args.dtype == "float32" else 2), dist.world()
    parts = capacity.memory(model.config, load_of(args), world, args.shard or world, size, whole=not place.active,
                            on_cpu=device.type == "cpu")
    parts = {name: round(value / capacity.MB) for name, value in parts.items()}
    state = parts["weights"] + parts["moments"] + parts["gradients"]
    predicted = parts["peak"] + alone
    if dist.rank() == 0:
        print(f"weights, gradients and Adam state: {state} MB, beside them {peak - state:.0f} MB; predicted peak {predicted} MB, "
              f"off by {(predicted / peak - 1):.1%}")
    return {"parameters": parameters, "state_mb": state, "beside_state_mb": peak - state, "process_alone_mb": alone,
            "peak_mb": peak, "predicted_mb": predicted, "off": predicted / peak - 1, "parts_mb": parts, "phases": phases.rows}


def predicted_memory(args):
    """GB a chip at a usual load, bfloat16 with float32 masters, fully sharded."""
    rows = []
    for shape in TABLE:
        c = ModelConfig.from_dict(common.SHAPES[shape])
        for world in (1, 8, 20):
            parts = capacity.memory(c, USUAL, world, world, 2)
            rows.append({"shape": shape, "parameters": capacity.counts(c)[0], "chips": world,
                         **{name: round(value / capacity.GB, 2) for name, value in parts.items()}})
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items() if k in ("shape", "chips", "rollout_phase", "training_phase", "peak")))
    return {"load": vars(USUAL), "unit": "GB a chip", "rows": rows}


# --------------------------------------------------------------------------------------------------- communication

KINDS = {"all_gather_into_tensor": "all_gather", "all_gather_single": "all_gather", "reduce_scatter_single": "reduce_scatter",
        "reduce_scatter_tensor": "reduce_scatter", "all_reduce": "all_reduce"}


@contextmanager
def counted(log):
    """While open, the collectives of this process are counted and waited for one by one: {kind: [calls, bytes, seconds]}."""
    originals = {name: getattr(torch.distributed, name) for name in KINDS if hasattr(torch.distributed, name)}

    def watched(name, function):
        def call(*tensors, **options):
            given = [t for t in (*tensors, *options.values()) if torch.is_tensor(t)]
            begin = time.perf_counter()
            work = function(*tensors, **options)
            if work is not None:
                work.wait()
            row = log.setdefault(KINDS[name], [0, 0, 0.0])
            row[0], row[2] = row[0] + 1, row[2] + time.perf_counter() - begin
            row[1] += max(t.numel() * t.element_size() for t in given)      # of the full tensor
            return work
        return call
    for name, function in originals.items():
        setattr(torch.distributed, name, watched(name, function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(torch.distributed, name, function)


def comm(args, device):
    """One GRPO step: calls, bytes and seconds of each collective, beside the bytes that capacity.py predicts."""
    if device.type != "cpu":
        raise ValueError("comm waits for each collective, which on an accelerator measures nothing: --device cpu")
    if dist.world() == 1:
        raise ValueError("comm measures several processes: torchrun --nproc-per-node 4 bench.py comm, or comm --predict")
    place = dist.Sharding(device, getattr(torch, args.dtype), args.shard)
    model = common.random_model(args, device, place)
    model.activation_checkpointing = args.checkpointing
    phases, log = Phases(device), {}
    steps(args, model, phases, 1)               # warms up: the first step allocates
    begin = time.perf_counter()
    with counted(log):
        steps(args, model, phases, 1)
    spent, world, shard = time.perf_counter() - begin, dist.world(), args.shard or dist.world()
    out = {"step_s": spent, "share": sum(row[2] for row in log.values()) / spent, "mesh": [world // shard, shard]}
    size = 4 if args.dtype == "float32" else 2
    micro_batches = log["reduce_scatter"][0] // (model.config.num_hidden_layers + 1) if "reduce_scatter" in log else 1
    expected = {}
    for kind, _, times, bytes_, _ in capacity.traffic(model.config, world, shard, micro_batches, size):
        expected[kind] = expected.get(kind, 0) + times * bytes_
    for kind, (calls, bytes_, seconds) in log.items():
        out[kind] = {"calls": calls, "bytes": bytes_, "seconds": seconds, "predicted_bytes": expected.get(kind)}
    return {**out, "micro_batches": micro_batches}


def predicted_comm(args):
    """The share of a step that is communication on 20 x 910B, for each mesh that keeps or breaks nodes of 8, 8 and 4."""
    rows = []
    for shape in ("qwen3-4b", "qwen3-8b", "qwen3-14b"):
        for shard in (20, 10, 5, 4, 2):
            row = {"shape": shape, **capacity.step(ModelConfig.from_dict(common.SHAPES[shape]), USUAL, 20, shard)}
            rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()))
    return {"load": vars(USUAL), "assumed": capacity.ASSUMED, "bus_inside_gb_s": {k: v for k, v in capacity.INSIDE.items() if k > 1},
            "bus_between_gb_s": capacity.BETWEEN, "chip": capacity.CHIP, "rows": rows}
