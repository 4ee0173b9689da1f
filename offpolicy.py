"""Off-policy GRPO: learn from completions that an older policy mu drew.

Drawing completions often costs most of a step, so let more than one update learn from them. There
are two ways, often confused:

    stale weights   --sync-every v     fresh completions every step, drawn by weights up to v - 1
                                       steps old, so that sampling need not wait for training. It is
                                       what arXiv 2505.22257 does (v = 10)
    sample reuse    --replay-ratio K   K passes a rollout: one over the fresh groups, K - 1 over
                                       groups from the buffer (replay.py). That paper's own reuse
                                       arm converged more slowly; it is classic for off-policy RL

Both train pi on tokens of mu. There are two forms of the loss, with a ratio a token as in grpo.py:

    bypass      - min(rho A, clip(rho) A)       rho = pi / mu; the clip is the only correction
                                                (2505.22257)
    decoupled   - W min(rho' A, clip(rho') A)   rho' = pi / prox, W = importance weight of prox / mu
                                                without gradient; prox = pi at the start of the
                                                pass, one more forward, for samples that are not
                                                pi's (AReaL, arXiv 2505.24298; verl)

The advantage is that of the group as it was drawn, with its own mean and std: a baseline of mu.

W is one weight a completion (the default), or one a token. That of a completion is exact, but its
variance grows like exp(2 KL), KL that of the whole completion; that of a token is biased, and tame.
Truncating weights at 2 keeps most of the correction (tests/test_offpolicy.py). `ess` in the log is
how many of the samples still count: watch it where completions are long.

Three refinements, each off by default: --ess-lr (a smaller step where few samples count),
--weighted-baseline (the baseline of least variance), --prox loglinear (prox without its forward).
Function by function beside grpo.py:

    prepare      the same, also for groups from the buffer      policy_loss   the same
    add_weights  new: weights of a pass (verl: rollout          loss          with weights, trust
                 correction)                                                  region, prox for mu
    learn        new: several passes a rollout

Names: old_logp is log mu (verl's rollout_log_probs, TRL's sampling_per_token_logps), prox_logp is
what verl calls old_log_probs.

`learn`, near the end, is the loop over passes: begin there. A draw from the buffer by priority has
a weight too, which multiplies the whole loss of its rows.

--replay-ratio 1 --sync-every 1 is grpo.py, bit for bit.
Left out: weights that change in the middle of a completion; asynchronous processes.
"""
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

import dist
import grpo
from config import setting
from replay import ReplayBuffer, pack, unpack
from rollout import Rollout, empty_rollout

TRACES = ("retrace", "tempered")
CAPPED = ("clipped", "truncated", "masked")
SCHEMES = ("none", "standard", *CAPPED, "self_normalized", *TRACES)
IMPORTANCE_LEVELS = ("token", "sequence", "geometric")
NORMALIZERS = ("", "batch", "group")
CORRECTIONS = ("decoupled", "bypass")
PROXIES = ("forward", "loglinear")
REGIONS = ("", "sequence", "token", "second_moment")


# ------------------------------------------------------------------------------ importance weights

def importance_weights(log_ratio, mask, scheme="none", level="token", cap=2.0, low=None,
                       normalize="", group_size=None, mean=None, trace=1.0):
    """Weights W (B, T) that turn an expectation under mu into one under pi; no gradient, 0 off the
    mask. A run's defaults (Settings) are scheme "truncated", level "sequence" and cap 2.

    log_ratio (B, T) = log prox - log mu of the drawn tokens, prox being pi when the pass began.
    level says whose ratio w it is: "token", "sequence" (product over the row) or "geometric" (the
    mean in logs; grpo.py's --ratio-level calls that "sequence", as GSPO does). scheme:

      none             1: biased, no variance
      standard         w: at sequence level unbiased, of large variance (docs/THEORY.md, 21)
      clipped          w in [low, cap], low by default 1 / cap (CISPO, arXiv 2506.13585; not PPO's
                       clip, which masks)
      truncated        min(w, cap) (TIS, V-trace's rho-bar)
      masked           w where low <= w <= cap, else 0 (MIS, IcePop); low by default 0
      self_normalized  w / mean(w): biased by O(1/B), bounded by B; the same as standard with
                       normalize="batch"
      retrace          W_t = min(1, w_t) prod_{i>t} trace min(1, w_i): V-trace (arXiv
                       1802.01561) without a critic. Beware: the product dies exponentially with
                       length (exp(-8) for 1,024 tokens of sd 0.02), so early tokens learn nothing
      tempered         min(1, w_t) prod_{i>t} min(1, w_i)^trace, ours: trace 0 is token-TIS,
                       1 is retrace. Both ignore level, cap and normalize

    normalize: "" or, after truncation, "batch" or "group" (of group_size rows): divide by the mean
    weight, over rows, for token level over tokens. mean: that mean where it comes from more than
    this call (other ranks, other micro-batches). Raises ValueError for names that are not these."""
    if scheme not in SCHEMES or level not in IMPORTANCE_LEVELS or normalize not in NORMALIZERS:
        raise ValueError(f"scheme {scheme!r}, level {level!r}, normalize {normalize!r}: "
                         f"choose {', '.join(SCHEMES)}; {', '.join(IMPORTANCE_LEVELS)}; "
                         "'', batch, group")
    if normalize == "group" and not group_size or scheme in CAPPED and not cap:
        raise ValueError("normalize='group' needs group_size; "
                         "clipped, truncated and masked need a cap above 0")

    log_ratio = log_ratio.detach()
    if scheme in TRACES:
        return trace_weights(log_ratio, mask, scheme, trace)

    w = level_ratio(log_ratio, mask, level)                     # (B, T)
    if scheme == "none":
        w = torch.ones_like(w)
    elif scheme == "clipped":
        w = w.clamp(1 / cap if low is None else low, cap)
    elif scheme == "truncated":
        w = w.clamp(max=cap)
    elif scheme == "masked":
        inside = (w <= cap) & (w >= (low or 0.0))
        w = torch.where(inside, w, 0.0)
    w = torch.where(mask.bool(), w, 0.0)

    if mean is None and (normalize or scheme == "self_normalized"):
        total, count = weight_mass(w, mask, level, group_size if normalize == "group" else None)
        mean = total / count.clamp(min=1)
    return w if mean is None else w / torch.as_tensor(mean).clamp(min=1e-30)


