"""The specification of rollout.py by example: what is drawn, what is recorded of it, and on what it may depend."""

import os
import random

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import config
from engine import batching
from engine.batching import ContinuousBatch
from engine.decode import InferenceModel, SwiGLU
from model import ModelConfig, Transformer
from prompts import decode
from rollout import Sampler, draw_groups, empty_rollout, generate_slowly
from test_sampling import chi_square

torch.set_num_threads(1)


def small_model(seed=0, vocab=50, spread=0.3, **changes):
    """A random model whose distributions are neither flat nor certain (entropy about 2 of ln 50 = 3.9)."""
    return Transformer(ModelConfig(vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                   head_dim=8, max_position_embeddings=64, initializer_range=spread,
                                   **changes)).init_weights(seed)


def ragged_prompts(count, seed=0, longest=9, vocab=50):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


MODEL = small_model()
PROMPTS = ragged_prompts(5)
STOPS = list(range(40, 50))     # a fifth of the vocabulary: some completions stop at once, some never do


def assert_same(a, b, rows=None):
    """Rollout a is rollout b (or these rows of it), token for token, whatever the width of either."""
    rows = list(range(len(b.tokens))) if rows is None else rows
    assert a.completions() == [b.completions()[i] for i in rows]
    assert torch.equal(a.prompt_lengths, b.prompt_lengths[rows]) and torch.equal(a.lengths, b.lengths[rows])
    assert torch.equal(a.finished, b.finished[rows])
    width = min(a.tokens.shape[1], b.tokens.shape[1])
    torch.testing.assert_close(a.logps[:, :width], b.logps[rows, :width], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------ slow and fast

@pytest.mark.parametrize("stops", [[], [20], STOPS], ids=["no stop", "one stop", "ten stops"])
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_fast_sampler_draws_what_the_slow_one_draws(temperature, group_size, stops):
    """The same tokens, and log-probs up to float32's rounding: the slow one is the specification.

    Three slots for four prompts: completions come in while others run. Rounding grows with the
    logits, which are small here (entropy near ln 50); the next test has larger ones."""
    model, prompts = small_model(spread=0.1), ragged_prompts(4, group_size)
    slow = generate_slowly(model, prompts, group_size, 8, stops, temperature, seed=3)
    fast = Sampler(model, stops, max_rows=3).generate(prompts, group_size, 8, temperature, seed=3)
    assert_drawn_alike(fast, slow, stops, 2e-6)


def test_the_fast_sampler_draws_what_the_slow_one_draws_from_large_logits():
    slow = generate_slowly(MODEL, PROMPTS, 2, 12, STOPS, seed=4)
    assert_drawn_alike(Sampler(MODEL, STOPS).generate(PROMPTS, 2, 12, seed=4), slow, STOPS, 1e-5)


def assert_drawn_alike(fast, slow, stops, close):
    """A Rollout is what generate_slowly returned."""
    assert fast.completions() == [tokens for tokens, _ in slow]
    for row, (tokens, logps) in enumerate(slow):
        assert fast.finished[row] == (tokens[-1] in stops)
        drawn = fast.logps[row, fast.prompt_lengths[row]:fast.lengths[row]]
        torch.testing.assert_close(drawn, torch.tensor(logps), atol=close, rtol=0)


# ------------------------------------------------------------------------------------ greedy

@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_transformers_token_for_token(seed, tmp_path):
    """Ragged prompts here, one by one there. The two stop ids are taken from what is said without them."""
    m, prompts = small_model(seed), ragged_prompts(6, seed)
    free = Sampler(m, []).generate(prompts, 1, 12, temperature=0).completions()
    stops = [free[0][3], free[1][8]]
    ours = Sampler(m, stops).generate(prompts, 1, 12, temperature=0)
    assert 2 <= ours.finished.sum() and not ours.finished.all()             # both kinds of ending occur

    m.save_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for prompt, completion in zip(prompts, ours.completions()):
        ids = torch.tensor([prompt])
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
                          eos_token_id=stops, pad_token_id=0)
        assert completion == out[0, len(prompt):].tolist()


