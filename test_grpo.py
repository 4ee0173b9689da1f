"""The objective, specified by examples: worked numbers first, then properties that hold for any
input.

Golden numbers were made by running TRL 1.16 and verl 0.9.1 in float64 on the small tensors below.
"""
import itertools
import math
from dataclasses import make_dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dist
import grpo
from rollout import Rollout
from config import Config, check
from learner import micro_batches_of

torch.set_num_threads(1)
LOGP = torch.tensor([[-.1, -.5, -1.], [-.2, -.3, 0.]], dtype=torch.float64)
OLD = torch.tensor([[-.2, -.4, -1.5], [-.1, -.8, 0.]], dtype=torch.float64)
REF = torch.tensor([[-.15, -.6, -.9], [-.3, -.2, 0.]], dtype=torch.float64)
MASK = torch.tensor([[1., 1., 1.], [1., 1., 0.]], dtype=torch.float64)
ADV = torch.tensor([1., -1.], dtype=torch.float64)


def random_batch(seed, B=6, T=9):
    """logp (needs grad), old, advantages, ragged mask, float64."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g, dtype=torch.float64) * 3
    logp = (old + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64)).requires_grad_()
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    mask = (torch.arange(T)[None] < lengths[:, None]).double()
    return logp, old, torch.randn(B, generator=g, dtype=torch.float64), mask


# --------------------------------------------------------------------------------------- advantages

def test_two_right_two_wrong():
    """mean 1/2, population std 1/2: the right ones get +1, the wrong ones -1."""
    A = grpo.group_advantages(torch.tensor([[1., 1., 0., 0.]]))
    torch.testing.assert_close(A, torch.tensor([[1., 1., -1., -1.]]), atol=1e-5, rtol=0)


def test_one_wrong_of_three_under_every_scale():
    r = torch.tensor([[1., 0., 1.]])
    expected = {                                    # mean 2/3; population std sqrt(2)/3, with G-1 sqrt(1/3)
        ("std", True): [.57735, -1.15470, .57735],
        ("std", False): [.70711, -1.41421, .70711],
        ("none", False): [1 / 3, -2 / 3, 1 / 3],
        ("loo", False): [.5, -1., .5],              # 1 - mean(0, 1), 0 - mean(1, 1), ...
    }
    for (scale, unbiased), values in expected.items():
        A = grpo.group_advantages(r, scale, unbiased=unbiased)
        torch.testing.assert_close(A, torch.tensor([values]), atol=1e-5, rtol=0)


def test_batch_scale_divides_by_the_std_of_all_rewards():
    r = torch.tensor([[1., 0.], [1., 1.]])          # all: mean 3/4, population std sqrt(3)/4
    A = grpo.group_advantages(r, "batch")
    torch.testing.assert_close(A, torch.tensor([[.5, -.5], [0., 0.]]) / (math.sqrt(3) / 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("unbiased, std", [(False, math.sqrt(3) / 4), (True, .5)])
def test_the_batch_scale_of_several_ranks_is_the_std_of_the_rewards_of_all(unbiased, std, monkeypatch):
    """Rank 0 has 1 1, this rank 1 0. The squares around 3/4 add up to 3/4, over 4 or, unbiased, over 3."""
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [torch.tensor([[1., 1.]]), mine])
    monkeypatch.setattr(dist, "rank", lambda: 1)
    config = Config(advantage_scale="batch", unbiased_std=unbiased, group_size=2)
    batch = grpo.prepare(rollout_of(N=1, G=2), torch.tensor([[1., 0.]]), config)
    grpo.complete(SimpleNamespace(config=config, reference=None), batch)
    torch.testing.assert_close(batch.advantages, torch.tensor([.5, -.5]) / std, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.3, 0.7, 10 / 3, 1e6])
@pytest.mark.parametrize("scale", ["std", "none", "loo", "batch"])
@pytest.mark.parametrize("G", [1, 2, 7, 8])
def test_equal_rewards_give_exactly_zero(value, scale, G):
    """In float32 the mean of eight 0.7 is not 0.7: dividing that error by its own std would make
    |A| = 0.06."""
    r = torch.full((3, G), value)
    assert (grpo.group_advantages(r, scale) == 0).all()
    assert not grpo.informative(r).any()


def test_an_equal_group_beside_others_stays_zero_and_finite():
    r = torch.tensor([[.7] * 8, [1.] + [0.] * 7])
    A = grpo.group_advantages(r)
    assert (A[0] == 0).all() and torch.isfinite(A).all() and A[1].abs().sum() > 0


@given(st.lists(st.integers(0, 1), min_size=4, max_size=4), st.floats(.1, 10), st.floats(-5, 5))
def test_std_advantage_ignores_the_reward_unit(rewards, a, b):
    r = torch.tensor([rewards], dtype=torch.float64)
    torch.testing.assert_close(grpo.group_advantages(a * r + b), grpo.group_advantages(r), atol=1e-4, rtol=0)


def test_advantages_follow_a_permutation_of_samples_and_prompts():
    r = torch.rand(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, columns = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([5, 0, 3, 1, 4, 2])
    for scale in ("std", "none", "loo", "batch"):
        torch.testing.assert_close(grpo.group_advantages(r[rows][:, columns], scale),
                                   grpo.group_advantages(r, scale)[rows][:, columns])


def test_bad_advantage_arguments_are_named():
    with pytest.raises(ValueError, match="prompts, group"):
        grpo.group_advantages(torch.zeros(4))
    with pytest.raises(ValueError, match="std, none, loo or batch"):
        grpo.group_advantages(torch.zeros(2, 2), "zscore")


@pytest.mark.parametrize("G, p, expected", [(2, .01, 1.00), (8, .01, 2.61), (64, .01, 6.74), (2, .5, 1.00),
                                            (8, .5, 1.86), (64, .5, 1.98)])
def test_what_the_std_normalised_gradient_is_on_average(G, p, expected):
    """E[gradient] = C_G(p) x grad p with C_G = E[sqrt(K (G - K))] / (G p (1 - p)), K ~ Bin(G, p):
    dividing by the std re-weights prompts by their success rate (1 for every p at G = 2; 1 / sqrt(p
    (1 - p)) for large G).

    The policy here is a Bernoulli with success probability p = sigmoid(theta): score = r - p,
    dp/dtheta = p (1 - p)."""
    total = closed = 0.0
    for K in range(G + 1):
        weight = math.comb(G, K) * p ** K * (1 - p) ** (G - K)
        r = torch.tensor([[1.] * K + [0.] * (G - K)], dtype=torch.float64)
        A = grpo.group_advantages(r, eps=0.0) if 0 < K < G else torch.zeros_like(r)
        total += weight * (A * (r - p)).mean().item()
        closed += weight * math.sqrt(K * (G - K)) / (G * p * (1 - p))
    assert total / (p * (1 - p)) == pytest.approx(closed, rel=1e-9)
    assert closed == pytest.approx(expected, abs=.005)


def test_leave_one_out_is_unbiased_and_mean_only_shrinks_by_one_over_g():
    G, p = 5, .3
    loo = plain = 0.0
    for K in range(G + 1):
        weight = math.comb(G, K) * p ** K * (1 - p) ** (G - K)
        r = torch.tensor([[1.] * K + [0.] * (G - K)], dtype=torch.float64)
        loo += weight * (grpo.group_advantages(r, "loo") * (r - p)).mean().item()
        plain += weight * (grpo.group_advantages(r, "none") * (r - p)).mean().item()
    assert loo == pytest.approx(p * (1 - p)) and plain == pytest.approx(p * (1 - p) * (G - 1) / G)


# ---------------------------------------------------------------------- golden numbers of the peers

@pytest.mark.parametrize("name, expected", [
    ("grpo", 0.103388283), ("dapo, clip-higher", -0.147289929), ("token mean", -0.131289929),
    ("dr_grpo", -0.082056206), ("gspo", 0.020021173), ("grpo + k3", 0.103563285), ("grpo + k3_is", 0.103612382),
    ("verl", -0.147289929)])
def test_golden_losses(name, expected):
    def loss(how, high=.2, **kw):
        per_token = grpo.policy_loss(LOGP, OLD, ADV, MASK, .2, high, **kw)
        return grpo.aggregate(per_token, MASK, how, max_length=4)

    def kl(kind):
        return .04 * grpo.aggregate(grpo.kl_penalty(LOGP, REF, kind, OLD), MASK, "sequence")

    values = {
        "grpo": lambda: loss("sequence"), "dapo, clip-higher": lambda: loss("token", .28), "token mean": lambda: loss("token"),
        "dr_grpo": lambda: loss("constant"), "gspo": lambda: loss("sequence", level="sequence"),
        "grpo + k3": lambda: loss("sequence") + kl("k3"), "grpo + k3_is": lambda: loss("sequence") + kl("k3_is"),
        "verl": lambda: loss("token", .28, dual_clip=3.0)}
    assert values[name]().item() == pytest.approx(expected, abs=1e-8)


# ----------------------------------------------------------------------------------- ratio and clip

def test_on_policy_the_loss_is_minus_mean_advantage_and_the_gradient_is_reinforce():
    """Ratio 1: a loss near zero is normal; the gradient is -A / normaliser on every token."""
    _, old, A, mask = random_batch(0)
    logp = old.clone().requires_grad_()
    value = grpo.aggregate(grpo.policy_loss(logp, old, A, mask), mask, "token")
    value.backward()
    torch.testing.assert_close(logp.grad, -A[:, None] * mask / mask.sum())
    assert value.item() == pytest.approx(-(A[:, None] * mask).sum().item() / mask.sum().item())


@pytest.mark.parametrize("advantage, ratio, clipped", [
    (1, 1.3, True), (1, .7, False), (-1, 1.3, False), (-1, .7, True), (1, 1.1, False), (-1, .9, False)])
def test_the_clip_removes_the_gradient_only_where_the_policy_already_moved_that_way(advantage, ratio, clipped):
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    A, mask, old = torch.tensor([float(advantage)]), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.float64)
    grpo.policy_loss(logp, old, A, mask).sum().backward()
    assert (logp.grad == 0).item() == clipped
    assert grpo.clipped_tokens(logp, old, A, mask).item() == float(clipped)


def test_the_reported_clip_is_that_of_the_ratio_in_use():
    """Token ratios e^.1 and e^-.1 leave a clip of 5 %; their geometric mean is 1 and leaves
    nothing."""
    logp, A, mask = torch.tensor([[.1, -.1]]), torch.ones(1), torch.ones(1, 2)
    old = torch.zeros(1, 2)
    assert grpo.clipped_tokens(logp, old, A, mask, .05, .05).tolist() == [[1., 0.]]
    assert grpo.clipped_tokens(logp, old, A, mask, .05, .05, "sequence").tolist() == [[0., 0.]]
    x = logp.clone().requires_grad_()
    grpo.policy_loss(x, old, A, mask, .05, .05, "sequence").sum().backward()
    assert (x.grad != 0).all()


def test_asymmetric_clip():
    logp = torch.tensor([[math.log(1.25)]], requires_grad=True)
    for high, zero in ((.2, True), (.28, False)):
        logp.grad = None
        grpo.policy_loss(logp, torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1), .2, high).sum().backward()
        assert (logp.grad == 0).item() == zero


def test_dual_clip_bounds_the_loss_of_a_wrong_completion():
    """A = -1, ratio 10: the loss would be 10; with dual_clip 3 it is 3 and has no gradient. A = +1
    is not touched."""
    logp = torch.full((2, 1), math.log(10.)).requires_grad_()
    loss = grpo.policy_loss(logp, torch.zeros(2, 1), torch.tensor([-1., 1.]), torch.ones(2, 1), dual_clip=3.0)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([[3.], [-1.2]]))
    assert (logp.grad == 0).all()


def test_sequence_ratio_is_the_geometric_mean_and_its_gradient_is_constant_in_a_row():
    logp, old, A, mask = random_batch(3)
    loss = grpo.policy_loss(logp, old, A, mask, 10., 10., level="sequence")
    s = (((logp - old) * mask).sum(1) / mask.sum(1)).exp()
    torch.testing.assert_close(loss, -(s * A)[:, None] * mask)
    grpo.aggregate(loss, mask, "sequence").backward()
    for row, m in zip(logp.grad, mask):
        assert row[m > 0].std(correction=0) < 1e-12 and (row[m == 0] == 0).all()


def test_huge_ratios_stay_finite():
    logp = torch.tensor([[0., -800.]], requires_grad=True)
    loss = grpo.policy_loss(logp, torch.tensor([[-900., 0.]]), torch.tensor([-1.]), torch.ones(1, 2)).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()


# ----------------------------------------------------------------------------------------------- KL

def policy_kl(logits, ref, kind):
    """E over all six tokens of the penalty, its value and its gradient with respect to the
    logits."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    penalty = grpo.kl_penalty(logp[None], ref[None], kind, logp.detach()[None])[0]
    value = (logp.exp().detach() * penalty).sum()           # tokens come from pi: their probability has no gradient
    return value, torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3_is"])
