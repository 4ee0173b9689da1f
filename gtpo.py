"""GTPO: Group-relative Trajectory-based Policy Optimization (Simoni et al., arXiv 2508.03772).

Not "GTPO and GRPO-S" (Tan et al., arXiv 2508.04349), another method of the same name. The paper's
body was not at hand: "published" below means the README of its repository.

GRPO gives every token of a completion the same advantage. Right and wrong completions of one prompt
begin alike (the template) and end alike (the answer's form, the stop token), so those tokens are
pushed up by one completion (a *row*) and down by another. They are called *conflict tokens*.
Pushing them down breaks the form, and pushing all down flattens the policy until it collapses. GTPO
maximises

    J = 1/B sum_i  gate_i (A_i - gamma H_i) / |o_i|  sum_t rho_it lambda_it,    A_i = r_i - mean(r)

    lambda   2 on a conflict token of a row with A > 0 (amplified), 0 in one with A < 0 (protected),
             1 elsewhere
    H_i      mean token entropy of completion i under pi, no gradient: a high one costs advantage
    gate     0 for completions of H_i > ln 2 if the initial policy was below ln 2; else 1. Below
             ln 2 some token has a probability above 1/2 (p_max >= exp(-H)); above ln 2 that is
             no longer certain
    rho      pi / mu, 1 at the first update; no clip

and has no KL term, so no reference model. Function by function beside grpo.py:

    prepare         with the conflict weights
    complete        with the initial entropy
    policy_loss     without the clip; with gate, entropy penalty and lambda
    loss            without the KL
    aggregate       the same, by default within a completion first

The official code (5d33811) does not compute this objective. Each difference is a choice here.
`official=True` takes the code's side except in the last four choices (for gamma pass 0.1, for the
groups give --zero-variance keep):

    here                          official code         why
    1/B over completions          sum_over_group        the published formula; lr keeps its meaning
    no division                   divide_by_conflict    not in the formula: a 30-token template
                                                        divides the row's gradient by 30
    lambda at most cap = 2        product: up to 4      0, 1, 2 in the formula; 4 only where short
                                                        rows overlap
    ln 2, and H of the initial    0.7, always on        a base model above 0.7 nats would train on
                                                        nothing
    rho = pi / mu                 1                     several updates a rollout
    gamma 0.005                   0.1                   theirs fits rewards of 0 to 20; ours, of 0
                                                        or 1, are 20 times smaller
    equal rewards: group dropped  kept: A' = -gamma H   pushes all-right groups down; no verified
                                                        signal in it
    lengths from the mask         ids != pad            pad == eos works
    entropy at the temperature    of the raw logits     of the policy that drew the tokens
"""
import math
from dataclasses import dataclass

import torch

import dist
import grpo
from config import setting

LN2 = math.log(2)
OFFICIAL_GATE = {"initial_entropy": 0.0, "threshold": 0.7}


# ---------------------------------------------------------------------------------- conflict tokens

def conflict_weights(tokens, mask, advantages, group_size, amplify=2.0, cap=2.0):
    """lambda (B, T), 0 off the mask: the factor of each token's gradient.

    tokens, mask (B, T), rows prompt-major in groups of group_size; advantages (B,). A conflict
    token counts `amplify` in a positive row and 0 in a negative one. A token in both runs (a short
    completion) gets the product, at most `cap`. cap=None leaves the product, as the official code
    does."""
    runs = conflict_runs(tokens, mask, advantages, group_size)
    return weights_of_runs(runs, mask, advantages, amplify, cap)


def conflict_runs(tokens, mask, advantages, group_size):
    """The number of conflict tokens at the start and at the end of each completion: two (B,) int64.

    A token is contested where a positive and a negative row of its group both have it at that
    distance from the start (from the end). A row's run stops at its first token that is not
    contested. tokens, mask (B, T) with one completion a row; rows of advantage 0 take no part. No
    loop: all pairs are compared, in a few times B x G x T bytes."""
    sign = advantages.sign().view(-1, group_size)                       # (N, G)
    positive = (sign > 0)[:, None, :, None]                             # (N, 1, G other, 1)
    negative = (sign < 0)[:, None, :, None]

    runs = []
    for from_end in (False, True):
        aligned = aligned_tokens(tokens, mask, from_end)                # (B, longest)
        aligned = aligned.view(*sign.shape, aligned.shape[1])           # (N, G, longest)

        mine = aligned[:, :, None]                                      # (N, G row, 1, longest)
        others = aligned[:, None]                                       # (N, 1, G other, longest)
        same = mine == others                                   # (N, G row, G other, longest)
        contested = (same & positive).any(2) & (same & negative).any(2)     # (N, G row, longest)

        run = (contested & (aligned >= 0)).int().cumprod(2).sum(2)      # (N, G row)
        runs.append((run * sign.abs()).flatten().long())
    return runs