def test_greedy_rows_of_a_group_are_equal_and_report_temperature_one():
    out = Sampler(MODEL, STOPS).generate(PROMPTS, 3, 8, temperature=0)
    assert all(out.completions()[i] == out.completions()[i - i % 3] for i in range(15))
    logps, _ = MODEL.token_logps(out.tokens, out.completion_mask())
    torch.testing.assert_close(out.logps, logps, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------ what is recorded

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_log_probs_are_those_of_the_trainer(temperature, seed):
    """What is sampled is what is trained: the first update has ratio 1."""
    out = Sampler(MODEL, STOPS).generate(PROMPTS, 4, 20, temperature, seed=seed)
    mask = out.completion_mask()
    logps, _ = MODEL.token_logps(out.tokens, mask, temperature)
    torch.testing.assert_close(out.logps, logps, atol=1e-4, rtol=0)
    assert (out.logps[mask == 0] == 0).all() and (out.logps[mask == 1] < 0).all()
    assert out.logps.dtype == torch.float32 and not out.logps.requires_grad


def assert_consistent(out, prompts, group_size, max_new_tokens, stops):
    """Lengths, mask, finished and padding are what the tokens say."""
    assert out.tokens.dtype == torch.int64 and out.tokens.shape == out.logps.shape == out.completion_mask().shape
    assert out.tokens.shape[1] == out.lengths.max()
    mask = out.completion_mask()
    for row, completion in enumerate(out.completions()):
        prompt = prompts[row // group_size]                                     # prompt-major
        assert out.tokens[row].tolist() == [*prompt, *completion] + [0] * (out.tokens.shape[1] - out.lengths[row])
        assert out.prompt_lengths[row] == len(prompt) and out.lengths[row] == len(prompt) + len(completion)
        assert mask[row].nonzero()[:, 0].tolist() == list(range(len(prompt), len(prompt) + len(completion)))
        assert not set(completion[:-1]) & set(stops)
        assert out.finished[row] == (completion[-1] in stops)                   # the stop token is in the mask
        assert len(completion) == max_new_tokens or out.finished[row]
    assert (out.logps[mask == 0] == 0).all()


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 8])
def test_lengths_mask_and_finished_follow_from_the_tokens(group_size, max_new_tokens):
    out = Sampler(MODEL, STOPS).generate(PROMPTS, group_size, max_new_tokens, seed=1)
    assert_consistent(out, PROMPTS, group_size, max_new_tokens, STOPS)
    if max_new_tokens == 8 and group_size == 4:
        assert out.finished.any() and not out.finished.all()


def test_stop_token_that_is_the_padding_id_is_in_the_mask():
    """pad == eos == 0: masks come from lengths. The prompts hold 0 too, which ends nothing."""
    prompts = [[0, 5, 0], [7, 0], [0]]
    m = small_model(vocab=8)
    out = Sampler(m, [0]).generate(prompts, 6, 12, seed=3)
    assert_consistent(out, prompts, 6, 12, [0])
    assert out.finished.any() and not out.finished.all()
    last = out.lengths[out.finished] - 1
    assert (out.tokens[out.finished, last] == 0).all() and (out.completion_mask()[out.finished, last] == 1).all()
    torch.testing.assert_close(out.logps, m.token_logps(out.tokens, out.completion_mask())[0], atol=1e-4, rtol=0)


def test_all_rows_stop_at_the_first_step():
    out = Sampler(MODEL, range(50)).generate(PROMPTS, 2, 20)
    assert out.finished.all() and (out.lengths == out.prompt_lengths + 1).all()
    assert_consistent(out, PROMPTS, 2, 20, range(50))


def test_without_stop_ids_every_row_is_cut():
    out = Sampler(MODEL, []).generate(PROMPTS, 2, 6)
    assert not out.finished.any() and (out.lengths == out.prompt_lengths + 6).all()