def level_ratio(log_ratio, mask, level):
    """exp of the log-ratio of each token, of its row's sum, or of its row's mean: (B, T).

    The exponent stays within +-20."""
    log_ratio = torch.where(mask.bool(), log_ratio, 0.0)
    if level != "token":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    if level == "geometric":
        log_ratio = log_ratio / mask.sum(1, keepdim=True).clamp(min=1)
    return log_ratio.clamp(-grpo.MAX_LOG_RATIO, grpo.MAX_LOG_RATIO).exp()


def weight_mass(weights, mask, level="sequence", group_size=None):
    """The sum of weights and their number, one weight a token or a row.

    Returns two scalars or, with group_size, two (B, 1) of each row's group."""
    if level == "token":
        total = weights.sum(1)                                  # (B,)
        count = mask.sum(1)
    else:
        total = weights.amax(1)
        count = (mask.sum(1) > 0).to(weights.dtype)

    if group_size is None:
        return total.sum(), count.sum()
    return [x.view(-1, group_size).sum(1).repeat_interleave(group_size)[:, None]
            for x in (total, count)]


def trace_weights(log_ratio, mask, scheme, trace):
    """min(1, w_t) times the traces of the tokens after t, by a reversed cumsum of logs."""
    on = mask.bool()
    down = torch.where(on, log_ratio, 0.0).clamp(-grpo.MAX_LOG_RATIO, 0.0)      # log min(1, w)

    if scheme == "tempered":
        factor = down * trace
    else:
        factor = down + torch.tensor(float(trace)).log()

    from_here = torch.where(on, factor, 0.0).flip(1).cumsum(1).flip(1)
    after = torch.nn.functional.pad(from_here[:, 1:], (0, 1))
    return torch.where(on, (down + after).exp(), 0.0)


def weighted_advantages(rewards, weights, scale="std", eps=1e-6, unbiased=False):
    """Group advantages with the baseline of least variance for weighted samples: (N, G).

    rewards and weights (N, G), one weight a completion. b = sum w^2 r / sum w^2 in the place of the
    group's mean: with weights w the variance of sum w (r - b) grad log pi is least there, if all
    gradients are about as long. A completion's own reward is part of b, so one whose weight is
    far above the others' keeps little of its advantage. With equal weights b is the mean, and this
    is grpo.py's group_advantages for the scales "std" and "none". Raises ValueError for others."""
    if scale not in ("std", "none"):
        raise ValueError(f"scale must be std or none for a weighted baseline, not {scale!r}")

    r = rewards if rewards.dtype == torch.float64 else rewards.float()
    squares = weights.detach().to(r.dtype).square()
    squares = torch.where(squares.sum(1, keepdim=True) > 0, squares, 1.0)
    baseline = (squares * r).sum(1, keepdim=True) / squares.sum(1, keepdim=True)

    advantages = r - baseline
    if scale == "std":
        advantages = advantages / (r.std(1, correction=int(unbiased), keepdim=True) + eps)
    return torch.where(grpo.informative(rewards)[:, None], advantages, 0.0)


