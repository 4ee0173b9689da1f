"""The claims of docs/THEORY.md, each by the enumeration of a small problem.

A policy is a vector of probabilities, one for each completion, so every expectation is a finite
sum: nothing is simulated. Where a claim is about a function of this repository, it runs through it.
Each bound is also shown to be attained, or nearly: a slightly smaller constant fails.
"""
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gtpo
import grpo
import offpolicy
import theory

SEEDS = st.integers(0, 10 ** 6)
FEW = settings(max_examples=30, deadline=None)
MANY = settings(max_examples=200, deadline=None)
TINY = 1e-12                    # rounding of float64 sums


def simplex(rng, M, scale=1.0):
    """A random policy over M completions."""
    weights = np.exp(scale * rng.normal(size=M))
    return weights / weights.sum()


def softmax_problem(rng, M=3, P=2, binary=True):
    """Probabilities (M,), scores (M, P) of a softmax of random features, and rewards (M,)."""
    features = rng.normal(size=(M, P))
    probabilities = simplex(rng, M)
    scores = features - probabilities @ features
    rewards = rng.random(M)
    if binary:
        rewards = np.zeros(M)
        rewards[:rng.integers(1, M)] = 1                # at least one right, one wrong
    return probabilities, scores, rewards


def groups_of(probabilities, G):
    """Every group of G completions: indices (M^G, G), and its probability (M^G,)."""
    indices = np.array(list(itertools.product(range(len(probabilities)), repeat=G)))
    return indices, probabilities[indices].prod(1)


def group_gradients(problem, G, scale, unbiased=False):
    """The estimate of every group (M^G, P), by grpo.group_advantages, and its probability."""
    probabilities, scores, rewards = problem
    indices, chances = groups_of(probabilities, G)
    drawn = torch.from_numpy(rewards[indices])
    A = grpo.group_advantages(drawn, scale, eps=0.0, unbiased=unbiased).numpy()
    return (A[:, :, None] * scores[indices]).mean(1), chances


def coin(p, slope=1.0):
    """A prompt with two completions, right with chance p; `slope` is the gradient of p."""
    scores = np.array([[slope / p], [-slope / (1 - p)]])
    return np.array([p, 1 - p]), scores, np.array([1.0, 0.0])


def column(x):
    """A vector (M,) as a (M, 1) tensor: M completions of one token."""
    return torch.as_tensor(x, dtype=torch.float64)[:, None]


def weights_of(pi, mu, scheme="standard", **options):
    """offpolicy.importance_weights of completions of one token, (M,)."""
    log_ratio = column(np.log(pi) - np.log(mu))
    weights = offpolicy.importance_weights(log_ratio, torch.ones_like(log_ratio), scheme, **options)
    return weights[:, 0].numpy()


# -------------------------------------------------------------------------------------- group size

@pytest.mark.parametrize("p", [.01, .3, .5])
@pytest.mark.parametrize("G", [2, 3, 5])
def test_zero_signal(p, G):
    rewards, chances = groups_of(np.array([1 - p, p]), G)
    silent = ~grpo.informative(torch.from_numpy(rewards)).numpy()
    assert chances[silent].sum() == pytest.approx(theory.zero_signal(p, G), abs=TINY)


def test_smallest_group():
    sizes = [theory.smallest_group(p, .05) for p in (.5, .3, .2, .1, .05, .01)]
    assert sizes == [6, 9, 14, 29, 59, 299]
    for p in (0, 1):
        with pytest.raises(ValueError, match="p and share"):
            theory.smallest_group(p, .05)


@MANY
@given(st.floats(.001, .999), st.integers(3, 40))
def test_informative_groups(p, G):
    """Larger groups are informative more often, but never more often for their price."""
    share = [1 - theory.zero_signal(p, size) for size in (2, 3, G, G + 1)]
    assert share[3] >= share[2] - TINY
    assert share[1] / 3 == pytest.approx(share[0] / 2, abs=TINY)        # G = 2 and 3 tie
    assert share[3] / (G + 1) < share[2] / G + TINY
    assert (1 - theory.zero_signal(p, 4)) / 4 < share[1] / 3            # and 4 is worse


@pytest.mark.parametrize("p", [.1, .5])
@pytest.mark.parametrize("G", [2, 3, 6])
def test_squared_advantage(p, G):
    rewards, chances = groups_of(np.array([0.0, 1.0]) * (2 * p - 1) + 1 - p, G)
    for unbiased, factor in ((False, 1), (True, (G - 1) / G)):
        A = grpo.group_advantages(torch.from_numpy(rewards).double(), eps=0.0, unbiased=unbiased)
        expected = factor * (1 - theory.zero_signal(p, G))
        assert chances @ A.square().mean(1).numpy() == pytest.approx(expected, abs=TINY)


@pytest.mark.parametrize("G", [2, 3, 4])
def test_leave_one_out_is_unbiased(G):
    """Through the loss and autograd: E[loss gradient] = - gradient of J, times (G - 1) / G."""
    rng = np.random.default_rng(G)
    rewards = torch.from_numpy(rng.random(3))                           # graded ones too
    logits = torch.from_numpy(rng.normal(size=3)).requires_grad_()
    J = logits.softmax(0) @ rewards
    true = torch.autograd.grad(J, logits)[0]

    indices, chances = groups_of(logits.softmax(0).detach().numpy(), G)
    for scale, factor in (("loo", 1), ("none", (G - 1) / G)):
        logp = logits.log_softmax(0)[indices].reshape(-1, 1)            # (groups x G, 1)
        A = grpo.group_advantages(rewards[indices], scale).flatten()
        loss = grpo.policy_loss(logp, logp.detach(), A, torch.ones_like(logp))
        expected = torch.from_numpy(chances) @ loss.view(-1, G).mean(1)
        gradient = torch.autograd.grad(expected, logits)[0]
        torch.testing.assert_close(gradient, -factor * true, atol=TINY, rtol=0)


# --------------------------------------------------------------------- what std-normalising ascends

