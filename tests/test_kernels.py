"""The specification of kernels.py, and of what model.py packs and chunks for it: each formula beside its plain loop.

The kernels of CUDA and Ascend do not run here: what they are called with goes to references written from their
documentation, which refuse what the kernel would refuse."""

import inspect
import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import kernels
from engine import logps as logps_file
from engine.decode import Groups
from engine.kernels import (Sequences, attention, length_mask, merge, partial_attention, rms_norm, rope_tables, rotate, row_ends,
                     shared_attention, swiglu)
from model import ModelConfig, Transformer, pack

torch.set_num_threads(1)

kernels.load_varlen()       # a PyTorch without CUDA does not
needs_varlen = pytest.mark.skipif("seqused_k" not in kernels.VARLEN, reason="PyTorch 2.12 brings it")


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def assert_same_gradients(got, want, inputs, **tolerance):
    """Of two tensors of one shape by the same inputs, each multiplied with the same random numbers."""
    weights = normal(*got.shape, seed=99, dtype=got.dtype)
    for a, b in zip(*(torch.autograd.grad(y, inputs, weights, retain_graph=True) for y in (got, want))):
        torch.testing.assert_close(a, b, **tolerance)


# ------------------------------------------------------------------------------------ attention over packed tokens

def naive_attention(q, k, v, queries, keys=None, index=None):
    """One softmax a query, over the keys up to its own."""
    keys, share, out, a, b = keys or queries, q.shape[1] // k.shape[1], [], 0, 0
    index = list(range(sum(keys))) if index is None else list(index)
    for n, m in zip(queries, keys):
        K, V = (x[index[b:b + m]].repeat_interleave(share, 1) for x in (k, v))
        for i in range(n):
            visible = m - n + i + 1
            weights = (torch.einsum("hd,khd->hk", q[a + i], K[:visible]) / math.sqrt(q.shape[2])).softmax(-1)
            out.append(torch.einsum("hk,khd->hd", weights, V[:visible]))
        a, b = a + n, b + m
    return torch.stack(out)


@st.composite
def packed_sequences(draw, longest=25):
    """(queries, keys, index): each sequence sees any tokens of anybody, also twice, and then its own; or only its own."""
    sizes = draw(st.lists(st.tuples(st.integers(1, longest), st.integers(0, 12)), min_size=1, max_size=7))
    queries, M = [n for n, _ in sizes], sum(n for n, _ in sizes)
    if draw(st.booleans()):
        return queries, None, None
    rng, index, start = random.Random(draw(st.integers(0, 999))), [], 0
    for n, before in sizes:
        index += [rng.randrange(M) for _ in range(before)] + list(range(start, start + n))
        start += n
    return queries, [n + before for n, before in sizes], index


