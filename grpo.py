"""GRPO: Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300), in pure functions.

PPO learns a critic to say how good a completion is compared with what was expected. GRPO draws a
group of G completions of the same prompt and compares each with the others: no second network, no
value loss.

    A_i   = (r_i - mean(r)) / std(r)                        advantage of a completion in its group
    rho   = pi(token) / mu(token) = exp(logp - old_logp)    pi is trained, mu drew the tokens
    loss  = - min(rho A, clip(rho, 1 - low, 1 + high) A)  +  beta KL        of a token

The loss is averaged over all tokens ("token", DAPO), within each sequence first ("sequence",
DeepSeekMath), or by a constant length ("constant", Dr. GRPO, arXiv 2503.20783).

N prompts x G completions = B rows, prompt-major; T positions, right-padded; mask (B, T) is 1 on
completion tokens, the stop token included. A loss near zero is normal here. On-policy rho is 1, so
the loss is minus the mean advantage, which is 0 ("sequence") or small ("token", where longer
completions weigh more); its gradient is what teaches. The clip acts from the second update of a
rollout on (--epochs, --minibatches).

gtpo.py and offpolicy.py change these functions; each says which. Not here, though often added: an
entropy bonus and length penalties. Length is a matter of the reward.
"""
from dataclasses import dataclass, fields, replace

import torch

import dist
from config import setting

MAX_LOG_RATIO = 20.0    # exp(20) is already absurd: beyond it only overflow is left to prevent
SCALES = ("std", "none", "loo", "batch")
LEVELS = ("token", "sequence")
KL_KINDS = ("k1", "k2", "k3", "k3_is")
AGGREGATIONS = ("token", "sequence", "constant")


# --------------------------------------------------------------------------------------- advantages

def group_advantages(rewards, scale="std", eps=1e-6, unbiased=False):
    """How much better each completion is than its group.

    rewards (N, G) -> advantages (N, G), float32 (float64 stays). A group whose rewards are all
    equal teaches nothing and gives exactly 0. That is tested by max == min, because in floating
    point the std of equal numbers is not 0.

    scale: "std" divides by the group's std (DeepSeekMath). "none" does not (Dr. GRPO). "loo"
    subtracts the mean of the *other* completions (RLOO, = "none" x G/(G-1)). "batch" divides by the
    std of all rewards (Lite-PPO, arXiv 2508.08221).
    unbiased: std with G - 1 (TRL, verl) instead of G.

    Raises ValueError on another shape or scale."""
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be (prompts, group), not {tuple(rewards.shape)}")
    if scale not in SCALES:
        raise ValueError(f"scale must be std, none, loo or batch, not {scale!r}")

    r = rewards if rewards.dtype == torch.float64 else rewards.float()
    G = r.shape[1]
    correction = int(unbiased)
    advantages = r - r.mean(1, keepdim=True)

    if scale == "loo":
        advantages = advantages * G / max(G - 1, 1)
    elif scale == "std" and G > correction:
        advantages = advantages / (r.std(1, correction=correction, keepdim=True) + eps)
    elif scale == "batch" and r.numel() > correction:
        advantages = advantages / (r.std(correction=correction) + eps)

    return torch.where(informative(rewards)[:, None], advantages, 0.0)


def informative(rewards):
    """rewards (N, G) -> (N,) bool: the groups that differ within, and so carry a gradient."""
    return rewards.amax(1) != rewards.amin(1)


# ---------------------------------------------------------------------------- the clipped surrogate

def policy_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, level="token",
                dual_clip=None):
    """The clipped surrogate (PPO, arXiv 1707.06347), negated: (B, T), 0 off the mask.

    logp (B, T) with gradient; old_logp (B, T) of the policy that the ratio is taken to, the one
    that drew the tokens (in offpolicy.py it may be prox); advantages (B,); mask (B, T).

    level: "token" one ratio a token; "sequence" its geometric mean over the row (GSPO, arXiv
    2507.18071).
    clip_high > clip_low leaves rare tokens more room to grow (clip-higher, DAPO, arXiv 2503.14476).
    dual_clip: for A < 0 the loss is at most dual_clip x |A| (arXiv 1912.09729; verl uses 3); None
    for no bound."""
    if level not in LEVELS:
        raise ValueError(f"level must be token or sequence, not {level!r}")

    A = advantages[:, None]                                     # (B, 1)
    ratio = policy_ratio(logp, old_logp, mask, level)           # (B, T)
    unclipped = ratio * A
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * A
    loss = -torch.minimum(unclipped, clipped)

    if dual_clip is not None:
        bounded = torch.minimum(loss, -dual_clip * A)
        loss = torch.where(A < 0, bounded, loss)

    return torch.where(mask.bool(), loss, 0.0)