def loglinear_prox(logp, old_logp, share):
    """log prox between mu and pi, without a forward of its own (A-3PO, arXiv 2512.06547): (B, T).

    Policies that training leaves behind are taken to lie on a line in log space, with prox the
    `share` (B,) of the way from mu to the pi that is now being trained. With 1 prox is pi itself,
    which is exact in the first update of a pass. No gradient."""
    return old_logp + share[:, None] * (logp.detach() - old_logp)


# ---------------------------------------------------------------- how far pi has moved away from mu

def effective_sample_size(weights):
    """(sum w)^2 / sum w^2 of weights (B,), one a sequence: 1 to B, or 0 when all are 0.

    It is how many samples of pi they are worth. The weights need not be normalised (the formula
    1 / sum w^2 needs a sum of 1)."""
    w = torch.as_tensor(weights).cpu().double()
    return (w.sum().square() / w.square().sum().clamp(min=1e-300)).item()


def kl_pi_mu(log_ratio, mask):
    """Estimate of KL(pi || mu) at each token drawn by mu: (B, T), unbiased and never negative.

    rho log rho - rho + 1, by expm1, which is exact also for the smallest drift."""
    log_ratio = torch.where(mask.bool(), log_ratio, 0.0)
    log_ratio = log_ratio.clamp(-grpo.MAX_LOG_RATIO, grpo.MAX_LOG_RATIO)
    return log_ratio.exp() * log_ratio - log_ratio.expm1()


@dataclass
class Drift:
    """Sums that say how far pi is from mu; those of several ranks or passes are added up.

    w is the ratio pi / mu of a whole completion."""
    sequences: float = 0.0
    weight: float = 0.0             # sum of w
    weight2: float = 0.0            # sum of w^2
    tokens: float = 0.0
    kl: float = 0.0                 # sum of the KL estimate over tokens
    lag: float = 0.0                # sum over sequences of their age in rollouts
    largest_weight: float = 0.0
    oldest: float = 0.0             # largest age

    MAXIMA = ("largest_weight", "oldest")       # of two drifts the larger one counts

    def __add__(self, other):
        joined = {name: value + getattr(other, name) for name, value in vars(self).items()}
        joined |= {name: max(getattr(self, name), getattr(other, name)) for name in self.MAXIMA}
        return Drift(**joined)

    @property
    def ess(self):
        """Effective sample size as a share of the sequences, 0 to 1."""
        if not self.sequences or not self.weight2:
            return 1.0
        return min(self.weight * self.weight / (self.sequences * self.weight2), 1.0)    # rounding

    @property
    def kl_a_token(self):
        """KL(pi || mu), nats a token."""
        return self.kl / max(self.tokens, 1)

    @property
    def staleness(self):
        """Mean age of the sequences in rollouts."""
        return self.lag / max(self.sequences, 1)


def drift_of(log_ratio, mask, lag=None):
    """The Drift of rows with log pi - log mu (B, T); lag: the ages of the rows that count."""
    w = level_ratio(log_ratio, mask, "sequence")[:, 0]
    w = w[mask.sum(1) > 0].cpu().double()
    lag = torch.zeros(0) if lag is None else lag
    return Drift(
        sequences=float(len(w)),
        weight=float(w.sum()),
        weight2=float(w.square().sum()),
        tokens=float(mask.sum()),
        kl=float(kl_pi_mu(log_ratio, mask).sum()),
        lag=lag.sum().item(),
        largest_weight=w.max().item() if len(w) else 0.0,
        oldest=lag.max().item() if len(lag) else 0.0)


# ------------------------------------------------------------------------------------ trust region

def sequence_mask(logp, old_logp, advantages, mask, delta):
    """Keep a completion unless it is bad and has become unlikely: (B, 1) of 0/1.

    It stays where A >= 0 or mean(log mu - log pi) <= delta, in nats a token (DeepSeek-V3.2, arXiv
    2512.02556)."""
    log_ratio = torch.where(mask.bool(), logp.detach() - old_logp, 0.0)
    gap = -log_ratio.sum(1) / mask.sum(1).clamp(min=1)
    return ((advantages >= 0) | (gap <= delta)).to(logp.dtype)[:, None]


def token_mask(logp, old_logp, advantages, mask, delta):
    """Drop tokens whose probability has moved by delta where A pushes it: (B, T) of 0/1.

    Unlike a ratio, a difference does not let rare tokens fill the mask (DPPO, arXiv 2602.04879)."""
    moved = torch.where(mask.bool(), logp.detach().exp() - old_logp.exp(), 0.0)
    good = advantages[:, None] > 0
    return torch.where(good, moved <= delta, moved >= -delta).to(logp.dtype)


def second_moment_limit(squares, limit):
    """The smallest square to drop, so that the mean of those below it stays within `limit`.

    squares (n,) of log-ratios of *all* tokens of the pass (M2PO, arXiv 2510.01161). Returns a
    float, inf when all may stay. Keep what is strictly below."""
    ordered = torch.as_tensor(squares).cpu().double().sort().values
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1)
    fit = int((means <= limit).sum())       # means of sorted numbers only grow
    return ordered[fit].item() if fit < len(ordered) else math.inf


