"""Off-policy GRPO, specified by examples: weights, trust region, replay buffer, loss. Whole runs: test_learner.py.

Expected numbers are worked by hand (shown), enumerated over every sequence of a tiny pair of policies, or come from the
definitions in plain Python. What the buffer holds was drawn by the real sampler.
"""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
import offpolicy
import learner
from model import ModelConfig, Transformer
from offpolicy import ReplayBuffer, importance_weights
from rollout import Rollout, Sampler
from test_grpo import probed, random_batch
from config import Config, check, parse
from engine.checkpoint import Progress

torch.set_num_threads(1)
NAN = math.nan
MASK = torch.tensor([[1., 1., 1.], [1., 1., 0.]], dtype=torch.float64)
LOG_RATIO = torch.tensor([[2., .5, 3.], [.25, 2., NAN]], dtype=torch.float64).log()     # padding may hold anything
LEVELS, TRACES = ("token", "sequence", "geometric"), ("retrace", "tempered")
SCHEMES = ("none", "standard", "clipped", "truncated", "masked", "self_normalized")
A, B = 3 ** (1 / 3), .5 ** .5                               # geometric means: 2 x .5 x 3 = 3, .25 x 2 = .5
BY_HAND = {                                                 # a level each; cap 1.25, so clipped keeps to [0.8, 1.25]
    "none": [[1, 1, 1, 1, 1]] * 3,
    "standard": [[2, .5, 3, .25, 2], [3, 3, 3, .5, .5], [A, A, A, B, B]],
    "clipped": [[1.25, .8, 1.25, .8, 1.25]] + [[1.25, 1.25, 1.25, .8, .8]] * 2,
    "truncated": [[1.25, .5, 1.25, .25, 1.25], [1.25, 1.25, 1.25, .5, .5], [1.25, 1.25, 1.25, B, B]],
    "masked": [[0, .5, 0, .25, 0], [0, 0, 0, .5, .5], [0, 0, 0, B, B]],
    "self_normalized": [[x / 1.55 for x in (2, .5, 3, .25, 2)],         # 7.75 over 5 tokens; 3.5 and A + B over 2 rows
                        [x / 1.75 for x in (3, 3, 3, .5, .5)], [2 * x / (A + B) for x in (A, A, A, B, B)]]}


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=0)


def drifted(seed, scale=.3):
    """A random log-ratio (6, 9) and its ragged mask, float64."""
    mask = random_batch(seed)[3]
    return scale * torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), mask


# ------------------------------------------------------------------------------------------- importance weights

@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_at_every_level_by_hand(scheme):
    for level, expected in zip(LEVELS, BY_HAND[scheme]):
        W = importance_weights(LOG_RATIO.clone().requires_grad_(), MASK, scheme, level, cap=1.25)
        close(W, [expected[:3], [*expected[3:], 0]])
        assert not W.requires_grad


def test_bounds_normalisation_and_traces_by_hand():
    """min(1, rho): 1, .5, 1 and .25, 1. Each later token multiplies by trace x min(1, rho), tempered by min(1, rho)^trace."""
    for args, options, expected in (
            (("clipped", "token", 2), {"low": .75}, [[2, .75, 2], [.75, 2, 0]]),
            (("masked", "token", 2), {"low": .5}, [[2, .5, 0], [0, 2, 0]]),
            (("truncated", "sequence", 2), {"normalize": "batch"}, [[1.6] * 3, [.4, .4, 0]]),   # then divided by mean(2, .5)
            (("standard",), {"normalize": "group", "group_size": 1}, [[12 / 11, 3 / 11, 18 / 11], [2 / 9, 16 / 9, 0]]),
            (("retrace",), {}, [[.5, .5, 1], [.25, 1, 0]]), (("retrace",), {"trace": .5}, [[.125, .25, 1], [.125, 1, 0]]),
            (("retrace",), {"trace": 0}, [[0, 0, 1], [0, 1, 0]]),               # only the last token learns
            (("tempered",), {"trace": 1}, [[.5, .5, 1], [.25, 1, 0]]), (("tempered",), {"trace": .5}, [[B, .5, 1], [.25, 1, 0]]),
            (("tempered",), {"trace": 0}, [[1, .5, 1], [.25, 1, 0]])):          # token weights, truncated at 1
        close(importance_weights(LOG_RATIO, MASK, *args, **options), expected)
    for bad in ({"scheme": "ppo"}, {"level": "row"}, {"normalize": "rank"}):
        with pytest.raises(ValueError, match="^[^\n]*choose none, standard[^\n]*$"):
            importance_weights(LOG_RATIO, MASK, **bad)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_retrace_is_the_written_out_product_and_the_backward_recursion_of_v_trace(seed):
    """V-trace (arXiv 1802.01561), value b before and R at the end: v_t = b + c_t (v_t+1 - b), advantage rho_t (v_t+1 - b)."""
    (log_ratio, mask), R, b = drifted(seed), 2., .5
    full, traced = (importance_weights(log_ratio, mask, "retrace", trace=trace) for trace in (1., .9))
    for row, n in enumerate(mask.sum(1).int().tolist()):
        down, v = [min(1., math.exp(x)) for x in log_ratio[row, :n].tolist()], R
        for t in reversed(range(n)):
            assert full[row, t].item() == pytest.approx(down[t] * (v - b) / (R - b))
            assert traced[row, t].item() == pytest.approx(down[t] * math.prod(.9 * x for x in down[t + 1:]))
            v = b + down[t] * (v - b)