def aligned_tokens(tokens, mask, from_end):
    """(B, longest) int32: each row's completion tokens, reversed if from_end, and then -1."""
    lengths = mask.sum(1, keepdim=True).long()                          # (B, 1)
    first = (mask.cumsum(1) == 0).sum(1, keepdim=True)                  # (B, 1)
    longest = int(lengths.max()) if len(lengths) else 0
    distance = torch.arange(max(longest, 1), device=tokens.device)[None]

    source = first + (lengths - 1 - distance if from_end else distance)
    aligned = tokens.gather(1, source.clamp(0, tokens.shape[1] - 1))
    return torch.where(distance < lengths, aligned, -1).int()


def weights_of_runs(runs, mask, advantages, amplify, cap):
    """lambda (B, T) of the runs that conflict_runs found; see conflict_weights."""
    from_start = mask.cumsum(1) - 1
    from_end = mask.sum(1, keepdim=True) - 1 - from_start
    factor = torch.where(advantages > 0, amplify, 0.0)[:, None]         # (B, 1)

    weights = mask.float()
    for distance, run in zip((from_start, from_end), runs):
        weights = weights * torch.where(distance < run[:, None], factor, 1.0)
    return weights if cap is None else weights.clamp(max=cap)


# --------------------------------------------------------------------------------- entropy and gate

