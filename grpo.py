"""GRPO: Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300), as pure functions of tensors.

PPO learns a critic to say how good a completion is compared with what was expected. GRPO draws a group of G
completions of the same prompt and compares each with the others: no second network, no value loss.

    A_i   = (r_i - mean(r)) / std(r)                                    advantage of completion i in its group
    rho   = pi(token) / mu(token) = exp(logp - old_logp)                pi is trained, mu drew the tokens
    loss  = - min(rho A, clip(rho, 1 - low, 1 + high) A)  +  beta KL    per token
    then averaged: over all tokens ("token", DAPO), within each sequence first ("sequence", DeepSeekMath)
    or by a constant length ("constant", Dr. GRPO, arXiv 2503.20783).

N prompts x G completions = B rows, prompt-major; T positions, right-padded; mask (B, T) is 1 on completion tokens,
the stop token included. On-policy rho is 1, so the loss is near -mean(A) = 0 while its gradient is not: a loss of
zero is normal here. gtpo.py and offpolicy.py change these functions; each says which.
Left out: entropy bonus and length penalties, which belong to the reward.
"""
import torch

MAX_LOG_RATIO = 20.0    # exp(20) is already absurd: beyond it only overflow is left to prevent


def group_advantages(rewards, scale="std", eps=1e-6, unbiased=False):
    """How much better each completion is than its group.

    rewards (N, G) -> advantages (N, G), float32 (float64 stays). A group whose rewards are all equal teaches
    nothing and gives exactly 0: tested by max == min, because in floating point the std of equal numbers is not 0.
    scale: "std" divides by the group's std (DeepSeekMath), "none" does not (Dr. GRPO), "loo" subtracts the mean of
    the *other* completions (RLOO, = "none" x G/(G-1)), "batch" divides by the std of all rewards (Lite-PPO,
    arXiv 2508.08221). unbiased: std with G - 1 (TRL, verl) instead of G. ValueError on another shape or scale."""
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be (prompts, group), not {tuple(rewards.shape)}")
    if scale not in ("std", "none", "loo", "batch"):
        raise ValueError(f"scale must be std, none, loo or batch, not {scale!r}")
    r = rewards if rewards.dtype == torch.float64 else rewards.float()
    G, correction = r.shape[1], int(unbiased)
    advantages = r - r.mean(1, keepdim=True)
    if scale == "loo":
        advantages = advantages * G / max(G - 1, 1)
    elif scale == "std" and G > correction:
        advantages = advantages / (r.std(1, correction=correction, keepdim=True) + eps)
    elif scale == "batch" and r.numel() > correction:
        advantages = advantages / (r.std(correction=correction) + eps)
    return torch.where(informative(rewards)[:, None], advantages, 0.0)


def informative(rewards):
    """rewards (N, G) -> (N,) bool: the groups whose completions differ, so that they carry a gradient."""
    return rewards.amax(1) != rewards.amin(1)


def _ratio(logp, old_logp, mask, level):
    """pi / mu of each token, or of the row's geometric mean: (B, T)."""
    log_ratio = _log_ratio(logp, old_logp, mask)
    if level == "sequence":
        log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(logp)
    return log_ratio.exp()


def _log_ratio(logp, other, mask):
    """logp - other on the mask and exactly 0 off it (padding may hold anything, even nan), bounded."""
    return torch.where(mask.bool(), logp - other, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, level="token", dual_clip=None):
    """The clipped surrogate (PPO, arXiv 1707.06347), negated: (B, T), 0 off the mask.

    logp (B, T) with gradient; old_logp (B, T) of the policy that drew the tokens; advantages (B,); mask (B, T).
    level: "token" one ratio a token; "sequence" its geometric mean over the row (GSPO, arXiv 2507.18071).
    clip_high > clip_low leaves rare tokens more room to grow (clip-higher, DAPO, arXiv 2503.14476).
    dual_clip: for A < 0 the loss is at most dual_clip x |A| (arXiv 1912.09729; verl uses 3), None for no bound."""
    if level not in ("token", "sequence"):
        raise ValueError(f"level must be token or sequence, not {level!r}")
    ratio, A = _ratio(logp, old_logp, mask, level), advantages[:, None]
    loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    if dual_clip is not None:
        loss = torch.where(A < 0, torch.minimum(loss, -dual_clip * A), loss)
    return torch.where(mask.bool(), loss, 0.0)


def clipped(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, level="token"):
    """(B, T) of 0/1: tokens whose gradient the clip removes: pushed up above 1 + high or down below 1 - low."""
    ratio, A = _ratio(logp, old_logp, mask, level), advantages[:, None]
    return ((A > 0) & (ratio > 1 + clip_high) | (A < 0) & (ratio < 1 - clip_low)).float() * mask


