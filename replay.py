"""The replay buffer: prompt groups of the last rollouts, compact, drawn uniformly or by priority (arXiv 1511.05952)."""
from dataclasses import dataclass

import numpy as np
import torch

import grpo


@dataclass
class Group:
    """The completions of one prompt, compact: 2 or 4 bytes a token id and 2 a log-probability (fp16: a sum over 1,000 tokens
    is off by 0.005; bfloat16 by 0.04, int8 by more than 0.4)."""
    tokens: np.ndarray          # uint16 or uint32: the prompt, then the G completions
    logps: np.ndarray           # float16, of the completions
    lengths: np.ndarray         # (G,) int32, of the completions
    finished: np.ndarray        # (G,) bool
    rewards: np.ndarray         # (G,) float32
    version: int                # optimizer updates that mu had seen
    uses: int = 0               # times drawn from the buffer
    ess: float = 1.0            # share of its sequences that the weights left, when last trained on

    @property
    def nbytes(self):
        return sum(x.nbytes for x in (self.tokens, self.logps, self.lengths, self.finished, self.rewards))


def pack(rollout, rewards, vocab_size, active=None):
    """Rollout and rewards (n, G) -> a list of Group, those that can teach: unequal rewards, some row active (B,)."""
    G, kind = rewards.shape[1], np.uint16 if vocab_size <= 2 ** 16 else np.uint32
    tokens, logps = rollout.tokens.cpu().numpy(), rollout.logps.cpu().numpy()
    starts, ends, finished = (x.cpu().numpy() for x in (rollout.prompt_lengths, rollout.lengths, rollout.finished))
    useful, groups = grpo.informative(rewards), []
    if active is not None:
        useful = useful & active.view(-1, G).any(1)
    for i in useful.nonzero()[:, 0].tolist():
        rows = range(i * G, (i + 1) * G)
        ids = [tokens[rows[0], :starts[rows[0]]], *(tokens[r, starts[r]:ends[r]] for r in rows)]
        groups.append(Group(np.concatenate(ids).astype(kind),
                            np.concatenate([logps[r, starts[r]:ends[r]] for r in rows]).astype(np.float16),
                            (ends - starts)[rows].astype(np.int32), finished[rows], rewards[i].float().cpu().numpy().copy(),
                            rollout.version))
    return groups


def unpack(groups, device):
    """A list of Group -> (fields of a Rollout, rewards (n, G), versions (n * G,)), on the device: what `pack` was given."""
    completions = np.concatenate([g.lengths for g in groups]).astype(np.int64)
    prompts = np.concatenate([np.full(len(g.lengths), len(g.tokens) - g.lengths.sum()) for g in groups]).astype(np.int64)
    tokens = np.zeros((len(prompts), (prompts + completions).max()), np.int64)
    logps, row = np.zeros(tokens.shape, np.float32), 0
    for g in groups:
        at = prompts[row]
        for ids, lp in zip(np.split(g.tokens[at:], g.lengths.cumsum()[:-1]), np.split(g.logps, g.lengths.cumsum()[:-1])):
            tokens[row, :at], tokens[row, at:at + len(ids)], logps[row, at:at + len(ids)] = g.tokens[:at], ids, lp
            row += 1
    finished = np.concatenate([g.finished for g in groups])
    fields = {"tokens": tokens, "prompt_lengths": prompts, "lengths": prompts + completions, "logps": logps,
              "finished": finished}
    rewards = torch.from_numpy(np.stack([g.rewards for g in groups])).to(device)
    versions = torch.tensor([g.version for g in groups for _ in g.lengths], device=device)
    return {name: torch.from_numpy(x).to(device) for name, x in fields.items()}, rewards, versions