def test_what_each_kl_estimator_estimates_and_what_its_gradient_is(kind):
    g = torch.Generator().manual_seed(1)
    logits, ref = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(2))
    ref = ref.log_softmax(-1)
    z = logits.clone().requires_grad_()
    logp = z.log_softmax(-1)
    reverse = (logp.exp() * (logp - ref)).sum()
    forward = (ref.exp() * (ref - logp)).sum()
    d_reverse, d_forward = (torch.autograd.grad(k, z, retain_graph=True)[0] for k in (reverse, forward))
    value, gradient = policy_kl(logits, ref, kind)
    if kind != "k2":                                        # k2 is biased as an estimate
        torch.testing.assert_close(value, reverse.detach())
    expected = {"k1": torch.zeros(6, dtype=torch.float64), "k2": d_reverse, "k3": d_forward, "k3_is": d_reverse}[kind]
    torch.testing.assert_close(gradient, expected)


def test_k3_is_never_negative_and_zero_at_the_reference():
    logp, ref, _, mask = random_batch(5)
    assert (grpo.kl_penalty(logp, ref) >= 0).all()
    assert (grpo.kl_penalty(ref, ref, mask=mask) == 0).all()


def test_off_the_mask_there_is_no_kl():
    """Padding may hold anything: its KL is exactly 0, in the value, in the gradient and so in the log's sum."""
    for kind in grpo.KL_KINDS:
        logp = torch.tensor([[-1., -2., -3.]], requires_grad=True)
        ref, mask = torch.tensor([[-2., -9., math.nan]]), torch.tensor([[1., 0., 0.]])
        kl = grpo.kl_penalty(logp, ref, kind, torch.zeros(1, 3), mask)
        kl.sum().backward()
        assert kl[0, 0] != 0 and kl[0, 1:].tolist() == [0, 0] and logp.grad[0, 1:].tolist() == [0, 0]