def test_retrace_dies_with_length():
    """E log W_0 = T E min(0, l) = -T sd / sqrt(2 pi) = -8.17 for 1,024 tokens of sd 0.02."""
    l = .02 * torch.randn(200, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W = importance_weights(l, torch.ones_like(l), "retrace")
    assert W[:, 0].log().mean().item() == pytest.approx(-1024 * .02 / math.sqrt(2 * math.pi), abs=.1)


@given(st.integers(0, 1000), st.sampled_from(SCHEMES + TRACES), st.sampled_from(LEVELS), st.sampled_from([1e-4, 1e-2, 1., 9.]))
@settings(max_examples=80, deadline=None)
def test_weights_are_bounded_one_without_drift_and_nothing_off_the_mask_and_the_kl_is_not_negative(seed, scheme, level, scale):
    log_ratio, mask = drifted(seed, scale)
    mask[0] = 0
    log_ratio[mask == 0] = NAN
    W = importance_weights(log_ratio, mask, scheme, level, cap=1.5)
    bound = {"truncated": 1.5, "clipped": 1.5, "masked": 1.5, "self_normalized": mask.sum(), "retrace": 1, "tempered": 1}
    assert torch.isfinite(W).all() and (W >= 0).all() and (W[mask == 0] == 0).all() and W.max() <= bound.get(scheme, math.inf) + 1e-9
    assert scheme != "clipped" or (W[mask > 0] >= 1 / 1.5 - 1e-9).all()
    assert torch.equal(importance_weights(torch.zeros_like(mask), mask, scheme, level), mask)
    kl = offpolicy.kl_pi_mu(log_ratio.float(), mask.float())
    assert (kl >= 0).all() and (kl[mask == 0] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_self_normalised_weights_average_one_also_over_two_parts(level):
    log_ratio, mask = drifted(3)
    mask[1] = 0                                             # a row without a token counts nowhere

    def average(W, rows=range(6)):
        w = [x for i in rows for x in W[i][mask[i] > 0].tolist()[:None if level == "token" else 1]]
        return sum(w) / len(w)
    whole = importance_weights(log_ratio, mask, "self_normalized", level)
    grouped = importance_weights(log_ratio, mask, "standard", level, normalize="group", group_size=3)
    assert [average(whole), average(grouped, range(3)), average(grouped, range(3, 6))] == pytest.approx([1] * 3)
    mean = average(importance_weights(log_ratio, mask, "standard", level))
    halves = [importance_weights(log_ratio[s], mask[s], "self_normalized", level, mean=mean) for s in (slice(2), slice(2, 6))]
    close(torch.cat(halves), whole, 1e-6)


# ------------------------------------------------------------ what is true on average: every sequence of a tiny pair

RNG, TABLE, REACH = np.random.default_rng(0), {}, {(): 1.}  # (pi, mu) of the next of 3 symbols; how often mu gets there
for prefix in (p for n in range(4) for p in itertools.product(range(3), repeat=n)):
    logits = RNG.normal(size=3)
    TABLE[prefix] = [np.exp(z) / np.exp(z).sum() for z in (logits + .5 * RNG.normal(size=3), logits)]
    REACH.update({(*prefix, y): REACH[prefix] * TABLE[prefix][1][y] for y in range(3)})
SEQUENCES = list(itertools.product(range(3), repeat=4))
TOKENS = torch.tensor(np.array([[[TABLE[y[:t]][k][y[t]] for t in range(4)] for y in SEQUENCES] for k in (0, 1)]))
PI, MU, LOG, ONES = *TOKENS.prod(2), TOKENS[0].log() - TOKENS[1].log(), torch.ones(81, 4)
REWARD = torch.tensor([float(y.count(0) >= 2) for y in SEQUENCES], dtype=torch.float64)


def test_sequence_weights_are_unbiased_at_the_price_of_variance_and_token_weights_are_not():
    J = (PI * REWARD).sum().item()
    estimate = {level: ((MU * REWARD)[:, None] * importance_weights(LOG, ONES, "standard", level)).sum(0) for level in LEVELS}
    close(estimate["sequence"], [J] * 4, 1e-12)
    assert all((estimate[level] - J).abs().mean() > .05 * J for level in ("token", "geometric"))
    truncated, none = ((MU * REWARD * importance_weights(LOG, ONES, s, "sequence")[:, 0]).sum() for s in ("truncated", "none"))
    assert abs(truncated - J) < .5 * abs(none - J)          # a bound of 2 keeps most of the correction
    second_moment = (MU * importance_weights(LOG, ONES, "standard", "sequence")[:, 0] ** 2).sum().item()
    chi_square = sum((p - m) ** 2 / m for p, m in zip(PI.tolist(), MU.tolist()))
    assert second_moment == pytest.approx(1 + chi_square) and chi_square > .1


def test_the_kl_estimate_is_unbiased_for_the_next_symbol_after_prefixes_of_mu():
    kl = {prefix: sum(p * math.log(p / m) for p, m in zip(*pair)) for prefix, pair in TABLE.items()}
    estimate = (MU[:, None] * offpolicy.kl_pi_mu(LOG, ONES)).sum(0).tolist()
    for t in range(4):
        assert estimate[t] == pytest.approx(sum(REACH[prefix] * kl[prefix] for prefix in TABLE if len(prefix) == t))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40), st.floats(1e-3, 1e3))
def test_effective_sample_size_is_between_1_and_n_and_has_no_scale(w, scale):
    ess, w = offpolicy.effective_sample_size, torch.tensor(w, dtype=torch.float64)
    assert 1 - 1e-9 <= ess(w) <= len(w) + 1e-9 and ess(w * scale) == pytest.approx(ess(w))
    assert ess(torch.ones(32)) == 32                        # 1 / sum w^2, for weights of sum 1, would say 1/32 here
    assert ess(torch.eye(7)[3]) == 1 and ess(torch.zeros(4)) == 0 and ess(torch.tensor([3., 1.])) == pytest.approx(16 / 10)


