"""The specification of decode.py and of continuous batching in batching.py: the numbers of the trainer's model, whatever
stands in the cache beside them, moves in it, or comes into it later.

The routes of accelerators (static shapes, device graphs, lengths known to the host, flash attention) run here on the CPU,
with a recording of the step's operations in place of a graph and plain formulas in place of the kernels."""

import builtins
import io
import math
import random
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import batching, decode
from engine.batching import ContinuousBatch, bucket
from engine.decode import (Cache, Groups, InferenceModel, Linear, bytes_per_token, own_blocks, stack_in_place,
                           weight_of)
from model import ModelConfig, Transformer
from engine.machine import free_bytes
from rollout import Sampler
from test_kernels import needs_varlen, normal, plain_part, replace_varlen

torch.set_num_threads(1)

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
FAMILIES = {
    "qwen3": dict(num_key_value_heads=2),
    "qwen2": dict(model_type="qwen2", qkv_bias=True, qk_norm=False, num_key_value_heads=4),
    "llama": dict(model_type="llama", qk_norm=False, rope_scaling=LLAMA3, num_key_value_heads=1, tie_word_embeddings=False),
    "llama with biases": dict(model_type="llama", qk_norm=False, qkv_bias=True, o_bias=True, mlp_bias=True),
}
STOPS = list(range(40, 50))     # a fifth of the vocabulary: some completions stop at once, some never do


def small_model(family="qwen3", scale=0.25):
    """Random weights in which nothing is 0 or 1; distributions neither flat nor certain."""
    model = Transformer(ModelConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                                    rope_theta=500.0, max_position_embeddings=64, **FAMILIES[family]))
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            p.copy_(normal(*p.shape, seed=i, scale=scale) + ("norm" in name))
    return model


MODEL = small_model()
PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9], [10, 11]]


# ------------------------------------------------------------------------------------ the numbers of Transformer.forward

