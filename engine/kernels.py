"""The formulas of the transformer, each with the kernel that a device has for it; without one, plain PyTorch.

    rms_norm, swiglu, rope_tables and rotate
    attention               causal, over packed tokens: training and prefill
    shared_attention        of single tokens over a prompt's keys, stored once for its group, and each row's own: decode
    partial_attention       over a part of the keys, with log-sum-exps, so that parts can be merged: decode, by kernels

CUDA: varlen_attn of PyTorch, in half precision. Ascend NPUs: the fused operators of torch_npu, which need no import by name.
Everything else is plain PyTorch, which the kernels are tested against.
"""
import inspect
import math
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F

VARLEN = set()      # what CUDA's kernel takes: it grew from version to version


def load_varlen():
    """Bring varlen_attn in, if this PyTorch has it. Its import takes half a second."""
    global AuxRequest, VARLEN, varlen_attn
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
        VARLEN = set(inspect.signature(varlen_attn).parameters)
    except ImportError:
        pass


if torch.backends.cuda.is_built():
    load_varlen()


def rms_norm(x, weight, eps):
    """x (..., D) scaled to unit root mean square, in float32, then by weight (D,), or (H, D) for x (..., H, D)."""
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        return _normed(x, weight, eps)[0]
    if weight.ndim > 1:     # the kernels take one weight for all heads
        return rms_norm(x, _ones(x.shape[-1], x.dtype, x.device), eps) * weight
    if x.device.type == "cpu":
        return _RMSNorm.apply(x, weight, eps)
    if x.device.type == "npu":
        return torch.ops.npu.npu_rms_norm(x, weight, eps)[0]
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _normed(x, weight, eps):
    """(the norm's output, 1 / root mean square (..., 1) in float32)."""
    y = x.float()
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    scale = torch.addcmul(_number(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (y * scale).to(x.dtype).mul_(weight), scale


class _RMSNorm(torch.autograd.Function):
    """On the CPU, where autograd's way back through the formula takes twice the passes over memory.

    y = w x s with s = (mean x^2 + eps)^(-1/2):  dw = sum over rows of g x s,  dx = g w s - x s^3 (g x . w) / D."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        both, w = grad.float() * x, weight.float()
        d_weight = torch.mv(both.reshape(-1, both.shape[-1]).T, scale.flatten())
        pull = (both @ w)[..., None].mul_(scale ** 3)
        dx = (grad * w).mul_(scale).addcmul_(x, pull, value=-1 / x.shape[-1])
        return dx.to(x.dtype), d_weight.to(weight.dtype), None


def swiglu(x):
    """silu(first half) * second half of the last dimension."""
    if x.device.type == "npu":
        return torch.ops.npu.npu_swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def inverse_frequencies(config, device):
    """RoPE's (D/2,) frequencies; "llama3" slows the low ones down and blends in between."""
    d = config.head_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, device=device).float() / d)
    s = config.rope_scaling
    if s is None:
        return freq
    turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)    # over the original context
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * freq / s["factor"] + blend * freq


def rope_tables(positions, frequencies, dtype):
    """cos and sin (M, 1, D) of positions (M,), computed once a forward and shared by all layers; see rotate."""
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    first = sin if positions.device.type == "npu" else -sin
    return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((first, sin), -1)[:, None].to(dtype)


def rotate(x, cos, sin):
    """RoPE on x (M, H, D) by rope_tables; pairs are (i, i + D/2), as in every HF checkpoint.

    (a, b) -> (a cos - b sin, b cos + a sin): the minus is in the table, except for Ascend's kernel, which brings its own."""
    if x.device.type == "npu":
        return torch.ops.npu.npu_rotary_mul(x[None], cos[None], sin[None])[0]      # older versions know 4-D only
    return _Rotation.apply(x, cos, sin) if torch.is_grad_enabled() else _rotated(x, cos, sin)


def _rotated(x, cos, sin, sign=1):
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=sign)


