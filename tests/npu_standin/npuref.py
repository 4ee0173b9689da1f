"""The NPU's fused operators that a decoder-only trainer uses, as formulas on the CPU.

    norm, RoPE, SwiGLU      npu_rms_norm, npu_rotary_mul, npu_swiglu and their backward operators
    attention               npu_fusion_attention (and v3, which scaled_dot_product_attention calls),
                            their backward operators, npu_fused_infer_attention_score
    the rest                torch_npu's substitutes for PyTorch's gather, matmul and conversions

They stand under torch_npu's own schemas. The limits that its documents state are errors here. So
is every argument that a formula below does not know, unless it has its default value. Masks are 1
where a key is hidden, the inverse of PyTorch's.
"""
import inspect
import warnings

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map, tree_map_only

from fakenpu import called, device_of, lower, to_npu

HALF = (torch.float16, torch.bfloat16)
LIBRARIES = {namespace: torch.library.Library(namespace, "IMPL") for namespace in ("npu", "aten")}
# arguments without effect on the values: accuracy, dropout, what backward keeps of forward
WITHOUT_EFFECT = {"inner_precise", "gen_mask_parallel", "sync", "softmax_max", "softmax_sum",
                  "softmax_in", "attention_in", "seed", "offset", "numels"}


def need(condition, message):
    if not condition:
        raise RuntimeError(f"npu_standin: {message}")


def kernel(name, namespace="npu", checked=False):
    """Registers a function of CPU tensors as the NPU's kernel.

    The function gets those arguments of the schema that it names. With checked, torch_npu's own
    checks in C++ come first. They end where its library of kernels is absent."""
    schema = getattr(getattr(torch.ops, namespace), name).default._schema
    original = torch.library.get_kernel(f"{namespace}::{name}", "PrivateUse1") if checked else None

    def register(function):
        known = inspect.signature(function).parameters
        need(set(known) <= {argument.name for argument in schema.arguments},
             f"{name} has other arguments: {schema}")

        def run(*args, **kwargs):
            called[f"{namespace}::{name}"] += 1
            device = device_of((args, kwargs))
            given = {argument.name: argument.default_value for argument in schema.arguments}
            given |= {**dict(zip(given, args)), **kwargs}
            if original:
                torch_npus_checks(original, given)
            for argument in schema.arguments:
                used = argument.name in known or argument.name in WITHOUT_EFFECT
                need(used or given[argument.name] == argument.default_value,
                     f"{name}: {argument.name} is not written")
            outputs = function(**{key: tree_map(lower, given[key]) for key in known})
            return tree_map_only(torch.Tensor, lambda x: to_npu(x, device), outputs)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # that it replaces another
            LIBRARIES[namespace].impl(name, run, "PrivateUse1")
        return function
    return register


def torch_npus_checks(original, arguments):
    try:
        original.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), **arguments)
    except RuntimeError as error:
        if not any(end in str(error) for end in ("not in libopapi.so", "error code is 500000")):
            raise


