"""Off-policy GRPO: learn from completions that an older policy mu drew, as pure functions and one replay buffer.

Drawing completions often costs most of a step, so let more than one update learn from them. Two ways, often confused:

    stale weights   --sync-every v     fresh completions every step, drawn by weights up to v - 1 steps old, so that
                                       sampling need not wait for training: what arXiv 2505.22257 does (v = 10)
    sample reuse    --replay-ratio K   K passes a rollout: one over the fresh groups, K - 1 over groups from the buffer.
                                       That paper's own reuse arm converged more slowly; classic for off-policy RL

Both train pi on tokens of mu. Two forms of the loss, with a ratio a token as in grpo.py:

    bypass      - min(rho A, clip(rho) A),       rho = pi / mu          the clip is the only correction (2505.22257)
    decoupled   - W min(rho A, clip(rho) A),     rho = pi / prox,  W = importance weight of prox / mu, no gradient
                  prox = pi at the start of the pass, one more forward, for samples that are not pi's
                  (AReaL, arXiv 2505.24298; verl)

The advantage is that of the group as it was drawn, with its own mean and std: a baseline of mu. Sequence weights are
exact but their variance grows like exp(2 KL) of the whole completion; token weights are biased but tame; truncating at 2 had
the smallest error of all in an exact comparison on 8-token sequences. For long completions watch `ess`. Function by function
beside grpo.py:

    prepare      the same, also for groups from the buffer        policy_loss   the same
    correct      new: weights of a pass                           loss          + weights, prox for mu, trust region

--replay-ratio 1 --sync-every 1 is grpo.py, bit for bit.
Left out: weights that change in the middle of a completion; asynchronous processes.
"""
import math

import torch

import grpo
from replay import Group, ReplayBuffer, pack, unpack

METRICS = grpo.METRICS
TRACES = ("retrace", "tempered")
SCHEMES = ("none", "standard", "clipped", "truncated", "masked", "self_normalized", *TRACES)
LEVELS = ("token", "sequence", "geometric")


# ------------------------------------------------------------------------------------------------ importance weights

def importance_weights(log_ratio, mask, scheme="none", level="token", cap=2.0, low=None, normalize="", group_size=None,
                       mean=None, trace=1.0):
    """Weights W (B, T) that turn an expectation under mu into one under pi; no gradient, 0 off the mask.

    log_ratio (B, T) = log pi - log mu of the drawn tokens. level: whose ratio w it is: "token", "sequence" (product over
    the row), "geometric" (its |y|-th root, GSPO). scheme:
      none             1: biased, no variance
      standard         w: at sequence level unbiased, E w^2 = 1 + chi^2, so ESS / n is about 1 / (1 + chi^2)
      clipped          w in [low, cap], low by default 1 / cap (CISPO, arXiv 2506.13585; not PPO's clip, which masks)
      truncated        min(w, cap) (TIS, V-trace's rho-bar)
      masked           w where low <= w <= cap, else 0 (MIS, IcePop); low by default 0
      self_normalized  w / mean(w): biased by O(1/B), bounded by B; the same as standard with normalize="batch"
      retrace          W_t = min(1, rho_t) prod_{i>t} trace min(1, rho_i): V-trace (arXiv 1802.01561) without a critic.
                       Beware: the product dies exponentially with length (exp(-8) for 1,024 tokens of sd 0.02), so early
                       tokens learn nothing
      tempered         min(1, rho_t) prod_{i>t} min(1, rho_i)^trace, ours: trace 0 is token-TIS, 1 is retrace. Both
                       ignore level, cap and normalize
    normalize: "" or, after truncation, "batch" or "group" (of group_size rows): divide by the mean weight, over rows, for
    token level over tokens. mean: that mean where it comes from more than this call (other ranks, other micro-batches).
    Raises ValueError for names that are not these."""
    if scheme not in SCHEMES or level not in LEVELS or normalize not in ("", "batch", "group"):
        raise ValueError(f"scheme {scheme!r}, level {level!r}, normalize {normalize!r}: choose {', '.join(SCHEMES)}; "
                         f"{', '.join(LEVELS)}; '', batch, group")
    if normalize == "group" and not group_size or scheme in ("clipped", "truncated", "masked") and not cap:
        raise ValueError("normalize='group' needs group_size; clipped, truncated and masked need a cap above 0")
    if scheme in TRACES:
        return _trace_weights(log_ratio.detach(), mask, scheme, trace)
    w = level_ratio(log_ratio.detach(), mask, level)
    if scheme == "none":
        w = torch.ones_like(w)
    elif scheme == "clipped":
        w = w.clamp(1 / cap if low is None else low, cap)
    elif scheme == "truncated":
        w = w.clamp(max=cap)
    elif scheme == "masked":
        w = torch.where((w <= cap) & (w >= (low or 0.0)), w, 0.0)
    w = torch.where(mask.bool(), w, 0.0)
    if mean is None and (normalize or scheme == "self_normalized"):
        total, count = weight_mass(w, mask, level, group_size if normalize == "group" else None)
        mean = total / count.clamp(min=1)
    return w if mean is None else w / torch.as_tensor(mean).clamp(min=1e-30)


