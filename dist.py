"""Processes, devices, sharding: the same program alone, on 8 GPUs and on three Ascend nodes.

float32 weights, gradients and Adam's moments are cut in `shard` parts (FSDP2: ZeRO-3, arXiv
1910.02054, 2304.11277). The parts are repeated world / shard times (HSDP). A block is gathered in
the compute dtype when it is needed, and its gradients are summed in float32 into the parts again.

A loss is divided by a *global* count before backward, so summing the gradients over ranks gives the
gradient of the single-process run: no rank average, no dependence on how many prompts a rank got. A
rank without prompts runs one token times zero and enters the same collectives. Plain `python` is
one process: float32 without any of this, bfloat16 as a mesh of one, for its float32 masters.

Backends: HCCL on Ascend, NCCL on CUDA, Gloo on CPU and for host objects everywhere. Left out:
tensor, pipeline and sequence parallelism, because FSDP2 with one chip's share of 14B parameters and
their optimizer fits (bench.py memory).
"""
import ctypes
import datetime
import faulthandler
import gc
import os
import re
import socket
import sys
import threading
import time
import uuid
from contextlib import contextmanager

import torch
import torch.distributed as c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy,
                                    fully_shard, register_fsdp_forward_method)


# -------------------------------------------------------------------------- devices and processes

def setup(device_name="", timeout=1800):
    """Join the process group that torchrun describes (none under plain python). Returns the device.

    device_name: "cpu", "cuda", "npu" or "" for the accelerator that is here. timeout: seconds that
    a collective may take. Raises ValueError when the device is absent, or the other ranks cannot be
    reached."""
    device = own_device(device_name)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)

    if "RANK" in os.environ and not c10d.is_initialized():
        try:
            c10d.init_process_group(backends(device.type),
                                    timeout=datetime.timedelta(seconds=timeout),
                                    **meeting_point(min(timeout, 600)))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"rank {os.environ['RANK']} cannot reach the others: "
                             f"{first_line(error)}") from None
    return device


def own_device(device_name):
    """The device of this rank, by its place on the node. Raises ValueError when it is absent."""
    found = torch.accelerator.current_accelerator(check_available=True)     # not only built for
    found_kind = found.type if found else "cpu"
    kind = device_name or (found_kind if found_kind in ("cuda", "npu") else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if kind != found_kind:
        raise ValueError(f"--device {kind}: no such device here "
                         f"(found: {found.type if found else 'cpu only'})")

    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
    if local_rank >= count:
        raise ValueError(f"local rank {local_rank} has no {kind} device: "
                         f"start at most {count} processes a node")
    return torch.device(kind, local_rank)


def give_memory_back(model, cached=False):
    """Give memory that a large model on the CPU has freed back to the system.

    glibc keeps it: the holes where the sampler's weights were would stay beside what training
    allocates, and holes of one micro-batch beside the next, 2.5 GB at 0.5B (LOG). cached: on an
    accelerator too, what PyTorch keeps."""
    if model.device.type != "cpu":
        if cached:
            getattr(torch, model.device.type).empty_cache()
        return
    if sum(p.numel() for p in model.parameters()) < 10 ** 8:
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):       # not glibc
        pass