def qkv(M, share, seed=0, dtype=torch.float64):
    """Two key heads, and `share` query heads to each."""
    return [normal(M, heads, 4, seed=seed + i, dtype=dtype).requires_grad_() for i, heads in enumerate((2 * share, 2, 2))]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(packed_sequences(), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_attention_is_that_of_every_sequence_by_itself(packed, share, seed):
    """Ragged sequences in any order, prompts that several of them see, shared key heads; values and gradients."""
    inputs = qkv(sum(packed[0]), share, seed)
    got, want = attention(*inputs, Sequences(*packed)), naive_attention(*inputs, *packed)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert_same_gradients(got, want, inputs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("queries, keys, index", [
    ([1], None, None), ([1, 1, 1], None, None), ([1], [1], [0]), ([1, 1], [2, 1], [1, 0, 1]),
    ([3, 1, 200, 1, 7], None, None),                                            # several buckets
    ([4, 1, 1, 60], [4, 5, 5, 64], [*range(4), *range(4), 4, *range(4), 5, *range(4), *range(6, 66)]),
], ids=str)
def test_attention_of_single_tokens_and_very_unequal_sequences(queries, keys, index, share):
    inputs = qkv(sum(queries), share)
    got, want = attention(*inputs, Sequences(queries, keys, index)), naive_attention(*inputs, queries, keys, index)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert_same_gradients(got, want, inputs, atol=1e-11, rtol=0)


def test_attention_in_float32_is_near_the_exact_one():
    inputs = qkv(40, 2, dtype=torch.float32)
    got, want = attention(*inputs, Sequences([30, 10])), naive_attention(*(x.double() for x in inputs), [30, 10])
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)


def test_a_token_that_nobody_sees_changes_nothing():
    """Keys of the second sequence, and of the padding that other sequences bring, do not reach the first."""
    q, k, v = (x.detach() for x in qkv(40, 2))
    before = attention(q, k, v, Sequences([5, 9, 26]))
    k[5:], v[5:] = 1e6, 1e6
    assert torch.equal(attention(q, k, v, Sequences([5, 9, 26]))[:5], before[:5])


def test_ends_of_sequences_by_hand():
    q_ends, k_ends = Sequences([2, 3], [4, 3], [0, 1, 0, 1, 2, 3, 4]).ends
    assert q_ends.tolist() == [0, 2, 5] and k_ends.tolist() == [0, 4, 7]
    assert q_ends.dtype == k_ends.dtype == torch.int32


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_buckets_hold_every_token_once_and_pad_little(queries):
    buckets, back = Sequences(queries).buckets
    assert sorted(torch.cat([q.flatten() for q, _, _ in buckets])[back].tolist()) == list(range(sum(queries)))
    for q, _, _ in buckets:
        least = min(int(row.argmax()) + 1 for row in q)                        # padding reads token 0
        assert q.shape[1] <= 1.25 * least + 8


def test_a_long_sequence_does_not_pad_the_keys_of_short_ones():
    """Single queries, as at the end of prefill: 80 over 50 keys each and one over 4,000."""
    buckets, _ = Sequences([1] * 81, [50] * 40 + [4000] + [50] * 40).buckets
    assert sum(k.numel() for _, k, _ in buckets) == 80 * 50 + 4000


# ------------------------------------------------------------------------------------ the route of CUDA, without CUDA

class Elsewhere:
    """A tensor that says it is on another device, of half precision."""

    def __init__(self, tensor, kind="cuda", dtype=torch.bfloat16):
        self.tensor, self.shape, self.dtype, self.device = tensor, tensor.shape, dtype, SimpleNamespace(type=kind)

    def __getattr__(self, name):
        return getattr(self.tensor, name)


def varlen_reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                     window_size=(-1, -1), enable_gqa=False, seqused_k=None):
    """varlen_attn as its documentation has it (but lse is (H, Tq), as its code has it)."""
    query = getattr(query, "tensor", query)
    H, D, dtype = query.shape[1], query.shape[2], query.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size in ((-1, -1), (-1, 0))
    assert enable_gqa or H == key.shape[1] == value.shape[1]
    q_ends, k_ends = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert len(q_ends) == len(k_ends) and (q_ends[-1], k_ends[-1]) == (len(query), len(key)) and len(key) == len(value)
    used = [b - a for a, b in zip(k_ends, k_ends[1:])]
    assert max_q == max(b - a for a, b in zip(q_ends, q_ends[1:])) and max_k == max(used)
    if seqused_k is not None:
        assert seqused_k.dtype == torch.int32 and all(0 < n <= m for n, m in zip(seqused_k.tolist(), used, strict=True))
        used = seqused_k.tolist()
    q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (query, key, value))
    out, lse = [], []
    for a, b, start, m in zip(q_ends, q_ends[1:], k_ends, used):
        K, V = (x[start:start + m].repeat_interleave(H // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], K) * (scale or D ** -0.5)
        if window_size == (-1, 0):
            hidden = torch.arange(m) > torch.arange(b - a)[:, None] + m - (b - a)
            scores = scores.masked_fill(hidden, -math.inf)
        lse.append(scores.logsumexp(-1))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), V))
    out, lse = torch.cat(out).to(dtype), torch.cat(lse, 1)
    return (out, lse) if return_aux is not None and return_aux.lse else out