def test_the_drift_of_two_parts_adds_up():
    """Sequence weights 4, 1 and 1/2: ESS 5.5^2 / 17.25 of 3. KL: 2 tokens of 2 ln 2 - 1, one of (ln 1/2) / 2 + 1/2."""
    log_ratio = torch.tensor([[2., 2.], [1., NAN], [NAN, .5], [NAN, NAN]], dtype=torch.float64).log()
    mask = torch.tensor([[1., 1.], [1., 0.], [0., 1.], [0., 0.]])
    parts = [offpolicy.drift_of(log_ratio[s], mask[s]) for s in (slice(0, 1), slice(1, 4), slice(4, 4))]
    assert [part.largest_weight for part in parts] == [pytest.approx(4), 1, 0]
    kl = (2 * (2 * math.log(2) - 1) + (1 - math.log(2)) / 2) / 4
    both = sum(parts, offpolicy.Drift())
    assert both.ess == pytest.approx(5.5 ** 2 / 17.25 / 3) and both.kl_a_token == pytest.approx(kl)
    assert both.largest_weight == pytest.approx(4)
    assert offpolicy.Drift().ess == 1 and offpolicy.Drift().kl_a_token == 0
    for w in (.9, 1.1, 1.3713139731745285):                 # 24 equal weights, with the float32 sums that the ranks return
        assert 1 - 1e-6 < offpolicy.Drift(*torch.tensor([24., 24 * w, 24 * w * w, 1., 0.]).tolist()).ess <= 1


# ------------------------------------------------------------------------------------------------- trust region

def test_what_has_drifted_is_masked():
    """Rows: mean(log mu - log pi) is 1/4 in 0 to 2, 3/4 in 3 and 4, -9 in 5; bad ones above 1/4 go. Tokens: the first is up
    by .3, the second down by .3; the ratio of the fourth is 1,000, yet it stays."""
    logp = torch.tensor([[-.25, NAN], [-.25, -.25], [-.5, 0.], [-1., -.5], [-.75, NAN], [9., 9.]])
    advantages, mask = torch.tensor([-1., -1., 1., -1., 0., -1.]), torch.isfinite(logp).float()
    keep = offpolicy.sequence_mask(logp, torch.zeros(6, 2), advantages, mask, .25)
    assert keep.tolist() == [[1], [1], [1], [0], [1], [1]]
    mu, pi = torch.tensor([.5, .5, .5, 1e-4, NAN]).log(), torch.tensor([.8, .2, .6, .1, .5]).log()
    keep = offpolicy.token_mask(pi.repeat(2, 1), mu.repeat(2, 1), torch.tensor([1., -1.]), torch.tensor([[1., 1, 1, 1, 0]]), .2)
    assert keep.tolist() == [[0, 1, 1, 1, 1], [1, 0, 1, 1, 1]]


def test_limits_by_hand():
    """The clip: 1.1 x wider below .02, narrower above .045, within .05 and .4. The replay ratio: within 1 and 8."""
    for squares, limit, expected in (
            ([.09, 0., 1., .04, .01], .04, 1.),             # means 0, .005, .017, .035, .228: only the largest goes
            ([0., 4., 4.], 2.5, 4.),                        # 0, 2, 2.67: one of the equal ones cannot stay alone
            ([1., 2.], 1.5, math.inf), ([1., 2.], .5, 1.), ([], .5, math.inf)):
        assert offpolicy.second_moment_limit(torch.tensor(squares, dtype=torch.float64), limit) == expected
    for clip, kl, expected in ((.2, .019, .22), (.2, .03, .2), (.2, .046, .2 / 1.1), (.39, 0., .4), (.051, 1., .05)):
        assert offpolicy.adapt_clip(clip, kl, .03) == pytest.approx(expected)
    for ratio, tripped, expected in ((4, True, 3.2), (4, False, 4.8), (1, True, 1), (7, False, 8)):
        assert offpolicy.adapt_replay(ratio, tripped, 8) == pytest.approx(expected)


# ------------------------------------------------------------------------------- buffer, with data of the real sampler

def tiny(vocab=16):
    return Transformer(ModelConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=.3)).init_weights()


def drawn(model, seed=0, version=0, prompts=((1, 2, 3), (4,), (5, 6), (7, 8), (9,), (2, 2, 2, 2))):
    """Completions, four a prompt, and rewards: 1 when the ids of a completion add up to an odd number."""
    sampler = Sampler(model, [0])
    sampler.version = version
    rollout = sampler.generate([list(p) for p in prompts], 4, 7, seed=seed)
    return rollout, torch.tensor([float(sum(c) % 2) for c in rollout.completions()]).view(-1, 4)


def stamped(*versions, reward=lambda version: 1.):
    """Real groups that differ in version and in one reward of four: the std of (0, 0, 0, x) is x sqrt(3) / 4."""
    group = offpolicy.pack(*drawn(tiny()), 16)[0]
    return [replace(group, version=v, rewards=np.array([0, 0, 0, reward(v)], np.float32)) for v in versions]


def filled(groups, version, **rules):
    buffer = ReplayBuffer(**rules)
    buffer.add(groups, version)
    return buffer


@pytest.mark.parametrize("vocab, kind, size", [(2 ** 16, np.uint16, 2), (2 ** 16 + 1, np.uint32, 4)])
def test_unpack_gives_back_what_was_packed_and_nbytes_is_the_sum(vocab, kind, size):
    """Bytes: an id `size`, the log-prob of a completion token 2, a completion 4 + 1 + 4 for length, finished, reward."""
    rollout, rewards = drawn(tiny(vocab), version=5, seed=1, prompts=[(vocab - 1, i) for i in range(6)])
    groups, kept = offpolicy.pack(rollout, rewards, vocab), [i for i in range(6) if 0 < rewards[i].sum() < 4]
    assert len(groups) == len(kept) and 0 < len(kept) < 6                           # equal rewards teach nothing
    fields_, r, stamps = offpolicy.unpack(groups, torch.device("cpu"))
    back, rows = Rollout(**fields_), [i * 4 + j for i in kept for j in range(4)]
    assert back.completions() == [rollout.completions()[k] for k in rows]
    assert back.tokens[:, :2].tolist() == [[vocab - 1, i] for i in kept for _ in range(4)]
    assert all(torch.equal(getattr(back, x), getattr(rollout, x)[rows]) for x in ("prompt_lengths", "lengths", "finished"))
    assert torch.equal(r, rewards[kept]) and stamps.tolist() == [5] * len(rows)
    exact = rollout.logps[rows, :back.tokens.shape[1]]
    assert ((back.logps - exact).abs() <= exact.abs() * 2 ** -11).all()             # fp16 has 11 bits; 0 off the completion
    assert groups[0].tokens.dtype == kind and groups[0].logps.dtype == np.float16
    tokens = sum(map(len, back.completions()))
    assert filled(groups, 5).nbytes == (size + 2) * tokens + 2 * size * len(kept) + 9 * len(rows)
    rollout.tokens.zero_(), rewards.zero_()                                         # the groups are copies
    assert groups[0].tokens.any() and groups[0].rewards.any()