@FEW
@given(SEEDS, st.integers(2, 5), st.booleans())
def test_std_factor(seed, G, unbiased):
    """The expected gradient has the direction of that of p, and C_G(p) is its length."""
    problem = softmax_problem(np.random.default_rng(seed))
    probabilities, scores, rewards = problem
    gradients, chances = group_gradients(problem, G, "std", unbiased)
    p = probabilities @ rewards
    true = (probabilities * rewards) @ scores
    np.testing.assert_allclose(chances @ gradients, theory.std_factor(p, G, unbiased) * true,
                               atol=1e-10)


def test_std_factor_by_hand():
    for p in (0.0, .01, .5, .9, 1.0):
        rest = p * (1 - p)
        assert theory.std_factor(p, 2) == pytest.approx(1)
        assert theory.std_factor(p, 3) == pytest.approx(math.sqrt(2))   # no reweighting up to here
        assert theory.std_factor(p, 4) == pytest.approx(3 ** .5 + (3 - 12 ** .5) * rest)
    assert [theory.std_factor(0, G) for G in (8, 64)] == pytest.approx([7 ** .5, 63 ** .5])
    values = [[theory.std_factor(p, G) for G in (8, 64)] for p in (.01, .5)]
    np.testing.assert_allclose(values, [[2.61, 6.74], [1.86, 1.98]], atol=.005)


@pytest.mark.parametrize("p", [.05, .3, .5, .8])
def test_std_ascends_the_arcsine(p):
    """For large groups the factor is the slope of 2 arcsin(sqrt(p)), and no other multiple."""
    step = 1e-6
    slope = (math.asin((p + step) ** .5) - math.asin((p - step) ** .5)) / step      # of 2 arcsin
    assert theory.std_factor(p, 1000) == pytest.approx(slope, rel=.01)
    errors = [abs(theory.std_factor(p, G) / slope - 1) for G in (250, 500, 1000)]
    assert errors[0] > 1.8 * errors[1] > 1.8 ** 2 * errors[2]                       # O(1 / G)


def test_std_can_lower_the_mean():
    """Two prompts that want opposite things: the std step follows the hard one, and J falls."""
    easy, hard = coin(.5, slope=-1.0), coin(.01, slope=.8)
    steps = {}
    for scale in ("std", "loo"):
        steps[scale] = 0.0
        for prompt in (easy, hard):
            gradients, chances = group_gradients(prompt, 8, scale)
            steps[scale] += float(chances @ gradients[:, 0]) / 2
    assert steps["loo"] == pytest.approx(-.1)                   # the gradient of J
    assert steps["std"] > .1                                    # upwards, where J falls


# --------------------------------------------------------------------- variance and the best group

@FEW
@given(SEEDS, st.integers(2, 5), st.booleans())
def test_loo_variance(seed, G, binary):
    problem = softmax_problem(np.random.default_rng(seed), binary=binary)
    true, c2, c3 = theory.prompt_constants(*problem)
    gradients, chances = group_gradients(problem, G, "loo")
    variance = chances @ ((gradients - true) ** 2).sum(1)

    assert variance == pytest.approx(theory.loo_variance(c2, c3, G), abs=1e-10)


def test_the_constant_of_the_variance():
    """A fair coin and its logit at G = 2; with G^2 for G (G - 1) the formula fails."""
    problem = coin(.5, slope=.25)                       # the slope of p = 1/2 in the logit
    gradient, c2, c3 = theory.prompt_constants(*problem)
    assert (gradient[0], c2, c3) == (.25, 0, .125)
    gradients, chances = group_gradients(problem, 2, "loo")
    variance = chances @ (gradients[:, 0] - .25) ** 2
    assert variance == pytest.approx(1 / 16)
    assert variance == theory.loo_variance(c2, c3, 2) != c2 / 2 + c3 / 4


@FEW
@given(SEEDS)
def test_gradient_mse(seed):
    """Four rollouts: one prompt with four, or two prompts with two each, all cases enumerated."""
    rng = np.random.default_rng(seed)
    prompts = [softmax_problem(rng), softmax_problem(rng)]
    truths, c2s, c3s = zip(*(theory.prompt_constants(*problem) for problem in prompts))
    true = np.mean(truths, axis=0)
    c1 = np.mean([((g - true) ** 2).sum() for g in truths])
    constants = c1, np.mean(c2s), np.mean(c3s)

    for G in (2, 4):
        parts = [group_gradients(problem, G, "loo") for problem in prompts]
        gradients = np.concatenate([g for g, _ in parts])                   # a random prompt's
        chances = np.concatenate([c / 2 for _, c in parts])
        if G == 2:              # the mean of two independent ones
            gradients = (gradients[:, None] + gradients[None]).reshape(-1, 2) / 2
            chances = np.outer(chances, chances).flatten()
        mse = chances @ ((gradients - true) ** 2).sum(1)
        assert mse == pytest.approx(theory.gradient_mse(G, 4, *constants), abs=1e-10)


@MANY
@given(st.floats(.01, 10), st.floats(0, 10), st.floats(2, 1000))
def test_best_group_size(c1, c2, ratio):
    constants = c1, c2, c1 * ratio
    best = theory.best_group_size(c1, c1 * ratio)
    for budget in (64, 4096):
        at_best = theory.gradient_mse(best, budget, *constants)
        for other in (best * 1.02, 1 + (best - 1) * .98):           # not with another constant
            assert theory.gradient_mse(other, budget, *constants) > at_best
        # flat: twice or half as large costs less than a quarter
        for other in (1 + 2 * (best - 1), 1 + (best - 1) / 2):
            assert theory.gradient_mse(other, budget, *constants) < 1.25 * at_best


@MANY
@given(SEEDS, st.integers(2, 5))
def test_best_group_size_is_above_2(seed, number):
    """c3 / c1 >= 2, so G* >= 1 + sqrt(2), for any prompts."""
    rng = np.random.default_rng(seed)
    constants = [theory.prompt_constants(*softmax_problem(rng)) for _ in range(number)]
    gradients = np.array([gradient for gradient, _, _ in constants])
    c1 = ((gradients - gradients.mean(0)) ** 2).sum(1).mean()
    c3 = np.mean([c3 for _, _, c3 in constants])
    assert theory.best_group_size(c1, c3) >= 1 + math.sqrt(2) - 1e-9