def replace_varlen(patch):
    """The reference in the kernel's place, for every call that the kernel's signature takes; the calls."""
    signature, calls = inspect.signature(kernels.varlen_attn), []

    def call(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return varlen_reference(*args, **kwargs)
    patch.setattr(kernels, "varlen_attn", call)
    return calls


@needs_varlen
@settings(max_examples=20, deadline=None, derandomize=True)
@given(packed_sequences(), st.sampled_from([1, 2, 4]), st.booleans())
def test_attention_on_cuda_is_one_call_of_varlen_attn(packed, share, knows_groups):
    """Before PyTorch 2.12 with keys repeated for each query head, because it takes no enable_gqa."""
    inputs = qkv(sum(packed[0]), share)
    with pytest.MonkeyPatch.context() as patch:
        calls = replace_varlen(patch)
        patch.setattr(kernels, "VARLEN", {"window_size", "enable_gqa"} if knows_groups else {"window_size"})
        got = attention(Elsewhere(inputs[0]), *inputs[1:], Sequences(*packed))
    want = naive_attention(*inputs, *packed)
    assert len(calls) == 1 and ("enable_gqa" in calls[0]) == (knows_groups and share > 1)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert_same_gradients(got, want, inputs, atol=1e-11, rtol=0)


@needs_varlen
@pytest.mark.parametrize("dtype, known", [(torch.float32, None), (torch.bfloat16, {"is_causal"}), (torch.bfloat16, set())],
                         ids=["float32", "PyTorch 2.10", "without varlen_attn"])
def test_cuda_without_a_kernel_for_it_pads(monkeypatch, dtype, known):
    """float32 has none, and older versions of PyTorch do not take all that it is asked for."""
    monkeypatch.setattr(kernels, "varlen_attn", None)
    monkeypatch.setattr(kernels, "VARLEN", kernels.VARLEN if known is None else known)
    q, k, v = qkv(12, 2)
    got = attention(Elsewhere(q, dtype=dtype), k, v, Sequences([7, 5]))
    torch.testing.assert_close(got, naive_attention(q, k, v, [7, 5]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind, dtype, known, flash", [
    ("cuda", torch.bfloat16, {"seqused_k"}, True), ("cuda", torch.float16, {"seqused_k"}, True),
    ("cuda", torch.float32, {"seqused_k"}, False), ("cuda", torch.bfloat16, {"window_size"}, False),
    ("cpu", torch.bfloat16, {"seqused_k"}, False), ("npu", torch.bfloat16, {"seqused_k"}, False),
])
def test_flash_is_for_half_precision_on_cuda(monkeypatch, kind, dtype, known, flash):
    monkeypatch.setattr(kernels, "VARLEN", known)
    assert kernels.use_flash(SimpleNamespace(type=kind), dtype) == flash


# ------------------------------------------------------------------------------------ the route of Ascend, without Ascend

def fusion_attention(query, key, value, head_num, input_layout, *, atten_mask, scale, sparse_mode, actual_seq_qlen,
                     actual_seq_kvlen):
    """npu_fusion_attention, TND: ends without the leading 0; sparse_mode 3 aligns the compressed mask to the lower right."""
    assert input_layout == "TND" and sparse_mode == 3 and head_num == query.shape[1] and len(actual_seq_qlen) <= 1024
    assert torch.equal(atten_mask, torch.ones(2048, 2048).triu(1).bool())
    assert actual_seq_qlen[-1] == len(query) and actual_seq_kvlen[-1] == len(key) == len(value)
    assert scale == query.shape[2] ** -0.5
    queries, keys = ([b - a for a, b in zip([0, *ends], ends)] for ends in (actual_seq_qlen, actual_seq_kvlen))
    return naive_attention(query, key, value, queries, keys), "softmax max", "softmax sum"


@settings(max_examples=10, deadline=None, derandomize=True)
@given(packed_sequences(), st.sampled_from([1, 2]))
def test_attention_on_ascend_is_npu_fusion_attention(packed, share):
    q, k, v = (x.detach() for x in qkv(sum(packed[0]), share))
    sequences = Sequences(*packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.npu, "npu_fusion_attention", fusion_attention, raising=False)
        got = kernels._ascend_attention(q, *kernels._seen(k, v, sequences), sequences)
    torch.testing.assert_close(got, naive_attention(q, k, v, *packed), atol=1e-12, rtol=0)


def test_more_sequences_than_ascends_kernel_takes_are_cut(monkeypatch):
    """2003 sequences that end the cut of 1000 at different places of queries and of keys."""
    monkeypatch.setattr(torch.ops.npu, "npu_fusion_attention", fusion_attention, raising=False)
    queries, index, start = [1 + s % 2 for s in range(2003)], [], 0
    for n in queries:
        index += [0, *range(start, start + n)]
        start += n
    keys, (q, k, v) = [n + 1 for n in queries], (x.detach() for x in qkv(start, 1))
    sequences = Sequences(queries, keys, index)
    got = kernels._ascend_attention(q, *kernels._seen(k, v, sequences), sequences)
    torch.testing.assert_close(got, attention(q, k, v, sequences), atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------ attention over a part of the keys

def exact_part(q, k, v, lengths):
    """Outputs and log-sum-exps over the first lengths keys of each row, float64."""
    out, lse = [], []
    for Q, K, V, n in zip(q.double(), k.double(), v.double(), lengths):
        scores = Q @ K[:, :n].mT / math.sqrt(q.shape[-1])
        out.append(scores.softmax(-1) @ V[:, :n])
        lse.append(scores.logsumexp(-1, keepdim=True))
    return torch.stack(out), torch.stack(lse)


def plain_part(q, k, v, lengths):
    """What partial_attention is to compute."""
    out, lse = exact_part(q, k, v, lengths)
    return out.to(q.dtype), lse.float()


def part_inputs(lengths, slots, heads=2, queries=3, dtype=torch.float32, seed=0):
    """q, k, v where everything behind the lengths is large: stale, but finite, as it is in a cache."""
    B = len(lengths)
    q = normal(B, heads, queries, 4, seed=seed, dtype=dtype)
    k, v = (normal(B, slots, heads, 4, seed=seed + i, dtype=dtype).transpose(1, 2) for i in (1, 2))
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = 40.0, 1000.0
    return q, k, v


TWO_PARTS = st.integers(1, 4).flatmap(lambda B: st.tuples(*(st.lists(st.integers(1, 9), min_size=B, max_size=B),) * 2))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(TWO_PARTS, st.integers(0, 3), st.integers(1, 4), st.integers(0, 99))
def test_two_parts_merged_are_attention_over_all_keys(lengths, spare, queries, seed):
    """Wherever the keys are split, and however many slots lie unused behind each part."""
    parts = []
    for i, n in enumerate(lengths):
        q, k, v = part_inputs(n, max(n) + spare, queries=queries, seed=seed + 10 * i)
        q = normal(*q.shape, seed=seed) if i else q
        parts.append((plain_part(q, k, v, n), k, v))
    (one, k1, v1), (two, k2, v2) = parts
    for row, (n, m) in enumerate(zip(*lengths)):
        k, v = (torch.cat((a[row, :, :n], b[row, :, :m]), 1)[None] for a, b in ((k1, k2), (v1, v2)))
        want = exact_part(q[row:row + 1], k, v, [n + m])[0]
        torch.testing.assert_close(merge(one, two)[row:row + 1].double(), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(merge(two, one)[row:row + 1].double(), want, atol=1e-5, rtol=0)


def test_merge_weighs_parts_by_their_mass():
    """Masses 1 and 3: a quarter of the one and three quarters of the other. A part without any mass does not count."""
    one, two = (torch.tensor([8.0]), torch.tensor([0.0])), (torch.tensor([4.0]), torch.tensor([math.log(3)]))
    assert merge(one, two).item() == pytest.approx(8 / 4 + 4 * 3 / 4)
    assert merge(one, (torch.tensor([4.0]), torch.tensor([-200.0]))).item() == 8.0
    assert merge((torch.tensor([8.0]), torch.tensor([-200.0])), two).item() == 4.0


def test_length_mask_by_hand():
    inf = math.inf
    assert length_mask(torch.tensor([1, 3, 4]), 3)[:, 0].tolist() == [[0, -inf, -inf], [0, 0, 0], [0, 0, 0]]


def test_merged_bfloat16_stays_bfloat16():
    part = plain_part(*part_inputs([3, 30], 32, dtype=torch.bfloat16), [3, 30])
    both = merge(part, part)
    assert both.dtype == torch.bfloat16
    torch.testing.assert_close(both, part[0], atol=0.01, rtol=0.01)


@needs_varlen
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 3), st.integers(1, 4))
def test_flash_attention_is_partial_attention(lengths, spare, queries):
    """Rows of M queries over a cache (B, S, Hkv, D), which is read where it lies: nothing is copied."""
    (q, k, v), n = part_inputs(lengths, max(lengths) + spare, queries=queries), torch.tensor(lengths)
    with pytest.MonkeyPatch.context() as patch:
        calls = replace_varlen(patch)
        got = partial_attention(q, k, v, n.int(), row_ends(len(q), q.shape[2], k.shape[2], "cpu"))
    assert len(calls) == 1 and (calls[0]["key"].data_ptr(), calls[0]["value"].data_ptr()) == (k.data_ptr(), v.data_ptr())
    for a, b in zip(got, plain_part(q, k, v, lengths)):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


LSE_LAYOUTS = {     # by hand from each backend's source, of what the reference gives as (H, B M)
    "flash": lambda lse, B, M: lse, "cuDNN": lambda lse, B, M: lse.T.contiguous()[..., None],
    "ROCm": lambda lse, B, M: lse.view(-1, B, M).transpose(0, 1).contiguous()}


@needs_varlen
@pytest.mark.parametrize("backend", LSE_LAYOUTS)
@pytest.mark.parametrize("lengths, queries", [([3, 7, 1], 2), ([4, 2], 1), ([5, 6], 2), ([9], 3)])
def test_log_sum_exps_are_read_from_any_backend(lengths, queries, backend, monkeypatch):
    """PyTorch 2.14 sends calls with more than 128 queries to cuDNN on Hopper, whose log-sum-exps lie otherwise; as many rows as
    heads, and one query, are the cases in which shapes alone could be taken for each other's."""
    def by_backend(*args, **kwargs):
        out, lse = varlen_reference(*args, **kwargs)
        return out, LSE_LAYOUTS[backend](lse, len(lengths), queries)
    monkeypatch.setattr(kernels, "varlen_attn", by_backend)
    (q, k, v), n = part_inputs(lengths, max(lengths), queries=queries), torch.tensor(lengths, dtype=torch.int32)
    got = partial_attention(q, k, v, n, row_ends(len(q), queries, k.shape[2], "cpu"))
    for a, b in zip(got, plain_part(q, k, v, lengths), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@needs_varlen
def test_log_sum_exps_of_varlen_attn_are_heads_first():
    """Its documentation says (Tq, H), its code (H, Tq): flash_attention reads the latter."""
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        q, ends = torch.empty(6, 2, 8, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int32)
        _, lse = kernels.varlen_attn(q, q, q, ends, ends, 3, 3, return_aux=kernels.AuxRequest(lse=True))
    assert tuple(lse.shape) == (2, 6)


def test_host_lengths_select_ascends_kernel(monkeypatch):
    def score(query, key, value, *, num_heads, input_layout, scale, actual_seq_lengths_kv, softmax_lse_flag):
        assert (num_heads, input_layout, softmax_lse_flag, scale) == (2, "BSND", True, 0.5) and query.is_contiguous()
        out, lse = exact_part(*(x.transpose(1, 2) for x in (query, key, value)), actual_seq_lengths_kv)
        return out.transpose(1, 2).float(), lse.float()
    monkeypatch.setattr(torch.ops.npu, "npu_fused_infer_attention_score", score, raising=False)
    (q, k, v), n = part_inputs([3, 7, 1], 8), torch.tensor([3, 7, 1])
    for a, b in zip(partial_attention(q, k, v, n, host_lengths=[3, 7, 1]), plain_part(q, k, v, [3, 7, 1])):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------ one new token a row

@st.composite
def rows_of_prompts(draw):
    """The prompt of each row, lengths of prompts and of rows, sizes of the blocks of own keys, whether the grid is larger."""
    P, R = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    places = draw(st.lists(st.integers(0, P - 1), min_size=R, max_size=R))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    own = draw(st.lists(st.integers(1, sum(sizes)), min_size=R, max_size=R))
    return places, draw(st.lists(st.integers(1, 6), min_size=P, max_size=P)), own, sizes, draw(st.sampled_from([None, R + 1]))


def shared_inputs(prompts, own, sizes, heads, share, dtype=torch.float32, seed=0):
    """q, keys and values of prompts and of rows, in blocks; everything behind the lengths is large."""
    slots = max(prompts) + 1
    prompt_k, prompt_v = (normal(len(prompts), heads, slots, 4, seed=seed + i, dtype=dtype) for i in (1, 2))
    k, v = (normal(len(own), heads, sum(sizes), 4, seed=seed + i, dtype=dtype) for i in (3, 4))
    for keys, values, lengths in ((prompt_k, prompt_v, prompts), (k, v, own)):
        for row, n in enumerate(lengths):
            keys[row, :, n:], values[row, :, n:] = 40.0, 1000.0
    q = normal(len(own), heads * share, 4, seed=seed, dtype=dtype)
    return q, prompt_k, prompt_v, list(zip(k.split(sizes, 2), v.split(sizes, 2)))


def shared(q, prompt_k, prompt_v, own, places, prompts, lengths, columns=None):
    groups = Groups(places, prompt_k.shape[1], len(prompts), columns)
    mask = torch.cat((length_mask(torch.tensor(prompts)[places], prompt_k.shape[2]),
                      length_mask(torch.tensor(lengths), sum(k.shape[2] for k, _ in own))), -1)
    return shared_attention(q, prompt_k, prompt_v, own, mask, groups.by_prompt, groups.by_row)


def exact_shared(q, prompt_k, prompt_v, own, places, prompts, lengths):
    """Row by row: one softmax over the prompt's keys and the row's own, in float64."""
    out = []
    for row, place in enumerate(places):
        k, v = (torch.cat((p[place, :, :prompts[place]], torch.cat(o, 2)[row, :, :lengths[row]]), 1).double()
                for p, o in zip((prompt_k, prompt_v), zip(*own)))
        query = q[row].double().view(len(k), -1, 4)
        out.append(((query @ k.mT / 2).softmax(-1) @ v).view(-1, 4))
    return torch.stack(out)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows_of_prompts(), st.integers(1, 2), st.integers(1, 3), st.integers(0, 99))
def test_shared_attention_is_a_softmax_over_the_prompt_and_the_own_keys_of_each_row(rows, heads, share, seed):
    """Rows of a prompt in any order and number, prompts that nobody reads, own keys in any blocks."""
    places, prompts, own, sizes, columns = rows
    inputs = shared_inputs(prompts, own, sizes, heads, share, seed=seed)
    copies = [x.clone() for x in inputs[:3]]
    got = shared(*inputs, places, prompts, own, columns)
    torch.testing.assert_close(got.double(), exact_shared(*inputs, places, prompts, own), atol=1e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies))