def test_who_enters_and_who_leaves_the_buffer():
    def left(groups, version=5, **rules):
        return [g.version for g in filled(groups, version, **rules).groups]
    size = stamped(0)[0].nbytes
    assert left(stamped(0, 1, 2, 3, 4), capacity=3) == [2, 3, 4]                    # the oldest first
    assert left(stamped(0, 1, 2, 3), capacity_mb=2.5 * size / 2 ** 20) == [2, 3] and left(stamped(0), capacity_mb=1e-6) == []
    groups = [replace(g, uses=u, ess=e) for g, u, e in zip(stamped(2, 3, 5), (1, 2, 3), (.4, .5, 1.))]
    assert left(groups, max_staleness=2) == [3, 5] == left(groups, min_ess=.5) and left(groups, max_reuse=2) == [2]
    assert left(groups, version=10 ** 6) == [2, 3, 5]                               # every rule is off by default
    assert left([replace(g, rewards=np.full(4, .7, np.float32)) for g in groups]) == []         # never entered
    buffer = filled(stamped(2, 3, 4), 4, max_reuse=1)
    buffer.sample(2)
    buffer.evict(4)
    assert len(buffer) == 1                                                         # drawing counts as a use


def test_a_group_that_a_rule_takes_away_takes_no_place_of_another():
    """Room for two: the second was drawn as often as it may be, so the first stays beside the third."""
    groups = [replace(g, uses=u) for g, u in zip(stamped(2, 3, 4), (0, 1, 0))]
    assert [g.version for g in filled(groups, 4, capacity=2, max_reuse=1).groups] == [2, 4]


VERSIONS, REWARDS = (0, 4, 8, 12, 16), {0: 2., 4: 1., 8: 4., 12: 1., 16: 1.}


def prioritized(alpha, seed=0):
    """A buffer, and P of its groups in proportion to (std x exp(-lag / 8))^alpha."""
    weight = [(REWARDS[v] * math.sqrt(3) / 4 * math.exp((v - 16) / 8)) ** alpha for v in VERSIONS]
    buffer = filled(stamped(*VERSIONS, reward=REWARDS.get), 16, alpha=alpha, decay=8., seed=seed)
    return buffer, {v: w / sum(weight) for v, w in zip(VERSIONS, weight)}


@pytest.mark.parametrize("alpha, count", [(0., 1), (0., 3), (.6, 1), (.6, 3)])
def test_sampling_frequencies_match_p_and_are_weighed_back(alpha, count):
    """Chi-square of 4 degrees of freedom: 18.5 is passed once in 1,000 times (three at once vary less). w = (n P)^-beta / max
    by hand; with beta 1 the weighted mean of what is drawn is the plain mean over the groups, 8."""
    (buffer, P), seen, draws = prioritized(alpha), dict.fromkeys(VERSIONS, 0), []
    for _ in range(2000):
        draws += [(g.version, w) for g, w in zip(*buffer.sample(count, 1.))]
    for v, _ in draws:
        seen[v] += 1
    assert sum((seen[v] - 2000 * count * p) ** 2 / (2000 * count * p) for v, p in P.items()) < 18.5
    assert [g.uses for g in buffer.groups] == list(seen.values())
    assert sum(v * w for v, w in draws) / sum(w for _, w in draws) == pytest.approx(8, abs=.5)
    assert alpha == 0 or abs(sum(v for v, _ in draws) / len(draws) - 8) > 1
    for beta in (0., .4, 1.):
        w = {v: (5 * p) ** -beta for v, p in P.items()}
        for g, weight in zip(*buffer.sample(5, beta)):
            assert weight == pytest.approx(w[g.version] / max(w.values()), rel=.02)     # priorities have a floor of 1e-3


def test_uniform_draws_do_not_repeat_and_follow_from_the_seed():
    buffers = [prioritized(0., seed)[0] for seed in (1, 1, 2)]
    a, b, c = ([[g.version for g in buffer.sample(4)[0]] for _ in range(6)] for buffer in buffers)
    assert a == b != c and len(set(map(tuple, a))) > 1 and all(len(set(d)) == 4 for d in a)
    assert len({frozenset(g.version for g in buffers[0].sample(2)[0]) for _ in range(200)}) == 10       # every pair occurs
    assert sorted(g.version for g in buffers[0].sample(99)[0]) == list(VERSIONS)                # all, when there are fewer


def test_a_saved_buffer_is_the_same_bit_for_bit_and_draws_the_same(tmp_path):
    def through_a_file(buffer):
        torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
        other = ReplayBuffer(alpha=.6, seed=3)
        other.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
        return other
    buffer = ReplayBuffer(alpha=.6, seed=3)
    empty = through_a_file(buffer)
    assert len(empty) == empty.nbytes == 0 and empty.sample(2)[0] == []
    for version, seed in ((0, 1), (3, 2)):
        buffer.add(offpolicy.pack(*drawn(tiny(), seed, version), 16), version)
        buffer.sample(3)[0][0].ess = .1 + .7 / 3
    loaded = through_a_file(buffer)
    np.testing.assert_equal(*([vars(g) for g in b.groups] for b in (loaded, buffer)))
    assert loaded.nbytes == buffer.nbytes and loaded.version == 3 and len(loaded) > 4
    for _ in range(5):
        (a, w), (b, v) = buffer.sample(3, .7), loaded.sample(3, .7)
        np.testing.assert_equal([w, *map(vars, a)], [v, *map(vars, b)])