def gradients(function, inputs, grad):
    """Returns the gradients of function(*inputs), by an autograd of its own inside a kernel."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradPrivateUse1", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*inputs), inputs, grad)


# ------------------------------------------------------------------------------- norm, RoPE, SwiGLU

@kernel("npu_rms_norm")
def rms_norm(input, gamma, epsilon):
    need(input.dtype == gamma.dtype or input.dtype in HALF and gamma.dtype == torch.float32,
         f"npu_rms_norm of {input.dtype} by {gamma.dtype}")
    rstd = torch.rsqrt(input.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


@kernel("npu_rms_norm_backward")
def rms_norm_backward(dy, input, gamma, rstd):
    normal, scaled = input.float() * rstd, dy.float() * gamma.float()
    dx = rstd * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    # the second stays float32 on the NPU
    return dx.to(dy.dtype), (dy.float() * normal).flatten(0, -2).sum(0)


def rotary(x, cos, sin):
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat((-two, one), -1) * sin


@kernel("npu_rotary_mul")
def rotary_mul(input, r1, r2, rotary_mode):
    need(rotary_mode == "half", f"npu_rotary_mul: rotary_mode {rotary_mode} is not written")
    D = input.shape[-1]
    need(input.ndim in (3, 4) and D % 2 == 0 and D < 896,
         f"npu_rotary_mul of shape {tuple(input.shape)}")
    need(r1.shape[-1] == r2.shape[-1] == D,
         "npu_rotary_mul: cosines and sines are as wide as the input")
    return rotary(input, r1, r2)


@kernel("npu_rotary_mul_backward")
def rotary_mul_backward(grad, input, r1, r2):
    return gradients(rotary, (input, r1, r2), grad)


@kernel("npu_swiglu")
def swiglu(input, dim):
    gate, up = input.chunk(2, dim)
    return F.silu(gate) * up


@kernel("npu_swiglu_backward")
def swiglu_backward(grad_output, input, dim):
    return gradients(lambda x: swiglu(x, dim), (input,), grad_output)[0]


# ---------------------------------------------------------------------------------------- attention

def hidden(queries, keys, mask, mode, before, after):
    """Returns the mask (queries, keys) that a sparse_mode means for one sequence.

    None says that nothing is hidden."""
    if mask is None:
        return None         # whatever the mode
    need(mask.dtype in (torch.bool, torch.uint8), f"atten_mask of {mask.dtype}")
    need(mode in (0, 1, 2, 3, 4), f"sparse_mode {mode} is not written")
    size, offset = tuple(mask.shape[-2:]), torch.arange(keys) - torch.arange(queries)[:, None]
    if mode < 2:
        need(mask.ndim in (2, 4) and size == (queries, keys),
             f"atten_mask {tuple(mask.shape)} for {queries} x {keys}")
        return mask.bool() if mode else mask.bool() | (offset > after) | (offset < -before)
    need(size == (2048, 2048), f"sparse_mode {mode} takes a mask of 2048 x 2048")
    if mode == 2:           # causal from the upper left
        return offset > 0
    offset -= keys - queries
    if mode == 3:           # causal from the lower right
        return offset > 0
    return (offset > after) | (offset < -before)


def scores(q, k, mask, scale):
    """Returns scores (B, heads, queries, keys) in float32, -inf where a key is hidden.

    q is (B, heads, queries, D) and k is (B, key heads, keys, D)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    raw = (q.float() @ k.float().mT) * scale
    return raw if mask is None else raw.masked_fill(mask, float("-inf"))


def attend(q, k, v, mask, scale):
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (scores(q, k, mask, scale).softmax(-1).nan_to_num(0) @ v.float()).to(q.dtype)


def check_heads(q, k, v, dtypes, head_num, layout, widest):
    """Checks dtypes, numbers of heads and widths of q, k and v in one of the layouts."""
    need(q.dtype == k.dtype == v.dtype and q.dtype in dtypes,
         f"attention of {q.dtype}, {k.dtype}, {v.dtype}")
    heads, key_heads = (x.shape[{"BNSD": 1}.get(layout, -2)] for x in (q, k))
    need(heads == head_num <= 256 and heads % key_heads == 0,
         f"{heads} heads, {key_heads} of keys, head_num {head_num}")
    need(q.shape[-1] == k.shape[-1] <= widest, f"queries {q.shape[-1]} and keys {k.shape[-1]} wide")