def test_shared_attention_in_bfloat16_has_its_precision():
    """8 bits of mantissa: 2^-8 of a value near 1, a few times."""
    inputs = shared_inputs([3, 30], [9, 1, 4], [5, 5], 2, 2, dtype=torch.bfloat16)
    got = shared(*inputs, [1, 0, 1], [3, 30], [9, 1, 4])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact_shared(*inputs, [1, 0, 1], [3, 30], [9, 1, 4]), atol=0.03, rtol=0)


def test_groups_by_hand():
    """Rows 0 and 2 read prompt 1, row 3 prompt 0, row 1 none; two key heads. The grid's cells are (prompt, head, column)."""
    groups = Groups([1, None, 1, 0], 2)
    assert groups.prompts == 2 and groups.seat.tolist() == [1, 0, 1, 0]
    assert groups.by_prompt.tolist() == [6, 0, 7, 1, 0, 4, 1, 5]         # row x 2 + head; empty cells: row 0
    assert groups.by_row.view(4, 2)[[0, 2, 3]].tolist() == [[4, 6], [5, 7], [0, 2]]
    wide = Groups([1, None, 1, 0], 2, 3, 4)
    assert wide.prompts == 3 and len(wide.by_prompt) == 3 * 2 * 4 and wide.by_row.view(4, 2)[2].tolist() == [9, 13]
    assert Groups([None], 2).by_prompt.tolist() == [0, 1] and Groups([], 1).prompts == 1