def test_a_context_that_is_just_full_is_served():
    prompt = list(range(40))
    out = Sampler(MODEL, []).generate([prompt, [1]], 1, 24)                     # 40 + 24 = 64 positions
    torch.testing.assert_close(out.logps, MODEL.token_logps(out.tokens, out.completion_mask())[0], atol=1e-4, rtol=0)


def test_version_of_the_weights_is_recorded():
    sampler = Sampler(MODEL, STOPS, max_rows=2)
    assert sampler.generate(PROMPTS, 2, 2).version == 0
    sampler.version = 7
    assert sampler.generate(PROMPTS, 2, 2).version == 7                         # in several parts, too


def test_activation_checkpointing_does_not_reach_the_sampler():
    m = small_model()
    m.activation_checkpointing = True
    assert_same(Sampler(m, STOPS).generate(PROMPTS, 2, 8), Sampler(MODEL, STOPS).generate(PROMPTS, 2, 8))


# ------------------------------------------------------------------------------------ seeds

ALONE = {}


def alone(i):
    """Prompt i by itself, drawn once: what it must be in any company."""
    if i not in ALONE:
        ALONE[i] = Sampler(MODEL, STOPS).generate([PROMPTS[i]], 3, 12, seed=[(9, i)])
    return ALONE[i]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.permutations(range(5)), st.integers(1, 5), st.sampled_from([1, 3, 4, 7, 100]),
       st.sampled_from([0.0, 0.8, 1.0]))
def test_a_completion_does_not_depend_on_its_batch(order, count, max_rows, leave_at):
    """Any subset of the prompts in any order, any max_rows, rows that leave the cache soon or late."""
    chosen, kept = order[:count], batching.LEAVE_AT
    batching.LEAVE_AT = leave_at
    try:
        sampler = Sampler(MODEL, STOPS, max_rows)
        out = sampler.generate([PROMPTS[i] for i in chosen], 3, 12, seed=[(9, i) for i in chosen])
    finally:
        batching.LEAVE_AT = kept
    for place, i in enumerate(chosen):
        rows = range(place * 3, place * 3 + 3)
        assert_same(alone(i), out, list(rows))


def test_a_smaller_group_is_the_beginning_of_a_larger_one():
    small, large = (Sampler(MODEL, STOPS).generate(PROMPTS, G, 12, seed=4) for G in (2, 5))
    assert_same(small, large, [i * 5 + j for i in range(5) for j in range(2)])


def test_fewer_new_tokens_are_the_beginning_of_more():
    short, long = (Sampler(MODEL, STOPS).generate(PROMPTS, 2, n, seed=4).completions() for n in (3, 12))
    assert short == [c[:3] for c in long]


def test_one_integer_seed_is_a_seed_for_each_prompt():
    by_integer = Sampler(MODEL, STOPS).generate(PROMPTS, 2, 8, seed=6)
    assert_same(by_integer, Sampler(MODEL, STOPS).generate(PROMPTS, 2, 8, seed=[(6, i) for i in range(5)]))


def test_seeds_prompts_and_samples_have_streams_of_their_own():
    """The same prompt four times, four samples each, two seeds: 32 completions of 12 tokens, all different."""
    drawn = [Sampler(MODEL, []).generate([PROMPTS[0]] * 4, 4, 12, seed=seed).completions() for seed in (0, 1)]
    assert len({tuple(c) for completions in drawn for c in completions}) == 32


def test_global_random_state_is_neither_used_nor_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = Sampler(MODEL, STOPS).generate(PROMPTS, 2, 8)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert_same(first, Sampler(MODEL, STOPS).generate(PROMPTS, 2, 8))


# ------------------------------------------------------------------------------------ order, parts, work