def test_two_opposite_coins():
    """One parameter, two completions, opposite gradients: c3 / c1 is exactly 2."""
    gradients, _, c3s = zip(*(theory.prompt_constants(*coin(.3, slope)) for slope in (1, -1)))
    c1 = np.mean(np.square(gradients))
    assert theory.best_group_size(c1, np.mean(c3s)) == pytest.approx(1 + math.sqrt(2))
    assert theory.best_group_size(0.0, 1.0) == math.inf             # one prompt: all rollouts to it


# --------------------------------------------------------------------------- KL: value and gradient

def two_policies(seed, size=6, scale=1.0):
    """Random logits of pi, with gradient, and log-probabilities of the reference."""
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(size, generator=generator, dtype=torch.float64)
    logits = ref + scale * torch.randn(size, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(0)


def estimate(logits, ref, kind, in_reward=False):
    """E_pi of grpo.kl_penalty over all completions: its value, and its gradient as a loss.

    in_reward: the gradient when the estimate is a cost in the reward, so that it weighs logp."""
    logp = logits.log_softmax(0)
    chances = logp.exp().detach()
    per_token = grpo.kl_penalty(logp[:, None], ref[:, None], kind)[:, 0]
    loss = per_token.detach() * logp if in_reward else per_token
    gradient = torch.autograd.grad(chances @ loss, logits)[0]
    return float(chances @ per_token.detach()), gradient


def true_kls(logits, ref):
    """KL(pi || ref), its gradient, and the gradient of KL(ref || pi)."""
    logp = logits.log_softmax(0)
    reverse = (logp.exp() * (logp - ref)).sum()
    forward = (ref.exp() * (ref - logp)).sum()
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (reverse, forward)]
    return float(reverse.detach()), *gradients


@FEW
@given(SEEDS)
def test_kl_value(seed):
    logits, ref = two_policies(seed)
    value = true_kls(logits, ref)[0]
    for kind in ("k1", "k3", "k3_is"):
        assert estimate(logits, ref, kind)[0] == pytest.approx(value, abs=TINY)

    near, ref = two_policies(seed, scale=1e-4)      # k2 is right for small steps, and only there
    ratio = estimate(near, ref, "k2")[0] / true_kls(near, ref)[0]
    assert ratio == pytest.approx(1, abs=.005)
    far, ref = two_policies(0)
    assert abs(estimate(far, ref, "k2")[0] / true_kls(far, ref)[0] - 1) > .02


@FEW
@given(SEEDS)
def test_kl_gradient(seed):
    logits, ref = two_policies(seed)
    _, reverse, forward = true_kls(logits, ref)
    wanted = {"k1": 0 * reverse, "k2": reverse, "k3": forward, "k3_is": reverse}
    for kind, expected in wanted.items():
        gradient = estimate(logits, ref, kind)[1]
        torch.testing.assert_close(gradient, expected, atol=TINY, rtol=0)


def test_kl_gradients_differ():
    """k3 as a loss, or as a cost in the reward, is not the gradient of KL(pi || ref)."""
    logits, ref = two_policies(0)
    reverse = true_kls(logits, ref)[1]
    for in_reward in (False, True):
        gradient = estimate(logits, ref, "k3", in_reward)[1]
        assert (gradient - reverse).norm() > .1 * reverse.norm()


@FEW
@given(SEEDS)
def test_kl_in_the_reward(seed):
    """As a cost in the reward k1 has the gradient of KL(pi || ref)."""
    logits, ref = two_policies(seed)
    reverse = true_kls(logits, ref)[1]
    torch.testing.assert_close(estimate(logits, ref, "k1", in_reward=True)[1], reverse,
                               atol=TINY, rtol=0)


# -------------------------------------------------------------------------------------- old samples

def sequences(V, T):
    """All V^T completions of T tokens, (V^T, T)."""
    return np.array(list(itertools.product(range(V), repeat=T)))


def next_token_policy(rng, V, T, scale):
    """{prefix: probabilities of the next token} for all prefixes shorter than T."""
    return {prefix: simplex(rng, V, scale)
            for t in range(T) for prefix in itertools.product(range(V), repeat=t)}


def token_probabilities(policy, V, T):
    """Of each token of each completion, given what comes before: (V^T, T)."""
    return np.array([[policy[tuple(row[:t])][row[t]] for t in range(T)]
                     for row in sequences(V, T)])


@FEW
@given(SEEDS)
@example(seed=0)
def test_sequence_weights_are_unbiased(seed):
    """Weights of whole completions are exact, those of tokens are not."""
    rng = np.random.default_rng(seed)
    V, T = 3, 3
    pi, mu = (token_probabilities(next_token_policy(rng, V, T, 1.0), V, T) for _ in range(2))
    rewards = rng.random(V ** T)
    log_ratio = torch.from_numpy(np.log(pi / mu))
    mask = torch.ones_like(log_ratio)
    J = pi.prod(1) @ rewards

    errors = {}
    for level in ("sequence", "token"):
        W = offpolicy.importance_weights(log_ratio, mask, "standard", level).numpy()
        errors[level] = np.abs(mu.prod(1) @ (W * rewards[:, None]) - J).max()
    assert errors["sequence"] < 1e-10
    if seed == 0:
        assert errors["token"] > .01


@FEW
@given(SEEDS, st.integers(2, 30))
def test_effective_sample_size(seed, n):
    """E rho^2 = 1 + chi^2, and ESS / n is 1 over it: exact where mu draws each sample once."""
    rng = np.random.default_rng(seed)
    mu, pi = np.full(n, 1 / n), simplex(rng, n)
    w = weights_of(pi, mu)
    moment = theory.second_moment(pi, mu)
    assert mu @ w ** 2 == pytest.approx(moment)
    assert moment == pytest.approx(1 + ((pi - mu) ** 2 / mu).sum())
    assert offpolicy.effective_sample_size(w) / n == pytest.approx(1 / moment)