# ------------------------------------------------------------------------------------ norms, swiglu, rope

@pytest.mark.parametrize("grad", [True, False])
def test_rms_norm_by_hand(grad):
    """(3, 4): mean square 12.5. A weight a head scales each head by its own."""
    unit = torch.tensor([3.0, 4.0]) / math.sqrt(12.5)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0),
                                   unit[None] * torch.tensor([1.0, 2.0]))
        torch.testing.assert_close(rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 12.5), unit[None] / math.sqrt(2))
        heads = rms_norm(torch.tensor([[[3.0, 4.0], [6.0, 8.0]]]), torch.tensor([[1.0, 2.0], [3.0, -1.0]]), 0.0)
        torch.testing.assert_close(heads, unit * torch.tensor([[[1.0, 2.0], [3.0, -1.0]]]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.booleans(), st.sampled_from([1e-6, 0.1]),
       st.integers(0, 99))
def test_rms_norm_is_its_formula_with_and_without_gradient(rows, heads, D, per_head, eps, seed):
    x = normal(rows, heads, D, seed=seed).requires_grad_()
    weight = normal(*((heads, D) if per_head else (D,)), seed=seed + 1).requires_grad_()
    exact = weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    got = rms_norm(x, weight, eps)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, eps), got, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)
    assert_same_gradients(got.double(), exact, (x, weight), atol=1e-3 if eps < 0.1 else 1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(32,), (3, 32)])