def clipped_tokens(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, level="token"):
    """(B, T) of 0/1: tokens whose gradient the clip removes.

    They were pushed up and are above 1 + high, or pushed down and below 1 - low."""
    A = advantages[:, None]
    ratio = policy_ratio(logp, old_logp, mask, level)
    too_high = (A > 0) & (ratio > 1 + clip_high)
    too_low = (A < 0) & (ratio < 1 - clip_low)
    return (too_high | too_low).float() * mask


def policy_ratio(logp, old_logp, mask, level="token"):
    """pi / mu of each token, or of its row's geometric mean: (B, T)."""
    log_ratio = masked_log_ratio(logp, old_logp, mask)
    if level == "sequence":
        mean = log_ratio.sum(1) / mask.sum(1).clamp(min=1)
        log_ratio = mean[:, None].expand_as(logp)
    return log_ratio.exp()


def masked_log_ratio(logp, other, mask):
    """logp - other, bounded: (B, T), exactly 0 off the mask, where padding may be nan."""
    return torch.where(mask.bool(), logp - other, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


# ------------------------------------------------------------------------------ KL to the reference

def kl_penalty(logp, ref_logp, kind="k3", old_logp=None, mask=None):
    """Estimates of KL(pi || pi_ref) at the drawn tokens: (B, T).

    With d = ref_logp - logp (http://joschu.net/blog/kl-approx.html):

        k1 = -d          k2 = d^2 / 2          k3 = exp(d) - d - 1, never negative (DeepSeekMath)

    As a *loss* they differ. On-policy the gradient of k1 is zero in expectation, that of k2 is the
    gradient of KL(pi || ref), that of k3 the gradient of the forward KL(ref || pi). "k3_is"
    multiplies k3 by pi/mu, whose gradient is that of KL(pi || ref) again (the default of TRL 1.16,
    not ours); without old_logp that ratio is 1 in value. mask (B, T) zeroes the rest."""
    if kind not in KL_KINDS:
        raise ValueError(f"kind must be k1, k2, k3 or k3_is, not {kind!r}")
    mask = torch.ones_like(logp) if mask is None else mask

    d = masked_log_ratio(ref_logp, logp, mask)
    if kind == "k1":
        kl = -d
    elif kind == "k2":
        kl = d.square() / 2
    else:
        kl = d.expm1() - d          # exp(d) - d - 1 rounds below 0 for small d

    if kind == "k3_is":
        mu = logp.detach() if old_logp is None else old_logp
        kl = kl * masked_log_ratio(logp, mu, mask).exp()

    return torch.where(mask.bool(), kl, 0.0)


# -------------------------------------------------------------------------- from tokens to a number

def aggregate(loss, mask, how="token", normalizer=None, max_length=None):
    """A (B, T) loss as one number: it decides what a token of a long completion weighs.

    "token": sum / tokens, so long completions weigh more (DAPO). "sequence": the mean within a row,
    then over rows, so a token of a long row weighs less (DeepSeekMath). "constant":
    sum / (rows x max_length), no length bias (Dr. GRPO).

    normalizer: the count of tokens ("token") or rows (the others) over *all* micro-batches and
    ranks of the update. Given it, the gradients of any split add up to that of the whole. By
    default it is the count of this call alone, where rows without a token do not count. "constant"
    without max_length divides by the normalizer alone."""
    loss = torch.where(mask.bool(), loss, 0.0)
    lengths = mask.sum(1)                                       # (B,)

    if how == "token":
        total = loss.sum()
        count = lengths.sum()
    elif how == "sequence":
        total = (loss.sum(1) / lengths.clamp(min=1)).sum()
        count = (lengths > 0).sum()
    elif how == "constant":
        if max_length is None and normalizer is None:
            raise ValueError('how="constant" needs max_length (tokens)')
        total = loss.sum() / (max_length or 1)
        count = (lengths > 0).sum()
    else:
        raise ValueError(f"how must be token, sequence or constant, not {how!r}")

    return total / (count.clamp(min=1) if normalizer is None else normalizer)


# ----------------------------------------------------------------------------------------- settings

# setting(): a default, bounds or choices, and what it needs to mean anything; it becomes a flag,
# whose help is the comment behind it (config.py).

# conditions without which a setting would do nothing: (test of the config, what to give)
WITH_STD = (lambda c: c.advantage_scale in ("std", "batch"), "--advantage-scale std or batch")
WITH_BETA = (lambda c: c.beta > 0, "--beta above 0")


@dataclass
class GroupSettings:
    # objective: advantages and averaging (grpo.py)
    advantage_scale: str = setting("std", choices=SCALES)       # std, none (Dr. GRPO), loo (RLOO),
                                                                # batch

    unbiased_std: bool = setting(False, needs=[WITH_STD])       # std with G - 1, as TRL and verl
    aggregation: str = setting("token", choices=AGGREGATIONS)   # token (DAPO), sequence
                                                                # (DeepSeekMath), constant (Dr.
                                                                # GRPO)

    zero_variance: str = setting("drop", choices=("drop", "keep"))  # groups of equal rewards: drop,
                                                                    # keep (in the normalizer)

    mask_truncated: bool = False            # leave cut completions out of the loss


@dataclass
class Settings(GroupSettings):
    # objective: clip and KL (grpo.py)
    clip_low: float = setting(0.2, least=0)             # how far below 1 a ratio still counts
    clip_high: float = setting(0.2, least=0)            # how far above; 0.28: DAPO's clip-higher
    ratio_level: str = setting("token", choices=LEVELS) # token, sequence (GSPO: clip about 3e-4)
    dual_clip: float = setting(0.0, least=0)            # 3.0: verl's bound for negative advantages;
                                                        # 0: none

    beta: float = setting(0.0, least=0)                 # weight of the KL to the starting model;
                                                        # above 0 loads a frozen reference

    kl_kind: str = setting("k3", choices=KL_KINDS, needs=[WITH_BETA])       # k1, k2, k3, k3_is

    def check(self):
        """Raise ValueError for settings that would quietly do something else."""
        if 0 < self.dual_clip <= 1:
            raise ValueError(f"--dual-clip {self.dual_clip}: must be above 1, or 0 for none; "
                             "at 1 it would take the gradient of all wrong answers")


# ------------------------------------------------------------------- the calls of the training loop

# the sums that `loss` returns, and the count that each is divided by
METRICS = {"entropy": "tokens", "kl": "tokens", "clip_ratio": "tokens"}


@dataclass
class Batch:
    """The B = N x G completions that a loss is computed on; None is what this run does not need."""
    tokens: torch.Tensor                    # (B, T) int64, prompt then completion, right-padded
    prompt_lengths: torch.Tensor            # (B,) int64
    lengths: torch.Tensor                   # (B,) int64, prompt and completion together
    mask: torch.Tensor                      # (B, T) float32, 1 on the tokens that are trained
    rewards: torch.Tensor                   # (B,)
    advantages: torch.Tensor                # (B,)
    active: torch.Tensor                    # (B,) bool: the rows that carry a gradient

    old_logp: torch.Tensor | None           # (B, T) log mu of the tokens, which mu drew. None: pi
                                            # is mu still, and Learner.backward takes pi's own
    drawn_logp: torch.Tensor | None = None  # (B, T) the sampler's log mu, if old_logp is not that
    ref_logp: torch.Tensor | None = None    # (B, T) log pi_ref; `complete` adds it with --beta
    pi_logp: torch.Tensor | None = None     # (B, T) log pi: where offpolicy.py allocates it,
                                            # Learner.backward keeps here what it computes anyway

    @property
    def sampler_logp(self):
        return self.old_logp if self.drawn_logp is None else self.drawn_logp

    def rows(self, indices):
        """The batch of these rows alone, cut to the longest of them.

        Every field has B rows; a two-dimensional one is cut to T columns."""
        indices = torch.as_tensor(indices, dtype=torch.int64, device=self.tokens.device)
        T = int(self.lengths[indices].max()) if len(indices) else 1

        chosen = {}
        for f in fields(self):
            tensor = getattr(self, f.name)
            if tensor is not None:
                chosen[f.name] = tensor[indices][:, :T] if tensor.ndim == 2 else tensor[indices]
        return replace(self, **chosen)


def prepare(rollout, rewards, config):
    """Turn a rollout and its rewards (N, G) into the batch that `loss` reads.

    With zero_variance="drop" the groups of equal rewards are not active: they leave the loss and
    its normalizer altogether. With "keep" they stay in the normalizer (and feel the KL penalty).
    mask_truncated takes rows without a stop token out of the loss, but leaves them in the mean of
    their group (DAPO)."""
    G = rewards.shape[1]
    advantages = group_advantages(rewards, config.advantage_scale, unbiased=config.unbiased_std)

    mask = rollout.completion_mask()
    if config.mask_truncated:
        mask = mask * rollout.finished[:, None]

    active = mask.sum(1) > 0
    if config.zero_variance == "drop":
        active = active & informative(rewards).repeat_interleave(G)

    return Batch(tokens=rollout.tokens, prompt_lengths=rollout.prompt_lengths,
                 lengths=rollout.lengths, mask=mask, rewards=rewards.flatten(),
                 advantages=advantages.flatten(), active=active, old_logp=rollout.logps)


def loss(logp, entropy, batch, config, normalizer):
    """The objective on some rows of the batch: a scalar, and sums over tokens for the log.

    logp (B, T) with gradient and entropy (B, T) of the current policy; normalizer as in aggregate,
    over the whole optimizer step."""
    old, A, mask = batch.old_logp, batch.advantages, batch.mask
    clip = {"clip_low": config.clip_low, "clip_high": config.clip_high, "level": config.ratio_level}

    per_token = policy_loss(logp, old, A, mask, **clip, dual_clip=config.dual_clip or None)
    kl = torch.zeros_like(logp)
    if config.beta > 0:
        kl = kl_penalty(logp, batch.ref_logp, config.kl_kind, old, mask)
        per_token = per_token + config.beta * kl

    sums = {**common_sums(logp, entropy, batch.sampler_logp, mask),
            "kl": kl.detach().sum(),
            "clip_ratio": clipped_tokens(logp.detach(), old, A, mask, **clip).sum()}
    return aggregate(per_token, mask, config.aggregation, normalizer, config.max_new_tokens), sums


def common_sums(logp, entropy, sampler_logp, mask):
    """Sums that every objective logs, of logp and entropy (B, T), as scalars. ratio_mean_dev is the
    sum of |pi / mu - 1| (Learner.means divides it), ratio_max_dev its largest; mu the sampler's."""
    deviation = (masked_log_ratio(logp.detach(), sampler_logp, mask).exp() - 1).abs()     # 0 off it
    return {"tokens": mask.sum(), "rows": (mask.sum(1) > 0).sum(),
            "entropy": (entropy.detach() * mask).sum(),
            "ratio_mean_dev": deviation.sum(), "ratio_max_dev": deviation.max()}


# ----------------------------------------------- not pure: what only other ranks and models can add

def complete(learner, batch):
    """Add to the batch what `prepare` cannot know: rewards of other ranks, the reference."""
    config = learner.config
    if config.advantage_scale == "batch":       # the std of all rewards, not of this rank's
        parts = dist.gather_objects(batch.rewards.view(-1, config.group_size).cpu())
        everyone = group_advantages(torch.cat(parts), "batch", unbiased=config.unbiased_std)
        mine = everyone.split([len(part) for part in parts])[dist.rank()]
        batch.advantages = mine.flatten().to(batch.advantages)

    if learner.reference is not None:
        batch.ref_logp = learner.score(batch, model=learner.reference)[0]
