"""The formulas of the transformer, each with the kernel that a device has for it.

    rms_norm                y = w x / sqrt(mean x^2 + eps)
    swiglu                  silu(gate) * up
    rope_tables, rotate     rotary positions (RoPE, arXiv 2104.09864)
    attention               causal, over packed tokens: training and prefill
    shared_attention        of one new token a row over its prompt's keys, which its group shares,
                            and the row's own: decode
    partial_attention       over a part of the keys, with log-sum-exps: decode by kernels
    merge                   two such parts as one

CUDA: varlen_attn of PyTorch, in half precision. Ascend NPUs: the fused operators of torch_npu,
which need no import by name. Everything else is plain PyTorch, which the kernels are tested
against. model.py trains by these formulas, and decode.py samples by them.

Letters of shapes: M packed tokens, or queries of a sequence; R rows; P prompts; B sequences;
H query heads; Hkv key heads; share = H / Hkv; S slots for keys; D numbers of a head.
"""
import inspect
import math
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F

VARLEN = set()      # names of the arguments that CUDA's kernel takes: they became more


def load_varlen():
    """Imports varlen_attn, if this PyTorch has it. The import takes half a second."""
    global AuxRequest, VARLEN, varlen_attn
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
        VARLEN = set(inspect.signature(varlen_attn).parameters)
    except ImportError:
        pass


if torch.backends.cuda.is_built():
    load_varlen()


# ---------------------------------------------------------------------------- norm, swiglu and RoPE

def rms_norm(x, weight, eps):
    """Scales x (..., D) to unit root mean square, in float32, and then by a weight.

    weight: (D,), or (H, D) for x (..., H, D). Returns the shape and dtype of x."""
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
    """Returns the norm's output, and 1 / root mean square (..., 1) in float32."""
    y = x.float()
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    scale = torch.addcmul(_number(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (y * scale).to(x.dtype).mul_(weight), scale


class _RMSNorm(torch.autograd.Function):
    """The norm on the CPU, where autograd's backward of the formula reads memory twice as often.

    With y = w x s and s = (mean x^2 + eps)^(-1/2):

        dw = sum over rows of g x s
        dx = g w s - x s^3 (g x . w) / D"""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad_x = grad.float() * x
        w = weight.float()
        d_weight = torch.mv(grad_x.reshape(-1, grad_x.shape[-1]).T, scale.flatten())

        # s^3 (g x . w), how much each row's scale pulls along x
        pull = (grad_x @ w)[..., None].mul_(scale ** 3)     # (..., 1)
        dx = (grad * w).mul_(scale).addcmul_(x, pull, value=-1 / x.shape[-1])
        return dx.to(x.dtype), d_weight.to(weight.dtype), None


def swiglu(x):
    """Returns silu(first half) * second half of the last dimension."""
    if x.device.type == "npu":
        return torch.ops.npu.npu_swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def inverse_frequencies(config, device):
    """Returns RoPE's (D/2,) frequencies, in radians a position.

    The scaling "llama3" slows the low ones down by its factor, and blends in between."""
    d = config.head_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, device=device).float() / d)
    scaling = config.rope_scaling
    if scaling is None:
        return freq

    # a frequency is low or high by its full turns over the original context
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * freq / scaling["factor"] + blend * freq


def rope_tables(positions, frequencies, dtype):
    """Returns cos and sin (M, 1, D) of positions (M,), as `rotate` reads them.

    They are computed once a forward, in float32, and shared by all layers."""
    angles = positions[:, None].float() * frequencies       # (M, D/2)
    cos, sin = angles.cos(), angles.sin()
    first = sin if positions.device.type == "npu" else -sin
    cos = torch.cat((cos, cos), -1)[:, None]
    sin = torch.cat((first, sin), -1)[:, None]
    return cos.to(dtype), sin.to(dtype)


def rotate(x, cos, sin):
    """Returns x (M, H, D) rotated by RoPE; cos and sin are rope_tables.

    Pairs are (i, i + D/2), as in every HF checkpoint: (a, b) -> (a cos - b sin, b cos + a sin). The
    minus is in the table, except for Ascend's kernel, which brings its own."""
    if x.device.type == "npu":      # older versions know four dimensions only
        return torch.ops.npu.npu_rotary_mul(x[None], cos[None], sin[None])[0]
    if torch.is_grad_enabled():
        return _Rotation.apply(x, cos, sin)
    return _rotated(x, cos, sin)


def _rotated(x, cos, sin, sign=1):
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=sign)


