"""DPO: learn from pairs of a right and a wrong completion (Rafailov et al., arXiv 2305.18290).

A group of completions has right and wrong ones, so pairs come for free. With y_w the right (chosen)
and y_l the wrong (rejected) one, and log-probs summed over the tokens of a completion:

    D    = beta ((log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l)))
    loss = -log sigmoid(D)                              sigmoid
           (D / beta - 1 / (2 beta))^2                  ipo   (arXiv 2310.12036)
           max(0, 1 - D)                                hinge (SLiC, arXiv 2305.10425)
           + sft_weight * -log pi(y_w) / |y_w|          arXiv 2404.19733, whose weight is 1

Without the last term log pi(y_w) often falls, only slower than log pi(y_l): both are logged.
Right is a completion whose reward lies above the middle of its group's best and worst. A second
reward beside correctness would so make pairs of two wrong answers, or reject a right one: it is
refused. With --reward correct=0 rewards of your own decide what is right.

The gradient of a pair is a weighted sum of two gradients,

    d loss = (d loss / d log pi(y_w)) d log pi(y_w) + (d loss / d log pi(y_l)) d log pi(y_l)

so DPO is a policy gradient whose weight depends on the pair. `refresh` scores the rows before each
update and finds their weights; `loss` then needs no pair at all. Rows may lie in any micro-batch.

Function by function beside grpo.py: `pairs` stands for group_advantages, `preference_loss` for
policy_loss, `prepare` and `loss` are the same calls, and `learn` refreshes the weights. Pairs of
unequal length teach length, and pairs that share nearly all tokens teach noise: of the possible
pairs the closest in length come first, and similar ones are left out.

    python train.py --algo dpo --beta 0.1
    python sft.py --preference sigmoid --data PAIRS.jsonl --model START --out DIR

The reference is the starting model. pipeline.py builds self-training rounds on it (DPO-ST, arXiv
2407.18248). The second command learns from pairs that were chosen before, as by people:
`FilePairs`, at the end. Left out: pairs over prompts, length-normalised variants.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import data
import dist
import grpo
from config import setting
from reward import correct_counts, reward_items

KINDS = ("sigmoid", "ipo", "hinge")


# -------------------------------------------------------------------------------- pure functions

def preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, kind="sigmoid"):
    """The loss of each pair: (P,).

    chosen, rejected (P,): log-probs of the completions under pi, summed over their tokens;
    ref_chosen, ref_rejected (P,) the same under the reference. Raises ValueError for another kind,
    or a beta that is not above 0."""
    if kind not in KINDS:
        raise ValueError(f"kind must be {', '.join(KINDS)}, not {kind!r}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, not {beta}")

    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    if kind == "sigmoid":
        return F.softplus(-beta * margin)           # -log sigmoid, without overflow
    if kind == "ipo":
        return (margin - 1 / (2 * beta)).square()
    return (1 - beta * margin).clamp(min=0)


def pairs(rewards, per_prompt=1, seed=0, lengths=None, allowed=None, first=0):
    """Choose pairs of a right and a wrong completion. Returns (chosen, rejected), row numbers (P,).

    rewards (N, G): a completion is right above the middle of its group's best and worst reward,
    else wrong; equal rewards give no pair. At most per_prompt pairs a group, no row twice, in an
    order that follows from the seed. lengths (N, G): the closest in length come first. allowed: a
    function of two row numbers, False for a pair that is left out. first: the number of the first
    prompt among those of all ranks, so that the pairs do not depend on who holds them."""
    if rewards.ndim != 2 or per_prompt < 1:
        raise ValueError(f"pairs needs rewards (prompts, group) and per_prompt >= 1, "
                         f"not {tuple(rewards.shape)}, {per_prompt}")
    N, G = rewards.shape
    best, worst = rewards.amax(1, keepdim=True), rewards.amin(1, keepdim=True)
    right = (rewards > (best + worst) / 2) & (best > worst)                     # (N, G)
    wrong = ~right & (best > worst)

    chosen, rejected = [], []
    for n in range(N):
        candidates = [(i, j) for i in right[n].nonzero()[:, 0].tolist()
                      for j in wrong[n].nonzero()[:, 0].tolist()]
        of_prompt = torch.Generator().manual_seed((seed * 1_000_003 + first + n) % 2 ** 63)
        order = torch.randperm(len(candidates), generator=of_prompt).tolist()
        candidates = [candidates[k] for k in order]
        if lengths is not None:
            of = lengths[n].tolist()
            candidates.sort(key=lambda pair: abs(of[pair[0]] - of[pair[1]]))

        taken = set()
        for i, j in candidates:
            if len(taken) == 2 * per_prompt:
                break
            rows = n * G + i, n * G + j
            if not taken & {i, j} and (allowed is None or allowed(*rows)):
                taken |= {i, j}
                chosen.append(rows[0])
                rejected.append(rows[1])
    return torch.tensor(chosen, dtype=torch.int64), torch.tensor(rejected, dtype=torch.int64)


def overlap(first, second):
    """Share of the tokens that two completions have in common (Jaccard): 0 to 1."""
    first, second = set(first), set(second)
    return len(first & second) / max(len(first | second), 1)


# ---------------------------------------------------------------------------------------- settings

@dataclass
class Settings:
    # objective: pairs of a right and a wrong completion (dpo.py)
    beta: float = setting(0.1, above=0)         # the larger, the nearer pi stays to the
                                                # reference, the starting model

    preference: str = setting("sigmoid", choices=KINDS)     # sigmoid (DPO), ipo, hinge
    sft_weight: float = setting(0.0, least=0)   # of the right completion's cross-entropy a
                                                # token, which keeps its probability from falling

    pairs_per_prompt: int = setting(1, least=1)
    most_overlap: float = setting(0.7, least=0, most=1)     # pairs whose sets of tokens overlap
                                                            # more (Jaccard) are left out

    # no flags: Learner.normalizer reads them of every objective
    aggregation = "sequence"        # the normaliser is the number of rows, two a pair

    def check(self):
        """Raise ValueError where another reward could make a right answer the rejected one."""
        names = {name for _, name, _ in reward_items(self.reward)}
        others = (names - {"correct"} or self.format_reward
                  or self.consistency_reward or self.overlong_buffer)
        if others and correct_counts(self.reward):
            raise ValueError("--algo dpo pairs right answers with wrong ones, so no other reward "
                             "may count beside correctness: leave it out, or say correct=0")


# ------------------------------------------------------------------- the calls of the training loop

METRICS = {"entropy": "tokens", "kl": "tokens", "clip_ratio": "tokens"}


@dataclass
class Batch(grpo.Batch):
    """The rows of a rollout. Those of a pair are active, and have the other's number."""
    partner: torch.Tensor | None = None     # (B,) int64: the other row of the pair; -1: in no pair
    chosen: torch.Tensor | None = None      # (B,) bool: the right one of its pair
    ref_sum: torch.Tensor | None = None     # (B,) log ref of the completion
    weight: torch.Tensor | None = None      # (B,) d loss / d log pi of the completion (`refresh`)
    value: torch.Tensor | None = None       # (B,) the pair's loss, at its chosen row


