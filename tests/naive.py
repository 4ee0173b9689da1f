"""A naive trainer: the specification of whole training steps, written to be read, not to be fast.

The model is that of transformers, and the gradient that of autograd. One completion goes through
the model at a time, all else is a plain loop, and nothing of the project is used. A run's record
says what chance decided: the completions, their rewards, and which groups came back from the replay
buffer. All else follows from the record and the run's settings c:

    pi      the policy that is trained      ref     the policy at the start of the run (c.beta)
    mu      the policy that drew            prox    pi at the start of a pass (off-policy GRPO)

test_naive.py holds the trainer of this repository to the losses, gradients and weights found here.
Left out: trust regions and the rarer choices, which the tests of each objective work out by hand.
"""
import copy
import math
from dataclasses import dataclass
from statistics import fmean, pstdev

import numpy as np
import torch


@dataclass
class Row:
    """A completion, and what is known of it."""
    prompt: list                # token ids
    completion: list            # token ids, the stop token included
    finished: bool              # with a stop token; else it was cut
    reward: float
    prox: torch.Tensor = None   # (n,) log-probs of its tokens, as mu and ref; None: pi drew them
    weight: object = 1.0        # importance weights, a number or (n,)
    replay_weight: float = 1.0  # of the draw from the buffer


@dataclass
class Group:
    """The completions of one prompt."""
    rows: list
    version: int = 0            # the step whose weights drew it
    uses: int = 0               # draws from the buffer


def score(model, row, temperature):
    """Log-probs (n,) of the completion's tokens, and the entropies (n,) where they were drawn."""
    ids = torch.tensor([row.prompt + row.completion])
    logits = model(ids).logits[0, len(row.prompt) - 1:-1] / temperature     # (n, V)
    every = logits.log_softmax(-1)
    entropy = -(every.exp() * every).sum(-1)
    return every[range(len(row.completion)), row.completion], entropy.detach()


