"""Theory: the formulas behind group size, old samples and truncated weights, as functions.

docs/THEORY.md derives them in plain words, and `python study.py theory --out DIR` draws them.
tests/test_theory.py holds each against the enumeration of a small problem, in which a policy is a
vector of probabilities, one for each completion that can be drawn. Nothing of the training loop
calls them; they answer what to expect of a setting:

    import theory
    theory.zero_signal(0.3, 8)              # 0.058: share of groups that teach nothing
    theory.std_factor(0.01, 8)              # 2.61: how much more a hard prompt counts with std
    theory.best_group_size(c1=0.02, c3=2)   # 11: for a fixed number of completions
    theory.largest_drop(0.5, 0.01)          # 0.07: how much worse a policy in the KL ball can be

p is the chance that a completion of the prompt is right, G the group size, r a reward, s the
gradient of a completion's log-probability (its score), J the expected reward. pi is the policy that
is judged, mu the one that drew the samples, rho = pi / mu. Numbers are float64, KL is in nats.
"""
import math

import numpy as np


# -------------------------------------------------------------------------------------- group size

def zero_signal(p, G):
    """Probability P0 that all G rewards of 0 or 1 are equal, so that the group teaches nothing."""
    return p ** G + (1 - p) ** G


def smallest_group(p, share):
    """The smallest group size whose P0 is at most `share`; p strictly between 0 and 1."""
    if not (0 < p < 1 and 0 < share < 1):
        raise ValueError(f"p and share must be between 0 and 1, not {p} and {share}")
    G = 2
    while zero_signal(p, G) > share:
        G += 1
    return G


def std_factor(p, G, unbiased=False):
    """C_G(p): the expected std-normalised gradient is C_G(p) times the gradient of p.

    It is E[sqrt(K (G - K))] / (G p (1 - p)) with K ~ Binomial(G, p) right answers, written as a
    polynomial, which also holds at p = 0 and 1. unbiased: std with G - 1, as TRL and verl."""
    total = 0.0
    for K in range(1, G):
        ways = math.comb(G, K) * math.sqrt(K * (G - K))
        total += ways * p ** (K - 1) * (1 - p) ** (G - K - 1)       # of Binomial, over p (1 - p)
    return total / G * (math.sqrt((G - 1) / G) if unbiased else 1.0)


def prompt_constants(probabilities, scores, rewards):
    """The gradient of J of one prompt (P,), and the constants c2 and c3 of its LOO variance.

    probabilities (M,) of the M completions, scores (M, P), rewards (M,), of any values."""
    squares = (scores ** 2).sum(1)                                          # (M,) |s|^2
    centred = rewards - probabilities @ rewards
    gradient = (probabilities * rewards) @ scores                           # (P,)

    c2 = probabilities @ (centred ** 2 * squares) - gradient @ gradient
    variance = probabilities @ centred ** 2                                 # p (1 - p) if r is 0, 1
    c3 = variance * (probabilities @ squares) + gradient @ gradient
    return gradient, c2, c3


def loo_variance(c2, c3, G):
    """Total variance (trace) of the leave-one-out gradient of one group of G completions."""
    return c2 / G + c3 / (G * (G - 1))


def gradient_mse(G, budget, c1, c2, c3):
    """Squared error of the gradient from `budget` completions, G >= 2 of each of budget / G
    prompts.

    c1 is the total variance of the prompts' true gradients, c2 and c3 the means of
    prompt_constants over prompts."""
    return (c1 * G + c2 + c3 / (G - 1)) / budget


def best_group_size(c1, c3):
    """The G that makes gradient_mse least, whatever the budget: 2.4 or more, inf for one prompt."""
    return 1 + math.sqrt(c3 / c1) if c1 > 0 else math.inf


# ---------------------------------------------------------------------- how far apart two policies