def test_old_samples_really_come_back_and_change_the_loss():
    """Groups of an older model, drawn from the buffer, against fresh ones of the model that is trained now."""
    model, config = tiny(), Config(algo="offpolicy", correction="bypass")
    old, rewards = drawn(model, seed=1)
    buffer, results = filled(offpolicy.pack(old, rewards, 16), 0), []
    with torch.no_grad():
        for p in model.parameters():
            p += .1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7))
    fields_, r, stamps = offpolicy.unpack(buffer.sample(4)[0], torch.device("cpu"))
    back = Rollout(**fields_)
    assert set(map(tuple, back.completions())) <= set(map(tuple, old.completions())) and stamps.tolist() == [0] * 16
    for rollout, scores in (drawn(model, seed=2), (back, r)):
        batch = offpolicy.prepare(rollout, scores, config)
        offpolicy.add_weights(batch, config)
        logp, entropy = model.token_logps(batch.tokens, batch.mask)
        loss, sums = offpolicy.loss(logp, entropy, batch, config, batch.mask.sum())
        gradient = torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight)[0]
        results.append((loss.item(), sums["ratio_max_dev"].item(), gradient.flatten()))
    (fresh, on_policy, g), (replayed, off_policy, h) = results
    assert on_policy < 1e-4 and off_policy > .1
    assert abs(fresh - replayed) > 1e-3 and torch.cosine_similarity(g, h, 0) < .9


# ------------------------------------------------------------------------------------------------------- the loss

def settings_of(importance, level="sequence", **more):
    return Config(algo="offpolicy", importance=importance, importance_level=level, group_size=3, **more)