def fusion(query, key, value, head_num, input_layout, mask, scale, before, after, mode, q_ends,
           k_ends):
    """Computes npu_fusion_attention by differentiable operators, in layouts BNSD, BSND and TND."""
    need(input_layout in ("BNSD", "BSND", "TND"), f"layout {input_layout} is not written")
    check_heads(query, key, value, (*HALF, torch.float32), head_num, input_layout, 768)

    def bnsd(q, k, v):
        return attend(q, k, v, hidden(q.shape[2], k.shape[2], mask, mode, before, after), scale)
    if input_layout == "BNSD":
        return bnsd(query, key, value)
    if input_layout == "BSND":
        return bnsd(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    # TND: sequences behind each other, attended to one by one
    ends = [[0, *map(int, x)] for x in (q_ends, k_ends)]
    need([x[-1] for x in ends] == [len(query), len(key)],
         "TND: the lengths do not cover the tensors")
    need(len(ends[0]) == len(ends[1]) <= 1025,
         "TND: at most 1024 sequences, the same number of queries' and keys'")
    queries, keys = ([end - start for start, end in zip(x, x[1:])] for x in ends)
    sequences = zip(query.split(queries), key.split(keys), value.split(keys))
    attended = []
    for sequence in sequences:
        q, k, v = (x.transpose(0, 1)[None] for x in sequence)
        attended.append(bnsd(q, k, v)[0].transpose(0, 1))
    return torch.cat(attended)


def outputs_of_fusion(out, head_num, input_layout):
    """Returns the attention and three more outputs, in the right shapes.

    A chip's backward reads those; the formulas above need none of them."""
    rows = out if input_layout != "BSND" else out.transpose(1, 2)
    statistics = torch.zeros(*rows.shape[:-1], 8)
    return out, statistics, statistics.clone(), out.new_empty(0)


@kernel("npu_fusion_attention", checked=True)
def fusion_attention(query, key, value, head_num, input_layout, atten_mask, scale, pre_tockens,
                     next_tockens, actual_seq_qlen, actual_seq_kvlen, sparse_mode):
    out = fusion(query, key, value, head_num, input_layout, atten_mask, scale, pre_tockens,
                 next_tockens, sparse_mode, actual_seq_qlen, actual_seq_kvlen)
    return *outputs_of_fusion(out, head_num, input_layout), 0, 0, 0


@kernel("npu_fusion_attention_v3", checked=True)
def fusion_attention_v3(query, key, value, head_num, input_layout, atten_mask, scale, pre_tockens,
                        next_tockens, actual_seq_qlen, actual_seq_kvlen, sparse_mode):
    out = fusion(query, key, value, head_num, input_layout, atten_mask, scale, pre_tockens,
                 next_tockens, sparse_mode, actual_seq_qlen, actual_seq_kvlen)
    seed, offset = torch.zeros(2, 1, dtype=torch.int64)
    return *outputs_of_fusion(out, head_num, input_layout), seed, offset


@kernel("npu_fusion_attention_grad")
@kernel("npu_fusion_attention_grad_v3")
def fusion_attention_grad(query, key, value, dy, head_num, input_layout, atten_mask, scale_value,
                          pre_tockens, next_tockens, actual_seq_qlen, actual_seq_kvlen,
                          sparse_mode):
    def forward(q, k, v):
        return fusion(q, k, v, head_num, input_layout, atten_mask, scale_value, pre_tockens,
                      next_tockens, sparse_mode, actual_seq_qlen, actual_seq_kvlen)
    return *gradients(forward, (query, key, value), dy), query.new_empty(0), torch.empty(0)


@kernel("npu_fused_infer_attention_score", checked=True)
def fused_infer_attention_score(query, key, value, atten_mask, actual_seq_lengths_kv, num_heads,
                                scale, input_layout, num_key_value_heads, sparse_mode,
                                softmax_lse_flag, pre_tokens, next_tokens):
    """Attends in decoding: keys and values are a cache, which each row has filled to its length."""
    name = "npu_fused_infer_attention_score"
    need(input_layout in ("BSND", "BNSD"), f"{name}: layout {input_layout} is not written")
    need(all(x.is_contiguous() for x in (query, key, value)),
         f"{name} of tensors that are not contiguous")
    check_heads(query, key, value, HALF, num_heads, input_layout, 512)
    q, k, v = (x if input_layout == "BNSD" else x.transpose(1, 2) for x in (query, key, value))
    (B, heads, queries, D), (rows, key_heads, slots, _) = q.shape, k.shape
    known_heads = num_key_value_heads in (0, key_heads)
    need(known_heads and (num_key_value_heads or heads == key_heads) and heads <= 64 * key_heads,
         f"{name}: {heads} heads, {key_heads} of keys, num_key_value_heads {num_key_value_heads}")
    need(D % 16 == 0 and B == rows <= 65536 and slots <= 262144,
         f"{name} of {tuple(query.shape)} and {tuple(key.shape)}")
    need(sparse_mode < 2 or atten_mask is not None,
         f"{name}: sparse_mode {sparse_mode} without a mask")

    mask = hidden(queries, slots, atten_mask, sparse_mode, pre_tokens, next_tokens)
    if actual_seq_lengths_kv is not None:
        lengths = torch.tensor([int(n) for n in actual_seq_lengths_kv])
        need(len(lengths) in (1, B) and 1 <= lengths.min() and lengths.max() <= slots,
             f"{name}: lengths of {slots} slots")
        need(sparse_mode < 2, f"{name}: sparse_mode {sparse_mode} with lengths is not written")
        behind = torch.arange(slots) >= lengths[:, None, None, None]
        mask = behind if mask is None else mask | behind

    out = attend(q, k, v, mask, scale)
    lse = torch.empty(0)
    if softmax_lse_flag:
        lse = scores(q, k, mask, scale).logsumexp(-1, keepdim=True)
    return out if input_layout == "BNSD" else out.transpose(1, 2), lse


# ----------------------------------------------------------------------------------------- the rest

@kernel("matmul_backward", "aten")
def matmul_backward(grad, self, other, mask):
    both = gradients(torch.matmul, (self, other), grad)
    return tuple(x if wanted else None for x, wanted in zip(both, mask))


@kernel("npu_gather_backward")
def gather_backward(grad, self_size, dim, index, sparse_grad):
    return grad.new_zeros(self_size).scatter_add_(dim, index, grad)


@kernel("npu_dtype_cast")
def dtype_cast(input, dtype, input_dtype):
    return input.to(dtype)


@kernel("_npu_dtype_cast")
def dtype_cast_inner(input, dtype):
    return input.to(dtype)


@kernel("_npu_dtype_cast_backward")
def dtype_cast_backward(grad, dtype):
    return grad.to(dtype)