def prepare(rollout, rewards, config):
    """Turn a rollout and its rewards (N, G) into a batch whose active rows are those of pairs."""
    mask = rollout.completion_mask()
    tokens = rollout.completions()

    def allowed(i, j):
        return overlap(tokens[i], tokens[j]) <= config.most_overlap

    lengths = (rollout.lengths - rollout.prompt_lengths).view(rewards.shape)
    seed = config.seed * 10_007 + rollout.version
    first = dist.split(config.prompts_per_step).start
    chosen, rejected = pairs(rewards.cpu(), config.pairs_per_prompt, seed, lengths.cpu(), allowed,
                             first)

    partner = torch.full((len(mask),), -1, dtype=torch.int64)
    partner[chosen] = rejected
    partner[rejected] = chosen
    is_chosen = torch.zeros(len(mask), dtype=torch.bool)
    is_chosen[chosen] = True

    device = mask.device
    return Batch(tokens=rollout.tokens, prompt_lengths=rollout.prompt_lengths,
                 lengths=rollout.lengths, mask=mask, rewards=rewards.flatten(),
                 advantages=is_chosen.to(device).float(), active=(partner >= 0).to(device),
                 old_logp=rollout.logps, partner=partner.to(device), chosen=is_chosen.to(device))


def loss(logp, entropy, batch, config, normalizer):
    """The mean loss of the pairs, by the weights of `refresh`: a scalar, and sums for the log.

    Its value is that of the pairs, its gradient that of sum(weight * log pi). normalizer: the rows
    of all pairs, over all micro-batches and ranks; there are half as many pairs."""
    sums = (logp * batch.mask).sum(1)                           # (B,)
    surrogate = batch.weight * sums
    value = batch.value + surrogate - surrogate.detach()
    kl = grpo.kl_penalty(logp.detach(), batch.ref_logp, "k3", mask=batch.mask)

    found = {**grpo.common_sums(logp, entropy, batch.sampler_logp, batch.mask),
             "kl": kl.sum(), "clip_ratio": kl.new_zeros(())}
    return value.sum() / (normalizer / 2), found


# --------------------------------------------------------- not pure: the weights before each update

def complete(learner, batch):
    """Add the reference's log-probs of the pairs' tokens."""
    batch.ref_logp = learner.score(batch, model=learner.reference)[0]
    batch.ref_sum = (batch.ref_logp * batch.mask).sum(1)