def batch_of(seed=0, drift=.3):
    """logp with gradient, and the batch of a pass: mu, prox `drift` away from it, pi a little further."""
    logp, old, advantages, mask = random_batch(seed)
    prox = old + drift * torch.randn(old.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    lengths = mask.sum(1).long()
    batch = offpolicy.Batch(
        tokens=torch.zeros(old.shape, dtype=torch.int64), prompt_lengths=0 * lengths, lengths=lengths, mask=mask,
        rewards=advantages, advantages=advantages, active=torch.ones(6, dtype=torch.bool), old_logp=old, prox_logp=prox)
    return (prox - old + logp.detach()).requires_grad_(), batch


def value_and_gradient(module, logp, batch, config):
    loss, _ = module.loss(logp, torch.zeros_like(logp), batch, config, batch.mask.sum())
    return loss, torch.autograd.grad(loss, logp)[0]


@pytest.mark.parametrize("importance", SCHEMES + TRACES)
def test_without_drift_the_decoupled_loss_is_that_of_grpo(importance):
    logp, batch = batch_of(drift=0)
    offpolicy.add_weights(batch, settings_of(importance))
    expected = value_and_gradient(grpo, logp, batch, Config())
    assert all(map(torch.equal, value_and_gradient(offpolicy, logp, batch, settings_of(importance)), expected))


@pytest.mark.parametrize("config, anchor, weight", [
    (settings_of("truncated"), "prox_logp", lambda w: min(w, 2)), (settings_of("masked"), "prox_logp", lambda w: w * (w <= 2)),
    (Config(algo="offpolicy", correction="bypass"), "old_logp", lambda w: 1)])
def test_decoupled_multiplies_rows_by_their_weights_and_bypass_has_the_ratio_to_mu(config, anchor, weight):
    """Both times the weights of the replay buffer. A row of weight 0 stays in the denominator."""
    logp, batch = batch_of(2, drift=.6)
    mask, replay = batch.mask, torch.tensor([1., .5, .25, 1., .75, 1.], dtype=torch.float64)
    w = [math.exp(x) for x in ((batch.prox_logp - batch.old_logp) * mask).sum(1).tolist()]
    offpolicy.add_weights(batch, config, replay)
    surrogate = grpo.policy_loss(logp, getattr(batch, anchor), batch.advantages, mask)
    expected = sum(weight(w[i]) * replay[i] * surrogate[i].sum() for i in range(6)) / mask.sum()
    value, gradient = value_and_gradient(offpolicy, logp, batch, config)
    close(value.detach(), expected.item())
    close(gradient, torch.autograd.grad(expected, logp)[0])
    assert min(w) < 1 and max(w) > 2


def test_the_weighted_baseline_by_hand():
    """1, 0, 0 of weights 1, 1, 2: the baseline is 1 / 6. Equal weights give the advantages of grpo.py, 0 weights the mean."""
    rewards, weights = torch.tensor([[1., 0, 0], [1., 1, 1]]).double(), torch.tensor([[1., 1, 2], [1., 2, 3]])
    close(offpolicy.weighted_advantages(rewards, weights, "none"), [[5 / 6, -1 / 6, -1 / 6], [0, 0, 0]])
    std = math.sqrt(2) / 3
    close(offpolicy.weighted_advantages(rewards, weights, eps=0)[0], [5 / 6 / std, -1 / 6 / std, -1 / 6 / std])
    for scale, unbiased in (("std", False), ("std", True), ("none", False)):
        expected = grpo.group_advantages(rewards, scale, unbiased=unbiased)
        for equal in (0., 1., 3.):
            found = offpolicy.weighted_advantages(rewards, torch.full((2, 3), equal), scale, unbiased=unbiased)
            close(found, expected if equal else offpolicy.weighted_advantages(rewards, 0 * rewards, scale, unbiased=unbiased))
    with pytest.raises(ValueError, match="std or none"):
        offpolicy.weighted_advantages(rewards, weights, "loo")


def test_the_weighted_baseline_has_the_least_variance_by_exact_enumeration():
    """A softmax over 4 symbols, samples of mu: E (w (r - b))^2 over mu is least at E w^2 r / E w^2, of which b is the estimate."""
    mu, pi, r = torch.tensor([.1, .2, .3, .4]), torch.tensor([.4, .3, .2, .1]), torch.tensor([1., 0, 1, 0])
    w = pi / mu
    best = (mu * w * w * r).sum() / (mu * w * w).sum()
    variance = lambda b: (mu * (w * (r - b)) ** 2).sum().item()
    assert variance(best) < min(variance(best - .01), variance(best + .01), variance((mu * r).sum()))
    draws = torch.multinomial(mu, 400_000, replacement=True, generator=torch.Generator().manual_seed(0)).view(1, -1)
    found = offpolicy.weighted_advantages(r[draws], w[draws], "none")
    close((r[draws] - found)[0, 0], best, 5e-3)


def test_the_baseline_of_a_run_is_weighted_by_what_the_loss_is_weighted_by():
    config = settings_of("truncated", weighted_baseline=True, replay_ratio=2)
    _, batch = batch_of(2, drift=.6)
    batch.rewards = torch.tensor([1., 0, 0, 1, 1, 0])
    offpolicy.add_weights(batch, config)
    w = ((batch.prox_logp - batch.old_logp) * batch.mask).sum(1).exp().clamp(max=2).view(2, 3)
    assert w.std() > .1
    close(batch.advantages, offpolicy.weighted_advantages(batch.rewards.view(2, 3), w).flatten())


def test_prox_between_mu_and_pi_by_hand():
    """2/3 of the way to pi, none of it, all of it. No gradient flows through it. Two passes behind, of several updates: 2/3."""
    mu, pi = torch.tensor([[-1., -2]] * 3), torch.tensor([[-4., -2]] * 3, requires_grad=True)
    prox = offpolicy.loglinear_prox(pi, mu, torch.tensor([0., 2 / 3, 1]))
    close(prox, [[-1, -2], [-3, -2], [-4, -2]], 1e-6)
    assert not prox.requires_grad
    for more in ({"epochs": 2}, {"minibatches": 2}):
        close(offpolicy.prox_share(settings_of("truncated", **more), torch.tensor([0., 2])), [0, 2 / 3], 1e-6)
    close(offpolicy.prox_share(settings_of("truncated"), torch.tensor([0., 2])), [1, 1])


def test_the_loss_with_a_loglinear_prox_lies_between_bypass_and_decoupled():
    """Prox at mu: rho = pi / mu without weights, as grpo.py. At pi: rho = 1, weights of pi / mu. Between: by hand."""
    logp, batch = batch_of(3)
    config = settings_of("truncated", prox="loglinear", replay_ratio=2)
    near = replace(batch, prox_logp=None, prox_share=torch.zeros(6))
    offpolicy.add_weights(near, config)
    assert all(map(torch.equal, value_and_gradient(offpolicy, logp, near, config), value_and_gradient(grpo, logp, batch, Config())))

    far, exact = replace(near, prox_share=torch.ones(6)), replace(batch, prox_logp=logp.detach())
    offpolicy.add_weights(exact, settings_of("truncated"))
    expected = value_and_gradient(offpolicy, logp, exact, settings_of("truncated"))
    list(map(close, value_and_gradient(offpolicy, logp, far, config), expected))

    between = replace(near, prox_share=torch.full((6,), 2 / 3, dtype=torch.float64))
    step = (logp.detach() - batch.old_logp) * batch.mask
    W = (2 / 3 * step).sum(1).exp().clamp(max=2)[:, None]
    rho, A = (step / 3).exp(), batch.advantages[:, None]
    loss = -W * torch.minimum(rho * A, rho.clamp(.8, 1.2) * A) * batch.mask
    close(value_and_gradient(offpolicy, logp, between, config)[0], loss.sum() / batch.mask.sum())


@pytest.mark.parametrize("kind, delta", [("sequence", .1), ("token", .05), ("second_moment", .04)])
def test_a_trust_region_takes_gradients_but_not_the_denominator(kind, delta):
    logp, batch = batch_of(5)
    mu, mask, replay, gradients = batch.old_logp, batch.mask, torch.linspace(.1, .6, 6), []
    squares = (batch.prox_logp - mu).square()
    stays = {"sequence": offpolicy.sequence_mask, "token": offpolicy.token_mask, "second_moment": lambda *_: squares <
             offpolicy.second_moment_limit(squares[mask > 0], delta)}[kind](logp, mu, batch.advantages, mask, delta)
    for region in ("", kind):
        config = Config(algo="offpolicy", correction="bypass", trust_region=region, trust_delta=delta, clip_high=9.)
        offpolicy.add_weights(batch, config, replay)
        gradients.append(value_and_gradient(offpolicy, logp, batch, config)[1])
    close(gradients[1], gradients[0] * stays)
    assert gradients[1].any() and not torch.equal(*gradients)


@pytest.mark.parametrize("kind, delta, region", [("sequence", .1, offpolicy.sequence_mask), ("token", .05, offpolicy.token_mask)])
def test_a_trust_region_lies_around_mu_also_where_the_ratio_is_to_prox(kind, delta, region):
    """At the start of a pass pi is prox, so that nothing would ever have left a region around prox."""
    _, batch = batch_of(5)
    logp, gradients = batch.prox_logp.clone().requires_grad_(), []
    for name in ("", kind):
        config = settings_of("none", trust_region=name, trust_delta=delta)
        offpolicy.add_weights(batch, config)
        gradients.append(value_and_gradient(offpolicy, logp, batch, config)[1])
    stays = region(logp, batch.old_logp, batch.advantages, batch.mask, delta)
    close(gradients[1], gradients[0] * stays)
    assert gradients[1].any() and not torch.equal(*gradients)


def test_the_second_moment_is_that_of_the_tokens_that_are_trained():
    """Row 0 has squares of .09 against a limit of .04; the rows of equal rewards, not trained, are still at mu."""
    _, batch = batch_of()
    batch.prox_logp = batch.old_logp + torch.tensor([.3] + [0.] * 5)[:, None]
    batch.active = torch.tensor([True] + [False] * 5)
    offpolicy.add_weights(batch, Config(algo="offpolicy", trust_region="second_moment", trust_delta=.04))
    assert (batch.weight[0] == 0).all()


@pytest.mark.parametrize("config", [
    settings_of("self_normalized"), settings_of("self_normalized", "token"), settings_of("standard", importance_normalize="group"),
    settings_of("truncated", "geometric", importance_normalize="batch"), settings_of("tempered", trace=.5),
    settings_of("clipped", trust_region="second_moment", trust_delta=.04), settings_of("none", aggregation="sequence")])
def test_ranks_and_micro_batches_add_up_to_the_whole(config):
    """Two ranks of three rows: what `reduce` and `gather` get from one rank is joined with the other's."""
    logp, batch = batch_of(4)
    batch.active[1] = False                              # a row that is not trained has no part in a mean weight
    halves, sums, squares = [], [], []
    for part in (slice(3), slice(3, 6)):
        halves.append(replace(batch, **{k: v[part] for k, v in vars(batch).items() if torch.is_tensor(v)}))
    offpolicy.add_weights(batch, config)
    for half in halves:
        offpolicy.add_weights(replace(half), config, None, lambda x: sums.append(x) or x, lambda x: squares.append(x) or x)
    for half in halves:
        offpolicy.add_weights(half, config, None, lambda _: {k: sum(x[k] for x in sums) for k in sums[0]}, lambda _: torch.cat(squares))
    close(torch.cat([half.weight for half in halves]), batch.weight)
    if config.importance == "self_normalized":
        on = batch.active[:, None] * (batch.mask if config.importance_level == "token" else torch.eye(9)[:1])
        assert (batch.weight * on).sum().item() / on.sum().item() == pytest.approx(1)
    count, gradients = batch.mask.sum() if config.aggregation == "token" else 6, []
    for parts in ([range(6)], [[0, 4], [1, 2, 3], [5]]):
        micros = [probed(batch, logp=logp).rows(list(rows)) for rows in parts]
        total = sum(offpolicy.loss(m.logp, torch.zeros_like(m.logp), m, config, count)[0] for m in micros)
        gradients.append(torch.autograd.grad(total, logp)[0])
    close(gradients[1], gradients[0], 1e-12)


# ------------------------------------------------------------------------------------------ the passes of a rollout

def learner_of(model, progress=None, **settings_):
    config = Config(algo="offpolicy", prompts_per_step=6, group_size=4, **settings_)
    return learner.Learner(config, offpolicy, model, learner.adamw(model, 1e-3), progress or Progress(),
                           state=offpolicy.State(config))


def test_stale_fresh_groups_have_weights_also_without_replay():
    """--replay-ratio 1 --sync-every 2: drawn by version 0, trained at version 1. W is the product of pi / mu, at most 2."""
    model = tiny()
    rollout, rewards = drawn(model)
    with torch.no_grad():
        for p in model.parameters():
            p += .05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7))
    one = learner_of(model, Progress(updates=1), replay_ratio=1, sync_every=2)
    batch = offpolicy.fresh_batch(one, rollout, rewards)
    pi, mask = model.token_logps(rollout.tokens, batch.mask)[0].detach(), batch.mask * batch.active[:, None]
    w = ((pi - rollout.logps) * mask).sum(1).exp()
    close(batch.weight, w.clamp(max=2)[:, None] * mask, 1e-4)
    assert 0 < w[batch.active].min() < .9 and w.max() > 2
    rollout.version = 1                                     # pi's own: no weights
    assert torch.equal(offpolicy.fresh_batch(one, rollout, rewards).weight, mask)


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p += .05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7))
    return model