@FEW
@given(SEEDS, st.integers(1, 6))
def test_second_moment_grows_with_length(seed, T):
    """(1 + least chi^2 of a token)^T <= E rho^2 <= (1 + largest)^T, equal if all are the same."""
    rng = np.random.default_rng(seed)
    pi_next, mu_next = (next_token_policy(rng, 2, T, .3) for _ in range(2))
    same = {prefix: np.array([.6, .4]) for prefix in pi_next}
    fair = {prefix: np.array([.5, .5]) for prefix in pi_next}

    for mine, old in ((pi_next, mu_next), (same, fair)):
        pi, mu = (token_probabilities(policy, 2, T) for policy in (mine, old))
        log_ratio = torch.from_numpy(np.log(pi / mu))
        w = offpolicy.importance_weights(log_ratio, torch.ones_like(log_ratio), "standard",
                                         "sequence")[:, 0].numpy()
        moment = mu.prod(1) @ w ** 2
        steps = [theory.second_moment(mine[prefix], old[prefix]) for prefix in mine]
        assert min(steps) ** T <= moment * (1 + TINY) and moment <= max(steps) ** T * (1 + TINY)
    assert moment == pytest.approx(1.04 ** T)           # chi^2 = .04 a token


@FEW
@given(SEEDS)
def test_small_drift(seed):
    rng = np.random.default_rng(seed)
    mu = simplex(rng, 8)
    pi = mu * np.exp(1e-3 * rng.normal(size=8))
    pi /= pi.sum()
    d2 = math.log(theory.second_moment(pi, mu))
    assert d2 / theory.kl(pi, mu) == pytest.approx(2, abs=.02)


@pytest.mark.parametrize("shift, share", [(.1, .990), (.5, .779), (1.0, .368)])
def test_ess_of_normal_log_ratios(shift, share):
    x = np.linspace(-12, 12, 4001)
    mu, pi = np.exp(-x ** 2 / 2), np.exp(-(x - shift) ** 2 / 2)
    mu, pi = mu / mu.sum(), pi / pi.sum()
    assert theory.kl(pi, mu) == pytest.approx(shift ** 2 / 2)
    ess = 1 / theory.second_moment(pi, mu)
    assert ess == pytest.approx(math.exp(-2 * theory.kl(pi, mu)))
    assert ess == pytest.approx(share, abs=5e-4)


def test_steady_and_wandering_drift():
    """tau equal steps have tau^2 times the KL of one, tau random ones on average tau times."""
    rng = np.random.default_rng(0)
    logits, step = rng.normal(size=8), 1e-3 * rng.normal(size=8)

    def kl_after(distance):
        weights = np.exp(logits), np.exp(logits + distance * step)
        mu, pi = (w / w.sum() for w in weights)
        return theory.kl(pi, mu)

    one, tau = kl_after(1), 6
    walks = [sum(signs) for signs in itertools.product((-1, 1), repeat=tau)]
    wandering = np.mean([kl_after(distance) for distance in walks])
    assert kl_after(tau) / one == pytest.approx(tau ** 2, rel=.02)
    assert wandering / one == pytest.approx(tau, rel=.02)


@MANY
@given(SEEDS, st.floats(.01, 3))
def test_kl_is_only_a_lower_bound(seed, scale):
    """E rho^2 >= exp(KL). It is attained where rho has one value, so exp(1.01 KL) fails."""
    rng = np.random.default_rng(seed)
    mu, pi = simplex(rng, 6, scale), simplex(rng, 6, scale)
    assert theory.second_moment(pi, mu) >= math.exp(theory.kl(pi, mu)) - TINY

    half = np.array([1.0, 0.0]), np.array([.5, .5])                 # rho is 2 or 0
    assert theory.second_moment(*half) == pytest.approx(math.exp(theory.kl(*half)))


def rare(kl, a):
    """pi and mu with that KL(pi || mu): an event of chance a under mu is likelier under pi."""
    b = theory.root(lambda x: theory.kl_bernoulli(x, a) - kl, a, 1.0)
    return np.array([b, 1 - b]), np.array([a, 1 - a])


@pytest.mark.parametrize("kl", [.01, .15])
def test_kl_alone_bounds_nothing(kl):
    """The same KL, ever rarer events: the second moment passes every bound."""
    pairs = [rare(kl, a) for a in (1e-3, 1e-6, 1e-9, 1e-12)]
    assert [theory.kl(*pair) for pair in pairs] == pytest.approx([kl] * 4)
    chi2s = [theory.second_moment(*pair) - 1 for pair in pairs]
    assert all(later > 40 * earlier for earlier, later in itertools.pairwise(chi2s))

    pi, mu = np.array([.01, .99]), np.array([1e-9, 1 - 1e-9])       # the numbers of the page
    assert theory.kl(pi, mu) == pytest.approx(.151, abs=.001)
    assert theory.second_moment(pi, mu) == pytest.approx(1e5, rel=.001)
    assert mu @ weights_of(pi, mu) ** 2 == pytest.approx(1e5, rel=.001)


# -------------------------------------------- statement 1: J(pi_new) >= J(pi_old) - O(sqrt(delta))

@MANY
@given(SEEDS, st.floats(.01, 3))
def test_change_is_bounded_by_the_kl(seed, scale):
    """|J(pi) - J(mu)| <= TV <= each bound, for rewards of 0 to 1."""
    rng = np.random.default_rng(seed)
    mu, pi, rewards = simplex(rng, 5, scale), simplex(rng, 5, scale), rng.random(5)
    delta, tv = theory.kl(pi, mu), theory.total_variation(pi, mu)
    J_mu, J_pi = mu @ rewards, pi @ rewards

    assert abs(J_pi - J_mu) <= tv + TINY
    assert tv <= theory.pinsker(delta) + TINY and tv <= theory.bretagnolle_huber(delta) + TINY
    assert theory.kl_bernoulli(J_pi, J_mu) <= delta + TINY          # data processing
    assert J_mu - J_pi <= theory.largest_drop(J_mu, delta) + 1e-9

    variance = mu @ (rewards - J_mu) ** 2                           # Cauchy-Schwarz
    chi2 = theory.second_moment(pi, mu) - 1
    assert (J_pi - J_mu) ** 2 <= variance * chi2 + TINY


