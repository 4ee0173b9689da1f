r"""Checks the collectives of device "npu", and FSDP2 on top of them, over any number of ranks.

    tests/npu_standin/with_npu torchrun --standalone --nproc-per-node 4 \
        tests/npu_standin/check_hccl.py --shard 2

Every rank contributes numbers that are exact in each type, so results must be equal, not close.
They are checked over the world and over both sub-groups of the mesh (world / shard, shard). Then
FSDP2 trains a small module on that mesh, against one copy on the CPU. A mismatch ends the rank
with an error, and so torchrun with a non-zero status. Nothing here knows of the stand-in: the
same command without with_npu checks real devices.
"""
import argparse
import copy
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

LONG = 300_001      # float32 numbers that take more than one of the stand-in's chunks


def contribution(rank, start, n, dtype):
    """Returns numbers start to start + n of a rank.

    Sums over 25 ranks stay below 256, which bfloat16 holds exactly."""
    modulus = 11 if dtype == torch.bfloat16 else 97
    return ((torch.arange(start, start + n) + 3 * rank) % modulus).to(dtype)


def equal(what, found, expected):
    if not torch.equal(found.cpu(), expected):
        found, expected = (x.flatten()[:4].tolist() for x in (found, expected))
        raise SystemExit(f"rank {dist.get_rank()}: {what} is wrong: {found}..., not {expected}...")


def check_group(name, group, device, dtype, n):
    """Checks every collective of one group for one type, with n numbers a rank."""
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
    parts = [contribution(rank, 0, n, dtype) for rank in ranks]
    # of the collectives that give each rank n numbers of its own
    my_parts = [contribution(rank, me * n, n, dtype) for rank in ranks]
    whole = contribution(ranks[me], 0, n * len(ranks), dtype).to(device)
    what = f"of {n} {dtype} over {name} {ranks}"

    largest = torch.stack(parts).amax(0)
    for op, expected in ((dist.ReduceOp.SUM, sum(parts)), (dist.ReduceOp.MAX, largest)):
        x = parts[me].to(device)
        dist.all_reduce(x, op, group)
        equal(f"all_reduce {what}", x, expected)

    x = torch.empty(n * len(ranks), dtype=dtype, device=device)
    dist.all_gather_into_tensor(x, parts[me].to(device), group)
    equal(f"all_gather {what}", x, torch.cat(parts))

    x = torch.empty(n, dtype=dtype, device=device)
    dist.reduce_scatter_tensor(x, whole, group=group)
    equal(f"reduce_scatter {what}", x, sum(my_parts))

    x = parts[me].to(device)
    dist.broadcast(x, src=ranks[-1], group=group)
    equal(f"broadcast {what}", x, parts[-1])

    x = torch.empty(n, dtype=dtype, device=device)
    given = list(whole.split(n)) if me == len(ranks) - 1 else None
    dist.scatter(x, given, src=ranks[-1], group=group)
    equal(f"scatter {what}", x, my_parts[-1])


def check_fsdp(mesh, device):
    """Checks two steps of a module whose sizes no shard divides, on a batch a rank.

    FSDP2 averages the gradients."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 3))
    sharded = copy.deepcopy(plain).to(device)
    for module in (*sharded, sharded):
        fully_shard(module, mesh=mesh)
    batches = torch.randn(2, dist.get_world_size(), 6, 10)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (plain, sharded)]
    for batch in batches:
        plain(batch).pow(2).mean().backward()
        sharded(batch[dist.get_rank()].to(device)).pow(2).mean().backward()
        for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(q.grad.full_tensor().cpu(), p.grad,
                                       msg=lambda text: f"gradient of {name}: {text}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor().cpu(), p.detach())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", type=int, default=2,
                        help="ranks that share one copy of the module [2]")
    shard = parser.parse_args().shard
    device = torch.device("npu", int(os.environ["LOCAL_RANK"]))
    torch.accelerator.set_device_index(device.index)
    dist.init_process_group("cpu:gloo,npu:hccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("npu", (world // shard, shard), mesh_dim_names=("replicate", "shard"))

    of_mesh = {name: mesh.get_group(name) for name in mesh.mesh_dim_names}
    groups = {"the world": dist.group.WORLD, **of_mesh}
    for name, group in groups.items():
        check_group(name, group, device, torch.float32, LONG)
        for dtype in (torch.int64, torch.bfloat16):
            check_group(name, group, device, dtype, 5)
    names = [None] * world
    dist.all_gather_object(names, (rank, str(device)))
    check_fsdp(mesh, device)
    dist.barrier()
    if rank == 0:
        print(f"{world} ranks, mesh {world // shard} x {shard}: collectives and FSDP2 are right; "
              "devices", " ".join(name for _, name in sorted(names)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