def level_ratio(log_ratio, mask, level):
    """exp of the log-ratio of each token, of its row's sum, or of its row's mean: (B, T), the exponent within +-20."""
    log_ratio = torch.where(mask.bool(), log_ratio, 0.0)
    if level != "token":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    if level == "geometric":
        log_ratio = log_ratio / mask.sum(1, keepdim=True).clamp(min=1)
    return log_ratio.clamp(-grpo.MAX_LOG_RATIO, grpo.MAX_LOG_RATIO).exp()


def weight_mass(weights, mask, level="sequence", group_size=None):
    """(sum of weights, their number), one weight a token or a row: scalars, or (B, 1) of each row's group."""
    if level == "token":
        total, count = weights.sum(1), mask.sum(1)
    else:
        total, count = weights.amax(1), (mask.sum(1) > 0).to(weights.dtype)
    if group_size is None:
        return total.sum(), count.sum()
    return [x.view(-1, group_size).sum(1).repeat_interleave(group_size)[:, None] for x in (total, count)]


def _trace_weights(log_ratio, mask, scheme, trace):
    """min(1, rho_t) times the traces of the tokens after t: a reversed cumulative sum of logs."""
    on = mask.bool()
    down = torch.where(on, log_ratio, 0.0).clamp(-grpo.MAX_LOG_RATIO, 0.0)
    factor = down * trace if scheme == "tempered" else down + torch.tensor(float(trace)).log()
    from_here = torch.where(on, factor, 0.0).flip(1).cumsum(1).flip(1)
    after = torch.nn.functional.pad(from_here[:, 1:], (0, 1))
    return torch.where(on, (down + after).exp(), 0.0)


# ------------------------------------------------------------------------------------- how far pi has moved from mu

def effective_sample_size(weights):
    """(sum w)^2 / sum w^2 of weights (B,), one a sequence: how many samples of pi they are worth, between 1 and B.

    Unnormalised weights will do (the formula 1 / sum w^2 needs a sum of 1). 0 when all are 0."""
    w = torch.as_tensor(weights).cpu().double()
    return (w.sum().square() / w.square().sum().clamp(min=1e-300)).item()


def kl_pi_mu(log_ratio, mask):
    """Estimate of KL(pi || mu) at each token drawn by mu: rho log rho - rho + 1, unbiased and never negative. (B, T)"""
    log_ratio = torch.where(mask.bool(), log_ratio, 0.0).clamp(-grpo.MAX_LOG_RATIO, grpo.MAX_LOG_RATIO)
    return log_ratio.exp() * log_ratio - log_ratio.expm1()          # expm1: exact also for the smallest drift


def drift(log_ratio, mask):
    """What ESS, KL and the largest weight are made of, to be added up (the last: maximised) over ranks and passes.

    [sequences, sum w, sum w^2, tokens, sum of the KL estimate], [max w]; w = pi / mu of a whole completion."""
    w = level_ratio(log_ratio, mask, "sequence")[:, 0][mask.sum(1) > 0].cpu().double()
    sums = [float(x) for x in (len(w), w.sum(), w.square().sum(), mask.sum(), kl_pi_mu(log_ratio, mask).sum())]
    return sums, [w.max().item() if len(w) else 0.0]


def drift_metrics(sums):
    """{"ess": share of the sequences (0 to 1), "kl_pi_mu": nats a token} of summed `drift`; what follows is ignored."""
    n, w, w2, tokens, kl, *_ = sums
    ess = min(w * w / (n * w2), 1.0) if n and w2 else 1.0           # rounding may put it above 1
    return {"ess": ess, "kl_pi_mu": kl / max(tokens, 1)}


# ------------------------------------------------------------------------------------------------------ trust region