def meeting_point(timeout):
    """Arguments of init_process_group: torchrun's store, under a name that only this start knows.

    torchrun keeps its store when it restarts the ranks, and with it the addresses of ranks that are
    gone; its count of restarts differs between nodes. So rank 0 makes up a name and tells it to
    those who greet it now, until all have confirmed."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":        # rank 0 makes a new store
        return {}
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = c10d.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                          is_master=False, timeout=datetime.timedelta(seconds=timeout))
    name = answer_greetings(store, world, timeout) if rank == 0 else greet(store, rank)
    return {"store": c10d.PrefixStore(name, store), "rank": rank, "world_size": world}


def greet(store, rank):
    """Ask rank 0 for the name of this start. Returns it when it has come."""
    greeting = uuid.uuid4().hex
    store.set(f"greeting/{rank}", greeting)
    name = store.get(f"answer/{greeting}").decode()         # waits
    store.set(f"{name}/{rank}", "confirmed")
    return name


def answer_greetings(store, world, timeout):
    """Make up the name of this start and tell it to all other ranks. Returns it when all have it.

    A rank may greet again after a restart, so greetings are answered until every rank has
    confirmed. Raises RuntimeError when some have not come in `timeout` seconds."""
    name = uuid.uuid4().hex
    deadline = time.monotonic() + timeout
    missing = set(range(1, world))
    while missing:
        for other in sorted(missing):
            if store.check([f"greeting/{other}"]):
                greeting = store.get(f"greeting/{other}").decode()
                store.set(f"answer/{greeting}", name)
        missing = {other for other in missing if not store.check([f"{name}/{other}"])}
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} have not come in {timeout} s")
        time.sleep(0.01)
    return name


def backends(kind):
    """The backend of a kind of device, and Gloo beside it: objects of the host travel over that."""
    if kind == "cpu":
        return "gloo"
    return f"cpu:gloo,{kind}:{c10d.get_default_backend_for_device(kind)}"


def close():
    """Leave the process group, if there is one.

    Drop sharded models before: what holds the group keeps its threads alive."""
    if c10d.is_initialized():
        gc.collect()
        c10d.destroy_process_group()


def rank():
    return c10d.get_rank() if c10d.is_initialized() else 0


def world():
    return c10d.get_world_size() if c10d.is_initialized() else 1


def split(count):
    """This rank's range of `count` items, on any world size.

    The ranges are contiguous and their sizes differ by at most one; rank 0 has the most."""
    return range(-(-count * rank() // world()), -(-count * (rank() + 1) // world()))


# --------------------------------------------------------------------------------------- sharding

class Sharding:
    """Where the weights of a model lie; call it on a model on the meta device, still empty.

    dtype: of computation. shard: ranks that hold one copy of the weights together; 0: all. offload:
    the parts, their gradients and the optimizer's state stay in the memory of the host. timeout:
    seconds of a collective of the mesh. Raises ValueError when shard does not divide the world, or
    there is nothing to offload from."""

    def __init__(self, device, dtype, shard=0, offload=False, timeout=1800):
        self.device = device
        self.dtype = dtype
        self.offload = offload
        shard = shard or world()
        if world() % shard:
            raise ValueError(f"--shard {shard}: {world()} rank{'s' * (world() > 1)} "
                             f"cannot be cut into groups of {shard}")
        if offload and device.type == "cpu":
            raise ValueError("--offload moves the optimizer's state from an accelerator to the "
                             "host: leave it out on the CPU")

        # one process in float32 needs no FSDP: the model's weights are its float32 masters
        self.active = c10d.is_initialized() or dtype != torch.float32 or offload
        if self.active:
            self.mesh = self.make_mesh(shard, timeout)

    def make_mesh(self, shard, timeout):
        """The mesh of ranks: (shard,), or (copies, shard) when there are several copies."""
        kind = self.device.type
        if not c10d.is_initialized():
            c10d.init_process_group(backends(kind), store=c10d.HashStore(), rank=0, world_size=1)
        if shard == world():
            return DeviceMesh.from_group(c10d.group.WORLD, kind, mesh_dim_names=("shard",))

        ranks = torch.arange(world()).view(-1, shard)
        of_copies = own_group(ranks.T.tolist(), timeout)
        of_shards = own_group(ranks.tolist(), timeout)
        return DeviceMesh.from_group([of_copies, of_shards], kind, mesh=ranks,
                                     mesh_dim_names=("copies", "shard"))

    def __call__(self, model):
        model.computes_on = self.device, self.dtype
        if not self.active:
            return model

        settings = {"mesh": self.mesh, "mp_policy": MixedPrecisionPolicy(
            self.dtype, torch.float32, cast_forward_inputs=False)}
        if self.offload:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")

        for module in (*model.model.layers, model):     # embedding and lm_head are gathered as one
            fully_shard(module, **settings)
            module.set_gradient_divide_factor(1.0)      # sums: the loss is divided already
            module.set_force_sum_reduction_for_comms(True)      # by SUM, which every backend has
        register_fsdp_forward_method(model, "token_logps")
        return model

    @property
    def home(self):
        """Device on which this rank keeps its part of the weights."""
        return torch.device("cpu") if self.offload else self.device


def own_group(rows, timeout):
    """This rank's process group among those of the rows (lists of ranks).

    Every rank makes all of them, in this order. A mesh would make them as well, but with a timeout
    of its own."""
    groups = [c10d.new_group(row, timeout=datetime.timedelta(seconds=timeout)) for row in rows]
    return next(group for row, group in zip(rows, groups) if rank() in row)


def sharded(model):
    return isinstance(model, FSDPModule)


def reduce_over_copies(model, now):
    """Say whether the next backward also sums gradients over the copies of the weights.

    Of several backwards only the last one has to."""
    if sharded(model):
        model.set_requires_all_reduce(now)


def reshard(model):
    """Give up the gathered weights that a forward without backward leaves.

    They would be old after the next update."""
    if sharded(model):
        model.reshard()


def local(tensor):
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def total(value):
    """A scalar as a float; of a sharded norm the whole."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).item()


# ------------------------------------------------------------------------------------ collectives