class Trainer:
    """Makes the updates of a run. `found` holds the loss and the gradients of each one."""

    def __init__(self, model, settings):
        self.c = settings
        self.pi, self.mu, self.ref = (copy.deepcopy(model) for _ in range(3))
        self.parameters = dict(self.pi.named_parameters())
        self.mean = dict.fromkeys(self.parameters, 0.0)         # Adam's moments
        self.square = dict.fromkeys(self.parameters, 0.0)
        self.steps = self.updates = self.version = self.behind = 0
        self.initial_entropy = None
        self.buffer = []
        self.found = []

    def step(self, groups, draws):
        """Learn from a rollout. draws: of each pass over the buffer, the prompts of its groups."""
        c = self.c
        self.steps += 1
        gone = max(0, self.steps - 1 - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
        self.lr = c.lr * min(self.steps / (c.warmup_steps + 1), 1 - (1 - c.lr_end) * gone)
        if (self.steps - 1) % getattr(c, "sync_every", 1) == 0:
            self.mu.load_state_dict(self.pi.state_dict())
            self.version, self.behind = self.steps, self.updates

        with torch.no_grad():
            for group in groups:
                group.version = self.version
                for row in group.rows:
                    row.mu, _ = score(self.mu, row, c.temperature)
                    if getattr(c, "beta", 0):
                        row.ref, _ = score(self.ref, row, c.temperature)
            self.compare(groups)
            if c.algo == "gtpo":
                self.find_conflicts(groups)

        self.one_pass(groups, stale=self.behind < self.updates)
        if getattr(c, "replay_ratio", 1) > 1:
            self.replay(groups, draws)

    def compare(self, groups):
        """The advantages in each group, and which of its rows are trained."""
        c = self.c
        all_rewards = [row.reward for group in groups for row in group.rows]
        for group in groups:
            rewards = [row.reward for row in group.rows]
            differ = pstdev(rewards) > 0
            scale = {"none": 1, "std": pstdev(rewards) + 1e-6, "batch": pstdev(all_rewards) + 1e-6,
                     "loo": (len(rewards) - 1) / len(rewards)}[c.advantage_scale]
            for row in group.rows:
                above = row.reward - fmean(rewards)
                row.A = above / scale if abs(above) > 1e-9 else 0.0     # not a rounding error
                row.counts = row.finished or not c.mask_truncated
                row.trained = row.counts and (differ or c.zero_variance == "keep")

    def one_pass(self, groups, stale):
        """c.epochs times the updates on c.minibatches parts of some groups."""
        c = self.c
        if stale and c.correction == "decoupled":
            self.weigh(groups)
        for part in [*range(c.minibatches)] * c.epochs:
            rows = [row for g in groups[part::c.minibatches] for row in g.rows if row.trained]
            if rows:
                self.update(rows)

    def update(self, rows):
        """One optimizer step on the loss of these rows."""
        c = self.c
        tokens = sum(len(row.completion) for row in rows)
        self.pi.zero_grad()
        for row in rows:
            logp, entropy = score(self.pi, row, c.temperature)
            per_token = (self.gtpo if c.algo == "gtpo" else self.grpo)(row, logp, entropy)  # (n,)
            count = {"token": tokens, "sequence": len(rows) * len(logp),
                     "constant": len(rows) * c.max_new_tokens}[c.aggregation]
            row.loss = per_token.sum() / count
            row.loss.backward()

        gradient = {name: p.grad.clone() for name, p in self.parameters.items()}
        self.found.append((sum(row.loss.item() for row in rows), gradient))
        self.adamw()

    @torch.no_grad()
    def adamw(self):
        """Clip the gradient to the norm c.grad_clip, and take a step of AdamW."""
        norm = math.sqrt(sum(p.grad.square().sum() for p in self.parameters.values()))
        self.updates += 1
        for name, p in self.parameters.items():
            g = p.grad * min(1, self.c.grad_clip / (norm + 1e-6))
            self.mean[name] = 0.9 * self.mean[name] + 0.1 * g
            self.square[name] = 0.95 * self.square[name] + 0.05 * g * g
            mean = self.mean[name] / (1 - 0.9 ** self.updates)
            square = self.square[name] / (1 - 0.95 ** self.updates)
            p -= self.lr * (mean / (square.sqrt() + 1e-8) + self.c.weight_decay * (p.ndim > 1) * p)

    # ------------------------------------------------------------------- GRPO, also off-policy

    def grpo(self, row, logp, _):
        """The loss of each token (n,): the clipped surrogate, and k3 to the reference."""
        c, A = self.c, row.A
        log_ratio = logp - (row.mu if row.prox is None else row.prox)
        if c.ratio_level == "sequence":
            log_ratio = log_ratio.mean().expand_as(logp)
        ratio = log_ratio.exp()
        loss = -torch.minimum(ratio * A, ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * A)
        if c.dual_clip and A < 0:
            loss = loss.clamp(max=-c.dual_clip * A)
        d = row.ref - logp if c.beta else 0 * logp
        return (row.weight * loss + c.beta * (d.exp() - d - 1)) * row.replay_weight

    @torch.no_grad()
    def weigh(self, groups):
        """Importance weights prox / mu of samples that another policy than pi has drawn."""
        c = self.c
        for row in [row for group in groups for row in group.rows]:
            row.prox, _ = score(self.pi, row, c.temperature)
            log_ratio = row.prox - row.mu
            w = {"token": log_ratio, "sequence": log_ratio.sum(),
                 "geometric": log_ratio.mean()}[c.importance_level].exp()
            row.weight = {"none": 1.0, "standard": w,
                          "truncated": w.clamp(max=c.importance_cap)}[c.importance]

    # ----------------------------------------------------------------------------- the buffer

    def replay(self, groups, draws):
        """Keep the groups of this rollout that teach something, and make passes over the buffer."""
        c = self.c
        for group in groups:
            for row in group.rows:          # the buffer keeps 16 bits
                row.mu = torch.tensor(row.mu.numpy().astype(np.float16)).double()
            differ = pstdev(row.reward for row in group.rows) > 0
            if differ and any(row.trained for row in group.rows):
                self.buffer.append(group)

        for prompts in draws:
            self.buffer = [g for g in self.buffer if g.uses < (c.max_reuse or math.inf) and
                           self.steps - g.version <= (c.max_staleness or math.inf)]
            self.buffer = self.buffer[-c.buffer_groups:]
            assert len(prompts) == min(c.prompts_per_step, len(self.buffer))
            self.one_pass(self.draw(prompts), stale=True)

    def draw(self, prompts):
        """The groups of these prompts, with weights that undo the priorities they were drawn by."""
        c = self.c
        for group in self.buffer:
            std = pstdev(row.reward for row in group.rows)
            group.priority = (std * math.exp((group.version - self.steps) / 8) + 1e-3) ** c.priority

        least = min((group.priority for group in self.buffer), default=None)
        beta = c.priority_beta + (1 - c.priority_beta) * self.steps / c.steps
        drawn = [next(g for g in self.buffer if g.rows[0].prompt == prompt) for prompt in prompts]
        for group in drawn:
            group.uses += 1
            for row in group.rows:
                row.replay_weight = (group.priority / least) ** -beta
        return drawn

    # ----------------------------------------------------------------------------------- GTPO

    def find_conflicts(self, groups):
        """lambda: 0 or c.gtpo_amplify on tokens that right and wrong rows share, else 1."""
        c = self.c
        if self.initial_entropy is None:
            rows = [row for group in groups for row in group.rows if row.counts]
            means = [score(self.pi, row, c.temperature)[1].mean().item() for row in rows]
            self.initial_entropy = fmean(means) if means else None

        for group, row in [(group, row) for group in groups for row in group.rows]:
            row.conflict = torch.ones(len(row.completion))
            for way in (1, -1):         # from the first token on, and from the last one back
                for t, token in enumerate(row.completion[::way]):
                    sharing = [r.A for r in group.rows if r.completion[::way][t:t + 1] == [token]]
                    if not row.A or max(sharing) <= 0 or min(sharing) >= 0:
                        break
                    row.conflict[t if way == 1 else -1 - t] *= c.gtpo_amplify * (row.A > 0)
            row.conflict.clamp_(max=c.gtpo_cap or math.inf)

    def gtpo(self, row, logp, entropy):
        """The loss of each token (n,): the advantage, after gate and entropy penalty, by lambda."""
        c, H = self.c, entropy.mean().item()
        gate = H <= math.log(2) or self.initial_entropy > math.log(2)
        ratio = (logp - (row.mu if c.gtpo_ratio else logp.detach())).exp()
        return -ratio * gate * (row.A - c.gtpo_gamma * H) * row.conflict