class _Rotation(torch.autograd.Function):
    """A rotation whose backward is the rotation by the opposite angle.

    Autograd's own backward passes over memory a third more often."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, sign=-1), None, None


# -------------------------------------------- attention over packed tokens (training and prefill)

class Sequences:
    """Who sees whom among packed tokens, without padding.

    Sequence s has the next queries[s] of the packed tokens. It sees keys[s] tokens, the last of
    which are its own: its last query sees them all, the one before it one fewer, and so on.
    index (sum of keys,) names the seen ones among the packed tokens; None: every sequence sees
    its own tokens only. So several completions can see one copy of their prompt."""

    def __init__(self, queries, keys=None, index=None, device="cpu"):
        self.queries = list(queries)
        self.keys = list(keys or queries)
        self.device = torch.device(device)
        self.index = None if index is None else torch.as_tensor(index, device=self.device)

    @cached_property
    def starts(self):
        """Where the queries of each sequence start, and its keys, and where the last end: lists."""
        return [0, *accumulate(self.queries)], [0, *accumulate(self.keys)]

    @cached_property
    def ends(self):
        """The same, cumulative queries and keys, as int32 tensors (count + 1,) for varlen_attn."""
        return [torch.tensor(n, dtype=torch.int32, device=self.device) for n in self.starts]

    @cached_property
    def buckets(self):
        """Sequences of like size, padded, for devices without a kernel for ragged ones.

        A list of (query index (n, Q), key index (n, K), mask), see `padded`; and an index (M,) that
        finds each packed token among the flattened queries of all buckets."""
        query_starts, _ = self.starts
        source = np.arange(sum(self.keys)) if self.index is None else self.index.cpu().numpy()
        found_at = np.empty(query_starts[-1], np.int64)
        buckets = []
        offset = 0      # of a bucket among the flattened queries

        for numbers in self.of_like_sizes():
            bucket = self.padded(numbers, source)
            buckets.append(bucket)
            rows, columns = bucket[0].shape
            for row, s in enumerate(numbers):
                first = offset + row * columns
                found_at[query_starts[s]:query_starts[s + 1]] = first + np.arange(self.queries[s])
            offset += rows * columns
        return buckets, torch.from_numpy(found_at).to(self.device)

    def of_like_sizes(self):
        """Returns the numbers of the sequences in lists, each of sequences of like size.

        A sequence has at most a quarter more queries than the first of its list, or a few more, and
        at most twice the keys, or some more."""
        order = sorted(range(len(self.queries)), key=lambda s: (self.queries[s], self.keys[s]))

        lists = []
        most_queries = most_keys = -1       # that the last list takes
        for s in order:
            if self.queries[s] > most_queries or self.keys[s] > most_keys:
                lists.append([])
                most_queries = 1.25 * self.queries[s] + 8
                most_keys = 2 * self.keys[s] + 64
            lists[-1].append(s)
        return lists

    def padded(self, numbers, source):
        """Returns the query index (n, Q), the key index (n, K) and the mask of n sequences.

        The indices name packed tokens; what pads them is token 0. source: what all sequences see,
        one after the other, also as packed tokens. mask (n, 1, Q, K): True where a query sees a
        key; None: plainly causal, since no sequence sees more than its own tokens."""
        query_starts, key_starts = self.starts
        Q = max(self.queries[s] for s in numbers)
        K = max(self.keys[s] for s in numbers)
        query_index = np.zeros((len(numbers), Q), np.int64)
        key_index = np.zeros((len(numbers), K), np.int64)
        for row, s in enumerate(numbers):
            query_index[row, :self.queries[s]] = np.arange(query_starts[s], query_starts[s + 1])
            key_index[row, :self.keys[s]] = source[key_starts[s]:key_starts[s + 1]]

        # query i of a sequence sees the keys before its own tokens, and i + 1 of these
        before = torch.tensor([self.keys[s] - self.queries[s] for s in numbers])
        mask = None
        if before.any():
            last_seen = torch.arange(Q)[:, None] + before[:, None, None]        # (n, Q, 1)
            mask = (torch.arange(K) <= last_seen)[:, None].to(self.device)
        query_index = torch.from_numpy(query_index).to(self.device)
        key_index = torch.from_numpy(key_index).to(self.device)
        return query_index, key_index, mask


def attention(q, k, v, sequences):
    """Returns the causal attention (M, H, D) of packed tokens q (M, H, D), k and v (M, Hkv, D)."""
    if q.device.type == "npu":
        return _ascend_attention(q, *_seen(k, v, sequences), sequences)
    if q.device.type == "cuda" and q.dtype != torch.float32 and "window_size" in VARLEN:
        return _flash_attention(q, *_seen(k, v, sequences), sequences)
    return _padded_attention(q, k, v, sequences)


def _seen(k, v, sequences):
    """Returns the keys and values (sum of keys, Hkv, D) that the sequences see, one by one."""
    if sequences.index is None:
        return k, v
    return k.index_select(0, sequences.index), v.index_select(0, sequences.index)


def _flash_attention(q, k, v, sequences):
    """Returns attention by varlen_attn on ragged sequences, causal from the lower right.

    Before PyTorch 2.12 it knows no grouped heads, so keys are repeated for each query head."""
    share = q.shape[1] // k.shape[1]
    grouped = {}
    if share > 1 and "enable_gqa" in VARLEN:
        grouped = {"enable_gqa": True}
    elif share > 1:
        k = k.repeat_interleave(share, 1)
        v = v.repeat_interleave(share, 1)
    return varlen_attn(q, k, v, *sequences.ends, max(sequences.queries), max(sequences.keys),
                       window_size=(-1, 0), **grouped)


def _padded_attention(q, k, v, sequences):
    """Returns attention by plain PyTorch, bucket by bucket of padded sequences."""
    buckets, found_at = sequences.buckets
    grouped = q.shape[1] != k.shape[1]
    out = []
    for query_index, key_index, mask in buckets:
        y = F.scaled_dot_product_attention(
            _picked(q, query_index), _picked(k, key_index), _picked(v, key_index),
            attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)     # (n, H, Q, D)
        out.append(y.transpose(1, 2).reshape(-1, *q.shape[1:]))
    return torch.cat(out).index_select(0, found_at)


def _picked(x, index):
    """Returns the tokens of x (M, H, D) at index (n, L), as (n, H, L, D)."""
    picked = x.index_select(0, index.flatten())
    return picked.view(*index.shape, *x.shape[1:]).transpose(1, 2)


def _ascend_attention(q, k, v, sequences):
    """Returns attention by npu_fusion_attention on ragged sequences.

    sparse_mode 3 is causal from the lower right, with a mask that is 1 where keys are hidden."""
    hidden = _hidden_keys(q.device)
    out = []
    q_start = k_start = 0

    for i in range(0, len(sequences.queries), 1000):        # the kernel's limit is 1024 sequences
        q_ends = list(accumulate(sequences.queries[i:i + 1000]))
        k_ends = list(accumulate(sequences.keys[i:i + 1000]))
        seen = slice(k_start, k_start + k_ends[-1])
        asking = slice(q_start, q_start + q_ends[-1])
        out.append(torch.ops.npu.npu_fusion_attention(
            q[asking], k[seen], v[seen], q.shape[1], "TND",
            atten_mask=hidden, scale=q.shape[-1] ** -0.5, sparse_mode=3,
            actual_seq_qlen=q_ends, actual_seq_kvlen=k_ends)[0])
        q_start += q_ends[-1]
        k_start += k_ends[-1]
    return torch.cat(out) if len(out) > 1 else out[0]


# Constants, made once and outside inference mode: sampling may ask first, and training saves them
# for the backward.

@lru_cache
def _hidden_keys(device):
    with torch.inference_mode(False):
        return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)


@lru_cache
def _number(value):
    with torch.inference_mode(False):
        return torch.tensor(value)


@lru_cache
def _ones(shape, dtype, device):
    with torch.inference_mode(False):
        return torch.ones(shape, dtype=dtype, device=device)


# ------------------------------------------------ attention of one new token a row, plain (decode)

def shared_attention(q, prompt_k, prompt_v, own, mask, by_prompt, by_row):
    """Returns the attention (R, H, D) of one token q (R, H, D) a row, by one softmax over all keys.

    A row sees the keys of its prompt and its own. A prompt's keys and values (P, Hkv, S, D) are
    stored once, and all queries of its rows read them together. Query heads that share a key head
    (GQA, arXiv 2305.13245) count as more queries of it. So no key is ever repeated.

    own: the rows' own keys and values, a list of blocks (k, v), each (R, Hkv, s, D).
    mask (R, 1, S + sum of s): 0, and -inf at slots that hold nothing.
    by_prompt, by_row: indices from the order of rows to that of prompts and back, see Groups of
    decode.py; a prompt has as many columns as rows of it may stand there."""
    R, H, D = q.shape
    P, kv, S, _ = prompt_k.shape
    share = H // kv
    q = q.reshape(R * kv, share, D)

    # scores over the prompts, with the queries in the order of prompts, and over the own keys
    queries_by_prompt = q.index_select(0, by_prompt).view(P * kv, -1, D)
    scores_by_prompt = products(queries_by_prompt, prompt_k.mT)     # (P * Hkv, columns * share, S)
    prompt_scores = scores_by_prompt.view(-1, share, S).index_select(0, by_row)
    own_scores = [products(q, k.mT) for k, _ in own]                # each (R * Hkv, share, s)

    # one softmax a row, in float32
    scores = torch.cat([prompt_scores, *own_scores], -1).view(R, kv * share, -1)
    weights = torch.add(mask, scores, alpha=D ** -0.5).softmax(-1).to(q.dtype)
    weights = weights.view(R * kv, share, -1)                       # (R * Hkv, share, S + sum of s)

    # the values of the prompts, weighted, and to them those of the rows' own blocks
    weights_by_prompt = weights[..., :S].index_select(0, by_prompt).view(P * kv, -1, S)
    out_by_prompt = products(weights_by_prompt, prompt_v)           # (P * Hkv, columns * share, D)
    out = out_by_prompt.view(-1, share, D).index_select(0, by_row)  # (R * Hkv, share, D)
    start = S
    for _, v in own:
        end = start + v.shape[2]
        out += products(weights[..., start:end], v)
        start = end
    return out.view(R, H, D)


def products(x, y):
    """Returns the matrix products (B Hkv, M, L) of x (B Hkv, M, K) and y (B, Hkv, K, L).

    y may lie in its cache in different orders, and is never to be copied."""
    if y.device.type == "cpu":
        return torch.bmm(x, y.flatten(0, 1))
    return torch.matmul(x.view(*y.shape[:2], *x.shape[1:]), y).flatten(0, 1)


def length_mask(lengths, slots):
    """Returns an additive mask (B, 1, slots) float32 for lengths (B,).

    It is 0 on a row's first `length` slots and -inf on the others."""
    empty = torch.arange(slots, device=lengths.device) >= lengths[:, None]      # (B, slots)
    mask = torch.zeros(empty.shape, device=lengths.device)
    return mask.masked_fill_(empty, float("-inf"))[:, None]