def mean_entropy(entropy, mask):
    """(B, T) token entropies -> (B,) mean over each row's tokens."""
    return torch.where(mask.bool(), entropy, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def entropy_gate(entropy, initial_entropy, threshold=LN2):
    """(B,) of 0/1: which completions are trained on.

    entropy (B,) mean token entropy of each completion, nats; initial_entropy the same of the
    initial policy (a float). A policy that began above the threshold keeps all completions: there a
    high entropy is no sign of collapse."""
    began_above = torch.as_tensor(initial_entropy > threshold, device=entropy.device)
    keep = (entropy <= threshold) | began_above
    return keep.to(entropy.dtype)


# ----------------------------------------------------------------------------------------- the loss

def policy_loss(logp, old_logp, advantages, mask, entropy, conflict, gate, gamma=0.005):
    """- gate (A - gamma H) rho lambda: (B, T), 0 off the mask.

    logp (B, T) with gradient; old_logp (B, T) of the policy that drew the tokens, or None for a
    ratio of 1 (one update a rollout); advantages, entropy (row means), gate (B,); conflict (B,
    T)."""
    shaped = gate * (advantages - gamma * entropy)                      # (B,)
    mu = logp.detach() if old_logp is None else old_logp
    ratio = grpo.policy_ratio(logp, mu, mask)                           # (B, T)
    return torch.where(mask.bool(), -ratio * shaped[:, None] * conflict, 0.0)


def gtpo_loss(logp, old_logp, advantages, mask, entropy, tokens, group_size, initial_entropy,
              gamma=0.005, amplify=2.0, threshold=LN2, cap=2.0, divide_by_conflict=False,
              sum_over_group=False, official=False):
    """The whole objective of a batch of groups, as one number, to read and to test.

    Training calls `loss`, below, which is the same by micro-batches. entropy (B, T), other
    arguments as above.

    The named choices are the table of the file's docstring. official=True takes the code's side,
    except gamma (pass 0.1)."""
    if official:
        old_logp = cap = None
        divide_by_conflict = sum_over_group = True
        initial_entropy, threshold = OFFICIAL_GATE.values()

    runs = conflict_runs(tokens, mask, advantages, group_size)
    conflict = weights_of_runs(runs, mask, advantages, amplify, cap)
    H = mean_entropy(entropy.detach(), mask)
    gate = entropy_gate(H, initial_entropy, threshold)

    per_token = policy_loss(logp, old_logp, advantages, mask, H, conflict, gate, gamma)
    per_token = per_token * row_scale(runs, group_size, divide_by_conflict, sum_over_group)
    return grpo.aggregate(per_token, mask, "sequence")


def row_scale(runs, group_size, divide_by_conflict, sum_over_group):
    """(B, 1): the factor of each row in the official code, 1 without its two choices.

    Its n_conflict is the longer of the two runs: it joins the two masks while the second is still
    reversed."""
    scale = torch.full_like(runs[0], group_size if sum_over_group else 1, dtype=torch.float32)
    if divide_by_conflict:
        scale = scale / torch.maximum(*runs).clamp(min=1)
    return scale[:, None]


# ----------------------------------------------------------------------------------------- settings

@dataclass
class Settings(grpo.GroupSettings):     # no clip and no KL, so those flags do not exist here
    advantage_scale: str = setting("none", choices=grpo.SCALES)         # none, std, loo, batch
    aggregation: str = setting("sequence", choices=grpo.AGGREGATIONS)   # sequence, token, constant
    # objective: conflict tokens and entropy (gtpo.py)
    gtpo_gamma: float = setting(0.005, least=0)     # entropy penalty;
                                                    # the official code's 0.1 is for rewards of 0 to
                                                    # 20

    gtpo_amplify: float = setting(2.0, least=0)     # weight of conflict tokens in positive rows
    gtpo_cap: float = setting(2.0, least=0)         # largest weight of a token in both runs;
                                                    # 0: no bound

    gtpo_ratio: bool = True                         # pi / mu for several updates a rollout; else 1
    gtpo_official: bool = False                     # the official code instead of the published
                                                    # objective (also set --gtpo-gamma)

    def check(self):
        """Raise ValueError for combinations that would be silently ignored, or biased."""
        if 0 < self.gtpo_cap < self.gtpo_amplify:
            raise ValueError(f"--gtpo-cap {self.gtpo_cap} would undo "
                             f"--gtpo-amplify {self.gtpo_amplify}: raise it, or 0 for no cap")

        for name in ("gtpo_amplify", "gtpo_cap", "gtpo_ratio", "aggregation", "advantage_scale"):
            if self.gtpo_official and getattr(self, name) != getattr(Settings, name):
                raise ValueError("--gtpo-official is the official code as it is: "
                                 f"leave --{name.replace('_', '-')} out")

        one_update = self.epochs * self.minibatches == 1
        if (self.gtpo_official or not self.gtpo_ratio) and not one_update:
            raise ValueError("--gtpo-official and --no-gtpo-ratio take pi/mu for 1, which it is "
                             "at a rollout's first update only: "
                             "leave --epochs and --minibatches at 1")


# ------------------------------------------------------------------- the calls of the training loop

METRICS = {**grpo.METRICS, "conflict_protected_frac": "tokens", "conflict_amplified_frac": "tokens",
           "gate_dropped_frac": "rows"}


@dataclass
class Batch(grpo.Batch):
    """A batch of grpo.py, and what GTPO knows of its tokens."""
    conflict: torch.Tensor | None = None            # (B, T) lambda
    scale: torch.Tensor | None = None               # (B, 1), see row_scale
    initial_entropy: torch.Tensor | None = None     # (B,) one number for all; `complete` adds it


def prepare(rollout, rewards, config):
    """As grpo.prepare, with the conflict weights, which depend on the rollout alone."""
    batch = grpo.prepare(rollout, rewards, config)
    G = rewards.shape[1]
    mask = rollout.completion_mask()        # also of the rows that mask_truncated drops

    # a reward at its group's mean has no sign but that of rounding
    rounding = 1e-6 * rewards.abs().amax(1, keepdim=True).clamp(min=1)
    at_mean = grpo.group_advantages(rewards, "none").abs() <= rounding      # (N, G)
    A = torch.where(at_mean.flatten(), 0.0, batch.advantages)

    runs = conflict_runs(batch.tokens, mask, A, G)
    cap = None if config.gtpo_official else config.gtpo_cap or None
    conflict = weights_of_runs(runs, mask, A, config.gtpo_amplify, cap) * batch.mask
    scale = row_scale(runs, G, config.gtpo_official, config.gtpo_official)
    return Batch(**vars(batch), conflict=conflict, scale=scale)


def loss(logp, entropy, batch, config, normalizer):
    """The objective on some rows of the batch: a scalar, and sums for the log.

    Arguments as in grpo.loss."""
    old, mask, conflict = batch.old_logp, batch.mask, batch.conflict
    H = mean_entropy(entropy.detach(), mask)

    if config.gtpo_official:
        gate = entropy_gate(H, **OFFICIAL_GATE)
    else:
        gate = entropy_gate(H, batch.initial_entropy)

    ratio_is_1 = config.gtpo_official or not config.gtpo_ratio
    per_token = policy_loss(logp, None if ratio_is_1 else old, batch.advantages, mask, H, conflict,
                            gate, config.gtpo_gamma)
    per_token = per_token * batch.scale
    total = grpo.aggregate(per_token, mask, config.aggregation, normalizer, config.max_new_tokens)

    none = torch.zeros((), device=logp.device)          # this objective has no KL and no clip
    sums = {**grpo.common_sums(logp, entropy, batch.sampler_logp, mask),
            "kl": none, "clip_ratio": none,
            "gate_dropped_frac": (gate == 0).sum(),
            "conflict_amplified_frac": (conflict > 1).sum(),
            "conflict_protected_frac": ((conflict == 0) & mask.bool()).sum()}
    return total, sums


# ----------------------------------------------------- not pure: what only the first policy can say

class State:
    """What a run carries from step to step, and every checkpoint holds."""

    def __init__(self, config):
        self.initial_entropy = None         # nats, of the first policy; None before the first step

    def state_dict(self):
        return {"initial_entropy": self.initial_entropy}

    def load_state_dict(self, state):
        self.initial_entropy = state["initial_entropy"]


def complete(learner, batch):
    """Add the initial entropy: the mean over the first rollout, before any update."""
    grpo.complete(learner, batch)
    state = learner.state

    if state.initial_entropy is None:
        _, entropy = learner.score(batch, rows=range(len(batch.mask)))
        sums = dist.all_reduce({"entropy": float(mean_entropy(entropy, batch.mask).sum()),
                                "rows": float((batch.mask.sum(1) > 0).sum())}, learner.device)
        state.initial_entropy = sums["entropy"] / sums["rows"] if sums["rows"] else None

    batch.initial_entropy = torch.full_like(batch.advantages, state.initial_entropy or 0.0)