def barrier():
    if c10d.is_initialized():
        with waiting("barrier"):
            c10d.barrier()


def all_reduce(values, device, op="sum"):
    """A dict of named numbers, reduced over ranks ("sum" or "max"): the same names, as floats.

    Every rank must bring the same names in the same order. The numbers travel in float32, so counts
    stay exact to 16 million."""
    numbers = [float(value) for value in values.values()]
    numbers = torch.tensor(numbers, dtype=torch.float32, device=device)
    if c10d.is_initialized():
        with waiting("all_reduce"):
            c10d.all_reduce(numbers, op=c10d.ReduceOp.SUM if op == "sum" else c10d.ReduceOp.MAX)
    return dict(zip(values, numbers.tolist()))


def broadcast_object(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if c10d.is_initialized():
        with waiting("broadcast"):
            c10d.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value):
    """Every rank's value, in a list by rank, on every rank.

    Between our own processes only, because it pickles."""
    box = [value]
    if c10d.is_initialized():
        box = [None] * world()
        with waiting("all_gather"):
            c10d.all_gather_object(box, value)
    return box


def together(act):
    """Let rank 0 act. Every rank gets its result, or raises the error that it met."""
    result = problem = None
    if rank() == 0:
        try:
            result = act()
        except Exception as error:      # a full disk is an OSError, or of torch.save a RuntimeError
            problem = first_line(error)

    result, problem = broadcast_object((result, problem))
    if problem:
        raise Agreed(problem)
    return result


def each(act):
    """Let every rank act, without collectives. Each gets its own result, or raises the first error
    that any of them met."""
    result = problem = None
    try:
        result = act()
    except Exception as error:
        problem = first_line(error)
    problem = next(filter(None, gather_objects(problem)), None)
    if problem:
        raise Agreed(problem)
    return result


# --------------------------------------------------------------------------------------- watching

class Watchdog(threading.Thread):
    """Says on stderr which rank has been in which phase for longer than `limit` seconds.

    It says so again each time that the time has doubled."""

    def __init__(self, limit):
        super().__init__(daemon=True)
        self.limit = limit
        self.stopped = threading.Event()
        self.enter("start")

    def enter(self, phase, detail=""):
        self.base = phase
        self.detail = detail
        self.since = time.monotonic()
        self.told = 0.0

    @property
    def phase(self):
        return self.base + (f", {self.detail}" if self.detail else "")

    def run(self):
        while not self.stopped.wait(min(self.limit / 4, 10.0)):
            seconds = time.monotonic() - self.since
            if seconds > max(self.limit, 2 * self.told):
                self.told = seconds
                print(f"rank {rank()} (pid {os.getpid()} on {socket.gethostname()}) has been in "
                      f"{self.phase!r} for {seconds:.0f} s, here:", file=sys.stderr, flush=True)
                try:
                    faulthandler.dump_traceback(sys.stderr)
                except (AttributeError, OSError, ValueError):       # a stderr that is no file
                    pass


_watchdog = None


def watch(limit):
    """Start the watchdog; a limit of 0 starts none."""
    global _watchdog
    if limit > 0:
        _watchdog = Watchdog(limit)
        _watchdog.start()


def phase(name):
    """Tell the watchdog what this rank does from now on."""
    if _watchdog:
        _watchdog.enter(name)


def detail(text):
    """Tell the watchdog which part of the present phase this is."""
    if _watchdog:
        _watchdog.enter(_watchdog.base, text)


@contextmanager
def waiting(what):
    """While open, this rank waits for the others in a collective outside of the model.

    So the late rank is the one that is not waiting. Collectives inside the model are in
    "training"."""
    before = _watchdog.detail if _watchdog else ""
    detail(f"waiting for the others in {what}")
    yield
    detail(before)


# ----------------------------------------------------------------------------------------- errors

class Agreed(ValueError):
    """An error that every rank raises: one of them says it."""


LOST = re.compile(r"closed by peer|reset by peer|[Tt]imed? ?out|Broken pipe|remote process exited")


def lost_contact(error):
    """One line when an error says that another rank is gone or late, else None."""
    if world() == 1 or not LOST.search(str(error)):
        return None
    where = _watchdog.phase if _watchdog else "a collective"
    return (f"rank {rank()} lost another rank in {where!r} ({first_line(error)[:200]}): "
            "its own message says why")


def fail(error):
    """End the program with one line.

    One of several ranks ends at once: leaving the group would wait for the others, who may wait for
    this one. torchrun ends them."""
    if world() == 1:
        sys.exit(f"error: {error}")
    if rank() == 0 or not isinstance(error, Agreed):
        print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def first_line(error):
    """The first line of an error's message; its type when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