def test_rms_norm_in_bfloat16_is_the_same_up_to_rounding(shape):
    """All routes compute in float32 and round twice."""
    x, weight = normal(5, 3, 32, dtype=torch.bfloat16, scale=30), normal(*shape, seed=1, dtype=torch.bfloat16)
    exact = weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = rms_norm(x, weight, 1e-6)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), exact, atol=0, rtol=2 ** -7)


@pytest.mark.parametrize("dtype,near", [(torch.float32, 1e-5), (torch.bfloat16, 2 ** -6)])
def test_the_way_back_through_norm_and_rope_is_that_of_their_formulas(dtype, near):
    """Both have a backward of their own; also for gradients that do not lie row by row in memory."""
    x, weight = normal(6, 3, 8, dtype=dtype, scale=3).requires_grad_(), normal(8, seed=1, dtype=dtype).requires_grad_()
    cos, sin = rope_tables(torch.arange(6), torch.tensor([1.0, 0.3, 0.1, 0.01]), dtype)
    grad = normal(3, 8, 6, seed=2, dtype=dtype).permute(2, 0, 1)
    got = torch.autograd.grad(rotate(rms_norm(x, weight, 0.1), cos, sin), (x, weight), grad)
    y, w, c, s = (z.detach().double().requires_grad_() for z in (x, weight, cos, sin))
    normed = w * y / (y.square().mean(-1, keepdim=True) + 0.1).sqrt()
    a, b = normed.chunk(2, -1)
    exact = torch.autograd.grad(normed * c + torch.cat((b, a), -1) * s, (y, w), grad.double())
    for one, other in zip(got, exact):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, atol=near * float(other.abs().max()), rtol=0)


def test_swiglu_by_hand():
    """silu(0) = 0; silu(ln 3) = ln 3 / (1 + 1/3)."""
    out = swiglu(torch.tensor([[0.0, math.log(3), 5.0, 4.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.0, 3 * math.log(3)]]))


def test_rope_by_hand():
    """D = 4, a quarter and a half turn a position: pairs are (first, third) and (second, fourth)."""
    cos, sin = rope_tables(torch.tensor([0, 1, 2]), torch.tensor([math.pi / 2, math.pi]), torch.float32)
    assert cos.shape == sin.shape == (3, 1, 4)
    near = dict(atol=1e-6, rtol=0)
    torch.testing.assert_close(cos[:, 0], torch.tensor([[1., 1, 1, 1], [0, -1, 0, -1], [-1, 1, -1, 1]]), **near)
    torch.testing.assert_close(sin[:, 0], torch.tensor([[0., 0, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]]), **near)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(3, 2, 4)                      # both heads alike
    want = torch.tensor([[1.0, 2, 3, 4], [-3, -2, 1, -4], [-1, 2, -3, 4]])
    torch.testing.assert_close(rotate(x, cos, sin), want[:, None].expand(3, 2, 4), **near)