def test_rows_are_prompt_major():
    out = Sampler(MODEL, STOPS).generate(PROMPTS, 3, 4)
    for row in range(15):
        assert out.tokens[row, :out.prompt_lengths[row]].tolist() == PROMPTS[row // 3]


@pytest.mark.parametrize("max_rows", [1, 4, 8, 9])
def test_fewer_rows_at_once_give_the_same_completions(max_rows):
    """A row that comes in later than another is drawn as if it had been there from the start."""
    whole = Sampler(MODEL, STOPS).generate(PROMPTS, 4, 12, seed=2)
    parts = Sampler(MODEL, STOPS, max_rows).generate(PROMPTS, 4, 12, seed=2)
    assert_same(parts, whole)
    assert torch.equal(parts.tokens, whole.tokens)


def record_calls(monkeypatch):
    """How many tokens go through the model, call by call: those of prompts, or one a row."""
    sizes, original = [], InferenceModel._forward

    def recorder(self, tokens, positions, *rest):
        assert tokens.shape == positions.shape == (len(tokens),)
        sizes.append(len(tokens))
        return original(self, tokens, positions, *rest)
    monkeypatch.setattr(InferenceModel, "_forward", recorder)
    return sizes


def test_each_prompt_is_prefilled_once_whatever_the_group(monkeypatch):
    """4 + 9 tokens for the prefill, not 8 times that, and then one token a row and step: the first was drawn from it."""
    sizes = record_calls(monkeypatch)
    Sampler(MODEL, []).generate([[1] * 4, [2] * 9], 8, 5)
    assert sizes == [4 + 9] + [16] * 4


def test_of_a_prompt_only_its_last_token_goes_through_the_end_of_the_last_block(monkeypatch):
    """Two blocks: of the others' 4 + 9 tokens the second needs keys and values, and no more."""
    sizes, original = [], SwiGLU.__call__

    def recorder(self, x, residual):
        sizes.append(len(x))
        return original(self, x, residual)
    monkeypatch.setattr(SwiGLU, "__call__", recorder)
    Sampler(MODEL, []).generate([[1] * 4, [2] * 9], 3, 2)
    assert sizes == [4 + 9, 2] + [6, 6]


def test_a_prompt_is_prefilled_when_its_first_row_comes_in(monkeypatch):
    """The longest first. The 16 rows of two prompts take all the room; when they are done, the third comes in."""
    sizes = record_calls(monkeypatch)
    Sampler(MODEL, [], max_rows=16).generate([[1] * 4, [2] * 9, [3] * 2], 8, 1)
    assert sizes == [9 + 4, 2]


def test_a_group_that_does_not_fit_at_once_shares_one_prefill_all_the_same(monkeypatch):
    """Eight rows of a prompt in threes: 3, 3 and 2 of them, four steps each. All three slots are computed: FEW_ROWS."""
    sizes = record_calls(monkeypatch)
    Sampler(MODEL, [], max_rows=3).generate([[1] * 4], 8, 5)
    assert sizes == [4] + [3] * 12


def test_the_place_of_a_finished_row_is_taken_at_once_by_the_next(monkeypatch):
    """Two places, four rows of one prompt that want 4, 2, 1 and 3 tokens. Each has its first from the prefill, so they need
    3, 1, 0 and 2 steps: row 1 leaves after one, row 2 comes and is done, row 3 takes the place for the other two."""
    sizes, prompt = record_calls(monkeypatch), [1, 2, 3]
    out = Sampler(MODEL, [], max_rows=2).generate([prompt], 4, [4, 2, 1, 3], seed=5)
    assert sizes == [3, 2, 2, 2]
    assert not out.finished.any() and (out.lengths - out.prompt_lengths).tolist() == [4, 2, 1, 3]
    whole = Sampler(MODEL, []).generate([prompt], 4, 4, seed=5).completions()
    assert out.completions() == [c[:n] for c, n in zip(whole, (4, 2, 1, 3))]


def test_keys_and_values_stay_within_their_budget(monkeypatch):
    """2 layers x (keys and values) x 2 heads x 8 numbers x 4 bytes = 256 a token: of the prompt once, of 5 for each row."""
    prompts, whole = [[1] * 4, [2] * 9], Sampler(MODEL, [])
    whole, sizes = whole.generate(prompts, 8, 5, seed=3), record_calls(monkeypatch)
    out = Sampler(MODEL, [], kv_bytes=256 * (4 + 3 * 5)).generate(prompts[:1], 8, 5, seed=[(3, 0)])
    assert sizes == [4] + [3] * 12
    assert_same(out, whole, list(range(8)))
    assert_same(Sampler(MODEL, [], kv_bytes=256 * (9 + 5) * 2).generate(prompts, 8, 5, seed=3), whole)
    with pytest.raises(ValueError, match="^keys and values of one completion take [^\n]*: lower --max-new-tokens[^\n]*$"):
        Sampler(MODEL, [], kv_bytes=256 * (4 + 5) - 1).generate(prompts[:1], 8, 5)


def test_device_graphs_are_refused_on_the_cpu():
    with pytest.raises(ValueError, match="^device graphs need an accelerator[^\n]*$"):
        Sampler(MODEL, [], graph=True)


def test_stopped_rows_leave(monkeypatch):
    """Step t decodes the rows still alive, and never more than 1 / LEAVE_AT times as many, or FEW_ROWS."""
    sizes = record_calls(monkeypatch)
    out = Sampler(MODEL, STOPS).generate(PROMPTS, 8, 20, seed=1)
    lengths = out.lengths - out.prompt_lengths
    decoded = sizes[1:]
    assert sizes[0] == sum(map(len, PROMPTS)) and len(decoded) == lengths.max() - 1
    for t, rows in enumerate(decoded, 1):
        alive = int((lengths > t).sum())                    # still wants a token number t (counted from 0)
        assert rows == max(alive, batching.FEW_ROWS) or alive < rows and alive > batching.LEAVE_AT * rows
    assert decoded[-1] < 40 / 4 and decoded == sorted(decoded, reverse=True)


def test_a_row_that_is_much_work_leaves_at_once(monkeypatch):
    """Of a model so large that one row counts, a step has no row that has stopped, but for FEW_ROWS."""
    monkeypatch.setattr(batching, "LITTLE_WORK", 1)
    monkeypatch.setattr(batching, "LEAVE_AT", 0.5)
    sizes = record_calls(monkeypatch)
    out = Sampler(MODEL, STOPS).generate(PROMPTS, 8, 20, seed=1)
    lengths = out.lengths - out.prompt_lengths
    assert sizes[1:] == [max(int((lengths > t).sum()), batching.FEW_ROWS) for t in range(1, lengths.max())]


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_little_steps_take_one_thread_and_larger_ones_all(monkeypatch, two_threads):
    """Two FLOP a weight and row: 32 rows are much work, and 16 are little. Afterwards the threads are what they were."""
    monkeypatch.setattr(batching, "LITTLE_WORK", 2 * batching.parameter_count(MODEL) * 17)
    monkeypatch.setattr(batching, "FEW_ROWS", 1)
    seen, between, step, refill = [], [], ContinuousBatch.step, ContinuousBatch.refill

    def observed(self, rows, used):
        seen.append((rows >= 17, torch.get_num_threads()))
        step(self, rows, used)

    def observed_between(self):         # new prompts may go through the model
        between.append(torch.get_num_threads())
        return refill(self)
    monkeypatch.setattr(ContinuousBatch, "step", observed)
    monkeypatch.setattr(ContinuousBatch, "refill", observed_between)
    Sampler(MODEL, []).generate(PROMPTS[:2], 16, [9] * 16 + [20] * 16)
    assert set(seen) == {(True, 2), (False, 1)} and set(between) == {2} and torch.get_num_threads() == 2


def test_threads_are_given_back_after_an_error(monkeypatch, two_threads):
    def fail(self, rows, used):
        assert torch.get_num_threads() == 1
        raise RuntimeError("in the middle of a step")
    monkeypatch.setattr(ContinuousBatch, "step", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        Sampler(MODEL, []).generate(PROMPTS, 2, 9)
    assert torch.get_num_threads() == 2


# ------------------------------------------------------------------------------------ texts

class Letters:
    """A tokenizer: id 0 is "a"; ids from 40 on have no text."""

    def batch_decode(self, rows, skip_special_tokens):
        assert not skip_special_tokens      # <answer> may be special
        return ["".join(chr(97 + token) for token in row if token < 40) for row in rows]


def test_completions_are_drawn_once_and_decoded_by_problem():
    """Each problem has its prompt, its seed and its list of texts; options reach the sampler."""
    sampler = Sampler(MODEL, STOPS)
    problems = [{"prompt": prompt, "answer": "left alone"} for prompt in PROMPTS]
    seeds = [(7, i) for i in range(5)]
    rollout, groups = draw_groups(sampler, Letters(), problems, 3, 8, 0.7, seeds, top_k=4)
    assert_same(rollout, sampler.generate(PROMPTS, 3, 8, 0.7, seeds, top_k=4))
    texts = decode(Letters(), rollout.completions(), STOPS)
    assert [len(group) for group in groups] == [3] * 5 and sum(groups, []) == texts


def test_no_problems_give_an_empty_rollout_of_the_sampler_s_version():
    sampler = Sampler(MODEL, STOPS)
    sampler.version = 7
    rollout, groups = draw_groups(sampler, Letters(), [], 3, 8, 1.0, [])
    assert groups == [] and rollout.completions() == [] and rollout.version == 7
    assert rollout.tokens.shape == rollout.logps.shape == rollout.completion_mask().shape == (0, 1)
    assert empty_rollout(torch.device("cpu")).version == 0


# ------------------------------------------------------------------------------------ the schedule

def test_a_schedule_by_hand():
    """Three prompts of two completions each, the longest first; three slots and two seats."""
    schedule = batching.Schedule([[1], [1] * 3, [1] * 2], 2, batching.Room(3, 2, 0))
    assert list(schedule.waiting) == [2, 3, 4, 5, 0, 1]
    assert schedule.admit() == ([0, 1, 2], [1, 2])                  # slots filled; prompts seated
    assert schedule.running == [2, 3, 4] and schedule.seat_of == {1: 0, 2: 1}

    schedule.time = 4
    schedule.release([False, True, False])
    assert schedule.empty_slots() == [0, 2] and schedule.ages() == [1, 4, 1]
    assert schedule.admit() == ([0], [])        # 5 has a seat with 4; none is free for prompt 0
    assert schedule.running == [5, 3, None] and schedule.since == [4, 0, 0]

    schedule.release([True, False, False])
    assert schedule.admit() == ([1, 2], [0])    # prompt 1 has given up its seat
    assert schedule.running == [5, 0, 1] and schedule.seat_of == {2: 1, 0: 0}
    assert not schedule.waiting and schedule.admit() == ([], [])

    schedule.release([False, True, True])
    assert schedule.close_slots() == [(2, 0)]
    assert schedule.running == [1, 0] and schedule.since == [4, 4]
    assert schedule.close_seats() == [] and schedule.seat_of == {0: 0}


# ------------------------------------------------------------------------------------ frequencies

@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_drawn_frequencies_are_those_of_the_softmax(temperature):
    """20,000 pairs of tokens from a vocabulary of 8, against p(a) p(b | a): 8 and 64 cells.

    99.9 % quantiles of chi-square: 24.3 at 7 degrees of freedom, 103.4 at 63. The wrong temperature is far outside."""
    m, prompt, count = small_model(vocab=8, spread=0.04), [3, 1, 4], 20_000
    out = Sampler(m, [], max_rows=count).generate([prompt], count, 2, temperature, seed=0)
    a, b = out.tokens[:, 3], out.tokens[:, 4]
    with torch.no_grad():
        after = m(torch.tensor([[*prompt, i] for i in range(8)]))
    first, second = after[0, 2], after[:, 3]

    p = (first / temperature).softmax(-1)
    assert chi_square(a.bincount(minlength=8), p) < 24.3
    joint = p[:, None] * (second / temperature).softmax(-1)
    assert joint.min() * count > 5                                              # else the quantile would not hold
    assert chi_square((a * 8 + b).bincount(minlength=64), joint.flatten()) < 103.4
    wrong = (first / (temperature * 1.2)).softmax(-1)
    assert chi_square(a.bincount(minlength=8), wrong) > 24.3


def test_sampler_passes_truncation_on():
    """top_k=1 and a tiny top_p are greedy at any temperature."""
    greedy = Sampler(MODEL, STOPS).generate(PROMPTS, 1, 8, temperature=0).completions()
    assert Sampler(MODEL, STOPS).generate(PROMPTS, 1, 8, temperature=2.0, top_k=1).completions() == greedy
    assert Sampler(MODEL, STOPS).generate(PROMPTS, 1, 8, temperature=2.0, top_p=1e-6).completions() == greedy


def test_limits_may_come_as_any_sequence():
    """A list, a tensor, an array."""
    for limits in ([2, 5, 1, 4], torch.tensor([2, 5, 1, 4]), np.array([2, 5, 1, 4])):
        out = Sampler(MODEL, []).generate([[1], [2, 3]], 2, limits, seed=1)
        assert (out.lengths - out.prompt_lengths).tolist() == [2, 5, 1, 4]


# ------------------------------------------------------------------------------------ bad requests

@pytest.mark.parametrize("request_, words", [
    (dict(prompts=[]), "at least one prompt"),
    (dict(prompts=[[1], []]), "prompt 1 is empty"),
    (dict(prompts=[[1], [2, 50]]), "prompt 1 has a token outside the vocabulary of 50"),
    (dict(prompts=[[-1]]), "prompt 0 has a token outside the vocabulary of 50"),
    (dict(prompts=[[1], [2] * 61]), "prompt 1 has 61 tokens"),                  # 61 + 4 > 64
    (dict(group_size=0), "group_size 0"),
    (dict(max_new_tokens=0), "max_new_tokens 0"),
    (dict(max_new_tokens=[4, 4, 4]), "max_new_tokens"),                         # three limits for four completions
    (dict(max_new_tokens=[4, 4, 4, 0]), "max_new_tokens"),
    (dict(max_new_tokens=4.5), "max_new_tokens must be one positive integer"),
    (dict(max_new_tokens=torch.tensor([4, 4, 4])), "max_new_tokens must be"),
    (dict(prompts=[[1] * 58, [2] * 61], max_new_tokens=[1, 1, 4, 4]), "prompt 1 has 61 tokens"),
    (dict(temperature=-0.5), "temperature -0.5"),
    (dict(seed=[(0, 0)]), "seed"),                                              # one seed for two prompts
    (dict(seed=[(0, 0), (0, 1), (0, 2)]), "seed"),
    (dict(seed=-1), "seed"),
], ids=str)
def test_bad_request_is_one_clear_line(request_, words):
    good = dict(prompts=[[1], [2]], group_size=2, max_new_tokens=4)
    with pytest.raises(ValueError) as caught:
        Sampler(MODEL, STOPS).generate(**{**good, **request_})
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- broken models

@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight",
                                  "model.layers.0.mlp.down_proj.weight"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_weights_that_are_not_finite_are_one_line(name, value, temperature):
    """Else every drawn token is 0, every reward the same, and a run ends well that learned nothing."""
    model = Transformer(MODEL.config)
    model.load_state_dict(MODEL.state_dict())
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0:200] = value
    with pytest.raises(ValueError, match="weights or its logits are NaN or infinite") as caught:
        Sampler(model, STOPS).generate(PROMPTS, 3, 8, temperature)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [1e-40, 1e-5, 1e5, 1e40, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_leaves_no_finite_logits_is_one_line(temperature):
    with pytest.raises(ValueError, match="temperature .* must be 0, or a number from 0.0001 to 10000"):
        Sampler(MODEL, STOPS).generate(PROMPTS, 3, 8, temperature)
    with pytest.raises(ValueError, match="--temperature"):
        config.parse(["--temperature", str(temperature)])


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_the_bounds_of_the_temperature_are_those_of_the_settings(temperature):
    assert Sampler(MODEL, STOPS).generate(PROMPTS, 3, 8, temperature).logps.isfinite().all()
    assert config.parse(["--temperature", str(temperature)]).temperature == temperature