def adapt_clip(clip, kl, limit, least=0.05, most=0.4):
    """The clip range after an update at that KL, within least and most.

    10 % wider below limit / 1.5, narrower above 1.5 limit: PPO's rule for its KL coefficient, on
    the clip."""
    factor = 1.0
    if kl < limit / 1.5:
        factor = 1.1
    elif kl > 1.5 * limit:
        factor = 1 / 1.1
    return min(max(clip * factor, least), most)


def adapt_replay(ratio, tripped, most):
    """The next step's replay ratio, between 1 and most.

    20 % less when the trust region ended this step's reuse, else 20 % more."""
    return min(max(ratio * (0.8 if tripped else 1.2), 1.0), float(most))


# ---------------------------------------------------------------------------------------- settings

def scheme_in(names):
    """A condition of setting(needs=...): --importance is one of these."""
    return lambda c: c.importance in names, "--importance " + " or ".join(names)


# conditions without which a setting would do nothing: (test of the config, what to give)
DECOUPLED = (lambda c: c.correction == "decoupled",
             "--correction decoupled: beside the ratio to mu it would count twice")
WEIGHTED = scheme_in([name for name in SCHEMES if name not in ("none", *TRACES)])
HAS_CAP = scheme_in(CAPPED)
HAS_LOW = scheme_in(("clipped", "masked"))
HAS_TRACE = scheme_in(TRACES)
IN_REGION = (lambda c: c.trust_region, "--trust-region")
REUSE = (lambda c: c.replay_ratio > 1, "--replay-ratio above 1")
OLD = (lambda c: c.replay_ratio > 1 or c.sync_every > 1,
       "samples of older weights: --replay-ratio or --sync-every above 1")
BY_FORWARD = (lambda c: c.prox == "forward", "--prox forward: before a pass loglinear knows none")
REUSE_OR_CLIP = (lambda c: c.replay_ratio > 1 or c.adaptive_clip,
                 "--replay-ratio above 1 or --adaptive-clip")
BY_PRIORITY = (lambda c: c.priority, "--priority")


