"""Computes for torch_npu: its kernels of PyTorch's operators become the CPU's, on the same memory.

The stand-in's device memory is host memory (cann.c). So a tensor on "npu" can be read and written
as a CPU tensor with the same storage and strides: views, in-place and out= behave as on a device.
The operators that allocate tensors or make views of them stay torch_npu's. Only operators that
torch_npu has a kernel for are replaced. Any other reaches torch_npu's own fallback, which
with_npu makes an error. The fused operators of the NPU are in npuref.py.

`called` counts the launches of each operator, so that a test can say which kernels a program uses.
"""
import warnings
from collections import Counter

import torch
import torch_npu  # noqa: F401
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

called = Counter()
CPU = torch.device("cpu")
TORCH_NPUS_OWN = {      # they allocate tensors, or make views
    "empty.memory_format", "empty.out", "empty_like", "empty_strided", "empty_with_format",
    "unsafe_empty_with_format", "new_empty", "new_empty_strided", "resize_", "resize_as_", "set_",
    "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "is_set_to",
    "as_strided", "as_strided_", "view", "alias", "_reshape_alias", "unfold", "view_as_real",
    "view_as_complex", "detach", "lift", "lift_fresh", "contiguous", "_to_copy", "record_stream",
    "_pin_memory", "is_pinned", "_has_compatible_shallow_copy_type", "scaled_dot_product_attention",
    "_fused_sdp_choice",
}


def on_npu(x):
    return isinstance(x, torch.Tensor) and x.device.type == "npu"


def host(tensor):
    """Returns a CPU tensor over the memory of an NPU tensor."""
    storage = tensor.untyped_storage()
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    alias = torch.empty(0, dtype=tensor.dtype, device=CPU)
    return alias.set_(same, tensor.storage_offset(), tensor.size(), tensor.stride())


def to_npu(tensor, device):
    """Returns a new NPU tensor with the values and strides of a CPU tensor."""
    new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    host(new).copy_(tensor)
    return new


def device_of(arguments):
    """Returns the NPU that the arguments of an operator are on or name, else the present one."""
    for x in tree_leaves(arguments):
        device = x.device if isinstance(x, torch.Tensor) else x
        if isinstance(device, torch.device) and device.type == "npu" and device.index is not None:
            return device
    return torch.device("npu", torch.npu.current_device())


def lower(x):
    """Returns an argument for the NPU as one for the CPU."""
    if on_npu(x):
        return host(x)
    if isinstance(x, torch.device) and x.type == "npu":
        return CPU
    if isinstance(x, torch.Generator) and x.device.type == "npu":
        return follower(x)
    return x


def follower(generator):
    """Returns a CPU generator seeded by an NPU's seed and offset, and moves that offset on."""
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.Generator().manual_seed((seed * 1000003 + offset) % 2 ** 62)


def kernel(name):
    """Returns the function that replaces torch_npu's kernel of the operator aten::`name`."""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    random = any(argument.name == "generator" for argument in operator._schema.arguments)

    def run(*args, **kwargs):
        called[f"aten::{name}"] += 1
        device = device_of((args, kwargs))
        if random and kwargs.get("generator") is None:
            kwargs["generator"] = torch.npu.default_generators[device.index]
        given, structure = tree_flatten((args, kwargs))
        lowered = [lower(x) for x in given]
        args, kwargs = tree_unflatten(lowered, structure)
        result = operator(*args, **kwargs)
        back = {}
        for cpu, npu in zip(lowered, given):
            if isinstance(npu, torch.Tensor):
                back[id(cpu)] = npu
            if on_npu(npu) and cpu.shape != npu.shape:      # an out= that the CPU has resized
                npu.resize_(cpu.shape)
                host(npu).copy_(cpu)

        def returned(x):        # an argument that was written comes back itself
            return back[id(x)] if id(x) in back else to_npu(x, device)

        return tree_map_only(torch.Tensor, returned, result)
    return run


def replace_kernels():
    """Replaces all that the CPU can compute. Returns the registrations, which last while kept."""
    library = torch.library.Library("aten", "IMPL")
    names = torch._C._dispatch_get_registrations_for_dispatch_key
    keys = ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    computable = {name for key in keys for name in names(key)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # each kernel warns that it replaces another
        for name in names("PrivateUse1"):
            short = name.removeprefix("aten::")
            if short != name and short not in TORCH_NPUS_OWN and name in computable:
                library.impl(short, kernel(short), "PrivateUse1")
    return library


torch.npu.init()
LIBRARY = replace_kernels()
