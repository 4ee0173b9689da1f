"""The replay buffer: prompt groups of the last rollouts, to be learned from more than once.

    pack            a rollout and its rewards  ->  one compact Group a prompt that can teach
    unpack          groups  ->  the tensors of a rollout again, as they were given to `pack`
    ReplayBuffer    keeps groups, lets the old and the useless go, and draws some by priority

Priorities are those of prioritized replay (Schaul et al., arXiv 1511.05952), with the group's
reward std in the place of the TD error. The buffer is the same on every rank: all ranks add the
groups of all, and draw the same ones. offpolicy.py says what is made of them. Left out: the
sum-tree of the paper, because a buffer of a few hundred groups is drawn from by one cumulative sum.
"""
from dataclasses import dataclass

import numpy as np
import torch

import grpo

ARRAYS = ("tokens", "logps", "lengths", "finished", "rewards")      # of a Group
NUMBERS = ("version", "uses", "ess")


@dataclass
class Group:
    """The completions of one prompt, compact: 2 or 4 bytes a token id, and as many a log-prob.

    A sum over 1,000 log-probabilities is off by 0.005 in float16, by 0.04 in bfloat16 and by more
    than 0.4 in int8."""
    tokens: np.ndarray          # uint16 or uint32: the prompt, then the G completions
    logps: np.ndarray           # float16 or float32, of the completions
    lengths: np.ndarray         # (G,) int32, of the completions
    finished: np.ndarray        # (G,) bool
    rewards: np.ndarray         # (G,) float32
    version: int                # the step whose weights drew it (Progress.behaviour_step)
    uses: int = 0               # times drawn from the buffer
    ess: float = 1.0            # share of its sequences that the weights left, when last trained on

    @property
    def nbytes(self):
        return sum(getattr(self, name).nbytes for name in ARRAYS)

    @property
    def prompt_length(self):
        return len(self.tokens) - int(self.lengths.sum())


# ------------------------------------------------------------------------- from a rollout and back

def pack(rollout, rewards, vocab_size, active=None, logp_type=np.float16):
    """Turn a rollout and its rewards (n, G) into a list of Group.

    Only groups that can teach are kept: their rewards differ and, where active (B,) is given, some
    row of theirs is active. logp_type: float16 is half of the memory; in float32 a ratio to the
    same weights is 1 to the last bit."""
    G = rewards.shape[1]
    id_type = np.uint16 if vocab_size <= 2 ** 16 else np.uint32
    tokens, logps = rollout.tokens.cpu().numpy(), rollout.logps.cpu().numpy()       # (B, T)
    starts, ends = rollout.prompt_lengths.cpu().numpy(), rollout.lengths.cpu().numpy()
    finished = rollout.finished.cpu().numpy()

    useful = grpo.informative(rewards)
    if active is not None:
        useful = useful & active.view(-1, G).any(1)

    groups = []
    for i in useful.nonzero()[:, 0].tolist():
        rows = range(i * G, (i + 1) * G)
        prompt = tokens[rows[0], :starts[rows[0]]]
        completions = [tokens[r, starts[r]:ends[r]] for r in rows]
        groups.append(Group(
            tokens=np.concatenate([prompt, *completions]).astype(id_type),
            logps=np.concatenate([logps[r, starts[r]:ends[r]] for r in rows]).astype(logp_type),
            lengths=(ends - starts)[rows].astype(np.int32),
            finished=finished[rows],
            rewards=rewards[i].float().cpu().numpy().copy(),
            version=rollout.version))
    return groups


def unpack(groups, device):
    """Turn a list of n groups into what `pack` was given, on the device.

    Returns (fields of a Rollout, rewards (n, G), versions (n * G,))."""
    lengths = np.concatenate([g.lengths for g in groups]).astype(np.int64)          # (B,)
    prompts = np.concatenate([[g.prompt_length] * len(g.lengths) for g in groups]).astype(np.int64)
    tokens = np.zeros((len(prompts), (prompts + lengths).max()), np.int64)          # (B, T)
    logps = np.zeros(tokens.shape, np.float32)

    row = 0
    for g in groups:
        prompt = g.tokens[:g.prompt_length]
        begin = 0           # of the row's completion among those of its group
        for length in g.lengths:
            end = begin + length
            here = slice(len(prompt), len(prompt) + length)
            tokens[row, :len(prompt)] = prompt
            tokens[row, here] = g.tokens[len(prompt) + begin:len(prompt) + end]
            logps[row, here] = g.logps[begin:end]
            begin = end
            row += 1

    fields = {"tokens": tokens, "prompt_lengths": prompts, "lengths": prompts + lengths,
              "logps": logps, "finished": np.concatenate([g.finished for g in groups])}
    fields = {name: torch.from_numpy(array).to(device) for name, array in fields.items()}
    rewards = torch.from_numpy(np.stack([g.rewards for g in groups])).to(device)
    versions = torch.tensor([g.version for g in groups for _ in g.lengths], device=device)
    return fields, rewards, versions


# -------------------------------------------------------------------------------------- the buffer