def test_the_constant_of_pinsker():
    """A coin of 1/2 that falls to 1/2 - e: sqrt(delta / 2) is attained, .70 sqrt(delta) fails."""
    for delta in (1e-6, 1e-4):
        drop = theory.largest_drop(.5, delta)
        assert .9999 * theory.pinsker(delta) < drop <= theory.pinsker(delta)
        assert drop > .70 * math.sqrt(delta)
    assert theory.largest_drop(.5, 1e-4) == pytest.approx(.00707, abs=5e-6)


def test_the_other_bound():
    for delta, pinsker_is_smaller in ((1.5, True), (1.59, True), (1.6, False), (5, False)):
        gap = theory.bretagnolle_huber(delta) - theory.pinsker(delta)
        assert (gap > 0) == pinsker_is_smaller

    certain, old = np.array([1.0, 0.0]), np.array([.25, .75])       # KL = ln 4, TV = 3/4
    delta = theory.kl(certain, old)
    assert theory.total_variation(certain, old) == pytest.approx(.75)
    assert theory.bretagnolle_huber(delta) == pytest.approx(math.sqrt(.75))
    assert math.sqrt(1 - 2 * math.exp(-delta)) < .75                # 2 for 1 fails


@pytest.mark.parametrize("p", [.05, .5, .9])
@pytest.mark.parametrize("delta", [1e-4, .01, .04])
def test_the_largest_drop_is_attained(p, delta):
    """The policy in the ball that falls by it, and its mirror image that rises: no improvement."""
    drop = theory.largest_drop(p, delta)
    pi, mu = np.array([p - drop, 1 - p + drop]), np.array([p, 1 - p])
    assert theory.kl(pi, mu) == pytest.approx(delta, rel=1e-6)
    assert drop < theory.pinsker(delta)
    assert drop < math.sqrt(2 * p * (1 - p) * delta) * (1 if p < .5 else 1.5)

    chi2 = theory.second_moment(pi, mu) - 1                         # Cauchy-Schwarz is attained
    assert drop == pytest.approx(math.sqrt(p * (1 - p) * chi2))


def test_the_largest_drop_in_numbers():
    assert theory.largest_drop(.05, .01) == pytest.approx(.0276, abs=5e-5)
    assert theory.pinsker(.01) == pytest.approx(.0707, abs=5e-5)
    for p in (.05, .5, .9):         # sqrt(2 p (1 - p) delta) for small delta
        ratio = theory.largest_drop(p, 1e-8) / math.sqrt(2 * p * (1 - p) * 1e-8)
        assert ratio == pytest.approx(1, abs=.001)
    assert theory.largest_drop(.05, 1.0) == .05                     # nothing is left to lose


def test_old_must_be_mu():
    """pi lies in the ball around mu, pi_old on its other side: the drop is twice the bound."""
    mu, pi_old, pi = (np.array([p, 1 - p]) for p in (.5, .51, .49))
    drop = pi_old[0] - pi[0]
    delta, delta_old = theory.kl(pi, mu), theory.kl(pi_old, mu)
    assert drop > 1.99 * theory.pinsker(delta)
    assert drop <= theory.pinsker(delta) + theory.pinsker(delta_old)


def surrogate(pi, mu, rewards):
    """E_mu[rho A] with A standardised under mu, by grpo.policy_loss without a clip."""
    J = mu @ rewards
    sd = math.sqrt(mu @ (rewards - J) ** 2)
    A = torch.from_numpy((rewards - J) / sd)
    loss = grpo.policy_loss(column(np.log(pi)), column(np.log(mu)), A, torch.ones(len(mu), 1),
                            clip_low=math.inf, clip_high=math.inf)
    return float(-mu @ loss[:, 0].numpy()), sd


@MANY
@given(SEEDS, st.floats(.01, 2))
def test_improvement_identity(seed, scale):
    """One prompt, whole completions: an identity, at any distance."""
    rng = np.random.default_rng(seed)
    mu, pi, rewards = simplex(rng, 5, scale), simplex(rng, 5, scale), rng.random(5)
    L, sd = surrogate(pi, mu, rewards)
    assert sd * L == pytest.approx(pi @ rewards - mu @ rewards, abs=1e-10)


def test_two_prompts_can_lose():
    rewards = np.array([1.0, 0.0])
    changes = [(.5, -.10), (.01, .03)]                  # p under mu, and how it changes
    values = [surrogate(np.array([p + d, 1 - p - d]), np.array([p, 1 - p]), rewards)[0]
              for p, d in changes]
    assert np.mean(values) == pytest.approx(.051, abs=5e-4)
    assert np.mean([d for _, d in changes]) == pytest.approx(-.035)


def random_token_problem(seed, V=2, T=3):
    rng = np.random.default_rng(seed)
    pi_next = next_token_policy(rng, V, T, .5)
    mu_next = next_token_policy(rng, V, T, .5)
    alpha = max(theory.total_variation(pi_next[prefix], mu_next[prefix]) for prefix in pi_next)
    pi, mu = (token_probabilities(policy, V, T) for policy in (pi_next, mu_next))
    return pi, mu, rng.random(V ** T), alpha


def token_surrogate_error(pi, mu, rewards):
    """|J(pi) - J(mu) - E_mu sum_t (rho_t - 1) r|, by grpo.policy_loss without a clip."""
    T = pi.shape[1]
    loss = grpo.policy_loss(torch.from_numpy(np.log(pi)), torch.from_numpy(np.log(mu)),
                            torch.from_numpy(rewards), torch.ones(pi.shape),
                            clip_low=math.inf, clip_high=math.inf)
    chances = mu.prod(1)
    predicted = chances @ (-loss.sum(1).numpy() - T * rewards)
    return abs(pi.prod(1) @ rewards - chances @ rewards - predicted)


@FEW
@given(SEEDS, st.integers(1, 4))
def test_token_ratios(seed, T):
    pi, mu, rewards, alpha = random_token_problem(seed, T=T)
    assert token_surrogate_error(pi, mu, rewards) <= theory.token_gap(T, alpha) + TINY


@pytest.mark.parametrize("T", [2, 3, 5])
def test_the_token_gap_is_attained(T):
    """mu writes zeros, pi a one with chance alpha, and an even number of ones is right."""
    alpha, never = 1e-3, 1e-13
    ones = sequences(2, T)
    pi, mu = np.where(ones, alpha, 1 - alpha), np.where(ones, never, 1 - never)
    rewards = (ones.sum(1) % 2 == 0).astype(float)
    share = token_surrogate_error(pi, mu, rewards) / theory.token_gap(T, alpha)
    assert .99 < share < 1.0001