class _Rotation(torch.autograd.Function):
    """The way back from a rotation is the rotation by the opposite angle; autograd's has a third more passes over memory."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        return _rotated(grad, *ctx.saved_tensors, sign=-1), None, None


# ------------------------------------------------------------------ attention over packed tokens (training and prefill)

class Sequences:
    """Who sees what among packed tokens, without padding.

    Sequence s owns the next queries[s] of the packed tokens. It sees keys[s] tokens, the last of which are its own: its
    last query sees them all, the one before it one fewer, and so on. index (sum of keys,) names them among the packed
    tokens; None: every sequence sees its own tokens only. So several completions can see one copy of their prompt."""

    def __init__(self, queries, keys=None, index=None, device="cpu"):
        self.queries, self.keys = list(queries), list(keys or queries)
        self.device = torch.device(device)
        self.index = None if index is None else torch.as_tensor(index, device=self.device)

    @cached_property
    def ends(self):
        """Cumulative queries and keys, (count + 1,) int32 from 0, for varlen_attn."""
        return [torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=self.device) for n in (self.queries, self.keys)]

    @cached_property
    def buckets(self):
        """Sequences of like size, padded, for devices without such a kernel: [(query index (n, Q), key index (n, K), mask)],
        and for each packed token its place among the flattened queries of all buckets."""
        q_start, k_start = ([0, *accumulate(n)] for n in (self.queries, self.keys))
        order, parts = sorted(range(len(self.queries)), key=lambda s: (self.queries[s], self.keys[s])), []
        for s in order:     # at most a quarter longer than the bucket's first, or a few tokens; keys: twice
            first = parts[-1][0] if parts else s
            if not parts or self.queries[s] > 1.25 * self.queries[first] + 8 or self.keys[s] > 2 * self.keys[first] + 64:
                parts.append([])
            parts[-1].append(s)
        source = np.arange(k_start[-1]) if self.index is None else self.index.cpu().numpy()
        back, out, offset = np.empty(q_start[-1], np.int64), [], 0
        for part in parts:
            Q, K = max(self.queries[s] for s in part), max(self.keys[s] for s in part)
            q, k = np.zeros((len(part), Q), np.int64), np.zeros((len(part), K), np.int64)       # padding reads token 0
            for row, s in enumerate(part):
                q[row, :self.queries[s]] = np.arange(q_start[s], q_start[s + 1])
                k[row, :self.keys[s]] = source[k_start[s]:k_start[s + 1]]
                back[q_start[s]:q_start[s + 1]] = offset + row * Q + np.arange(self.queries[s])
            offset += q.size
            before = torch.tensor([self.keys[s] - self.queries[s] for s in part])
            mask = None
            if before.any():        # else plainly causal
                mask = (torch.arange(K) <= torch.arange(Q)[:, None] + before[:, None, None])[:, None].to(self.device)
            out.append((torch.from_numpy(q).to(self.device), torch.from_numpy(k).to(self.device), mask))
        return out, torch.from_numpy(back).to(self.device)


def attention(q, k, v, sequences):
    """Causal attention of packed tokens: q (M, H, D), k and v (M, Hkv, D) -> (M, H, D)."""
    if q.device.type == "npu":
        return _ascend_attention(q, *_seen(k, v, sequences), sequences)
    if q.device.type == "cuda" and q.dtype != torch.float32 and "window_size" in VARLEN:
        return _flash_attention(q, *_seen(k, v, sequences), sequences)
    return _padded_attention(q, k, v, sequences)


def _flash_attention(q, k, v, sequences):
    """varlen_attn on ragged sequences, causal from the lower right. Before PyTorch 2.12 it knows no grouped heads."""
    share, grouped = q.shape[1] // k.shape[1], {}
    if share > 1 and "enable_gqa" in VARLEN:
        grouped = {"enable_gqa": True}
    elif share > 1:
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    return varlen_attn(q, k, v, *sequences.ends, max(sequences.queries), max(sequences.keys), window_size=(-1, 0), **grouped)


def _seen(k, v, sequences):
    return (k, v) if sequences.index is None else (k.index_select(0, sequences.index), v.index_select(0, sequences.index))


def _padded_attention(q, k, v, sequences):
    buckets, back = sequences.buckets
    out = []
    for q_index, k_index, mask in buckets:
        pick = [x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)
                for x, index in ((q, q_index), (k, k_index), (v, k_index))]
        y = F.scaled_dot_product_attention(*pick, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
        out.append(y.transpose(1, 2).reshape(-1, *q.shape[1:]))
    return torch.cat(out).index_select(0, back)


def _ascend_attention(q, k, v, sequences):
    """npu_fusion_attention on ragged sequences; sparse_mode 3 is causal from the lower right, its mask 1 where hidden."""
    hidden, out, q_end, k_end = _hidden_keys(q.device), [], 0, 0
    for i in range(0, len(sequences.queries), 1000):        # the kernel's limit is 1024 sequences
        queries, keys = (list(accumulate(n[i:i + 1000])) for n in (sequences.queries, sequences.keys))
        out.append(torch.ops.npu.npu_fusion_attention(
            q[q_end:q_end + queries[-1]], k[k_end:k_end + keys[-1]], v[k_end:k_end + keys[-1]], q.shape[1], "TND",
            atten_mask=hidden, scale=q.shape[-1] ** -0.5, sparse_mode=3, actual_seq_qlen=queries, actual_seq_kvlen=keys)[0])
        q_end, k_end = q_end + queries[-1], k_end + keys[-1]
    return torch.cat(out) if len(out) > 1 else out[0]


@lru_cache
def _hidden_keys(device):
    with torch.inference_mode(False):       # sampling may come first, and training saves it for the way back
        return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)


@lru_cache
def _number(value):
    with torch.inference_mode(False):
        return torch.tensor(value)


@lru_cache
def _ones(shape, dtype, device):
    with torch.inference_mode(False):
        return torch.ones(shape, dtype=dtype, device=device)


# -------------------------------------------------------------------- attention of one new token a row (sampling)

def shared_attention(q, prompt_k, prompt_v, own, mask, together, back):
    """Attention of R single tokens, each over the keys of its prompt and its own: one softmax over both.

    A prompt's keys (P, Hkv, S, D) are stored once; all queries of its rows read them together, and query heads that share a key
    head (2305.13245) are folded into the query dimension, so neither is ever repeated. own: the rows' own keys and values, a
    list of pairs (R, Hkv, s, D). mask (R, 1, S + sum of s): 0, and -inf on slots that hold nothing. together: which (row,
    key head) stands in each cell of the grid (P, Hkv, columns); back: the cell of each (row, key head). q (R, H, D) -> the same."""
    (R, H, D), (P, kv, S, _) = q.shape, prompt_k.shape
    share = H // kv
    q = q.reshape(R * kv, share, D)
    grid = q.index_select(0, together).view(P * kv, -1, D)
    scores = products(grid, prompt_k.mT).view(-1, share, S).index_select(0, back)
    scores = torch.cat([scores, *(products(q, k.mT) for k, _ in own)], -1).view(R, kv * share, -1)
    weights = torch.add(mask, scores, alpha=D ** -0.5).softmax(-1).to(q.dtype).view(R * kv, share, -1)      # in float32
    grid = weights[..., :S].index_select(0, together).view(P * kv, -1, S)
    out = products(grid, prompt_v).view(-1, share, D).index_select(0, back)
    for _, v in own:
        out += products(weights[..., S:S + v.shape[2]], v)
        S += v.shape[2]
    return out.view(R, H, D)


def products(x, y):
    """x (N Hkv, M, K), y (N, Hkv, K, L) -> (N Hkv, M, L). y lies in its cache in different ways, and is never to be copied."""
    if y.device.type == "cpu":
        return torch.bmm(x, y.flatten(0, 1))
    return torch.matmul(x.view(*y.shape[:2], *x.shape[1:]), y).flatten(0, 1)


def length_mask(lengths, slots):
    """(B,) lengths -> additive (B, 1, slots) float32: 0 on the first `length` slots, -inf behind them."""
    behind = torch.arange(slots, device=lengths.device) >= lengths[:, None]
    return torch.zeros(behind.shape, device=lengths.device).masked_fill_(behind, float("-inf"))[:, None]


# ------------------------------------------------------------------- the same by devices' kernels, a part of the keys each

def use_flash(device, dtype):
    """PyTorch's variable-length flash attention (2.12 and later), which reads no more keys than there are."""
    return device.type == "cuda" and dtype != torch.float32 and "seqused_k" in VARLEN