@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_give_the_logits_of_the_whole_sequence(monkeypatch, family, uniform):
    """Seven rows of four ragged prompts: at other places than their order, rows of a prompt apart from each other, moved
    after the third step, own keys in blocks of four. They begin at different steps, or (uniform) all at once, and then row 6
    stops mattering after the second."""
    monkeypatch.setattr(decode, "CPU_BLOCK", 4)
    monkeypatch.setattr(decode, "ONE_BLOCK", 0)
    model, rng, own_tokens, R = small_model(family), random.Random(0), 6, 7
    owner = [0, 2, 1, 0, 3, 0, 2]
    texts = [PROMPTS[p] + [rng.randrange(50) for _ in range(own_tokens)] for p in owner]
    width = max(len(text) for text in texts)
    with torch.no_grad():
        logits = model(torch.tensor([text + [0] * (width - len(text)) for text in texts]))

    def want(row, drawn):       # after the prompt and `drawn` own tokens
        return logits[row, len(PROMPTS[owner[row]]) + drawn - 1]

    with torch.inference_mode():
        inference = InferenceModel(model, R)
        cache = Cache(model.config, 6, 9, R + 2, 8, torch.device("cpu"), torch.float32)
        assert cache.k.shape[1] == 2
        place = [4, 0, 3, 1]
        first = torch.cat([inference.prefill(PROMPTS[part], cache, place[part]) for part in (slice(3), slice(3, 4))])
        torch.testing.assert_close(first, torch.stack([want(owner.index(p), 0) for p in range(4)]), atol=1e-5, rtol=0)
        begin, rows = [0 if uniform else [0, 1, 0, 2, 2, 0, 1][r] for r in range(R)], list(range(R))
        for time in range(own_tokens + max(begin)):
            if time == 3:
                order, moved = torch.tensor([6, 2, 0, 5, 1, 4, 3]), torch.tensor([5, 1, 2, 0])
                cache.move_rows(order, torch.arange(R), 4)
                cache.move_prompts(torch.tensor(place), moved)
                rows, place = [rows[k] for k in order], moved.tolist()
            own = [time - begin[r] for r in rows]
            live = [0 <= n < (2 if uniform and r == 6 else own_tokens) for r, n in zip(rows, own)]
            tokens = [texts[r][len(PROMPTS[owner[r]]) + n] if a else 49 for r, n, a in zip(rows, own, live)]
            groups = Groups([place[owner[r]] if a else None for r, a in zip(rows, live)], inference.config.num_key_value_heads,
                            max(place) + 1, rng.choice([None, R]))
            own = [min(max(n, 0), own_tokens - 1) if uniform <= a else 1 for n, a in zip(own, live)]
            out = inference.decode(torch.tensor(tokens), torch.tensor(own), groups, cache,
                                   max(own) + 1 + (0 if uniform else time % 2), max(own) if uniform else None)
            for k, r in enumerate(rows):
                if live[k]:
                    torch.testing.assert_close(out[k], want(r, own[k] + 1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("at_once", [1, 4, 6, 100])
def test_prefill_in_parts_is_prefill_of_all(monkeypatch, at_once):
    """At most so many tokens at once, or one prompt; logits in the order of the prompts."""
    sizes, whole = [], InferenceModel._prefill

    def part(self, prompts, *rest):
        sizes.append([len(p) for p in prompts])
        return whole(self, prompts, *rest)
    monkeypatch.setattr(decode, "PREFILL_TOKENS", at_once)
    monkeypatch.setattr(InferenceModel, "_prefill", part)
    with torch.inference_mode():
        cache = Cache(MODEL.config, 4, 5, 1, 1, torch.device("cpu"), torch.float32)
        got = InferenceModel(MODEL, 1).prefill(PROMPTS, cache, [2, 0, 3, 1])
        want = torch.stack([MODEL(torch.tensor([p]))[0, -1] for p in PROMPTS])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert cache.prompt_lengths.tolist() == [1, 2, 5, 3]
    assert sizes == {1: [[5], [1], [3], [2]], 4: [[5], [1, 3], [2]], 6: [[5, 1], [3, 2]], 100: [[5, 1, 3, 2]]}[at_once]


def test_prefill_leaves_other_places_alone():
    with torch.inference_mode():
        inference, cache = InferenceModel(MODEL, 1), Cache(MODEL.config, 3, 5, 1, 1, torch.device("cpu"), torch.float32)
        inference.prefill([PROMPTS[0]], cache, [1])
        before = cache.prompt_k[:, 1].clone()
        inference.prefill([PROMPTS[2], PROMPTS[3]], cache, [2, 0])
    assert torch.equal(cache.prompt_k[:, 1], before) and cache.prompt_lengths.tolist() == [2, 5, 3]


def test_bytes_of_a_token_by_hand():
    """Keys and values, 2 layers, 2 heads of 8 numbers of 4 or 2 bytes."""
    assert bytes_per_token(MODEL.config, torch.float32) == 2 * 2 * 2 * 8 * 4
    assert bytes_per_token(MODEL.config, torch.bfloat16) == 2 * 2 * 2 * 8 * 2


# ------------------------------------------------------------------------------------ fused weights

def projections(sizes, with_bias, dtype):
    """Linear layers of 12 inputs."""
    out = []
    for i, n in enumerate(sizes):
        layer = torch.nn.Linear(12, n, bias=with_bias, dtype=dtype)
        layer.weight.data.copy_(normal(n, 12, seed=i))
        if with_bias:
            layer.bias.data.copy_(normal(n, seed=9 + i))
        out.append(layer)
    return out


@pytest.fixture(params=[True, False], ids=["onednn", "plain"])
def either_way(request, monkeypatch):
    """With the blocked products of oneDNN, which large weights have where this machine has them, and without."""
    if request.param:
        monkeypatch.setattr(decode, "SMALL", 0)
    else:
        monkeypatch.setattr(decode, "has_onednn", lambda dtype: False)


@pytest.mark.skipif(not decode.has_onednn(torch.float32), reason="this PyTorch has no oneDNN")
def test_only_large_weights_are_stored_in_blocks(monkeypatch):
    """Three of 5 x 12 together are 180 numbers; the model's own weights stay as small ones are."""
    monkeypatch.setattr(decode, "SMALL", 180)
    layers = projections([5, 5, 5], False, torch.float32)
    assert Linear(layers, 1).weight is None and Linear(layers[:2], 1).weight.shape == (10, 12)


def test_a_small_weight_is_not_changed_by_what_follows():
    """It is the model's own, not a copy: silu, sums and products are taken in the new tensor."""
    layers, x = projections([12], False, torch.float32), normal(3, 12, seed=20)
    before, x_before, other = layers[0].weight.detach().clone(), x.clone(), normal(3, 12, seed=21)
    with torch.no_grad():
        for then in ("silu", "add", "mul"):
            Linear(layers, 1)(x, then, other)
    assert torch.equal(layers[0].weight, before) and torch.equal(x, x_before) and torch.equal(other, normal(3, 12, seed=21))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("sizes", [[5], [8, 3, 3], [16, 16]])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("then", ["none", "silu", "add", "mul"])
@torch.no_grad()
def test_linear_is_every_product_side_by_side_and_what_follows(sizes, rows, with_bias, dtype, then, either_way):
    layers, x, other = projections(sizes, with_bias, dtype), normal(rows, 12, seed=20, dtype=dtype), normal(rows, sum(sizes), seed=21)
    want = torch.cat([layer(x) for layer in layers], 1).float()
    want = {"none": want, "silu": torch.nn.functional.silu(want), "add": want + other, "mul": want * other}[then]
    got = Linear(layers, rows)(x, then, other.to(dtype) if then in ("add", "mul") else None)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=2e-5 if dtype == torch.float32 else 0.2, rtol=0)


class Wrapped(torch.nn.Module):
    """A linear layer of base weights and an addition, as LoRA's."""

    def __init__(self, base, added):
        super().__init__()
        self.base, self.added, self.bias = base, added, base.bias

    def inference_weight(self):
        return self.base.weight + self.added


def test_the_sampler_reads_the_weight_that_a_layer_gives_for_inference(either_way):
    """Of a stack some layers may be wrapped and some not; the base weights stay as they are."""
    plain, base = projections([5, 3], False, torch.float32)
    wrapped, x = Wrapped(base, normal(3, 12, seed=30)), normal(7, 12, seed=20)
    before = base.weight.detach().clone()
    assert weight_of(plain) is plain.weight and torch.equal(weight_of(wrapped), base.weight + wrapped.added)
    with torch.no_grad():
        want = torch.cat([plain(x), x @ (base.weight + wrapped.added).T], 1)
        torch.testing.assert_close(Linear([plain, wrapped], 7)(x), want, atol=2e-5, rtol=0)
    assert torch.equal(base.weight, before)


def test_a_block_s_mlp_in_the_form_of_the_sampler_is_the_mlp_and_the_residual(either_way):
    mlp, x, residual = MODEL.model.layers[0].mlp, normal(7, 32, seed=20), normal(7, 32, seed=21)
    with torch.no_grad():
        want = mlp(x) + residual
        torch.testing.assert_close(mlp.for_inference(7, False)(x, residual), want, atol=2e-5, rtol=0)


def matrices(*sizes):
    return [torch.nn.Parameter(normal(n, 4, seed=i)) for i, n in enumerate(sizes)]


def test_adjoined_matrices_are_neighbours_in_memory_with_the_same_values():
    weights = matrices(3, 1, 2)
    values, shapes = [w.detach().clone() for w in weights], [w.shape for w in weights]
    whole = stack_in_place(weights)
    assert torch.equal(whole, torch.cat(values)) and [w.shape for w in weights] == shapes
    assert all(torch.equal(w, value) for w, value in zip(weights, values))
    assert [w.data_ptr() - whole.data_ptr() for w in weights] == [0, 3 * 4 * 4, 4 * 4 * 4]


def test_adjoining_again_moves_nothing():
    weights = matrices(3, 1, 2)
    first = stack_in_place(weights)
    places = [w.data_ptr() for w in weights]
    again = stack_in_place(weights)
    assert again.data_ptr() == first.data_ptr() and [w.data_ptr() for w in weights] == places
    assert torch.equal(again, first)


def test_an_update_of_the_parameters_is_seen_in_the_adjoined_matrix():
    weights = matrices(3, 2)
    whole = stack_in_place(weights)
    with torch.no_grad():
        weights[1].add_(1.0)
        weights[0].copy_(torch.zeros(3, 4))
    assert torch.equal(whole, torch.cat([w.detach() for w in weights])) and (whole[:3] == 0).all()


def test_one_matrix_stays_where_it_is():
    weights = matrices(3)
    place = weights[0].data_ptr()
    assert stack_in_place(weights).data_ptr() == place == weights[0].data_ptr()


def test_matrices_that_the_sampler_adjoined_are_trained_on():
    """It adjoins in inference mode: the parameters must stay ordinary ones, with gradients and optimizer steps."""
    weights = matrices(3, 2)
    with torch.inference_mode():
        whole = stack_in_place(weights)
    assert all(w.requires_grad and not w.is_inference() for w in weights)
    x = normal(5, 4, seed=7)
    sum((x @ w.T).square().sum() for w in weights).backward()
    before = whole.clone()
    torch.optim.SGD(weights, lr=0.1).step()
    assert not torch.equal(whole, before) and torch.equal(whole, torch.cat([w.detach() for w in weights]))


def test_neighbours_by_chance_are_adjoined_too():
    """Two tensors of the caching allocator may lie side by side, and yet neither may reach into the other's memory."""
    memory = bytearray(5 * 4 * 4)
    weights = [torch.nn.Parameter(torch.frombuffer(memory, dtype=torch.float32, count=n * 4, offset=offset).view(n, 4))
               for n, offset in ((3, 0), (2, 48))]
    assert weights[1].data_ptr() == weights[0].data_ptr() + 48
    with torch.no_grad():
        weights[0].fill_(1.0)
        weights[1].fill_(2.0)
    assert stack_in_place(weights).tolist() == [[1.0] * 4] * 3 + [[2.0] * 4] * 2


# ------------------------------------------------------------------------------------ completions in any company

class Request:
    """One call of generate, by itself or cut into one call a prompt."""

    def __init__(self, prompts, G, limits, stops, temperature, seed):
        self.prompts, self.G, self.limits, self.stops = prompts, G, limits, stops
        self.temperature, self.seeds = temperature, [(seed, i) for i in range(len(prompts))]

    def together(self, model=MODEL, **settings_):
        return Sampler(model, self.stops, **settings_).generate(
            self.prompts, self.G, list(self.limits), self.temperature, seed=self.seeds)

    def alone(self, model=MODEL):
        """Each prompt in a call of its own: completions, and their log-probs without any padding."""
        completions, logps = [], []
        for i, prompt in enumerate(self.prompts):
            out = Sampler(model, self.stops, max_rows=1000).generate(
                [prompt], self.G, self.limits[i * self.G:(i + 1) * self.G], self.temperature, seed=self.seeds[i:i + 1])
            completions += out.completions()
            logps += logps_of(out)
        return completions, logps

    def check(self, out):
        """That `out` is what the plain sampler gives, all prompts at once."""
        want = self.together(max_rows=1000)
        assert out.completions() == want.completions() and torch.equal(out.finished, want.finished)
        torch.testing.assert_close(out.logps, want.logps, atol=1e-4, rtol=0)

    def check_alone(self, out, model=MODEL):
        """That `out` is what drawing each prompt alone gives, and what the trainer's model says of it."""
        completions, logps = self.alone(model)
        assert out.completions() == completions
        torch.testing.assert_close(torch.cat(logps_of(out)), torch.cat(logps), atol=1e-4, rtol=0)
        mask, groups = out.completion_mask(), [i // self.G for i in range(len(out.tokens))]
        with torch.no_grad():
            trainer, _ = model.token_logps(out.tokens, mask, self.temperature or 1.0, groups)
        torch.testing.assert_close(out.logps, trainer, atol=1e-4, rtol=0)
        for row, completion in enumerate(completions):
            stopped = completion[-1] in self.stops
            assert not set(completion[:-1]) & set(self.stops) and len(completion) <= self.limits[row]
            assert bool(out.finished[row]) == stopped and (stopped or len(completion) == self.limits[row])
            assert out.tokens[row, :out.prompt_lengths[row]].tolist() == self.prompts[row // self.G]


def logps_of(out):
    return [row[start:end] for row, start, end in zip(out.logps, out.prompt_lengths, out.lengths)]


@st.composite
def requests(draw, temperatures=(0.0, 1.0)):
    rng = random.Random(draw(st.integers(0, 9999)))
    lengths, G = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6)), draw(st.integers(1, 5))
    prompts = [[rng.randrange(50) for _ in range(n)] for n in lengths]
    longest = draw(st.integers(1, 14))
    limits = [rng.randint(1, longest) for _ in range(len(prompts) * G)]
    stops = rng.sample(range(50), draw(st.sampled_from([0, 1, 4, 10])))
    return Request(prompts, G, limits, stops, draw(st.sampled_from(temperatures)), rng.randrange(99))


@contextmanager
def route(leave_at=None, on_step=None, blocks=None, one_block=0, least=(1, 1), **attributes):
    """Calls of generate inside have these attributes (of ContinuousBatch); yields the list of them. blocks: slots of each, at least;
    one_block: rows that have one block only. least: rows and own slots of a step on accelerators."""
    with pytest.MonkeyPatch.context() as patch:
        create, step, batches = ContinuousBatch.__init__, ContinuousBatch.step, []

        def init(self, *args, **options):
            create(self, *args, **options)
            for name, value in attributes.items():
                setattr(self, name, value)
            batches.append(self)

        def observed(self, rows, used):
            if on_step and not Recording.active:
                on_step(self, rows, used)
            step(self, rows, used)
        patch.setattr(ContinuousBatch, "__init__", init)
        patch.setattr(ContinuousBatch, "step", observed)
        if attributes.get("static"):        # as on accelerators
            patch.setattr(batching, "LEAST_ROWS", least[0])
            patch.setattr(batching, "LEAST_KEYS", least[1])
            for file in (decode, batching):
                patch.setattr(file, "own_blocks", lambda slots, device, rows: (1, slots))
        elif blocks:
            patch.setattr(decode, "CPU_BLOCK", blocks)
            for file in (decode, batching):
                patch.setattr(file, "ONE_BLOCK", one_block)
            if one_block:
                patch.setattr(batching, "FEW_ROWS", min(one_block, batching.FEW_ROWS))
        if leave_at is not None:
            patch.setattr(batching, "LEAVE_AT", leave_at)
        yield batches


LEAVE = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(requests(), st.integers(1, 10), LEAVE, st.sampled_from([1, 10, 8192]), st.sampled_from([1, 3, 16]), st.integers(0, 4))
def test_completions_are_those_of_each_prompt_alone(request, max_rows, leave_at, prefill_tokens, blocks, one_block):
    with route(leave_at, blocks=blocks, one_block=one_block), pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "PREFILL_TOKENS", prefill_tokens)
        out = request.together(max_rows=max_rows)
    request.check_alone(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_of_every_family_are_those_of_each_prompt_alone(family):
    model = small_model(family)
    request = Request(PROMPTS, 3, [12, 5, 9] * 4, STOPS, 1.0, 5)
    request.check_alone(request.together(model, max_rows=4), model)


# ------------------------------------------------------------------------------------ slots

def test_a_freed_slot_is_given_to_the_next_completion_at_once():
    """Two slots. Completion 0 takes 20 tokens: 19 steps after its first token. Beside it each of 1 to 5 has two tokens,
    one of them drawn when it came in: one step each, in the same slot. Then that slot is empty, but computed: one of FEW_ROWS."""
    seen = []
    with route(on_step=lambda batch, rows, used: seen.append((list(batch.schedule.running), rows))):
        out = Request([[1, 2, 3]], 6, [20, 2, 2, 2, 2, 2], [], 1.0, 0).together(max_rows=2)
    assert seen == [([0, k], 2) for k in range(1, 6)] + [([0], 2)] * 14
    assert (out.lengths - out.prompt_lengths).tolist() == [20, 2, 2, 2, 2, 2]


def test_a_completion_of_one_token_needs_no_step():
    """It comes from the prompt; the slot is free again at once. Six such beside one of three tokens: two steps."""
    seen = []
    with route(on_step=lambda batch, rows, used: seen.append(list(batch.schedule.running))):
        Request([[1, 2, 3]], 7, [1, 1, 1, 3, 1, 1, 1], [], 1.0, 0).together(max_rows=2)
    assert seen == [[3], [3]]


def test_long_prompts_come_first():
    """So that those in the cache together have like lengths. Outcomes stand in the order of the request all the same."""
    seen = []
    with route(on_step=lambda batch, rows, used: seen.append(list(batch.schedule.running))):
        Request([[1], [2] * 5, [3] * 3], 2, [2] * 6, [], 1.0, 0).together(max_rows=2)
    assert seen == [[2, 3], [4, 5], [0, 1]]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(requests(), st.integers(1, 10), LEAVE)
def test_every_completion_is_drawn_once_in_few_slots_and_little_is_computed_for_nobody(request, max_rows, leave_at):
    """A completion of n tokens is in n - 1 steps, one after the other. A step has at most 1 / LEAVE_AT times as many rows
    as are wanted, or FEW_ROWS. Every prompt is prefilled once."""
    steps, prefilled, prefill = [], [], ContinuousBatch.prefill
    with route(leave_at, lambda batch, rows, used: steps.append((list(batch.schedule.running), rows, batch.slots.alive.sum().item()))), \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContinuousBatch, "prefill", lambda self, new: prefilled.extend(new) or prefill(self, new))
        out = request.together(max_rows=max_rows)
    lengths = (out.lengths - out.prompt_lengths).tolist()
    assert sorted(prefilled) == list(range(len(request.prompts)))
    for row, n in enumerate(lengths):
        at = [t for t, (holder, _, _) in enumerate(steps) if row in holder]
        assert at == list(range(at[0], at[0] + n - 1)) if n > 1 else not at
    few = min(batching.FEW_ROWS, max_rows, len(lengths))
    for holder, rows, alive in steps:
        assert rows == max(len(holder), few) <= max_rows and alive == sum(row is not None for row in holder)
        assert alive == len(holder) or alive > leave_at * len(holder) - 1e-9
    assert sum(len(holder) for holder, _, _ in steps) * leave_at <= sum(lengths) - len(lengths)