def test_rope_products_depend_on_the_distance_alone():
    frequencies, x, y = torch.tensor([1.0, 0.3, 0.01]), normal(1, 1, 6), normal(1, 1, 6, seed=1)

    def at(z, position):
        return rotate(z, *rope_tables(torch.tensor([position]), frequencies, torch.float32))
    products = [float((at(x, 7 + n) * at(y, 2 + n)).sum()) for n in (0, 1, 40)]
    assert products == pytest.approx(products[:1] * 3, abs=1e-4)
    assert abs(products[0] - float((at(x, 8) * at(y, 2)).sum())) > 0.01


def test_rope_tables_have_the_dtype_of_the_model_but_angles_have_not():
    """Position 1001 is 1000 in bfloat16: the angle is made in float32."""
    cos, _ = rope_tables(torch.tensor([1001]), torch.tensor([1.0]), torch.bfloat16)
    assert cos.dtype == torch.bfloat16 and cos[0, 0, 0].item() == pytest.approx(math.cos(1001), abs=0.004)


# ------------------------------------------------------------------------------------ log-probs by chunks

def naive_logps(hidden, weight, targets, temperature):
    logits = ((hidden @ weight.T).float() / temperature).log_softmax(-1)
    return logits.gather(1, targets[:, None])[:, 0], -(logits.exp() * logits).sum(-1).detach()


def chunked_and_naive(W, D, V, chunk, temperature, seed=0, dtype=torch.float32):
    inputs = [normal(n, D, seed=seed + i, dtype=dtype).requires_grad_() for i, n in enumerate((W, V))]
    targets = torch.randint(V, (W,), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logps_file, "LOGIT_CHUNK", chunk)
        got = logps_file.chunked_logps(*inputs, targets, temperature)
        grads = torch.autograd.grad(got[0], inputs, normal(W, seed=99))
    want = naive_logps(*inputs, targets, temperature)
    return inputs, got, grads, want, torch.autograd.grad(want[0], inputs, normal(W, seed=99))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(2, 20), st.integers(1, 100), st.sampled_from([0.5, 1.0, 2.0]),
       st.integers(0, 99))
def test_chunked_log_probs_are_the_naive_ones_in_value_and_gradient(W, D, V, chunk, temperature, seed):
    """However many tokens a chunk holds: from one to all."""
    _, got, grads, want, exact = chunked_and_naive(W, D, V, chunk, temperature, seed)
    for a, b in zip((*got, *grads), (*want, *exact)):
        assert a.dtype == torch.float32 and a.shape == b.shape
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert got[0].requires_grad and not got[1].requires_grad


@pytest.mark.parametrize("chunk", [1, 100, 10 ** 6])
def test_chunked_log_probs_of_bfloat16_are_float32_of_the_same_logits(chunk):
    """Values to float32; gradients are bfloat16 and rounded once a chunk: 2^-7 of the largest."""
    inputs, got, grads, want, exact = chunked_and_naive(12, 16, 30, chunk, 0.7, dtype=torch.bfloat16)
    for a, b in zip(got, want):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    for a, b, x in zip(grads, exact, inputs):
        assert a.dtype == x.dtype and (a.float() - b.float()).abs().max() <= 2 ** -6 * b.float().abs().max()


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32(monkeypatch):
    """600 chunks of one token each add (1/2, -1/2). A sum in bfloat16, of 8 bits, would stop at 128."""
    monkeypatch.setattr(logps_file, "LOGIT_CHUNK", 2)
    hidden = torch.ones(600, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logps_file.chunked_logps(hidden, head, torch.zeros(600, dtype=torch.int64), 1.0)[0].sum().backward()
    assert head.grad.dtype == torch.bfloat16 and head.grad.tolist() == [[300.0], [-300.0]]


def test_gradient_of_the_log_prob_by_hand():
    """Logits 0 and ln 3: p = 1/4, 3/4. d log p(0) / d logits = (1 - 1/4, -3/4), over the temperature."""
    hidden = torch.tensor([[0.0, math.log(3)]], requires_grad=True)             # the weight is the identity
    logps, entropy = logps_file.chunked_logps(hidden, torch.eye(2), torch.tensor([0]), 1.0)
    logps.sum().backward()
    assert logps.item() == pytest.approx(math.log(1 / 4)) and hidden.grad[0].tolist() == pytest.approx([0.75, -0.75])
    assert entropy.item() == pytest.approx(math.log(4) / 4 + math.log(4 / 3) * 3 / 4)
    hidden.grad = None                                                          # at 1/2: p = 1/10, 9/10
    logps_file.chunked_logps(hidden, torch.eye(2), torch.tensor([0]), 0.5)[0].sum().backward()
    assert hidden.grad[0].tolist() == pytest.approx([1.8, -1.8])


# ------------------------------------------------------------------------------------ packing

def bools(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


def test_packing_by_hand():
    """Groups a (three prompt tokens; three, one and no wanted tokens) and b (two prompt tokens; a hole in the first mask).

    Packed: 0-2 the prompt a, 3-4 the first row's own, 5-6 the prompt b, 7-8 and 9-12 the own ones of its rows. What
    stands on the last wanted token predicts nothing; the only wanted token of row 1 is predicted by the prompt."""
    wanted = bools("0001110", "0001000", "0000000", "0010100", "0011111")
    source, positions, sequences, before = pack(wanted, ["a", "a", "a", "b", "b"])
    assert source.tolist() == [0, 1, 2, 3, 4, 21, 22, 23, 24, 30, 31, 32, 33]
    assert positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 2, 3, 4, 5]
    assert sequences.queries == [3, 2, 2, 2, 4] and sequences.keys == [3, 5, 2, 4, 6]
    assert sequences.index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 5, 6, 9, 10, 11, 12]
    assert before.tolist() == [2, 3, 4, 2, 6, 8, 6, 9, 10, 11, 12]