class ReplayBuffer:
    """Informative prompt groups of the last rollouts, the same on every rank.

    capacity: groups. capacity_mb: megabytes, 0 for no bound; the oldest leave first. A group also
    leaves when one of three rules says so; 0 switches a rule off. It is more than max_staleness
    rollouts old, it has been drawn max_reuse times, or its effective sample size fell below the
    share min_ess (which is 1 until it has been replayed). alpha: 0 draws uniformly.
    Above, a group is drawn in proportion to priority^alpha, where priority = std of the rewards x
    exp(-staleness / decay) + 0.001. All draws follow from seed."""

    def __init__(self, capacity=512, capacity_mb=0.0, max_staleness=0, max_reuse=0, min_ess=0.0,
                 alpha=0.0, decay=8.0, seed=0):
        if capacity < 1:
            raise ValueError(f"capacity {capacity}: a replay buffer holds at least one group")
        self.capacity = capacity
        self.capacity_mb = capacity_mb
        self.max_staleness = max_staleness
        self.max_reuse = max_reuse
        self.min_ess = min_ess
        self.alpha = alpha
        self.decay = decay
        self.seed = seed

        self.groups = []
        self.version = 0        # the trainer's step at the last add or evict
        self.draws = 0          # calls of `sample` so far

    def __len__(self):
        return len(self.groups)

    @property
    def nbytes(self):
        """Bytes of the stored groups."""
        return sum(g.nbytes for g in self.groups)

    def add(self, groups, version):
        """Store a list of Group; version: the trainer's rollouts now.

        Groups of equal rewards are refused."""
        self.groups += [g for g in groups if g.rewards.min() != g.rewards.max()]
        self.evict(version)

    def evict(self, version):
        """Let go what the rules above say, at this number of the trainer's rollouts."""
        self.version = version
        self.groups = [g for g in self.groups if not self.is_over(g)][-self.capacity:]

        if self.capacity_mb:
            excess = self.nbytes - self.capacity_mb * 2 ** 20
            while excess > 0:
                excess -= self.groups.pop(0).nbytes

    def is_over(self, group):
        """Whether a group is too old, too often used, or too far from the policy."""
        too_old = self.max_staleness and self.version - group.version > self.max_staleness
        too_used = self.max_reuse and group.uses >= self.max_reuse
        return bool(too_old or too_used or group.ess < self.min_ess)

    def probabilities(self):
        """P(g) of every stored group, (n,) float64."""
        age = np.array([self.version - g.version for g in self.groups], float)
        spread = np.array([g.rewards.std() for g in self.groups], float)
        priority = (spread * np.exp(-age / self.decay) + 1e-3) ** self.alpha
        return priority / priority.sum()

    def sample(self, count, beta=1.0):
        """Draw `count` groups, or as many as there are, each draw a use; by priority one may come
        twice.

        Returns (list of groups, their weights (count,) float32). The weights (n P)^-beta / max
        correct for drawing some groups more often: beta 1 fully, 0 not at all. For uniform draws
        they are 1."""
        rng = np.random.default_rng([self.seed, self.draws])
        self.draws += 1
        count = min(count, len(self.groups))
        if count == 0:
            return [], np.zeros(0, np.float32)

        P = self.probabilities()
        chosen = systematic(P, count, rng)
        weights = (len(P) * P) ** -beta
        weights = (weights / weights.max())[chosen].astype(np.float32)

        for i in chosen:
            self.groups[i].uses += 1
        return [self.groups[i] for i in chosen], weights

    def state_dict(self):
        """Everything as a flat dict of tensors and numbers, to be saved without pickle."""
        state = {"version": self.version, "draws": self.draws,
                 "sizes": [len(g.tokens) for g in self.groups]}
        for name in ARRAYS:
            arrays = [getattr(g, name) for g in self.groups]
            state[name] = torch.from_numpy(np.concatenate(arrays)) if arrays else torch.zeros(0)
        for name in NUMBERS:
            state["group_" + name] = [getattr(g, name) for g in self.groups]
        return state

    def load_state_dict(self, state):
        """Go back to what state_dict saw, bit for bit."""
        self.version = state["version"]
        self.draws = state["draws"]
        self.groups = []

        count = len(state["sizes"])
        G = len(state["rewards"]) // max(count, 1)
        arrays = {name: state[name].numpy() for name in ARRAYS}
        token = logp = 0            # where the next group's tokens and log-probs begin
        for i, size in enumerate(state["sizes"]):
            rows = slice(i * G, (i + 1) * G)
            drawn = int(arrays["lengths"][rows].sum())
            self.groups.append(Group(
                tokens=arrays["tokens"][token:token + size],
                logps=arrays["logps"][logp:logp + drawn],
                lengths=arrays["lengths"][rows],
                finished=arrays["finished"][rows],
                rewards=arrays["rewards"][rows],
                version=state["group_version"][i],
                uses=state["group_uses"][i],
                ess=state["group_ess"][i]))
            token += size
            logp += drawn


def systematic(P, count, rng):
    """Draw an index array (count,) by systematic sampling from probabilities P (n,).

    Lay the intervals P end to end, in a random order, from 0 to 1. Lay a comb of `count` teeth over
    them, 1 / count apart, shifted by one random number. Each tooth takes the interval it falls
    into. So index i is drawn count x P_i times, rounded up or down: never twice unless that is
    above 1."""
    order = rng.permutation(len(P))
    teeth = (rng.random() + np.arange(count)) / count
    ends = P[order].cumsum()
    hit = np.searchsorted(ends, teeth, side="right").clip(max=len(P) - 1)
    return order[hit]