# ------------------------------------------ the same by devices' kernels, a part of the keys each

def use_flash(device, dtype):
    """Says whether decode can use PyTorch's variable-length flash attention (2.12 and later).

    That one reads no more keys than there are."""
    return device.type == "cuda" and dtype != torch.float32 and "seqused_k" in VARLEN


def row_ends(rows, queries, keys, device):
    """Returns Sequences.ends of rows that all have as many queries, and as many slots for keys.

    They are the same in every layer."""
    ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
    return ends * queries, ends * keys


def partial_attention(q, k, v, lengths, ends=None, host_lengths=None):
    """Attention of q (B, Hkv, M, D) over the first lengths (B,) keys of k, v (B, Hkv, S, D).

    Each of the M queries sees all of them. In memory k and v are (B, S, Hkv, D).

    host_lengths: the lengths as a list, for Ascend's kernel. Where it is None flash attention is
    used, for which each row is a sequence of M queries: lengths are int32, and ends are
    row_ends(B, M, S).

    Returns the outputs (B, Hkv, M, D) and their log-sum-exps (B, Hkv, M, 1) float32."""
    if host_lengths is not None:
        return _ascend_partial_attention(q, k, v, host_lengths)
    return _flash_partial_attention(q, k, v, lengths, ends)


def _ascend_partial_attention(q, k, v, host_lengths):
    out, lse = torch.ops.npu.npu_fused_infer_attention_score(
        q.transpose(1, 2).contiguous(), k.transpose(1, 2), v.transpose(1, 2),
        num_heads=k.shape[1], input_layout="BSND", scale=q.shape[-1] ** -0.5,
        actual_seq_lengths_kv=host_lengths, softmax_lse_flag=True)
    return out.transpose(1, 2), lse