def kl_penalty(logp, ref_logp, kind="k3", old_logp=None, mask=None):
    """Estimates of KL(pi || pi_ref) at the drawn tokens (http://joschu.net/blog/kl-approx.html): (B, T).

    With d = ref_logp - logp:  k1 = -d,  k2 = d^2 / 2,  k3 = exp(d) - d - 1 (never negative; DeepSeekMath).
    As a *loss* they differ: on-policy the gradient of k1 is zero in expectation, of k2 that of KL(pi || ref), of k3
    that of the forward KL(ref || pi). "k3_is" multiplies k3 by pi/mu (old_logp; without it the ratio is 1 in value),
    whose gradient is that of KL(pi || ref) again (TRL's default). mask (B, T) zeroes the rest."""
    if kind not in ("k1", "k2", "k3", "k3_is"):
        raise ValueError(f"kind must be k1, k2, k3 or k3_is, not {kind!r}")
    mask = torch.ones_like(logp) if mask is None else mask
    d = _log_ratio(ref_logp, logp, mask)
    if kind == "k1":
        kl = -d
    elif kind == "k2":
        kl = d.square() / 2
    else:
        kl = d.exp() - d - 1
    if kind == "k3_is":
        kl = kl * _log_ratio(logp, logp.detach() if old_logp is None else old_logp, mask).exp()
    return torch.where(mask.bool(), kl, 0.0)


def aggregate(loss, mask, how="token", normalizer=None, max_length=None):
    """A (B, T) loss as one number; the choice with the largest effect on what is learned.

    "token": sum / tokens, long completions weigh more (DAPO). "sequence": mean within a row, then over rows, so a
    token of a long row weighs less (DeepSeekMath). "constant": sum / (rows x max_length), no length bias (Dr. GRPO).
    normalizer: the count of tokens ("token") or rows (the others) over *all* micro-batches and ranks of the step;
    given it, the gradients of any split add up to that of the whole. By default that of this call alone, rows without
    a token not counted. "constant" without max_length divides by the normalizer alone."""
    loss = torch.where(mask.bool(), loss, 0.0)
    lengths = mask.sum(1)
    if how == "token":
        total, count = loss.sum(), lengths.sum()
    elif how == "sequence":
        total, count = (loss.sum(1) / lengths.clamp(min=1)).sum(), (lengths > 0).sum()
    elif how == "constant":
        if max_length is None and normalizer is None:
            raise ValueError('how="constant" needs max_length (tokens)')
        total, count = loss.sum() / (max_length or 1), (lengths > 0).sum()
    else:
        raise ValueError(f"how must be token, sequence or constant, not {how!r}")
    return total / (count.clamp(min=1) if normalizer is None else normalizer)


# ------------------------------------------------------------------------------ the two calls of train.py's loop

METRICS = {"entropy": "tokens", "kl": "tokens", "clip_ratio": "tokens"}     # sums of `loss`, and the count to divide by


def prepare(rollout, rewards, config):
    """Rollout and rewards (N, G) -> the batch that `loss` reads: a dict of tensors with B rows.

    "active" (B,) marks the rows that carry a gradient. With zero_variance="drop" the groups of equal rewards leave
    the loss and its normalizer altogether; with "keep" they stay in the normalizer (and feel the KL penalty).
    mask_truncated leaves rows without a stop token out of the loss, but in the mean of their group (DAPO)."""
    advantages = group_advantages(rewards, config.advantage_scale, unbiased=config.unbiased_std)
    G = rewards.shape[1]
    active = torch.ones(rewards.numel(), dtype=torch.bool, device=rewards.device)
    if config.zero_variance == "drop":
        active = informative(rewards).repeat_interleave(G)
    mask = rollout.completion_mask()
    if config.mask_truncated:
        mask = mask * rollout.finished[:, None]
    return {"tokens": rollout.tokens, "prompt_lengths": rollout.prompt_lengths, "lengths": rollout.lengths, "mask": mask,
            "old_logp": rollout.logps, "advantages": advantages.flatten(), "active": active & (mask.sum(1) > 0)}


def base_sums(logp, entropy, old_logp, mask):
    """What every objective logs: counts, entropy, and the largest |pi / mu - 1|, rounding error where mu is pi."""
    deviation = (_log_ratio(logp.detach(), old_logp, mask).exp() - 1).abs().max()
    return {"tokens": mask.sum(), "rows": (mask.sum(1) > 0).sum(), "entropy": (entropy.detach() * mask).sum(),
            "ratio_max_dev": deviation}


def loss(logp, entropy, batch, config, normalizer, weight=None, row_weight=None):
    """The objective on some rows of the batch: a scalar, and sums over tokens for the log.

    logp, entropy (B, T) of the current policy; normalizer as in aggregate, over the whole optimizer step; for offpolicy.py
    weight (B, T) multiplies the policy term and row_weight (B,) all terms."""
    A, mask, old = batch["advantages"], batch["mask"], batch["old_logp"]
    mu = batch.get("mu_logp", old)          # another policy than the ratio's only in the decoupled form
    per_token = policy_loss(logp, old, A, mask, config.clip_low, config.clip_high, config.ratio_level,
                            config.dual_clip or None)
    if weight is not None:
        per_token = per_token * weight
    kl = torch.zeros_like(logp)
    if config.beta > 0:
        kl = kl_penalty(logp, batch["ref_logp"], config.kl_kind, mu, mask)
        per_token = per_token + config.beta * kl
    if row_weight is not None:
        per_token = per_token * row_weight[:, None]
    clip = clipped(logp.detach(), old, A, mask, config.clip_low, config.clip_high, config.ratio_level)
    sums = {**base_sums(logp, entropy, mu, mask), "kl": kl.detach().sum(), "clip_ratio": clip.sum()}
    return aggregate(per_token, mask, config.aggregation, normalizer, config.max_new_tokens), sums