@dataclass
class Settings(grpo.Settings):          # those of GRPO, and these
    # objective: old samples (offpolicy.py)
    sync_every: int = setting(1, least=1)       # v: steps between updates of the weights that draw
    replay_ratio: int = setting(2, least=1)     # K: passes a rollout, one over fresh groups and
                                                # K - 1 over the buffer

    correction: str = setting("decoupled", choices=CORRECTIONS)
                                                # decoupled (ratio to prox, importance weights),
                                                # bypass (ratio to mu)

    prox: str = setting("forward", choices=PROXIES, needs=[DECOUPLED, OLD])
                                                # how prox is known. forward: one more forward
                                                # measures it; loglinear: it is pi where a pass is
                                                # one update, else between mu and pi

    importance: str = setting("truncated", choices=SCHEMES, needs=[DECOUPLED, OLD])
                                                # none, standard, clipped, truncated, masked,
                                                # self_normalized, retrace, tempered

    importance_level: str = setting("sequence", choices=IMPORTANCE_LEVELS,
                                    needs=[DECOUPLED, WEIGHTED])
                                                # token, sequence, geometric

    importance_cap: float = setting(2.0, above=0, needs=[DECOUPLED, HAS_CAP])
                                                # largest weight of clipped, truncated, masked

    importance_low: float = setting(0.0, least=0, needs=[DECOUPLED, HAS_LOW])
                                                # least weight of clipped (0: 1 / cap) and masked

    importance_normalize: str = setting("", choices=NORMALIZERS,
                                        needs=[DECOUPLED, WEIGHTED, BY_FORWARD])
                                                # batch, group: weights of mean 1

    weighted_baseline: bool = setting(False, needs=[DECOUPLED, OLD, WEIGHTED, BY_FORWARD])
                                                # subtract sum w^2 r / sum w^2, not the mean

    ess_lr: bool = setting(False, needs=[DECOUPLED, OLD, WEIGHTED, BY_FORWARD])
                                                # learning rate of a pass x sqrt(ESS / B), for B
                                                # sequences

    trace: float = setting(1.0, least=0, most=1, needs=[DECOUPLED, HAS_TRACE])
                                                # of retrace and tempered

    trust_region: str = setting("", choices=REGIONS)    # sequence, token, second_moment: leave out
                                                        # what has drifted

    trust_delta: float = setting(0.0, least=0, needs=[IN_REGION])   # sequence: nats a token;
                                                # token: probability; second_moment: mean squared
                                                # log-ratio; 0: 0.2 (second_moment: 0.04)

    kl_limit: float = setting(0.0, least=0, needs=[REUSE_OR_CLIP])  # nats a token: above this
                                                # KL(pi||mu) the reuse of a step ends; 0: never

    adaptive_clip: bool = setting(False, needs=[OLD])       # widen and narrow the clip to hold
                                                            # --kl-limit

    adaptive_replay: bool = setting(False, needs=[REUSE])   # let ESS (below half) and --kl-limit
                                                            # choose K, up to --replay-ratio

    buffer_groups: int = setting(0, least=0, needs=[REUSE])     # capacity in groups;
                                                                # 0: those of 16 rollouts

    buffer_mb: float = setting(0.0, least=0, needs=[REUSE])     # and in megabytes; 0: no bound
    max_staleness: int = setting(16, least=0, needs=[REUSE])    # rollouts after which a group
                                                                # leaves; 0: never

    max_reuse: int = setting(0, least=0, needs=[REUSE])         # draws after which it leaves;
                                                                # 0: never

    min_ess: float = setting(0.0, least=0, most=1, needs=[REUSE])   # least share of effective
                                                # sequences at its last replay, else it leaves

    priority: float = setting(0.0, least=0, most=10, needs=[REUSE])     # alpha: draw by (reward std
                                                # x exp(-age / 8 rollouts))^alpha; usual 0.6

    priority_beta: float = setting(0.4, least=0, most=1, needs=[BY_PRIORITY])   # its bias
                                                # correction at the start, rising to 1 at --steps

    def __post_init__(self):
        super().__post_init__()
        self.buffer_groups = self.buffer_groups or 16 * self.prompts_per_step
        default = 0.04 if self.trust_region == "second_moment" else 0.2
        self.trust_delta = self.trust_delta or default

    def check(self):
        """Raise ValueError for combinations that contradict each other."""
        super().check()
        least = self.importance_low
        if self.importance == "clipped":
            least = least or 1 / self.importance_cap
        if self.importance in ("clipped", "masked") and least > self.importance_cap:
            raise ValueError(f"--importance-cap {self.importance_cap}: "
                             f"below the least weight, {least:g}")

        if self.importance == "masked" and not least <= 1 <= self.importance_cap:
            raise ValueError(f"--importance masked keeps weights from {least:g} to "
                             f"{self.importance_cap:g}, not that of unchanged tokens, 1")

        if self.replay_ratio > 1:
            oldest = self.sync_every - 1        # on entry
            if 0 < self.max_staleness < oldest:
                raise ValueError(f"--max-staleness {self.max_staleness}: fresh groups may be "
                                 f"{oldest} rollouts old; raise it, or 0")
            if self.buffer_groups < self.prompts_per_step:
                raise ValueError(f"--buffer-groups {self.buffer_groups}: less than a rollout, of "
                                 f"which the last ones alone would stay; raise it to "
                                 f"--prompts-per-step {self.prompts_per_step} at least")
            if self.advantage_scale == "batch":
                raise ValueError("--advantage-scale batch: its std is that of one rollout, not of "
                                 "a batch from the buffer; use another, or --replay-ratio 1")

        elif self.trust_region == "second_moment" and self.sync_every == 1:
            raise ValueError("--trust-region second_moment needs samples of older weights: "
                             "--replay-ratio or --sync-every above 1")

        if self.importance_level == "token" and (self.weighted_baseline or self.ess_lr):
            raise ValueError("--weighted-baseline and --ess-lr need one weight a completion: "
                             "--importance-level sequence or geometric")
        if self.weighted_baseline:
            if self.mask_truncated or self.advantage_scale not in ("std", "none"):
                raise ValueError("--weighted-baseline needs --advantage-scale std or none, and a "
                                 "weight of each completion, so no --mask-truncated")

        if self.prox == "loglinear":
            if self.trust_region == "second_moment" or self.importance == "self_normalized":
                raise ValueError("--prox loglinear knows prox only in the middle of a pass: "
                                 "--trust-region second_moment and --importance self_normalized "
                                 "need that of the whole pass; use --prox forward")

        if self.adaptive_clip and not (self.kl_limit and self.clip_low):
            raise ValueError("--adaptive-clip holds the KL near --kl-limit: give one above 0, "
                             "and --clip-low above 0")


# ------------------------------------------------------------------ the calls of the training loop

METRICS = grpo.METRICS


@dataclass
class Batch(grpo.Batch):
    """A batch of grpo.py, and what is known of the policy that drew it."""
    lag: torch.Tensor | None = None             # (B,) steps since pi was mu
    prox_logp: torch.Tensor | None = None       # (B, T) of pi at the start of the pass
    prox_share: torch.Tensor | None = None      # (B,) with --prox loglinear: prox lies this share
                                                # of the way from mu (0) to pi (1), in log space
    weight: torch.Tensor | None = None          # (B, T) importance weights, 0 for dropped tokens
    replay_weight: torch.Tensor | None = None   # (B,) of the draw from the buffer