def row_ends(rows, queries, keys, device):
    """Sequences.ends of rows that all have as many queries and slots for keys: the same in every layer."""
    ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
    return ends * queries, ends * keys


def partial_attention(q, k, v, lengths, ends=None, host_lengths=None):
    """Attention of q (B, Hkv, M, D) over the first lengths (B,) keys of k, v (B, Hkv, S, D): no order among the M queries.

    host_lengths: the same as a list, for Ascend's kernel; None: flash attention, each row a sequence of M queries, with ends =
    row_ends(B, M, S) and int32 lengths. k and v are (B, S, Hkv, D) in memory. Returns the outputs (B, Hkv, M, D) and their
    log-sum-exps (B, Hkv, M, 1) float32."""
    if host_lengths is not None:
        out, lse = torch.ops.npu.npu_fused_infer_attention_score(
            q.transpose(1, 2).contiguous(), k.transpose(1, 2), v.transpose(1, 2), num_heads=k.shape[1], input_layout="BSND",
            scale=q.shape[-1] ** -0.5, actual_seq_lengths_kv=host_lengths, softmax_lse_flag=True)
        return out.transpose(1, 2), lse
    (B, H, M, D), S = q.shape, k.shape[2]
    out, lse = varlen_attn(q.transpose(1, 2).reshape(B * M, H, D), k.transpose(1, 2).reshape(B * S, H, D),
                           v.transpose(1, 2).reshape(B * S, H, D), *ends, M, S, return_aux=AuxRequest(lse=True), seqused_k=lengths)
    return out.view(B, M, H, D).transpose(1, 2), _rows_first(lse, B, H, M)[..., None]


def _rows_first(lse, B, H, M):
    """Log-sum-exps as (B, H, M), whoever computed them: flash attention gives (H, B M), cuDNN (B M, H, 1), to which PyTorch
    2.14 goes on Hopper for more than 128 queries, and ROCm (B, H, M)."""
    if lse.ndim == 2:
        return lse.view(H, B, M).transpose(0, 1)
    return lse if lse.shape == (B, H, M) else lse.view(B, M, H).transpose(1, 2)


def merge(one, two):
    """Two partial attentions of the same queries over disjoint keys as one: weights exp(lse), normalized."""
    weight = torch.sigmoid(one[1] - two[1]).to(one[0].dtype)
    return torch.lerp(two[0], one[0], weight)