class ReplayBuffer:
    """Informative prompt groups of the last rollouts, the same on every rank.

    capacity: groups; capacity_mb: megabytes, 0 for no bound (the oldest leave first). A group also leaves when it is more
    than max_staleness optimizer updates old, has been drawn max_reuse times, or its effective sample size fell below the
    share min_ess; 0 switches a rule off. alpha: 0 draws uniformly; above, in proportion to priority^alpha, priority =
    std of the rewards x exp(-staleness / decay) + 0.001 (prioritized replay, arXiv 1511.05952). A group's share of effective
    samples is 1 until it has been replayed. All draws follow from seed."""

    def __init__(self, capacity=512, capacity_mb=0.0, max_staleness=0, max_reuse=0, min_ess=0.0, alpha=0.0, decay=16.0,
                 seed=0):
        if capacity < 1:
            raise ValueError(f"capacity {capacity}: a replay buffer holds at least one group")
        self.capacity, self.capacity_mb, self.max_staleness, self.max_reuse = capacity, capacity_mb, max_staleness, max_reuse
        self.min_ess, self.alpha, self.decay, self.seed = min_ess, alpha, decay, seed
        self.groups, self.version, self.draws = [], 0, 0

    def __len__(self):
        return len(self.groups)

    @property
    def nbytes(self):
        """Bytes of what is stored."""
        return sum(g.nbytes for g in self.groups)

    def add(self, groups, version):
        """Store a list of Group; version: the trainer's optimizer updates now. Groups of equal rewards are refused."""
        self.groups += [g for g in groups if g.rewards.min() != g.rewards.max()]
        self.evict(version)

    def evict(self, version):
        """Apply the rules above."""
        self.version = version
        self.groups = [g for g in self.groups if not (
            self.max_staleness and version - g.version > self.max_staleness
            or self.max_reuse and g.uses >= self.max_reuse or g.ess < self.min_ess)][-self.capacity:]
        spare = self.nbytes - self.capacity_mb * 2 ** 20 if self.capacity_mb else 0
        while spare > 0:
            spare -= self.groups.pop(0).nbytes

    def probabilities(self):
        """P(g) of every stored group, (n,) float64."""
        lag = np.array([self.version - g.version for g in self.groups], float)
        priority = np.array([g.rewards.std() for g in self.groups], float) * np.exp(-lag / self.decay) + 1e-3
        return priority ** self.alpha / (priority ** self.alpha).sum()

    def sample(self, count, beta=1.0):
        """(list of `count` groups, or all when there are fewer; their weights (count,) float32).

        The weights (n P)^-beta / max correct for drawing some groups more often: beta 1 fully, 0 not at all; for uniform
        draws they are 1. Systematic sampling: group g is drawn count x P(g) times, rounded up or down, never twice unless
        that is above 1. Drawing counts as a use."""
        rng = np.random.default_rng([self.seed, self.draws])
        self.draws += 1
        count, P = min(count, len(self.groups)), self.probabilities()
        if count == 0:
            return [], np.zeros(0, np.float32)
        order = rng.permutation(len(P))
        points = (rng.random() + np.arange(count)) / count
        chosen = order[np.searchsorted(P[order].cumsum(), points, side="right").clip(max=len(P) - 1)]
        weights = (len(P) * P) ** -beta
        for i in chosen:
            self.groups[i].uses += 1
        return [self.groups[i] for i in chosen], (weights / weights.max())[chosen].astype(np.float32)

    def state_dict(self):
        """Everything as a flat dict of tensors and numbers, to be saved without pickle."""
        state = {"version": self.version, "draws": self.draws, "sizes": [len(g.tokens) for g in self.groups]}
        for name in ("tokens", "logps", "lengths", "finished", "rewards"):
            arrays = [getattr(g, name) for g in self.groups]
            state[name] = torch.from_numpy(np.concatenate(arrays)) if arrays else torch.zeros(0)
        for name in ("version", "uses", "ess"):
            state["group_" + name] = [getattr(g, name) for g in self.groups]
        return state

    def load_state_dict(self, state):
        """Back to what state_dict saw, bit for bit."""
        self.version, self.draws, n = state["version"], state["draws"], len(state["sizes"])
        G = len(state["rewards"]) // max(n, 1)
        token_ends, lengths = np.cumsum(state["sizes"])[:-1], state["lengths"].numpy()
        ends = lengths.reshape(n, G).sum(1).cumsum()[:-1] if n else []
        split = {"tokens": token_ends, "logps": ends, **{name: n for name in ("lengths", "finished", "rewards")}}
        parts = [np.split(state[name].numpy(), at) for name, at in split.items()] if n else [[]] * 5
        rest = zip(state["group_version"], state["group_uses"], state["group_ess"])
        self.groups = [Group(*arrays, *numbers) for *arrays, numbers in zip(*parts, rest)]