def prepare(rollout, rewards, config):
    """As grpo.prepare: of the fresh rollout and, on `unpack`ed groups, of a replayed one."""
    return Batch(**vars(grpo.prepare(rollout, rewards, config)))


complete = grpo.complete


def add_weights(batch, config, weights=None, reduce=lambda sums: sums, gather=lambda x: x):
    """Add to the batch, once a pass, what `loss` needs: weight (B, T), replay_weight (B,), and with
    --weighted-baseline other advantages.

    Without batch.prox_logp there are no importance weights here, only `weights` (B,), the replay
    buffer's; with --prox loglinear `loss` makes them. reduce sums a dict of numbers
    over ranks, gather joins a vector over ranks: means and limits belong to the whole pass, never
    to a part of it."""
    mask = batch.mask * batch.active[:, None]           # of the rows that are trained
    batch.weight = mask

    if batch.prox_logp is not None:
        log_ratio = torch.where(mask.bool(), batch.prox_logp - batch.old_logp, 0.0)
        if config.correction == "decoupled":
            batch.weight = configured_weights(log_ratio, mask, config, reduce)
        if config.weighted_baseline:
            by_group = batch.weight.amax(1).view(-1, config.group_size)
            batch.advantages = weighted_advantages(
                batch.rewards.view_as(by_group), by_group, config.advantage_scale,
                unbiased=config.unbiased_std).flatten()
        if config.trust_region == "second_moment":
            squares = log_ratio.square()
            limit = second_moment_limit(gather(squares[mask.bool()]), config.trust_delta)
            batch.weight = batch.weight * (squares < limit)

    batch.replay_weight = torch.ones_like(batch.advantages) if weights is None else weights


def configured_weights(log_ratio, mask, config, reduce=lambda sums: sums):
    """importance_weights as the config names them; a mean over the batch is one over all ranks."""
    scheme, level = config.importance, config.importance_level
    normalize = config.importance_normalize
    if scheme == "self_normalized":
        scheme = "standard"
        normalize = normalize or "batch"
    bounds = {"cap": config.importance_cap, "low": config.importance_low or None,
              "trace": config.trace}

    if normalize != "batch":
        return importance_weights(log_ratio, mask, scheme, level, normalize=normalize,
                                  group_size=config.group_size, **bounds)

    here = importance_weights(log_ratio, mask, scheme, level, **bounds)
    total, count = weight_mass(here, mask, level)
    sums = reduce({"weight": float(total), "count": float(count)})
    mean = sums["weight"] / max(sums["count"], 1)
    return importance_weights(log_ratio, mask, scheme, level, mean=mean, **bounds)


def loss(logp, entropy, batch, config, normalizer):
    """As grpo.loss, with prox in the place of mu when decoupled, weights, and the trust region.

    A scalar, and sums over tokens for the log."""
    mu, A, mask, weight = batch.old_logp, batch.advantages, batch.mask, batch.weight
    decoupled = config.correction == "decoupled" and batch.prox_logp is not None
    anchor = batch.prox_logp if decoupled else mu           # the ratio's and the clip's
    if batch.prox_share is not None:
        anchor = loglinear_prox(logp, mu, batch.prox_share)
        log_ratio = torch.where(mask.bool(), anchor - mu, 0.0)
        weight = configured_weights(log_ratio, weight, config)      # so far 1 on trained tokens
    clip = {"clip_low": config.clip_low, "clip_high": config.clip_high, "level": config.ratio_level}

    if config.trust_region == "sequence":
        weight = weight * sequence_mask(logp, mu, A, mask, config.trust_delta)
    elif config.trust_region == "token":
        weight = weight * token_mask(logp, mu, A, mask, config.trust_delta)

    per_token = grpo.policy_loss(logp, anchor, A, mask, **clip, dual_clip=config.dual_clip or None)
    per_token = per_token * weight
    kl = torch.zeros_like(logp)
    if config.beta > 0:
        kl = grpo.kl_penalty(logp, batch.ref_logp, config.kl_kind, mu, mask)
        per_token = per_token + config.beta * kl
    per_token = per_token * batch.replay_weight[:, None]

    sums = {**grpo.common_sums(logp, entropy, batch.sampler_logp, mask),
            "kl": kl.detach().sum(),
            "clip_ratio": grpo.clipped_tokens(logp.detach(), anchor, A, mask, **clip).sum()}
    total = grpo.aggregate(per_token, mask, config.aggregation, normalizer, config.max_new_tokens)
    return total, sums


# ------------------------------------------------------------ not pure: the passes of a rollout