def sequence_mask(logp, old_logp, advantages, mask, delta):
    """Keep a completion unless it is bad and has become unlikely: A >= 0 or mean(log mu - log pi) <= delta. (B, 1) of 0/1.

    (DeepSeek-V3.2, arXiv 2512.02556.) delta in nats a token."""
    gap = -torch.where(mask.bool(), logp.detach() - old_logp, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return ((advantages >= 0) | (gap <= delta)).to(logp.dtype)[:, None]


def token_mask(logp, old_logp, advantages, mask, delta):
    """Drop tokens whose probability has already moved delta in the direction of the advantage (DPPO, arXiv 2602.04879).

    (B, T) of 0/1. Unlike a ratio, a difference does not let rare tokens fill the mask."""
    moved = torch.where(mask.bool(), logp.detach().exp() - old_logp.exp(), 0.0)
    return torch.where(advantages[:, None] > 0, moved <= delta, moved >= -delta).to(logp.dtype)


def second_moment_limit(squares, limit):
    """The square from which on tokens must go, so that the mean of the rest stays within `limit` (M2PO, arXiv 2510.01161).

    squares (n,) of log-ratios of *all* tokens of the pass; float, inf when all may stay. Keep what is strictly below."""
    ordered = torch.as_tensor(squares).cpu().double().sort().values
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1)
    fit = int((means <= limit).sum())       # means of sorted numbers only grow
    return ordered[fit].item() if fit < len(ordered) else math.inf


def adapt_clip(clip, kl, limit, least=0.05, most=0.4):
    """The clip range after an update at that KL: 10 % wider below limit / 1.5, narrower above 1.5 limit (PPO's rule for its
    KL coefficient, on the clip); within least and most."""
    factor = 1.1 if kl < limit / 1.5 else 1 / 1.1 if kl > 1.5 * limit else 1.0
    return min(max(clip * factor, least), most)


def adapt_replay(ratio, tripped, most):
    """The next step's replay ratio: 20 % less when the trust region ended this step's reuse, else 20 % more; 1 to most."""
    return min(max(ratio * (0.8 if tripped else 1.2), 1.0), float(most))


# ------------------------------------------------------------------------------ the two calls of train.py's loop

prepare = grpo.prepare      # of the fresh rollout and, on `unpack`ed groups, of a replayed one


def correct(batch, config, weights=None, reduce=lambda sums: sums, gather=lambda x: x):
    """Add what `loss` needs once a pass: "weight" (B, T), importance weights, 0 for dropped tokens; "replay_weight" (B,).

    batch["prox_logp"] is pi at the start of the pass; without it (on-policy, or bypass) only weights (B,), those of the
    replay buffer, count. reduce sums a list of numbers over ranks, gather joins a vector over ranks: means and limits belong
    to the whole pass, never to a part of it."""
    W = mask = batch["mask"] * batch["active"][:, None]         # of the rows that are trained
    if "prox_logp" in batch:
        l = torch.where(mask.bool(), batch["prox_logp"] - batch["old_logp"], 0.0)
        if config.correction == "decoupled":
            W = _configured_weights(l, mask, config, reduce)
        if config.trust_region == "second_moment":
            squares = l.square()
            W = W * (squares < second_moment_limit(gather(squares[mask.bool()]), config.trust_delta))
    batch["weight"] = W
    batch["replay_weight"] = torch.ones_like(batch["advantages"]) if weights is None else weights


def _configured_weights(log_ratio, mask, config, reduce):
    """importance_weights as the config names them; a mean over the batch is one over all ranks."""
    scheme, level, normalize = config.importance, config.importance_level, config.importance_normalize
    if scheme == "self_normalized":
        scheme, normalize = "standard", normalize or "batch"
    options = {"cap": config.importance_cap, "low": config.importance_low or None, "trace": config.trace}
    if normalize == "batch":
        local = importance_weights(log_ratio, mask, scheme, level, **options)
        total, count = reduce([float(x) for x in weight_mass(local, mask, level)])
        return importance_weights(log_ratio, mask, scheme, level, mean=total / max(count, 1), **options)
    return importance_weights(log_ratio, mask, scheme, level, normalize=normalize, group_size=config.group_size, **options)


def loss(logp, entropy, batch, config, normalizer):
    """As grpo.loss, with prox in the place of mu when decoupled, the weights of `correct`, and the trust region."""
    mu, A, mask, weight = batch["old_logp"], batch["advantages"], batch["mask"], batch["weight"]
    if config.trust_region in ("sequence", "token"):
        keep = sequence_mask if config.trust_region == "sequence" else token_mask
        weight = weight * keep(logp, mu, A, mask, config.trust_delta)
    if config.correction == "decoupled" and "prox_logp" in batch:
        batch = {**batch, "old_logp": batch["prox_logp"], "mu_logp": mu}
    return grpo.loss(logp, entropy, batch, config, normalizer, weight, batch["replay_weight"])