@MANY
@given(SEEDS, st.floats(.05, 1.5))
def test_the_published_bound_certifies_nothing(seed, scale):
    """Its constant 2 is never above 0 for rewards of 0 or 1; with 1 it still holds."""
    rng = np.random.default_rng(seed)
    mu = simplex(rng, 5)
    pi = mu * np.exp(scale * rng.normal(size=5))
    old = mu * np.exp(scale * rng.normal(size=5))
    pi, old = pi / pi.sum(), old / old.sum()
    rewards = (np.arange(5) < rng.integers(1, 5)).astype(float)

    L, sd = surrogate(pi, mu, rewards)
    distances = theory.total_variation(pi, mu), theory.total_variation(old, mu)
    gain = pi @ rewards - old @ rewards
    assert theory.surrogate_bound(L, sd, *distances, constant=2) <= TINY
    assert theory.surrogate_bound(L, sd, *distances) <= gain + TINY


@pytest.mark.parametrize("p", [.1, .4])
def test_the_bound_with_1_is_attained(p):
    """Right answers gain all that wrong ones lose, from mu to pi and from pi_old to mu."""
    rewards = np.array([1.0, 0.0])
    mu, pi, old = (np.array([x, 1 - x]) for x in (p, p + .2, p + .1))
    L, sd = surrogate(pi, mu, rewards)
    distances = theory.total_variation(pi, mu), theory.total_variation(old, mu)
    assert theory.surrogate_bound(L, sd, *distances) == pytest.approx(.1)       # the true gain
    assert theory.surrogate_bound(L, sd, *distances, constant=.95) > .1 + 1e-3  # .95 fails


# ---------------------------------- statement 2: best clip = Theta(sqrt(Var r / Var rho)) is false

@FEW
@given(SEEDS, st.integers(1, 3), st.floats(.3, 3))
def test_truncated_mse(seed, n, cap):
    """All samples of n draws, each averaged with the truncated weights of offpolicy.py."""
    rng = np.random.default_rng(seed)
    mu, pi, f = simplex(rng, 4), simplex(rng, 4, scale=3.0), rng.normal(size=4)
    terms = weights_of(pi, mu, "truncated", cap=cap) * f
    draws, chances = groups_of(mu, n)
    mse = chances @ (terms[draws].mean(1) - pi @ f) ** 2
    assert theory.truncated_mse(mu, pi / mu, f, cap, n) == pytest.approx(mse, abs=TINY)


def independent(rng, n_ratios=6, spread=1.0):
    """Ratios, and values independent of them: mu, rho, f (M,), and the ratios' own law."""
    law = simplex(rng, n_ratios)
    ratios = np.exp(spread * rng.normal(size=n_ratios))
    ratios /= law @ ratios                                              # E rho = 1
    values = np.array([0.0, 1.0])
    chance = np.array([.4, .6])
    mu = np.outer(law, chance).flatten()
    rho, f = np.repeat(ratios, 2), np.tile(values, n_ratios)
    return mu, rho, f, lambda cap: law @ (ratios - cap).clip(0)


@FEW
@given(SEEDS, st.integers(1, 500))
def test_best_cap(seed, n):
    mu, rho, f, excess = independent(np.random.default_rng(seed))
    best = theory.best_cap(excess, mean=.6, second=.6, n=n)
    at_best = theory.truncated_mse(mu, rho, f, best, n)
    for factor in (.9, .99, 1.01, 1.1):
        assert theory.truncated_mse(mu, rho, f, factor * best, n) >= at_best - TINY
    assert theory.truncated_mse(mu, rho, f, .9 * best, n) > at_best
    # the largest ratio is never cut for nothing: the cap is in the range that matters
    assert 0 < best < rho.max()


@pytest.mark.parametrize("k", [2.5, 3.5])
def test_the_best_cap_grows_with_the_samples(k):
    """Ratios with P(rho > c) ~ c^-k: the cap grows as n^(1/k), where the statement has no n."""
    tail = np.linspace(0, 1, 200_001)[1:] - 2.5e-6                      # P(rho > c), uniform
    ratios = (k - 1) / k * tail ** (-1 / k)
    for cap in (.3, 2.0):               # the closed form beside a sum
        expected = np.maximum(ratios - cap, 0).mean()
        assert theory.pareto_excess(cap, k) == pytest.approx(expected, rel=.005)

    caps = [theory.best_cap(lambda c: theory.pareto_excess(c, k), .5, .5, n) for n in (1e8, 1e10)]
    slope = math.log(caps[1] / caps[0]) / math.log(100)
    assert slope == pytest.approx(1 / k, abs=.003)


def test_the_best_cap_falls_with_the_noise_of_rewards():
    """The statement says that it grows by sqrt(2) for twice the variance."""
    caps = [theory.best_cap(lambda c: theory.pareto_excess(c, 3), .5, .25 + variance, 256)
            for variance in (.25, .5, 1.0)]
    assert caps[0] > 1.1 * caps[1] > 1.1 ** 2 * caps[2]


def drifted(sd_ratio, sd_advantage, slope):
    """rho = 1 + sd z with normal z, advantages slope (rho - 1) + noise of +-: mu, rho, A."""
    z = np.linspace(-6, 6, 1201)
    law = np.exp(-z ** 2 / 2)
    noise = math.sqrt(sd_advantage ** 2 - (slope * sd_ratio) ** 2)
    mu = np.repeat(law / law.sum(), 2) / 2
    rho = np.repeat(1 + sd_ratio * z, 2)
    A = slope * (rho - 1) + noise * np.tile([-1.0, 1.0], len(z))
    return mu, rho, A


@pytest.mark.parametrize("sd_ratio, n, tolerance",
                         [(.02, 4000, .02), (.05, 256, .02), (.1, 256, .05)])