def test_all_slots_are_filled_while_completions_wait():
    """Twelve completions that all last, five slots: 5, 5 and 2."""
    seen = []
    with route(on_step=lambda batch, rows, used: seen.append(len(batch.schedule.running))):
        Request(PROMPTS, 3, [4] * 12, [], 1.0, 0).together(max_rows=5)
    assert seen == [5] * 3 + [5] * 3 + [2] * 3


# ------------------------------------------------------------------------------------ memory

@contextmanager
def caches():
    """The caches that are made inside."""
    with pytest.MonkeyPatch.context() as patch:
        made = []

        def new(*args):
            made.append(Cache(*args))
            return made[-1]
        patch.setattr(batching, "Cache", new)
        yield made


def bytes_of(cache):
    """With the copy of the last few rows, if there is one."""
    copy = (cache.k, cache.v) if cache.k is not cache.memory[0] else ()
    return sum(x.nbytes for x in (*cache.memory, *copy, cache.prompt_k, cache.prompt_v))


TOKEN_BYTES = bytes_per_token(MODEL.config, torch.float32)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(requests(), st.integers(1, 400), st.sampled_from([3, 1000]), st.sampled_from([3, 16]), st.sampled_from([0, 2, 16]))
def test_keys_and_values_stay_within_the_budget(request, tokens, max_rows, blocks, few):
    """As many slots as fit, and with any number of them the same completions; else one line that says what helps."""
    budget, longest, cpu = tokens * TOKEN_BYTES, max(len(p) for p in request.prompts), torch.device("cpu")
    with caches() as made, route(blocks=blocks, one_block=few):
        def own(rows): return rows * math.prod(own_blocks(max(request.limits), cpu, rows))
        try:
            out = request.together(max_rows=max_rows, kv_bytes=budget)
        except ValueError as error:
            assert "lower --max-new-tokens" in str(error) and "\n" not in str(error) and tokens < own(1) + longest
            return
        most, slots = min(max_rows, len(request.limits)), made[0].memory[0].shape[2]
        prompts = min(len(request.prompts), 2 * -(-(slots + 1) // request.G))       # with one row more: two for each group's rows
        assert slots == most or slots < most and own(slots + 1) + prompts * longest > tokens
    request.check(out)
    assert bytes_of(made[0]) <= budget


def test_slots_that_fill_up_the_last_block_are_in_the_budget():
    """17 tokens are two blocks of 9. With a prompt of three: 3 + 3 x 18 tokens for three rows; 3 + 4 x 17 are not four."""
    for tokens, slots in ((3 + 3 * 18 - 1, 2), (3 + 3 * 18, 3), (3 + 4 * 17, 3), (3 + 4 * 18, 4)):
        with caches() as made, route(blocks=16):
            Request([[1, 2, 3]], 4, [17] * 4, [], 1.0, 0).together(kv_bytes=tokens * TOKEN_BYTES)
        assert made[0].k.shape[1:3] == (2, slots) and bytes_of(made[0]) <= tokens * TOKEN_BYTES


def test_the_last_few_rows_are_copied_only_within_the_budget():
    """The same, where two rows have one block: beside four, or three, the copy of two takes 2 x 18."""
    for tokens, slots, blocks in ((3 + 4 * 18, 4, 2), (3 + 6 * 18 - 1, 4, 2), (3 + 6 * 18, 4, 1), (3 + 2 * 17, 2, 1),
                                  (3 + 3 * 18 - 1, 2, 1)):
        with caches() as made, route(blocks=16, one_block=2):
            out = Request([[1, 2, 3]], 4, [17, 2, 17, 5], [], 1.0, 0).together(kv_bytes=tokens * TOKEN_BYTES)
        assert made[0].memory[0].shape[2] == slots and made[0].k.shape[1] == blocks
        assert bytes_of(made[0]) <= tokens * TOKEN_BYTES and (out.lengths - out.prompt_lengths).tolist() == [17, 2, 17, 5]


@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_a_budget_of_just_one_completion_is_enough(prompts):
    """Prompts of 3 tokens and 5 new ones: 8 tokens in the cache, the next prompt in the place of the one before."""
    request = Request([[i, i, i] for i in range(prompts)], 2, [5] * prompts * 2, [], 1.0, 0)
    with pytest.raises(ValueError, match="lower --max-new-tokens"):
        request.together(kv_bytes=8 * TOKEN_BYTES - 1)
    request.check(request.together(kv_bytes=8 * TOKEN_BYTES))


def test_without_a_budget_it_is_a_share_of_what_is_free(monkeypatch):
    """40 completions of 10 tokens, prompts of 5: room for 300 tokens is free and 240 may be taken, 16 bytes a row and word of
    the vocabulary for logits among them."""
    monkeypatch.setattr(batching, "free_bytes", lambda device: 300 * TOKEN_BYTES)
    with caches() as made:
        Request([[1] * 5] * 10, 4, [10] * 40, [], 1.0, 0).together()
    logits = made[0].k.shape[2] * 16 * MODEL.config.vocab_size
    assert 200 * TOKEN_BYTES < bytes_of(made[0]) + logits <= batching.KV_SHARE * 300 * TOKEN_BYTES


def test_kept_memory_does_not_make_the_next_cache_larger(monkeypatch):
    """What is free stays the same here, as it does when few of the kept pages were ever touched."""
    monkeypatch.setattr(batching, "free_bytes", lambda device: 300 * TOKEN_BYTES)
    sampler = Sampler(MODEL, [])
    with caches() as made:
        for _ in range(3):
            sampler.generate([[1] * 5] * 10, 4, [40] + [3] * 39)
    assert len({cache.k.shape for cache in made}) == 1


def test_free_bytes_are_this_process_s_share_of_what_is_available(monkeypatch):
    assert free_bytes(torch.device("cpu")) > 0
    lines = "MemTotal:       4000 kB\nMemFree:         100 kB\nMemAvailable:   3000 kB\n"
    monkeypatch.setattr(builtins, "open", lambda *args, real=open, **more: (
        io.StringIO(lines) if args[0] == "/proc/meminfo" else real(*args, **more)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_bytes(torch.device("cpu")) == 3000 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == 750 * 1024


GROUP_FILES = {
    "2": ("/sys/fs/cgroup{}/memory.max", "/sys/fs/cgroup{}/memory.current", "/sys/fs/cgroup{}/memory.stat", "inactive_file"),
    "1": ("/sys/fs/cgroup/memory{}/memory.limit_in_bytes", "/sys/fs/cgroup/memory{}/memory.usage_in_bytes",
          "/sys/fs/cgroup/memory{}/memory.stat", "total_inactive_file")}


@pytest.mark.parametrize("version", GROUP_FILES)
@pytest.mark.parametrize("membership, groups, expected", [
    ("", {"": (1000, 400, 0)}, 600),
    ("", {"": (1000, 990, 700)}, 710),                  # files that were read give way
    ("", {"": (1000, 400, 900)}, 1000),                 # two looks, and a file was read in between
    ("", {"": (1000, 1200, 0)}, 0),
    ("", {"": (None, 400, 0)}, 3000 * 1024),
    ("/a/b", {"": (None, 0, 0), "/a": (1000, 100, 0), "/a/b": (None, 5, 0)}, 900),
    ("/a/b", {"": (2000, 100, 0), "/a": (1500, 100, 0), "/a/b": (1200, 100, 50)}, 1150),
    ("/a/b", {"/a/b": (2 ** 63 - 4096, 100, 0)}, 3000 * 1024),
    ("/elsewhere", {"": (1000, 0, 0)}, 1000),           # the path is the host's, the root the container's
    ("/", {}, 3000 * 1024),
])
def test_the_least_of_all_control_groups_counts(monkeypatch, version, membership, groups, expected):
    limit_file, used_file, stat_file, dropped = GROUP_FILES[version]
    line = f"0::{membership}" if version == "2" else f"5:cpu,cpuacct:/x\n4:memory:{membership}"
    files = {"/proc/meminfo": "MemAvailable:   3000 kB\n", "/proc/self/cgroup": line + "\n"}
    for path, (limit, used, inactive) in groups.items():
        files[limit_file.format(path)] = f"{'max' if limit is None else limit}\n"
        files[used_file.format(path)] = f"{used}\n"
        files[stat_file.format(path)] = f"anon 77\n{dropped} {inactive}\n{dropped}_more 9\nactive_file 800\n"

    def fake(name, *args, real=open, **more):
        if str(name).startswith(("/proc/", "/sys/")):
            if str(name) in files:
                return io.StringIO(files[str(name)])
            raise FileNotFoundError(name)
        return real(name, *args, **more)
    monkeypatch.setattr(builtins, "open", fake)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_bytes(torch.device("cpu")) == expected


def test_blocks_by_hand():
    """At most eight of equal size, of at least 16 slots, and no more slots than that takes; one of few rows and on accelerators."""
    cpu = torch.device("cpu")
    assert [own_blocks(n, cpu, 17) for n in (1, 16, 17, 64, 128, 130, 1024)] == [
        (1, 1), (1, 16), (2, 9), (4, 16), (8, 16), (8, 17), (8, 128)]
    assert own_blocks(130, cpu, 16) == (1, 130) and own_blocks(1000, torch.device("meta"), 17) == (1, 1000)


def blocks_by_step(request, **limits):
    """(slots in use, completions that wait, blocks) of each step, where two rows have one block and blocks are of four slots."""
    seen = []
    with route(1.0, lambda batch, *_: seen.append((len(batch.schedule.running), len(batch.schedule.waiting), batch.cache.k.shape[1])), 4, one_block=2):
        request.check_alone(request.together(**limits))
    return seen


def test_the_last_few_rows_have_one_block():
    """As soon as nobody waits for their slots. Five slots; eight completions of 2 to 16 tokens."""
    seen = blocks_by_step(Request(PROMPTS, 2, [12, 3, 5, 7, 2, 16, 9, 15], [], 1.0, 4), max_rows=5)
    assert [rows for rows, _, _ in seen].count(2) > 1 and any(queue for _, queue, _ in seen)
    assert all(blocks == (1 if rows <= 2 and not queue else 4) for rows, queue, blocks in seen)


def test_few_rows_that_leave_slots_free_for_the_queue_keep_their_blocks():
    """Two prompts have room. Of each a completion stays long: then no place is free for the third, though two slots are."""
    request = Request([[1] * 30, [2] * 30, [3] * 30], 4, [12, 2, 2, 2] * 3, [], 1.0, 0)
    seen = blocks_by_step(request, kv_bytes=(4 * 12 + 2 * 30 + 2 * 12) * TOKEN_BYTES)
    assert (2, 4, 3) in seen and (2, 4, 1) not in seen and seen[-1][2] == 1


@pytest.mark.parametrize("one_block", [0, 2, 4])
def test_memory_is_kept_for_the_next_rollout_and_what_lies_in_it_does_not_show(one_block, monkeypatch):
    sampler = Sampler(MODEL, STOPS, max_rows=4)
    with caches() as made, route(blocks=16, one_block=one_block):
        for limit in (20, 20, 21, 20):
            out = sampler.generate(PROMPTS, 3, limit, seed=limit)
            want = Sampler(MODEL, STOPS, max_rows=4).generate(PROMPTS, 3, limit, seed=limit)
            assert torch.equal(out.tokens, want.tokens) and torch.equal(out.logps, want.logps)
        for name, few in (("KEEP_BYTES", 0), ("free_bytes", lambda device: 2 * 8 * made[-1].memory[0].nbytes - 1)):
            with monkeypatch.context() as patch:
                patch.setattr(batching, name, few)
                sampler.generate(PROMPTS, 3, 20, seed=0)
                assert sampler.kept is None
    places = [cache.memory[0].data_ptr() for cache in made[:8:2]]
    assert places[0] == places[1] and made[4].memory[0].shape != made[2].memory[0].shape


def test_memory_that_does_not_fit_is_given_up_before_the_next_rollout_begins():
    """Else both would be there while it runs."""
    sampler, seen = Sampler(MODEL, [], max_rows=4), []
    sampler.generate(PROMPTS, 3, 20)
    old = weakref.ref(sampler.kept[0])
    with route(on_step=lambda *_: seen.append(old() is None)):
        sampler.generate(PROMPTS, 3, 30)
    assert seen and all(seen)


def test_a_model_that_was_broken_leaves_nothing_behind():
    """NaN times 0 is NaN: no mask would hide it."""
    model = small_model()
    sampler, weight = Sampler(model, [], max_rows=4), model.model.layers[0].self_attn.v_proj.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="no finite log-probability"):
        sampler.generate(PROMPTS, 3, 20)
    with torch.no_grad():
        weight.copy_(good)
    assert sampler.kept is None and sampler.generate(PROMPTS, 3, 20).logps.isfinite().all()


def test_what_a_stopped_row_has_broken_is_not_kept(monkeypatch):
    """Only the stop token's embedding is NaN: no log-prob of the rollout shows it, because that token ends a row. The row draws
    on until all have stopped, and its keys would be read by the next rollout."""
    monkeypatch.setattr(batching, "LEAVE_AT", 0.0)
    model = small_model("llama")        # its head is not the embedding
    good, sampler, met = model.model.embed_tokens.weight.detach().clone(), Sampler(model, [20]), 0
    for seed in range(30):
        with torch.no_grad():
            model.model.embed_tokens.weight[20] = math.nan
        assert sampler.generate(PROMPTS, 4, [3] * 15 + [12], seed=seed).logps.isfinite().all()
        met += sampler.kept is None
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(good)
        assert sampler.generate(PROMPTS, 4, [3] * 15 + [12], seed=seed).logps.isfinite().all()
    assert met > 5


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_sampling_in_bfloat16_is_the_trainer_in_bfloat16_up_to_rounding(family):
    """Log-probs of the same tokens by the same weights: 8 bits of mantissa through two layers, and a shared prompt."""
    model = small_model(family).to(torch.bfloat16)
    out = Sampler(model, STOPS, max_rows=7).generate(PROMPTS, 3, 20, seed=1)
    mask = out.completion_mask()
    trainer, _ = model.token_logps(out.tokens, mask, prompts=[i // 3 for i in range(12)])
    assert out.logps.dtype == torch.float32 and mask.sum() > 60
    torch.testing.assert_close(out.logps, trainer.detach(), atol=0.15, rtol=0)
    assert (out.logps - trainer)[mask.bool()].square().mean().sqrt() < 0.04


HALF = small_model().to(torch.bfloat16)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(requests(), st.integers(1, 10), LEAVE, st.booleans(), st.integers(1, 8))
def test_random_ragged_batches_in_bfloat16(request, max_rows, leave_at, static, look_every):
    """On the CPU's route and that of accelerators: rounding may change which token is drawn, but never by how much its log-prob
    differs from the trainer's."""
    with route(leave_at, static=static, look_every=look_every if static else 1):
        out = request.together(HALF, max_rows=max_rows)
    groups = [i // request.G for i in range(len(out.tokens))]
    with torch.no_grad():
        trainer, _ = HALF.token_logps(out.tokens, out.completion_mask(), request.temperature or 1.0, groups)
    torch.testing.assert_close(out.logps, trainer, atol=0.15 / min(1, request.temperature or 1), rtol=0)


# ------------------------------------------------------------------------------------ the routes of accelerators

def test_buckets_by_hand():
    """top, 3/4, 1/2, 3/8, 1/4, ... of it: the least that holds n."""
    sizes = [64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1]
    assert [bucket(n, 64) for n in (64, 49, 48, 33, 32, 25, 24, 17, 1)] == [64, 64, 48, 48, 32, 32, 24, 24, 1]
    assert [bucket(n, 64) for n in range(1, 65)] == [min(s for s in sizes if s >= n) for n in range(1, 65)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 5000), st.integers(0, 5000))
def test_a_bucket_holds_its_number_with_at_most_half_as_much_again(n, more):
    top = n + more
    assert n <= bucket(n, top) <= min(top, 1.5 * n + 1) and bucket(bucket(n, top), top) == bucket(n, top)


def test_buckets_are_few():
    """Two to each halving of the top: a graph is captured for each."""
    count = {top: len({bucket(n, top) for n in range(1, top + 1)}) for top in (7, 100, 256, 1000, 4096)}
    assert all(n <= 2 * top.bit_length() for top, n in count.items()), count


def addresses(batch):
    """Of all tensors that a step reads or writes, by name."""
    named = {**vars(batch), **vars(batch.slots), **vars(batch.cache), **vars(batch.groups)}
    named |= {"embedding": batch.model.embedding, "frequencies": batch.model.frequencies}
    return {name: x.data_ptr() for name, x in named.items() if isinstance(x, torch.Tensor)}


class Watch:
    """on_step: the shapes of all steps, and that no tensor is ever replaced."""

    def __init__(self):
        self.shapes, self.places = set(), None

    def __call__(self, batch, rows, used):
        self.shapes.add((rows, used))
        self.places = self.places or addresses(batch)
        assert addresses(batch) == self.places and len(self.places) >= 18
        schedule, slots, T = batch.schedule, batch.slots, batch.max_new_tokens
        assert len(schedule.running) <= rows <= schedule.slot_count
        assert rows == bucket(len(schedule.running), schedule.slot_count)
        assert min(max(slots.drawn[slots.alive].tolist(), default=0), T) <= used <= T
        assert batch.groups.prompts == schedule.seat_count and not batch.in_step
        assert batch.groups.by_prompt.numel() == schedule.seat_count * batch.kv_heads * batch.group_size


@settings(max_examples=20, deadline=None, derandomize=True)
@given(requests(), st.integers(1, 10), LEAVE, st.integers(1, 8))
def test_static_shapes_give_the_same_completions(request, max_rows, leave_at, look_every):
    """The host looks every few steps only: rows that have finished run on, and write nothing down."""
    watch = Watch()
    with route(leave_at, watch, static=True, look_every=look_every) as batches:
        out = request.together(max_rows=max_rows)
    request.check(out)
    slots, T = batches[0].schedule.slot_count, batches[0].max_new_tokens
    allowed = {(bucket(r, slots), bucket(u, T)) for r in range(1, slots + 1) for u in range(1, T + 1)}
    assert watch.shapes <= allowed


def test_on_accelerators_stopped_rows_stay_whatever_they_cost(monkeypatch):
    """A step of another shape may cost a graph. Where no share of the rows makes the others leave, all eight stay to the end."""
    monkeypatch.setattr(batching, "LITTLE_WORK", 1)
    seen = []
    with route(0.0, lambda batch, rows, used: seen.append(len(batch.schedule.running)), static=True):
        Sampler(MODEL, []).generate(PROMPTS[:2], 4, [3, 5, 7, 9] * 2)
    assert seen == [8] * 8


ASKS_THE_HOST = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "lift_fresh",
                 "lift_fresh_copy", "unique_dim", "_unique2"}


class Recording(TorchDispatchMode):
    """What a device graph is: the operations of one run with the very tensors that they met, run again without Python.

    Where an operation makes a new tensor, a replay writes into the one that was made when recording. Operations that
    wait for the device, or read host memory that will be gone, are refused as a graph would."""
    active = False

    def __init__(self):
        super().__init__()
        self.operations = []

    def __enter__(self):
        Recording.active = True
        return super().__enter__()

    def __exit__(self, *error):
        Recording.active = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ASKS_THE_HOST, f"{function} in a device graph"
        if function.overloadpacket.__name__.startswith(("index", "_index", "_unsafe_index")):
            assert not any(x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor))
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(batches):
    """In place of decode.capture: the same contract, of which the first is that recording runs nothing."""
    def capture(step, device, pool):
        batch = batches[-1]
        state = [x for part in (batch, batch.slots, batch.cache, batch.groups) for x in vars(part).values()]
        tensors = [x for x in state if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in tensors]
        with Recording() as recording:
            step()
        for x, value in zip(tensors, before):
            x.copy_(value)
        return recording.replay, None
    return capture


@settings(max_examples=15, deadline=None, derandomize=True)
@given(requests(), st.integers(1, 10), LEAVE)
def test_replayed_steps_give_the_same_completions(request, max_rows, leave_at):
    """A recording that has frozen all Python values, made once a shape; nothing in it asks the host."""
    watch = Watch()
    with route(leave_at, watch, static=True, look_every=8, graph=True) as batches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "capture", record(batches))
        out = request.together(max_rows=max_rows)
    request.check(out)
    batch = batches[0]
    assert set(batch.graphs) == watch.shapes
    assert not watch.places or addresses(batch) == watch.places


def test_each_shape_is_captured_once_and_then_replayed():
    """Twelve completions of 40 tokens in eight slots, and then in four: each number of slots meets every width."""
    captures, request = [], Request([[1, 2]], 12, [40] * 12, [], 1.0, 0)
    with route(static=True, look_every=8, graph=True) as batches, pytest.MonkeyPatch.context() as patch:
        inner = record(batches)
        patch.setattr(batching, "capture", lambda *args: captures.append(args) or inner(*args))
        out = request.together(max_rows=8)
    request.check(out)
    assert set(batches[0].graphs) == {(rows, bucket(t, 40)) for rows in (4, 8) for t in range(1, 41)}
    assert len(captures) == len(batches[0].graphs)


@pytest.mark.parametrize("least, shapes", [((8, 16), {(8, 20), (8, 40)}), ((100, 100), {(8, 40)})])
def test_the_last_rows_and_the_first_slots_share_a_graph(least, shapes):
    """Lengths 40, 21 and ten short ones, in eight slots of 40: of 1, 2, 3, 4, 6 and 8 rows, and 1, 2, 3, 5, 8, 10, 15, 20, 30
    and 40 slots, eight rows are left, and all that is below 20 is computed with 20, of which 3/4 would be 15."""
    request = Request([[1, 2]], 12, [40, 21, *[5] * 10], [], 1.0, 0)
    with route(static=True, look_every=8, graph=True, least=least) as batches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "capture", record(batches))
        out = request.together(max_rows=8)
    request.check(out)
    assert shapes <= set(batches[0].graphs) <= shapes | {(8, 30)}


class Refusing:
    """A backend whose capture fails as it ends, in a stream of its own."""
    current = "the caller's"

    class CUDAGraph:
        pass

    def current_stream(self):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    @contextmanager
    def graph(self, graph, pool):
        self.current = "the capture's"
        yield
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("kind, name", [("cuda", "CUDAGraph"), ("npu", "NPUGraph")])
def test_a_capture_runs_the_step_once_inside_the_graph_of_its_backend(monkeypatch, kind, name):
    """backend.graph(graph, pool=pool) around the step; what comes back replays this graph, and names its pool."""
    log = []

    class Graph:
        def replay(self):
            log.append("replay")

        def pool(self):
            return "its pool"

    @contextmanager
    def graph(made, pool=None):
        assert isinstance(made, Graph)
        log.append(("begin", pool))
        yield
        log.append("end")
    backend = SimpleNamespace(graph=graph, current_stream=lambda: "now", **{name: Graph})
    monkeypatch.setattr(torch, kind, backend, raising=False)
    replay, pool = decode.capture(lambda: log.append("step"), SimpleNamespace(type=kind), "the last one's")
    replay()
    assert log == [("begin", "the last one's"), "step", "end", "replay"] and pool == "its pool"


def test_a_capture_that_fails_gives_the_stream_back(monkeypatch):
    monkeypatch.setattr(torch, "cuda", Refusing())
    with pytest.raises(RuntimeError, match="not permitted"):
        decode.capture(lambda: None, SimpleNamespace(type="cuda"))
    assert torch.cuda.current == "the caller's"


def test_a_device_that_refuses_a_graph_is_asked_once(capsys):
    def refuse(step, device, pool):
        raise RuntimeError("no graphs here")
    request = Request([[1, 2]], 3, [9] * 3, [], 1.0, 0)
    with route(static=True, look_every=8) as batches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "capture", refuse)
        sampler = Sampler(MODEL, [])
        sampler.graph = True
        for _ in range(2):
            out = sampler.generate(request.prompts, 3, 9)
    assert capsys.readouterr().err.count("no device graph (no graphs here)") == 1
    assert len(batches) == 2 and not sampler.graph and out.lengths.tolist() == [11] * 3