def kl(pi, mu):
    """KL(pi || mu) of two vectors of probabilities; inf if pi has what mu never draws."""
    on = pi > 0
    if (mu[on] == 0).any():
        return math.inf
    return float((pi[on] * np.log(pi[on] / mu[on])).sum())


def total_variation(pi, mu):
    """Half the sum of |pi - mu|: the largest difference in the probability of any event."""
    return float(np.abs(pi - mu).sum() / 2)


def second_moment(pi, mu):
    """E_mu[rho^2] = 1 + chi^2(pi || mu) = exp(D2), the price of importance weights; or inf."""
    on = pi > 0
    if (mu[on] == 0).any():
        return math.inf
    return float((pi[on] ** 2 / mu[on]).sum())


# -------------------------------------------------- how much worse a policy near mu can be (0 to 1)

def pinsker(delta):
    """Bound of |J(pi) - J(mu)| for rewards of 0 to 1 and KL(pi || mu) <= delta, by Pinsker."""
    return math.sqrt(delta / 2)


def bretagnolle_huber(delta):
    """Another bound of the same, below 1 for every delta; the smaller one from delta = 1.6 on."""
    return math.sqrt(1 - math.exp(-delta))


def kl_bernoulli(x, p):
    """KL of two coins with chances x and p."""
    return kl(np.array([x, 1 - x]), np.array([p, 1 - p]))


def largest_drop(p, delta):
    """The largest J(mu) - J(pi) for J(mu) = p and KL(pi || mu) <= delta, attained: the x below p
    with kl_bernoulli(x, p) = delta is J(pi)."""
    if kl_bernoulli(0.0, p) <= delta:
        return p
    return root(lambda drop: kl_bernoulli(p - drop, p) - delta, 0.0, p)


def surrogate_bound(surrogate, sd, tv_new, tv_old, constant=1.0):
    """Lower bound of J(pi) - J(pi_k) by the surrogate L of samples from mu, rewards 0 to 1.

    L = E_mu[rho (r - J(mu)) / sd], tv_new = TV(pi, mu), tv_old = TV(pi_k, mu). arXiv 2505.22257
    has 2 as the constant."""
    return surrogate - constant * ((1 - sd) / sd * tv_new + tv_old)


def token_gap(T, alpha):
    """Bound of |J(pi) - J(mu) - E_mu sum_t (rho_t - 1) r| for token ratios and rewards of 0 to 1.

    T tokens; alpha is the largest total variation of the next token over all prefixes."""
    return T * (T - 1) * alpha ** 2


# -------------------------------------------------------------------------------- truncated weights

def truncated_mse(mu, rho, f, cap, n, low=0.0):
    """Squared error of the mean of n draws of clip(rho, low, cap) f as an estimate of E_mu[rho f].

    mu, rho, f (M,): probability, ratio and value of each of M completions."""
    weighted = rho.clip(low, cap) * f
    mean = mu @ weighted
    bias = mean - mu @ (rho * f)
    variance = mu @ weighted ** 2 - mean ** 2
    return bias ** 2 + variance / n


def best_cap(excess, mean, second, n):
    """The cap c of min(rho, c) with the least squared error, where f is independent of rho.

    excess(c) = E[max(rho - c, 0)] is a function; mean and second are E f and E f^2. It solves
    n mean^2 excess(c) = c second - mean^2 E[min(rho, c)]."""
    def slope(cap):
        expected = 1 - excess(cap)                      # of min(rho, cap), since E rho = 1
        return cap * second - mean ** 2 * expected - n * mean ** 2 * excess(cap)

    high = 1.0
    while slope(high) < 0:
        high *= 2
    return root(slope, 0.0, high)


def pareto_excess(cap, k):
    """E[max(rho - cap, 0)] of ratios with mean 1 and P(rho > c) ~ c^-k, k > 1, for caps of 0 up."""
    least = (k - 1) / k
    if cap <= least:
        return 1 - cap
    return least ** k * cap ** (1 - k) / (k - 1)


