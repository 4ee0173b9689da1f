"""GTPO: Group-relative Trajectory-based Policy Optimization (Simoni et al., arXiv 2508.03772), as pure functions.

Not "GTPO and GRPO-S" (Tan et al., arXiv 2508.04349), another method of the same name.

GRPO gives every token of a completion the same advantage. Right and wrong completions of one prompt begin alike (the
template) and end alike (the answer's form, the stop token), so those tokens are pushed up by one row and down by another:
*conflict tokens*. Pushing them down breaks the form, and pushing all down flattens the policy until it collapses. GTPO

    J = 1/B sum_i  gate_i (A_i - gamma H_i) / |o_i|  sum_t rho_it lambda_it                   A_i = r_i - mean(r)

    lambda   2 on a conflict token of a positive row (amplified), 0 in a negative row (protected), 1 elsewhere
    H_i      mean token entropy of completion i under pi, without gradient: a high one costs advantage
    gate     0 for completions of H_i > ln 2, if the initial policy was below ln 2, else 1: below ln 2 some token surely
             has a probability above 1/2 (p_max >= exp(-H)), above it that is no longer guaranteed
    rho      pi / mu, 1 at the first update; no clip

and has no KL term, so no reference model. Function by function beside grpo.py:

    prepare      + the conflict weights              policy_loss   - clip   + gate, - gamma H, + lambda
    loss         - KL                                aggregate     the same, by default within a completion first

The official code (5d33811) is not its own objective. Each difference is a choice here; `official=True` takes the code's side
except in the last four lines (for gamma pass 0.1, for the groups give --zero-variance keep):

    here                            official code               why
    1/B over completions            sum_over_group              the published formula; the learning rate keeps its meaning
    no division                     divide_by_conflict          in no formula: 1/30 of an update for a 30-token template
    lambda at most cap = 2          product: up to 4            0, 1, 2 in the formula; 4 only where short rows overlap
    ln 2, and H of the initial      0.7, always on              a base model above 0.7 nats would train on nothing
    rho = pi / mu                   1                           several updates a rollout
    gamma 0.005                     0.1                         theirs is for rewards of 0 to 20; 20 x weaker for 0 or 1
    equal rewards: group dropped    kept: A' = -gamma H         pushes all-right groups down; no verified signal in it
    lengths from the mask           ids != pad                  pad == eos works
    entropy at the temperature      of the raw logits           of the policy that drew the tokens
The paper's body was not at hand: "published" means the README of its repository.
"""
import math

import torch

import grpo

LN2 = math.log(2)
OFFICIAL_GATE = {"initial_entropy": 0.0, "threshold": 0.7}

METRICS = {**grpo.METRICS, "conflict_protected_frac": "tokens", "conflict_amplified_frac": "tokens",
           "gate_dropped_frac": "rows"}        # as in grpo.py: each a sum of `loss`, divided by that count


def conflict_runs(tokens, mask, advantages, group_size):
    """How many tokens at the start and at the end of each completion are conflict tokens: two (B,) int64.

    A token is contested where a positive and a negative row of its group both have it at that distance from the start
    (from the end); a row's run stops at its first token that is not. tokens, mask (B, T) with one completion a row;
    rows of advantage 0 take no part. No loop: comparisons of all pairs, a few times B x G x T bytes."""
    sign = advantages.sign().view(-1, group_size)
    runs = []
    for from_end in (False, True):
        x = _aligned(tokens, mask, from_end)
        x = x.view(*sign.shape, x.shape[1])                                             # (N, G, T)
        same = x[:, :, None] == x[:, None]                                              # row i, row j, position
        contested = (same & (sign > 0)[:, None, :, None]).any(2) & (same & (sign < 0)[:, None, :, None]).any(2)
        run = (contested & (x >= 0)).int().cumprod(2).sum(2)
        runs.append((run * sign.abs()).flatten().long())
    return runs


def _aligned(tokens, mask, from_end):
    """(B, longest) int32: the masked tokens of each row from its first (or backwards from its last), -1 after them."""
    lengths, first = mask.sum(1, keepdim=True).long(), (mask.cumsum(1) == 0).sum(1, keepdim=True)
    longest = int(lengths.max()) if len(lengths) else 0
    position = torch.arange(max(longest, 1), device=tokens.device)[None]
    source = first + (lengths - 1 - position if from_end else position)
    aligned = tokens.gather(1, source.clamp(0, tokens.shape[1] - 1))
    return torch.where(position < lengths, aligned, -1).int()


def conflict_weights(tokens, mask, advantages, group_size, amplify=2.0, cap=2.0):
    """lambda (B, T), 0 off the mask: what each token's gradient is multiplied by.

    tokens, mask (B, T), rows prompt-major in groups of group_size; advantages (B,). A conflict token counts `amplify` in
    a positive row and 0 in a negative one. A token in both runs (a short completion) gets the product, at most `cap`;
    cap=None leaves the product, as the official code does."""
    return _lambda(conflict_runs(tokens, mask, advantages, group_size), mask, advantages, amplify, cap)


def _lambda(runs, mask, advantages, amplify, cap):
    from_start = mask.cumsum(1) - 1
    from_end = mask.sum(1, keepdim=True) - 1 - from_start
    factor = torch.where(advantages > 0, amplify, 0.0)[:, None]
    weights = mask.float()
    for distance, run in zip((from_start, from_end), runs):
        weights = weights * torch.where(distance < run[:, None], factor, 1.0)
    return weights if cap is None else weights.clamp(max=cap)