def test_the_learning_rate_follows_the_effective_samples():
    """x sqrt(ESS) of the capped weights of each pass over samples of older weights; back after each, also when it fails."""
    model = tiny()
    rollout, rewards = drawn(model)
    one = learner_of(moved(model), Progress(updates=1), replay_ratio=1, sync_every=2, ess_lr=True)
    rates, shares, passes = [], [], one.make_pass

    def seen(batch, *a):
        w = batch.weight.amax(1)[batch.active].double()
        shares.append((w.sum() ** 2 / (len(w) * (w * w).sum())).item())
        rates.append([g["lr"] for g in one.optimizer.param_groups])
        return passes(batch, *a)

    one.make_pass = seen
    more = one.learn(rollout, rewards)
    assert more["ess"] < shares[0] < .95                    # the cap makes the weights more equal
    close(torch.tensor(rates), torch.full((1, 2), 1e-3 * math.sqrt(shares[0])))
    assert all(group["lr"] == 1e-3 for group in one.optimizer.param_groups)

    def fails(*a):
        raise ValueError("stop")
    one.make_pass = fails
    with pytest.raises(ValueError, match="stop"):
        one.learn(rollout, rewards)
    assert all(group["lr"] == 1e-3 for group in one.optimizer.param_groups)
    one.make_pass = seen
    rollout.version = one.progress.updates                  # now pi drew it
    one.learn(rollout, rewards)
    assert rates[1] == [1e-3, 1e-3]


def test_a_loglinear_prox_needs_no_forward_and_ages_by_passes():
    """pi's own samples have no prox. A pass later: 1 / 2. One rollout and one pass of two later: 1 x 2 + 1, so 3 / 4."""
    one = learner_of(tiny(), replay_ratio=2, prox="loglinear", minibatches=2)
    one.score, shares, passes = None, [], one.make_pass

    def seen(batch, *a):
        shares.append(None if batch.prox_share is None else batch.prox_share.tolist())
        return passes(batch, *a)

    one.make_pass = seen
    for _ in range(2):
        rollout, rewards = drawn(one.model, seed=one.progress.step)
        rollout.version = one.progress.updates
        one.progress.behaviour_step = one.progress.step
        last = one.learn(rollout, rewards)
        one.progress.step += 1
    assert shares[0] is shares[2] is None and set(shares[1]) == {.5} and set(shares[3]) <= {.5, .75}
    assert last["kl_last"] > 0 and last["replay_ratio"] == 2