def refresh(batch, logp, config):
    """Set the weights of a batch from log pi of its tokens, logp (B, T). Returns sums for the log.

    The weight of a row is the derivative of the pair's loss by the row's log-prob."""
    sums = (logp * batch.mask).sum(1)                           # (B,)
    batch.weight = torch.zeros_like(sums)
    batch.value = torch.zeros_like(sums)
    right = (batch.chosen & batch.active).nonzero()[:, 0]       # (P,)
    wrong = batch.partner[right]

    chosen = sums[right].requires_grad_()
    rejected = sums[wrong].requires_grad_()
    value = preference_loss(chosen, rejected, batch.ref_sum[right], batch.ref_sum[wrong],
                            config.beta, config.preference)
    value = value - config.sft_weight * chosen / batch.mask[right].sum(1)
    batch.weight[right], batch.weight[wrong] = torch.autograd.grad(value.sum(), (chosen, rejected))
    batch.value[right] = value.detach()

    # TRL's names: the reward that DPO implies is beta log(pi / ref)
    reward = config.beta * (sums - batch.ref_sum)
    margin = reward[right] - reward[wrong]
    return {"pairs": float(len(right)),
            "rewards/chosen": reward[right].sum(), "rewards/rejected": reward[wrong].sum(),
            "rewards/accuracies": (margin > 0).sum(), "rewards/margins": margin.sum(),
            "logps/chosen": sums[right].sum(), "logps/rejected": sums[wrong].sum()}


def learn(learner, rollout, rewards):
    """Go --epochs times through the pairs of a rollout; the weights are fresh at each update."""
    c = learner.config
    batch = learner.batch(rollout, rewards)
    one_update = replace(c, epochs=1, minibatches=1)
    numbers = torch.tensor(dist.split(c.prompts_per_step))      # of this rank's groups
    of_row = numbers.repeat_interleave(c.group_size).to(batch.active.device)

    updates, logged = [], []
    for _ in range(c.epochs):
        for minibatch in range(c.minibatches):
            part = replace(batch, active=batch.active & (of_row % c.minibatches == minibatch))
            sums = refresh(part, learner.score(part)[0], c)
            logged.append(dist.all_reduce(sums, learner.device))
            updates += learner.make_pass(part, c.prompts_per_step, one_update)

    count = sum(sums["pairs"] for sums in logged)
    return updates, {"pairs": count / c.epochs, **means_of_pairs(logged)}


def means_of_pairs(logged):
    """The means over all pairs of what `refresh` has summed, in one or more updates."""
    count = max(1, sum(sums["pairs"] for sums in logged))
    return {name: sum(sums[name] for sums in logged) / count
            for name in logged[0] if name != "pairs"}


# ------------------------------------------------------------------- pairs that are in a file

class FilePairs:
    """The objective of sft.py --preference. It has the calls of an objective (learner.py)."""
    METRICS = METRICS
    loss = staticmethod(loss)

    def __init__(self, reference):
        self.reference = reference

    def update(self, learner, batch, rows):
        """One update on the rows of some pairs: chosen, rejected, chosen, rejected ...

        Returns its sums, and means for the log."""
        batch, sums = self.weighted(learner, batch)
        return {**learner.update(batch, rows), **means_of_pairs([sums])}

    def held_out(self, learner, batch):
        """Loss and rewards of pairs that are not trained on, for the log."""
        batch, sums = self.weighted(learner, batch)
        total = dist.all_reduce({"loss": batch.value.sum()}, learner.device)["loss"]
        found = {"loss": total / sums["pairs"], **means_of_pairs([sums])}
        return {f"eval_{name}": value for name, value in found.items()}

    @staticmethod
    def weighted(learner, batch):
        """The batch with its pairs, reference and weights, and what `refresh` summed, of all ranks.

        Its rows are chosen, rejected, chosen, rejected ..."""
        numbers = torch.arange(len(batch.mask), device=learner.device)
        batch = Batch(**{**vars(batch), "partner": numbers ^ 1, "chosen": numbers % 2 == 0,
                         "active": numbers >= 0})
        complete(learner, batch)
        sums = refresh(batch, learner.score(batch)[0], learner.config)
        return batch, dist.all_reduce(sums, learner.device)


def texts_of(pair):
    """The two completions (chosen, rejected) of a row of a file, a problem in the sense of data.py.

    Raises ValueError, with the row's name, where one is missing or both are the same."""
    try:
        chosen, rejected = text_of(pair, "chosen"), text_of(pair, "rejected")
        if chosen == rejected:
            raise ValueError("chosen and rejected are the same text")
    except ValueError as error:
        raise ValueError(f"{pair.get('id') or '--data'}: {error}") from None
    return chosen, rejected


def text_of(pair, side):
    """A completion of a pair: text, or the assistant's message of a conversation.

    Raises ValueError where it is neither, or of several turns."""
    text = pair.get(side)
    if isinstance(text, list):
        said = data.said_in([{"role": "user", "content": pair["problem"]}, *text]
                            if len(text) == 1 else text)
        if said["user"] != pair["problem"]:
            raise ValueError(f"{side} answers another question")
        text = said.get("assistant")

    if not isinstance(text, str):
        raise ValueError(f'no text in the field "{side}"; --preference needs a file of pairs: '
                         'a question, "chosen" and "rejected"')
    data.check_characters(side, text)
    return text