def best_clip(sd_ratio, sd_advantage, slope, n):
    """The eps of clip(rho, 1 - eps, 1 + eps) with the least squared error, for small drift.

    Ratios are 1 + sd_ratio z with normal z, and advantages are slope (rho - 1) plus noise, with sd
    sd_advantage in all. eps = u sd_ratio, where u solves u = 2 lambda density(u)."""
    lam = n * (slope * sd_ratio / sd_advantage) ** 2

    def excess(u):
        return u - 2 * lam * math.exp(-u * u / 2) / math.sqrt(2 * math.pi)

    return sd_ratio * root(excess, 0.0, 1.0 + lam)


# --------------------------------------------------------------------------------- how many samples

def importance_mse(mu, rho, rewards, n):
    """Squared error of the mean of rho r over n distinct samples of mu, as an estimate of J(pi)."""
    J = mu @ (rho * rewards)
    return (mu @ (rho * rewards) ** 2 - J ** 2) / n


def importance_bound(mu, rho, n):
    """exp(D2) / n, which bounds importance_mse for rewards of 0 to 1."""
    return mu @ rho ** 2 / n


def self_normalized_mse(mu, rho, rewards, n):
    """The same of sum(rho r) / sum(rho), up to terms of order 1 / n^2."""
    J = mu @ (rho * rewards)
    return mu @ (rho * (rewards - J)) ** 2 / n


def least_error(gap, n):
    """A chance of error that every test of p = 1/2 + gap against 1/2 - gap has on n rollouts.

    A quarter of exp(-n KL), the larger error of the two kinds (Bretagnolle-Huber)."""
    return math.exp(-n * kl_bernoulli(0.5 + gap, 0.5 - gap)) / 4


def root(increasing, low, high):
    """Where a function that rises from below 0 to above 0 between low and high is 0."""
    for _ in range(200):
        middle = (low + high) / 2
        if increasing(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


# ----------------------------------------------------------------------------------- what to draw

def curves():
    """The curves of the page: [(title, name of x, [(label, xs, ys)])], all of them exact."""
    chances = np.linspace(0.01, 0.99, 99)
    sizes = (2, 4, 8, 16, 64)
    empty = [(f"G = {G}", chances, zero_signal(chances, G)) for G in sizes]
    factor = [(f"G = {G}", chances, [std_factor(p, G) for p in chances]) for G in sizes]

    groups = np.arange(2, 65)
    error = []
    for ratio in (4, 50, 1000):
        least = gradient_mse(best_group_size(1, ratio), 1, 1, 0, ratio)
        error.append((f"c3 / c1 = {ratio}", groups,
                      [gradient_mse(G, 1, 1, 0, ratio) / least for G in groups]))

    nats = np.linspace(0.001, 1.5, 100)
    drop = [("Pinsker", nats, [min(pinsker(d), 0.5) for d in nats]),
            ("J = 0.5", nats, [largest_drop(0.5, d) for d in nats]),
            ("J = 0.05", nats, [largest_drop(0.05, d) for d in nats])]
    worth = [("exp(-2 KL)", nats, np.exp(-2 * nats))]
    return [("groups that teach nothing", "success p", empty),
            ("weight of a prompt by the std", "success p", factor),
            ("error of a step, best = 1 (c2 = 0)", "group size", error),
            ("what KL(pi || mu) allows J to fall", "KL, nats", drop),
            ("effective share of old samples", "KL of a completion, nats", worth)]


def draw(file):
    """Write the curves as a picture."""
    from report import new_figure, save_figure
    panels = curves()
    figure, axes = new_figure(len(panels), width=4.5, height=3.6)
    for axis, (title, x, lines) in zip(axes, panels):
        for label, xs, ys in lines:
            axis.plot(xs, ys, label=label)
        axis.set(title=title, xlabel=x)
    save_figure(figure, file)