def test_best_clip(sd_ratio, n, tolerance):
    """The formula beside a search over clips, by the clipped weights of offpolicy.py."""
    mu, rho, A = drifted(sd_ratio, .5, .5)
    clips = np.geomspace(.2, 5, 400) * theory.best_clip(sd_ratio, .5, .5, n)
    errors = [theory.truncated_mse(mu, rho, A, 1 + eps, n, low=1 - eps) for eps in clips]
    best = clips[int(np.argmin(errors))]
    assert theory.best_clip(sd_ratio, .5, .5, n) == pytest.approx(best, rel=tolerance)

    W = weights_of(rho * mu, mu, "clipped", level="token", cap=1 + best, low=1 - best)
    mean = mu @ (W * A)
    mse = (mean - mu @ (rho * A)) ** 2 + (mu @ (W * A) ** 2 - mean ** 2) / n
    assert min(errors) == pytest.approx(mse)


def test_best_clip_in_numbers():
    """More drift, a wider clip; noisier rewards, a narrower one: the statement reversed."""
    drifts = (.05, .1, .2, .3)
    clips = [theory.best_clip(sd, .5, .5, 256) for sd in drifts]
    statement = [.5 / sd for sd in drifts]
    np.testing.assert_allclose(clips, [.023, .111, .351, .626], atol=5e-4)
    np.testing.assert_allclose(statement, [10, 5, 2.5, 1.67], atol=.01)

    assert theory.best_clip(.05, .25, .5, 256) == pytest.approx(.055, abs=5e-4)     # half the noise
    by_n = [theory.best_clip(.05, .5, .5, n) for n in (256, 2560, 25600)]
    assert by_n[0] < by_n[1] < by_n[2]