def entropy_gate(entropy, initial_entropy, threshold=LN2):
    """(B,) of 0/1: which completions are trained on.

    entropy (B,) mean token entropy of each completion, nats; initial_entropy the same of the initial policy (a float). A
    policy that began above the threshold keeps all: there a high entropy is no sign of collapse."""
    keep = (entropy <= threshold) | torch.as_tensor(initial_entropy > threshold, device=entropy.device)
    return keep.to(entropy.dtype)


def mean_entropy(entropy, mask):
    """(B, T) token entropies -> (B,) mean over each row's tokens."""
    return torch.where(mask.bool(), entropy, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def policy_loss(logp, old_logp, advantages, mask, entropy, conflict, gate, gamma=0.005):
    """- gate (A - gamma H) rho lambda: (B, T), 0 off the mask.

    logp (B, T) with gradient; old_logp (B, T) of the policy that drew the tokens, or None for a ratio of 1 (one update a
    rollout); advantages, entropy (row means), gate (B,); conflict (B, T)."""
    shaped = gate * (advantages - gamma * entropy)
    ratio = grpo._log_ratio(logp, logp.detach() if old_logp is None else old_logp, mask).exp()
    return torch.where(mask.bool(), -ratio * shaped[:, None] * conflict, 0.0)


def gtpo_loss(logp, old_logp, advantages, mask, entropy, tokens, group_size, initial_entropy, gamma=0.005, amplify=2.0,
              threshold=LN2, cap=2.0, divide_by_conflict=False, sum_over_group=False, official=False):
    """The whole objective of a batch of groups, as one number; entropy (B, T), other arguments as above.

    The named choices are the table of the file's docstring; official=True takes the code's side, except gamma (pass 0.1)."""
    if official:
        old_logp, cap, divide_by_conflict, sum_over_group = None, None, True, True
        initial_entropy, threshold = OFFICIAL_GATE.values()
    runs = conflict_runs(tokens, mask, advantages, group_size)
    H = mean_entropy(entropy.detach(), mask)
    conflict, gate = _lambda(runs, mask, advantages, amplify, cap), entropy_gate(H, initial_entropy, threshold)
    scale = _scale(runs, group_size, divide_by_conflict, sum_over_group)
    return grpo.aggregate(policy_loss(logp, old_logp, advantages, mask, H, conflict, gate, gamma) * scale, mask, "sequence")


def _scale(runs, group_size, divide_by_conflict, sum_over_group):
    """(B, 1) what the official code multiplies a row by. Its n_conflict is the longer of the two runs, because it joins
    them without turning the second one round again."""
    scale = torch.full_like(runs[0], group_size if sum_over_group else 1, dtype=torch.float32)
    return (scale / torch.maximum(*runs).clamp(min=1) if divide_by_conflict else scale)[:, None]


# ------------------------------------------------------------------------------ the two calls of train.py's loop

def prepare(rollout, rewards, config):
    """As grpo.prepare, with the conflict weights: they depend on the rollout alone, so once is enough.

    train.py adds "initial_entropy" (B,), the same number in each row: measured on the first rollout of the run."""
    batch = grpo.prepare(rollout, rewards, config)
    G, A, mask = rewards.shape[1], batch["advantages"], rollout.completion_mask()   # also of rows that mask_truncated drops
    rounding = 1e-6 * rewards.abs().amax(1).clamp(min=1).repeat_interleave(G)
    A = torch.where(A.abs() <= rounding, 0.0, A)        # a reward at its group's mean has no sign but that of rounding
    runs = conflict_runs(batch["tokens"], mask, A, G)
    cap = None if config.gtpo_official else config.gtpo_cap or None
    batch["conflict"] = _lambda(runs, mask, A, config.gtpo_amplify, cap) * batch["mask"]
    batch["scale"] = _scale(runs, G, config.gtpo_official, config.gtpo_official)
    return batch


def loss(logp, entropy, batch, config, normalizer):
    """The objective on some rows of the batch: a scalar, and sums for the log. Arguments as in grpo.loss."""
    A, mask, old, conflict = batch["advantages"], batch["mask"], batch["old_logp"], batch["conflict"]
    H = mean_entropy(entropy.detach(), mask)
    gate = entropy_gate(H, **OFFICIAL_GATE) if config.gtpo_official else entropy_gate(H, batch["initial_entropy"])
    one_update = config.gtpo_official or not config.gtpo_ratio
    per_token = policy_loss(logp, None if one_update else old, A, mask, H, conflict, gate, config.gtpo_gamma)
    per_token = per_token * batch["scale"]
    none = torch.zeros((), device=logp.device)          # this objective has no KL and no clip
    sums = {**grpo.base_sums(logp, entropy, old, mask), "kl": none, "clip_ratio": none,
            "gate_dropped_frac": (gate == 0).sum(), "conflict_amplified_frac": (conflict > 1).sum(),
            "conflict_protected_frac": ((conflict == 0) & mask.bool()).sum()}
    return grpo.aggregate(per_token, mask, config.aggregation, normalizer, config.max_new_tokens), sums