# -------------------------------------------------------------------------------------- aggregation

def test_three_aggregations_by_hand():
    loss = torch.tensor([[1., 2., 3.], [4., 99., 99.]])
    mask = torch.tensor([[1., 1., 1.], [1., 0., 0.]])
    assert grpo.aggregate(loss, mask, "token").item() == 10 / 4
    assert grpo.aggregate(loss, mask, "sequence").item() == (2 + 4) / 2
    assert grpo.aggregate(loss, mask, "constant", max_length=5).item() == 10 / (2 * 5)
    with pytest.raises(ValueError, match="max_length"):
        grpo.aggregate(loss, mask, "constant")
    with pytest.raises(ValueError, match="token, sequence or constant"):
        grpo.aggregate(loss, mask, "mean")


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@given(seed=st.integers(0, 1000), cut=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_any_split_into_micro_batches_gives_the_same_gradient(how, seed, cut):
    logp, old, A, mask = random_batch(seed)
    count = mask.sum() if how == "token" else len(mask)
    whole = torch.autograd.grad(grpo.aggregate(grpo.policy_loss(logp, old, A, mask), mask, how, max_length=9), logp)[0]
    parts = sum(grpo.aggregate(grpo.policy_loss(logp[s], old[s], A[s], mask[s]), mask[s], how, count, 9)
                for s in (slice(0, cut), slice(cut, None)))
    torch.testing.assert_close(torch.autograd.grad(parts, logp)[0], whole)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_padding_and_empty_rows_change_nothing(how, level):
    """Longer padding filled with nan, and a row without a single token: same loss, finite
    gradient."""
    logp, old, A, mask = random_batch(7)
    bad = torch.full((6, 4), float("nan"), dtype=torch.float64)
    wide = [torch.cat([x, bad], 1) for x in (logp, old)]
    wide_mask = torch.cat([mask, torch.zeros(6, 4)], 1)
    wide = [torch.cat([x, bad.new_full((1, 13), float("nan"))]) for x in wide]
    wide_mask, wide_A = torch.cat([wide_mask, torch.zeros(1, 13)]), torch.cat([A, torch.ones(1, dtype=A.dtype)])
    a = grpo.aggregate(grpo.policy_loss(logp, old, A, mask, level=level), mask, how, max_length=9)
    b = grpo.aggregate(grpo.policy_loss(*wide, wide_A, wide_mask, level=level), wide_mask, how, max_length=9)
    torch.testing.assert_close(a, b)
    first = torch.autograd.grad(a, logp, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(b, logp)[0], first)


# -------------------------------------------------------------- prepare and loss, as train.py calls

def rollout_of(seed=0, N=3, G=4, T=10):
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(1, 4, (N,), generator=g).repeat_interleave(G)
    lengths = prompt + torch.randint(1, T - 3, (N * G,), generator=g)
    r = Rollout(torch.randint(0, 9, (N * G, T), generator=g), prompt, lengths,
                -torch.rand(N * G, T, generator=g), torch.rand(N * G, generator=g) < .7)
    r.logps = r.logps * r.completion_mask()
    return r


def test_k3_is_never_negative_however_small_the_difference():
    """In float32 exp(d) - d - 1 is below 0 for 2 % of such d; the value is d^2 / 2 to within its rounding."""
    d = 10 ** -torch.linspace(1, 7, 2000) * torch.tensor([1.0, -1.0]).repeat(1000)
    kl = grpo.kl_penalty(torch.zeros(1, 2000), d[None])
    assert (kl >= 0).all() and (d.exp() - d - 1 < 0).any()
    torch.testing.assert_close(kl[0].double(), d.double().expm1() - d.double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("bound, wrong", [(0.5, True), (1.0, True), (0.0, False), (1.5, False)])
def test_a_dual_clip_that_would_take_all_gradients_is_refused(bound, wrong):
    """At 1 or below, -dual_clip A is below every loss of a wrong answer, whose gradient is then 0."""
    config = Config(dual_clip=bound)
    for settings in (config, Config(algo="offpolicy", dual_clip=bound)):
        if wrong:
            with pytest.raises(ValueError, match="--dual-clip"):
                check(settings)
        else:
            assert check(settings) is settings


def probed(batch, **tensors):
    """The batch with more tensors of B rows, which `rows` cuts as it cuts the others."""
    kind = make_dataclass("Probed", [(name, object, None) for name in tensors], bases=(type(batch),))
    return kind(**vars(batch), **tensors)


def total_gradient(batch, config, logp, rows, budget=1000):
    """The gradient of learner.update's loss by logp, over micro-batches of `budget` tokens; groups of
    four."""
    count = batch.mask[rows].sum() if config.aggregation == "token" else len(rows)
    parts = list(micro_batches_of(probed(batch, logp=logp), rows, replace(config, micro_batch_tokens=budget, group_size=4)))
    assert sorted(r for part, _ in parts for r in part) == rows and (budget >= 1000 or len(parts) > 1)
    for _, micro in parts:
        loss, _ = grpo.loss(micro.logp, torch.zeros_like(micro.logp), micro, config, count)
        loss.backward(retain_graph=True)
    return logp.grad


def test_groups_of_equal_rewards_leave_loss_and_normaliser_exactly():
    rollout, config = rollout_of(), Config(beta=.1)
    rewards = torch.tensor([[1., 0., 0., 1.], [.7] * 4, [0., 0., 0., 1.]])
    batch = replace(grpo.prepare(rollout, rewards, config), ref_logp=rollout.logps - .3)
    assert batch.active.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    kept = grpo.prepare(rollout, rewards, Config(zero_variance="keep"))
    assert kept.active.all() and (kept.advantages[4:8] == 0).all()
    logp = (rollout.logps + .1).requires_grad_()
    rows = batch.active.nonzero()[:, 0].tolist()
    gradient = total_gradient(batch, config, logp, rows)
    assert (gradient[4:8] == 0).all() and (gradient[0] != 0).any()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_token_budget_does_not_change_the_gradient(aggregation):
    rollout, config = rollout_of(2), Config(aggregation=aggregation, beta=.1)
    rewards = torch.tensor([[1., 0., 0., 1.], [1., 1., 0., 1.], [0., 0., 0., 1.]])
    batch = replace(grpo.prepare(rollout, rewards, config), ref_logp=rollout.logps - .3)
    gradients = []
    for budget in (1, 13, 30, 10000):
        logp = (rollout.logps + .1).requires_grad_()
        gradients.append(total_gradient(batch, config, logp, list(range(12)), budget))
    for g in gradients[1:]:
        torch.testing.assert_close(g, gradients[0])


def test_masking_truncated_rows_keeps_them_in_the_baseline():
    rollout = rollout_of(4)
    rollout.finished = torch.tensor([True, False, True, True] * 3)
    rewards = torch.tensor([[1., 0., 0., 1.]] * 3)
    batch = grpo.prepare(rollout, rewards, Config(mask_truncated=True))
    assert (batch.mask[1::4] == 0).all() and not batch.active[1::4].any()
    torch.testing.assert_close(batch.advantages.view(3, 4), grpo.group_advantages(rewards))


def test_two_groups_of_one_prompt_stay_two():
    """Both prompts are 7. The means are 1/2 and 2; together they would be 5/4."""
    rollout = Rollout(torch.tensor([[7, 1], [7, 2], [7, 3], [7, 4]]), torch.ones(4, dtype=torch.int64),
                      torch.full((4,), 2), torch.zeros(4, 2), torch.ones(4, dtype=torch.bool))
    batch = grpo.prepare(rollout, torch.tensor([[1., 0.], [3., 1.]]), Config(advantage_scale="none"))
    assert batch.advantages.tolist() == [.5, -.5, 1, -1]


def test_the_stop_token_is_trained_also_when_it_equals_the_padding():
    """Token 0 is both stop token and padding; the mask comes from lengths, so position 3 (the stop)
    counts."""
    rollout = Rollout(torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([2]), torch.tensor([4]), torch.zeros(1, 5),
                      torch.tensor([True]))
    assert rollout.completion_mask().tolist() == [[0, 0, 1, 1, 0]]
    assert rollout.completions() == [[7, 0]]


def test_every_aggregation_and_level_runs_with_every_kl(tmp_path):
    rollout = rollout_of(6)
    rewards = torch.tensor([[1., 0., 0., 1.]] * 3)
    for how, level, kind in itertools.product(("token", "sequence", "constant"), ("token", "sequence"),
                                              ("k1", "k2", "k3", "k3_is")):
        config = Config(aggregation=how, ratio_level=level, kl_kind=kind, beta=.1, dual_clip=3.0)
        batch = replace(grpo.prepare(rollout, rewards, config), ref_logp=rollout.logps - .3)
        logp = (rollout.logps + .1 * rollout.completion_mask()).requires_grad_()
        loss, sums = grpo.loss(logp, torch.ones_like(logp), batch, config, 12)
        loss.backward()
        assert torch.isfinite(logp.grad).all() and sums["tokens"] == batch.mask.sum()
        assert sums["entropy"] == sums["tokens"] and sums["ratio_max_dev"].item() == pytest.approx(math.e ** .1 - 1, rel=1e-4)