@pytest.mark.parametrize("A, ratio", [(1.0, 1.5), (-1.0, .5)])
def test_ppo_clip_masks(A, ratio):
    """grpo.policy_loss has no gradient where a truncated ratio only weighs less."""
    logp = torch.full((1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    zero, one, advantage = torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([A])
    clipped = grpo.policy_loss(logp, zero, advantage, one).sum()
    assert torch.autograd.grad(clipped, logp)[0] == 0

    W = offpolicy.importance_weights(logp, one, "clipped", cap=1.2, low=.8)
    weighted = (-W * advantage * logp).sum()
    assert torch.autograd.grad(weighted, logp)[0].item() == pytest.approx(
        -A * min(max(ratio, .8), 1.2))


# ------------------------------- statement 3: sample complexity O(1 / (B (1 - delta))) is no bound

@FEW
@given(SEEDS, st.integers(1, 4))
def test_importance_mse(seed, n):
    """All batches of n distinct samples, exactly; and at most exp(D2) / n."""
    rng = np.random.default_rng(seed)
    mu, pi, rewards = simplex(rng, 4), simplex(rng, 4), rng.random(4)
    rho = weights_of(pi, mu)
    draws, chances = groups_of(mu, n)
    mse = chances @ ((rho * rewards)[draws].mean(1) - pi @ rewards) ** 2
    assert mse == pytest.approx(theory.importance_mse(mu, rho, rewards, n), abs=TINY)
    assert mse <= theory.importance_bound(mu, rho, n) + TINY


def test_the_constant_of_exp_d2():
    """Rewards of 1 and rho large on a rare event: the ratio to the bound is 1 - 1 / E rho^2."""
    for kl in (.15, .5):
        pi, mu = rare(kl, 1e-9)
        rho, ones = pi / mu, np.ones(2)
        share = theory.importance_mse(mu, rho, ones, 7) / theory.importance_bound(mu, rho, 7)
        assert .9999 < share < 1                                        # .99 exp(D2) / n fails
    assert theory.importance_bound(mu, rho, 7) == theory.second_moment(pi, mu) / 7


@pytest.mark.parametrize("K", [2, 5])
def test_replay_is_not_new_evidence(K):
    """A buffer of B = K n rows with n distinct ones: the error is that of n, for every K."""
    mu, pi, rewards = np.array([.5, .5]), np.array([.6, .4]), np.array([1.0, 0.0])
    n = 4
    terms = weights_of(pi, mu) * rewards
    draws, chances = groups_of(mu, n)
    buffers = np.repeat(draws, K, axis=1)                               # (2^n, K n)
    mse = chances @ (terms[buffers].mean(1) - pi @ rewards) ** 2
    assert mse == pytest.approx(theory.importance_mse(mu, pi / mu, rewards, n))

    # so B (1 - delta) error grows with K: no constant bounds it
    B, delta = K * n, theory.kl(pi, mu)
    at_n = theory.importance_mse(mu, pi / mu, rewards, 1) * (1 - delta)
    assert B * (1 - delta) * mse == pytest.approx(K * at_n)


def test_one_minus_kl_is_no_share():
    """delta may be above 1, where the statement is negative; and at one delta the error has no
    bound."""
    pi, mu = np.array([.9, .1]), np.array([.1, .9])
    rewards = np.ones(2)
    assert 1 - theory.kl(pi, mu) < 0 < theory.importance_mse(mu, pi / mu, rewards, 1)

    errors = []
    for a in (1e-3, 1e-6, 1e-9):
        pi, mu = rare(.15, a)
        errors.append(theory.importance_mse(mu, pi / mu, rewards, 1))
    assert errors[0] > 10 * .15 and errors[1] > 100 * errors[0] and errors[2] > 100 * errors[1]


def multinomial(mu, B):
    """All counts of B draws from three completions, (cases, 3), and their probabilities."""
    counts = np.array([(i, j, B - i - j) for i in range(B + 1) for j in range(B + 1 - i)])
    log_factorial = np.cumsum([0.0, *np.log(np.arange(1, B + 1))])
    log_chances = log_factorial[B] - log_factorial[counts].sum(1) + counts @ np.log(mu)
    return counts, np.exp(log_chances)


def test_self_normalized_mse():
    """B x error tends to E[rho^2 (r - J)^2], and what is left halves with twice the samples."""
    mu, pi, rewards = np.array([.5, .3, .2]), np.array([.3, .3, .4]), np.array([1.0, 0.0, .5])
    rho = weights_of(pi, mu)
    errors, biases = [], []
    for B in (100, 200, 400):
        counts, chances = multinomial(mu, B)
        estimates = counts @ (rho * rewards) / (counts @ rho)
        mse = chances @ (estimates - pi @ rewards) ** 2
        errors.append(abs(mse / theory.self_normalized_mse(mu, rho, rewards, B) - 1))
        biases.append(abs(chances @ estimates - pi @ rewards))
    assert errors[2] < .01
    for series in (errors, biases):
        assert series[0] / series[1] == pytest.approx(2, abs=.1)
        assert series[1] / series[2] == pytest.approx(2, abs=.1)

    # it is the mean of W r with the weights of offpolicy.py
    rows = np.repeat(np.arange(3), (5, 2, 3))
    W = weights_of(pi[rows], mu[rows], "self_normalized")
    by_hand = (rho * rewards)[rows].sum() / rho[rows].sum()
    assert (W * rewards[rows]).mean() == pytest.approx(by_hand)


@pytest.mark.parametrize("gap", [.02, .1, .2])
def test_distinct_rollouts_are_needed(gap):
    """The best test of two coins, exactly: its error is at least the bound."""
    tightest = 1.0
    for n in (1, 3, 5, 10, 30, 100):
        ways = np.array([float(math.comb(n, k)) for k in range(n + 1)])
        k = np.arange(n + 1)
        good, bad = (ways * q ** k * (1 - q) ** (n - k) for q in (.5 + gap, .5 - gap))
        error = (1 - theory.total_variation(good, bad)) / 2
        bound = theory.least_error(gap, n)
        assert bound <= error
        tightest = min(tightest, error / bound)
    assert tightest < 2                                             # 1/2 for 1/4 fails


def test_least_error_by_hand():
    """KL = .2 ln 1.5, so ten rollouts have 1.5^-2 / 4; for small gaps it is 8 gap^2 a rollout."""
    assert theory.least_error(.1, 10) == pytest.approx(1 / 9)
    assert -math.log(4 * theory.least_error(.001, 1)) == pytest.approx(8e-6, rel=1e-3)


# --------------------------------------------------------------------------------------------- GTPO

@MANY
@given(SEEDS, st.floats(.1, 4))
def test_ln_2(seed, scale):
    """Where the gate is open some token has more than 1/2; with a gate at 0.7 that is not so."""
    p = simplex(np.random.default_rng(seed), 6, scale)
    entropy = torch.tensor([-(p * np.log(p)).sum()])
    assert p.max() >= math.exp(-float(entropy)) - TINY
    if gtpo.entropy_gate(entropy, initial_entropy=0.0) == 1:
        assert p.max() > .5

    p = np.array([.4998, .4998, .0004])
    entropy = torch.tensor([-(p * np.log(p)).sum()])
    assert gtpo.entropy_gate(entropy, initial_entropy=0.0) == 0
    assert gtpo.entropy_gate(entropy, initial_entropy=0.0, threshold=0.7) == 1


@MANY
@given(SEEDS)
def test_ln_2_of_a_mean(seed):
    """Of a completion: the geometric mean of its p_max is at least exp(- mean entropy)."""
    rng = np.random.default_rng(seed)
    rows = [simplex(rng, 5, scale) for scale in (.5, 2, 4)]
    entropies = torch.tensor([[-(p * np.log(p)).sum() for p in rows]])
    H = gtpo.mean_entropy(entropies, torch.ones(1, 3))
    geometric = math.exp(np.mean([math.log(p.max()) for p in rows]))
    assert geometric >= math.exp(-float(H)) - TINY


def beginning(seed, how, conflict=False):
    """A group whose completions share three tokens, then differ: rewards, lengths, and the weight of each shared position.

    The weight of a token is - d loss / d log pi, of the objective's own loss at rho = 1. A shared beginning has one context
    in all completions, so one gradient, and its weight is the sum over completions."""
    rng = np.random.default_rng(seed)
    G, T = 6, 12
    lengths = torch.tensor(rng.integers(4, T + 1, G))
    mask = (torch.arange(T) < lengths[:, None]).double()
    tokens = torch.tensor(rng.integers(10, 10 ** 6, (G, T)))
    tokens[:, :3] = torch.tensor([1, 2, 3])
    rewards = torch.zeros(G).double()
    rewards[rng.permutation(G)[:rng.integers(1, G)]] = 1

    A = grpo.group_advantages(rewards[None], "none")[0]
    logp = torch.zeros(G, T, dtype=torch.float64, requires_grad=True)
    loss = grpo.policy_loss(logp, logp.detach(), A, mask)
    if conflict:
        loss = loss * gtpo.conflict_weights(tokens, mask, A, G)
    weights = -torch.autograd.grad(grpo.aggregate(loss, mask, how), logp)[0]
    return rewards, lengths, A, weights[:, :3].sum(0)


@MANY
@given(SEEDS)
def test_a_shared_beginning_learns_nothing_under_token_averaging(seed):
    assert beginning(seed, "token")[3].abs().max() < TINY


@MANY
@given(SEEDS)
def test_a_shared_beginning_under_sequence_averaging(seed):
    """The covariance of A with 1 / length: below 0 where all right completions are longer than all wrong ones."""
    rewards, lengths, A, weights = beginning(seed, "sequence")
    covariance = (A * (1 / lengths.double())).mean()
    assert torch.allclose(weights, covariance.expand(3), atol=TINY)
    if lengths[rewards == 1].min() > lengths[rewards == 0].max():
        assert (weights < 0).all()


@MANY
@given(SEEDS)
def test_conflict_weights_hold_a_shared_beginning(seed):
    """Twice the weight that right completions give it, under either averaging: above 0."""
    for how in ("token", "sequence"):
        rewards, lengths, A, weights = beginning(seed, how, conflict=True)
        share = 1 / lengths.sum() if how == "token" else 1 / (len(A) * lengths)
        assert torch.allclose(weights, (2 * A.clamp(min=0) * share).sum().expand(3), atol=TINY) and (weights > 0).all()


# ----------------------------------------------------------------------------------------- the page

def test_the_page_names_every_test_and_no_other():
    here = Path(__file__).resolve().parent
    page = (here.parent / "docs" / "THEORY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    mine = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.M))
    assert named == mine - {"test_the_page_names_every_test_and_no_other"}