def test_packing_without_shared_prompts_by_hand():
    wanted = bools("0011", "0000", "0010", "0001")
    source, positions, sequences, before = pack(wanted, range(4))
    assert source.tolist() == [0, 1, 2, 8, 9, 12, 13, 14] and positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert sequences.queries == [2, 1, 2, 3] and sequences.keys == [2, 3, 2, 3] and before.tolist() == [1, 2, 4, 7]


def test_rows_of_a_group_that_begin_elsewhere_have_prompts_of_their_own():
    """A row whose first wanted token comes later sees more as its prompt."""
    source, _, sequences, before = pack(bools("0011", "0001"), [0, 0])
    assert source.tolist() == [0, 1, 2, 4, 5, 6] and sequences.queries == [2, 1, 3] and before.tolist() == [1, 2, 5]


def test_packing_of_nothing_is_empty():
    source, positions, sequences, before = pack(bools("000", "000"), [0, 0])
    assert len(source) == len(positions) == len(before) == len(sequences.queries) == 0


def small_model():
    model = Transformer(ModelConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
                                    rope_theta=500.0))
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            p.copy_(normal(*p.shape, seed=i, scale=0.3) + ("norm" in name))
    return model


MODEL = small_model()


@st.composite
def ragged_groups(draw):
    """tokens, mask and keys of rows in any order: groups share a prompt; masks have holes, some are empty."""
    rng, rows = random.Random(draw(st.integers(0, 999))), []
    for key, (prompt_length, sizes) in enumerate(draw(st.lists(st.tuples(
            st.integers(1, 6), st.lists(st.integers(0, 7), min_size=1, max_size=4)), min_size=1, max_size=3))):
        prompt = [rng.randrange(30) for _ in range(prompt_length)]
        for n in sizes:
            mask = [1] + [int(rng.random() < 0.7) for _ in range(n - 1)] if n else []
            rows.append((prompt + [rng.randrange(30) for _ in range(n)], [0] * prompt_length + mask, key))
    rng.shuffle(rows)
    T = max(len(tokens) for tokens, _, _ in rows)
    tokens, mask = (torch.tensor([row[i] + [0] * (T - len(row[i])) for row in rows]) for i in (0, 1))
    return tokens, mask, [row[2] for row in rows]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ragged_groups(), st.sampled_from([1.0, 0.7]))
def test_shared_prompts_change_neither_log_probs_nor_gradients(batch, temperature):
    """Beside rows that bring their own prompts, and beside the logits of whole padded rows."""
    tokens, mask, keys = batch
    shared, entropy = MODEL.token_logps(tokens, mask, temperature, prompts=keys)
    apart, same_entropy = MODEL.token_logps(tokens, mask, temperature)
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, same_entropy, atol=1e-5, rtol=0)
    full = (MODEL(tokens) / temperature).log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0] * mask[:, 1:]
    torch.testing.assert_close(shared[:, 1:], full, atol=1e-5, rtol=0)
    assert not entropy.requires_grad
    if mask.any():
        parameters = list(MODEL.parameters())
        assert_same_gradients(shared[:, 1:], full, parameters, atol=1e-4, rtol=1e-4)
        assert_same_gradients(shared, apart, parameters, atol=1e-4, rtol=1e-4)


def test_only_what_is_needed_goes_through_the_model(monkeypatch):
    """Two groups of four with 5 prompt and 3 completion tokens: 2 x 5, and 2 of each completion; 8 x 7 unshared. Where
    nothing is needed one token goes, times zero: with weights sharded over ranks the others wait for it."""
    sizes, whole = [], MODEL.hidden_states
    monkeypatch.setattr(MODEL, "hidden_states", lambda tokens, *rest: sizes.append(len(tokens)) or whole(tokens, *rest))
    mask = torch.zeros(8, 12)
    mask[:, 5:8] = 1
    tokens = torch.zeros(8, 12, dtype=torch.int64)
    MODEL.token_logps(tokens, mask, prompts=[0] * 4 + [1] * 4)
    MODEL.token_logps(tokens, mask)
    MODEL.token_logps(tokens, mask * 0)
    assert sizes == [2 * 5 + 8 * 2, 8 * 7, 1]