@pytest.mark.parametrize("kind, slots", [("cpu", [1, 7, 8, 9]), ("cuda", [8, 8, 8, 16])])
def test_prompts_have_rows_of_16_bytes_on_accelerators(kind, slots):
    assert [decode.prompt_slots(n, torch.device(kind)) for n in (1, 7, 8, 9)] == slots


def test_graphs_on_the_cpu_are_refused():
    with pytest.raises(ValueError, match="device graphs need an accelerator"):
        Sampler(MODEL, [], graph=True)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(requests(), st.integers(1, 10), LEAVE, st.integers(1, 8))
def test_lengths_known_to_the_host_are_those_on_the_device(request, max_rows, leave_at, look_every):
    """For Ascend's kernel: of every row that is alive, and of the prompts they read. Others stay within their slots."""
    def with_host_lengths(q, k, v, lengths, ends, host_lengths):
        assert ends is None and k.is_contiguous() and len(host_lengths) == len(lengths) == len(k) == len(q)
        assert all(type(n) is int and 1 <= n <= k.shape[2] for n in host_lengths)
        batch = batches[-1]
        alive, place = batch.slots.alive.tolist(), batch.groups.seat.tolist()
        of_prompts = k.data_ptr() in [x.data_ptr() for x in batch.cache.prompt_k]
        matters = {place[s] for s in range(len(alive)) if alive[s]} if of_prompts else {s for s in range(len(k)) if alive[s]}
        assert [host_lengths[i] for i in matters] == lengths[sorted(matters)].tolist() if matters else True
        return plain_part(q, k, v, host_lengths)

    with route(leave_at, static=True, ascend=True, look_every=look_every) as batches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "partial_attention", with_host_lengths)
        out = request.together(max_rows=max_rows)
    request.check(out)


@needs_varlen
@settings(max_examples=12, deadline=None, derandomize=True)
@given(requests(), st.integers(1, 10), st.sampled_from([1, 8]))
def test_flash_attention_gives_the_same_completions(request, max_rows, look_every):
    """The cache in the order of CUDA's kernel, lengths in place of masks."""
    with route(static=True, look_every=look_every), caches() as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "use_flash", lambda device, dtype: True)
        replace_varlen(patch)
        out = request.together(max_rows=max_rows)
    request.check(out)
    assert made[0].flash and made[0].k.transpose(3, 4).is_contiguous() and made[0].prompt_v.transpose(2, 3).is_contiguous()