class State:
    """What a run carries from step to step, and every checkpoint holds."""

    def __init__(self, config):
        c = config
        self.buffer = ReplayBuffer(c.buffer_groups, c.buffer_mb, c.max_staleness, c.max_reuse,
                                   c.min_ess, c.priority, seed=c.seed)
        self.replay_ratio = float(c.replay_ratio)       # of the next step, with --adaptive-replay
        self.clip = c.clip_low                          # of the next step, with --adaptive-clip

    def state_dict(self):
        return {"buffer": self.buffer.state_dict(), "replay_ratio": self.replay_ratio,
                "clip": self.clip}

    def load_state_dict(self, state):
        self.buffer.load_state_dict(state["buffer"])
        self.replay_ratio = state["replay_ratio"]
        self.clip = state["clip"]


def learn(learner, rollout, rewards):
    """A pass over the fresh groups, then passes over the buffer while pi stays near enough.

    Returns the updates, and more for the log."""
    c, state = learner.config, learner.state
    config = c
    if c.adaptive_clip:
        config = replace(c, clip_low=state.clip, clip_high=state.clip * c.clip_high / c.clip_low)

    # the fresh groups; they go into the buffer after their own pass, so that a draw may hold them
    batch = fresh_batch(learner, rollout, rewards)
    updates = make_pass(learner, batch, c.prompts_per_step, config)
    if batch.old_logp is None:          # the update has met mu itself
        batch.old_logp = batch.pi_logp
    first = last = measure(learner, batch)
    drifts = [first]
    if c.replay_ratio > 1:
        store(learner, rollout, rewards, batch)

    while len(drifts) < int(state.replay_ratio) and not too_far(c, last):
        state.buffer.evict(learner.progress.step)
        groups, weights = state.buffer.sample(c.prompts_per_step, annealed_beta(learner))
        if not groups:
            break

        batch = replayed_batch(learner, groups, weights, len(drifts))
        measured_before = batch.prox_logp is not None
        if measured_before:         # a pass that would start too far away is not made at all
            last = measure(learner, batch, groups)
            if too_far(c, last):
                break

        updates += make_pass(learner, batch, len(groups), config)
        if not measured_before:
            last = measure(learner, batch, groups)
        drifts.append(last)

    state.buffer.evict(learner.progress.step)
    adapt(learner, last, old=last is not first or last.oldest > 0)
    return updates, {**metrics(learner, drifts, last), "clip": config.clip_low}


def make_pass(learner, batch, count, config):
    """learner.make_pass; with --ess-lr at a learning rate that fits what the samples are worth.

    B samples of effective sample size ESS act like a batch of ESS samples, whose noise is
    sqrt(B / ESS) times as large: the rate is sqrt(ESS / B) times its own (VCPO, arXiv 2602.17616).
    The weights are those of the loss, after the cap. The log's `lr` is the rate before."""
    if not (config.ess_lr and batch.prox_logp is not None):
        return learner.make_pass(batch, count, config)

    w = (batch.weight.amax(1) * batch.replay_weight)[batch.active]
    sums = {"sequences": float(len(w)), "weight": float(w.sum()), "weight2": float((w * w).sum())}
    share = Drift(**dist.all_reduce(sums, learner.device)).ess

    groups = learner.optimizer.param_groups
    usual = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] *= math.sqrt(share)
    try:
        return learner.make_pass(batch, count, config)
    finally:
        for group, lr in zip(groups, usual):
            group["lr"] = lr


def fresh_batch(learner, rollout, rewards):
    """The batch of a rollout that was just drawn."""
    versions = torch.full_like(rollout.lengths, learner.progress.behaviour_step)
    on_policy = rollout.version == learner.progress.updates
    return pass_batch(learner, rollout, rewards, versions, fresh=True, on_policy=on_policy)


def replayed_batch(learner, groups, weights, made):
    """This rank's share of groups that were drawn from the buffer, as if just rolled out.

    made: passes of this step so far."""
    mine = dist.split(len(groups))
    device, G = learner.device, learner.config.group_size
    if not len(mine):
        nothing = torch.zeros(0, device=device)
        return pass_batch(learner, empty_rollout(device), nothing.view(0, G), versions=nothing,
                          weights=nothing, made=made)

    fields, rewards, versions = unpack([groups[i] for i in mine], device)
    weights = torch.from_numpy(weights[mine.start:mine.stop]).to(device)
    weights = weights.repeat_interleave(G)
    return pass_batch(learner, Rollout(**fields), rewards, versions, weights, made=made)