@pytest.mark.parametrize("changes, complaint", [
    (dict(prox="loglinear", trust_region="second_moment"), "--prox forward"),
    (dict(prox="loglinear", importance="self_normalized"), "--prox forward"),
    (dict(prox="loglinear", ess_lr=True), "--ess-lr needs --prox forward"),
    (dict(prox="loglinear", weighted_baseline=True), "--weighted-baseline needs --prox forward"),
    (dict(correction="bypass", ess_lr=True), "--ess-lr needs --correction decoupled"),
    (dict(replay_ratio=1, prox="loglinear"), "--prox needs samples of older weights"),
    (dict(weighted_baseline=True, importance_level="token"), "one weight a completion"),
    (dict(ess_lr=True, importance_level="token"), "one weight a completion"),
    (dict(ess_lr=True, importance="none"), "--ess-lr needs --importance"),
    (dict(weighted_baseline=True, mask_truncated=True), "no --mask-truncated"),
    (dict(weighted_baseline=True, advantage_scale="loo"), "std or none")])
def test_refinements_that_would_do_nothing_are_refused(changes, complaint):
    words = [[f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])] for name, value in changes.items()]
    with pytest.raises(ValueError, match=complaint):
        parse(["--algo", "offpolicy", *itertools.chain(*words)])


def test_the_bias_correction_of_priorities_rises_from_its_start_to_1_at_the_last_step():
    """.4 + .6 x step / 10, whatever the number of updates; it is what the draws are weighed back by."""
    for step, expected in ((1, .46), (5, .7), (10, 1.)):
        one = learner_of(tiny(), Progress(step=step, updates=3 * step), priority=.6, priority_beta=.4, steps=10)
        betas = []
        one.state.buffer.sample = lambda count, beta: betas.append(beta) or ([], None)
        one.learn(*drawn(one.model))
        assert betas == [pytest.approx(expected)]


def test_an_adaptive_clip_moves_both_its_sides():
    """.1 and .3, now at .12: the upper side is .36. It stays within a quarter of --clip-low and twice that."""
    one = learner_of(tiny(), adaptive_clip=True, kl_limit=.03, clip_low=.1, clip_high=.3, replay_ratio=1)
    one.state.clip, seen = .12, []
    passes = one.make_pass
    one.make_pass = lambda batch, count, config: seen.append((config.clip_low, config.clip_high)) or passes(batch, count, config)
    one.learn(*drawn(one.model))
    assert seen == [(.12, pytest.approx(.36))]
    for kl, expected in ((0., .2), (1., .025)):
        for _ in range(30):
            offpolicy.adapt(one, offpolicy.Drift(tokens=1., kl=kl), old=True)
        assert one.state.clip == pytest.approx(expected)


def test_samples_of_pi_itself_say_nothing_of_the_clip():
    """They meet a KL of 0 whatever the clip is: it would widen at every step until it is at its bound."""
    one = learner_of(tiny(), adaptive_clip=True, kl_limit=.03, replay_ratio=1)
    assert one.learn(*drawn(one.model))["kl_last"] < .02 and one.state.clip == one.config.clip_low
    one.progress.step += 1                                  # now the weights that drew are a rollout old
    one.learn(*drawn(one.model))
    assert one.state.clip > one.config.clip_low


def test_a_pass_without_a_trained_token_leaves_the_replay_ratio():
    """It says nothing of the drift: its ESS of 1 and KL of 0 are those of no sample."""
    one = learner_of(tiny(), adaptive_replay=True, replay_ratio=4)
    one.state.replay_ratio = 2.
    offpolicy.adapt(one, offpolicy.Drift(), old=True)
    rollout, rewards = drawn(one.model)
    one.learn(rollout, 0 * rewards)
    assert one.state.replay_ratio == 2
    offpolicy.adapt(one, offpolicy.Drift(sequences=1., weight=1., weight2=1., tokens=3.), old=True)
    assert one.state.replay_ratio == pytest.approx(2.4)


def test_the_effective_sample_size_of_a_group_is_that_of_whole_sequences():
    """Every token's ratio is 2. Sequences of 1, 2, 1 and 1 tokens weigh 2, 4, 2, 2: 10^2 / 28 of 4. Roots would all weigh 2.
    In the second group the two rows that are not trained do not count: 2 and 4, so 6^2 / 20 of 2."""
    mask = torch.tensor([[1., 0.], [1., 1.], [1., 0.], [1., 0.]] * 2)
    nothing, ones, groups = torch.zeros(8), torch.ones(8, dtype=torch.int64), stamped(0, 0)
    batch = offpolicy.Batch(
        tokens=mask.long(), prompt_lengths=0 * ones, lengths=2 * ones, mask=mask, rewards=nothing, advantages=nothing,
        active=torch.tensor([True] * 6 + [False] * 2), old_logp=0 * mask, prox_logp=math.log(2) * mask, lag=nothing)
    offpolicy.measure(learner_of(tiny()), batch, groups)
    assert [g.ess for g in groups] == pytest.approx([100 / 28 / 4, 36 / 20 / 2])


@pytest.mark.parametrize("changes, oldest", [({}, 4), ({"sync_every": 3}, 2), ({"replay_ratio": 3}, 4), ({"epochs": 1}, 4)])
def test_groups_may_not_be_too_old_when_they_enter_the_buffer(changes, oldest):
    """Weights that draw for 5 steps are 4 rollouts old in the last of them, however many updates a rollout has."""
    given = {"epochs": 2, "minibatches": 3, "sync_every": 5, "replay_ratio": 2, **changes}
    with pytest.raises(ValueError, match=f"^--max-staleness {oldest - 1}: fresh groups may be {oldest} rollouts old[^\n]*$"):
        check(Config(algo="offpolicy", max_staleness=oldest - 1, **given))
    for allowed in (oldest, 0):                             # 0: no bound
        check(Config(algo="offpolicy", max_staleness=allowed, **given))
    check(Config(algo="offpolicy", max_staleness=1, **given | {"replay_ratio": 1}))         # nothing enters