def _flash_partial_attention(q, k, v, lengths, ends):
    B, H, M, D = q.shape
    S = k.shape[2]
    out, lse = varlen_attn(
        q.transpose(1, 2).reshape(B * M, H, D),
        k.transpose(1, 2).reshape(B * S, H, D),
        v.transpose(1, 2).reshape(B * S, H, D),
        *ends, M, S, return_aux=AuxRequest(lse=True), seqused_k=lengths)
    out = out.view(B, M, H, D).transpose(1, 2)
    return out, _rows_first(lse, B, H, M)[..., None]


def _rows_first(lse, B, H, M):
    """Returns log-sum-exps as (B, H, M), whichever backend computed them.

    Flash attention gives (H, B M) and ROCm (B, H, M). cuDNN, to which PyTorch 2.14 goes on Hopper
    for more than 128 queries, gives (B M, H, 1)."""
    if lse.ndim == 2:
        return lse.view(H, B, M).transpose(0, 1)
    if lse.shape == (B, H, M):
        return lse
    return lse.view(B, M, H).transpose(1, 2)


def merge(one, two):
    """Returns the attention over two disjoint parts of the keys, from that over each part.

    one, two: (outputs, log-sum-exps) of the same queries. Their weights are exp(lse), normalized,
    and exp(a) / (exp(a) + exp(b)) = sigmoid(a - b)."""
    out_one, lse_one = one
    out_two, lse_two = two
    weight = torch.sigmoid(lse_one - lse_two).to(out_one.dtype)
    return torch.lerp(out_two, out_one, weight)