def pass_batch(learner, rollout, rewards, versions, weights=None, fresh=False, on_policy=False,
               made=0):
    """The batch of a pass, with the age of each row, pi at its start where needed, and the weights.

    fresh: just drawn, so that log mu is still the sampler's. on_policy: pi drew the batch; there is
    nothing to correct, and prox is mu. made: passes of this step so far."""
    c = learner.config
    batch = learner.batch(rollout, rewards)
    if fresh:
        learner.score_mu(batch, rollout.version)
    batch.lag = learner.progress.step - versions.float()

    by_prox = c.correction == "decoupled" or c.trust_region == "second_moment"
    needs_prox = by_prox and not on_policy
    if needs_prox and c.prox == "loglinear":
        batch.prox_share = prox_share(c, batch.lag * c.replay_ratio + made)

    if needs_prox and c.prox == "forward":
        batch.prox_logp = learner.score(batch)[0]
    else:           # Learner.backward writes pi's log-probs here: measure needs no forward
        batch.pi_logp = batch.sampler_logp.clone()

    add_weights(batch, c, weights,
                reduce=lambda sums: dist.all_reduce(sums, learner.device),
                gather=lambda x: torch.cat(dist.gather_objects(x.cpu())))
    return batch


def prox_share(c, passes):
    """How far prox is on the way from mu to pi, where it is not measured: (B,).

    passes (B,): those from mu to prox, if each step makes --replay-ratio of them. Where a pass is
    one update, the update meets prox itself: 1. Else pi is taken to be one pass further,
    v / (v + 1)."""
    if c.epochs * c.minibatches == 1:
        return torch.ones_like(passes)
    return passes / (passes + 1)


def store(learner, rollout, rewards, batch):
    """Put the fresh groups of all ranks into the buffer."""
    rollout = replace(rollout, logps=batch.old_logp, version=learner.progress.behaviour_step)
    mine = pack(rollout, rewards, learner.model.config.vocab_size, batch.active,
                np.float16 if batch.drawn_logp is None else np.float32)
    everyones = [group for part in dist.gather_objects(mine) for group in part]
    learner.state.buffer.add(everyones, learner.progress.step)

    held = set(map(id, learner.state.buffer.groups))
    kept = sum(id(group) in held for group in everyones)
    if kept < len(everyones):
        learner.say(f"step {learner.progress.step}: the buffer kept {kept} of {len(everyones)} "
                    "groups of this rollout: raise --buffer-mb")


def measure(learner, batch, groups=()):
    """The pass's Drift over all ranks; replayed groups learn their effective sample size."""
    pi = batch.pi_logp if batch.prox_logp is None else batch.prox_logp
    mask = batch.mask * batch.active[:, None]
    log_ratio = torch.where(mask.bool(), pi - batch.old_logp, 0.0)
    here = drift_of(log_ratio, mask, batch.lag[batch.active])

    if groups:
        trained = batch.active.view(-1, learner.config.group_size)                  # (n, G)
        weights = level_ratio(log_ratio, mask, "sequence")[:, 0].view_as(trained)
        shares = []
        for w, t in zip(weights, trained):
            shares.append(effective_sample_size(w[t]) / max(int(t.sum()), 1))
        everyones = [share for part in dist.gather_objects(shares) for share in part]
        for group, share in zip(groups, everyones):
            group.ess = share

    sums = {name: value for name, value in vars(here).items() if name not in Drift.MAXIMA}
    maxima = {name: getattr(here, name) for name in Drift.MAXIMA}
    return Drift(**dist.all_reduce(sums, learner.device),
                 **dist.all_reduce(maxima, learner.device, "max"))


def too_far(c, drift):
    """Whether reuse should end: by --kl-limit, or by ESS with --adaptive-replay."""
    above_limit = c.kl_limit and drift.kl_a_token > c.kl_limit
    few_effective = c.adaptive_replay and drift.ess < 0.5
    return bool(above_limit or few_effective)


def adapt(learner, last, old):
    """Choose the replay ratio and the clip of the next step by the drift that was met last.

    old: pi had moved away from the policy that drew those samples."""
    c, state = learner.config, learner.state
    if c.adaptive_replay and last.tokens > 0:           # some token was trained
        state.replay_ratio = adapt_replay(state.replay_ratio, too_far(c, last), c.replay_ratio)
    if c.adaptive_clip and old:
        state.clip = adapt_clip(state.clip, last.kl_a_token, c.kl_limit,
                                least=c.clip_low / 4, most=c.clip_low * 2)


def annealed_beta(learner):
    """The bias correction of prioritized replay: from --priority-beta to 1 over the run."""
    c = learner.config
    return c.priority_beta + (1 - c.priority_beta) * learner.progress.step / c.steps


def metrics(learner, drifts, last):
    """All passes of the step together, each as pi was when it met them; and the drift that was met
    last, which may have ended the reuse."""
    every, buffer = sum(drifts, Drift()), learner.state.buffer
    return {"ess": every.ess, "kl_pi_mu": every.kl_a_token,
            "ess_last": last.ess, "kl_last": last.kl_a_token,
            "is_weight_max": every.largest_weight,
            "staleness": every.staleness, "staleness_max": every.oldest,
            "replay_ratio": len(drifts),
            "buffer_groups": len(buffer), "buffer_mb": buffer.nbytes / 2 ** 20}
