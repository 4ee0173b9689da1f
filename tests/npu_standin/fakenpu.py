"""Computes for torch_npu: each of its kernels for PyTorch's operators becomes the CPU's kernel on the same memory.

The stand-in's device memory is host memory (cann.c), so a tensor on "npu" can be read and written as a CPU tensor with the
same storage and strides: views, in-place and out= behave as they do on a device. What allocates tensors or makes views of
them stays torch_npu's. Only operators that torch_npu has a kernel for are replaced: any other reaches torch_npu's own
fallback, which with_npu makes an error. The fused operators of the NPU are in npuref.py.

called: operator -> how often, so that a test can say which kernels a program launches.
"""
import warnings
from collections import Counter

import torch
import torch_npu  # noqa: F401
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

called = Counter()
CPU = torch.device("cpu")
TORCH_NPUS_OWN = {
    "empty.memory_format", "empty.out", "empty_like", "empty_strided", "empty_with_format", "unsafe_empty_with_format",
    "new_empty", "new_empty_strided", "resize_", "resize_as_", "set_", "set_.source_Storage",
    "set_.source_Storage_storage_offset", "set_.source_Tensor", "is_set_to", "as_strided", "as_strided_", "view", "alias",
    "_reshape_alias", "unfold", "view_as_real", "view_as_complex", "detach", "lift", "lift_fresh", "contiguous", "_to_copy",
    "record_stream", "_pin_memory", "is_pinned", "_has_compatible_shallow_copy_type", "scaled_dot_product_attention",
    "_fused_sdp_choice"}


def on_npu(x):
    return isinstance(x, torch.Tensor) and x.device.type == "npu"


def host(tensor):
    """A CPU tensor over the memory of an NPU tensor."""
    storage = tensor.untyped_storage()
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    alias = torch.empty(0, dtype=tensor.dtype, device=CPU)
    return alias.set_(same, tensor.storage_offset(), tensor.size(), tensor.stride())


def to_npu(tensor, device):
    """A new NPU tensor with the values and strides of a CPU tensor."""
    new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    host(new).copy_(tensor)
    return new


def device_of(arguments):
    """The NPU that the arguments of an operator are on, or name; else the present one."""
    for x in tree_leaves(arguments):
        device = x.device if isinstance(x, torch.Tensor) else x
        if isinstance(device, torch.device) and device.type == "npu" and device.index is not None:
            return device
    return torch.device("npu", torch.npu.current_device())


def lower(x):
    """An argument for the NPU as one for the CPU."""
    if on_npu(x):
        return host(x)
    if isinstance(x, torch.device) and x.type == "npu":
        return CPU
    if isinstance(x, torch.Generator) and x.device.type == "npu":
        return follower(x)
    return x


def follower(generator):
    """A CPU generator by the seed and the offset of an NPU's, which moves on."""
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.Generator().manual_seed((seed * 1000003 + offset) % 2 ** 62)


def kernel(name):
    """What takes the place of torch_npu's kernel for the operator aten::`name`."""
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
            if on_npu(npu) and cpu.shape != npu.shape:      # an out= that the CPU's kernel has resized
                npu.resize_(cpu.shape)
                host(npu).copy_(cpu)
        return tree_map_only(torch.Tensor, lambda x: back[id(x)] if id(x) in back else to_npu(x, device), result)
    return run


def replace_kernels():
    """Returns the registrations, which last as long as they are kept."""
    library = torch.library.Library("aten", "IMPL")
    names = torch._C._dispatch_get_registrations_for_dispatch_key
    computable = {name for key in ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd") for name in names(key)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # one a kernel that it replaces another
        for name in names("PrivateUse1"):
            short = name.removeprefix("aten::")
            if short != name and short not in TORCH_NPUS_OWN and name in computable:
                library.impl(short, kernel(short), "PrivateUse1")
    return library


torch.npu.init()
LIBRARY = replace_kernels()
