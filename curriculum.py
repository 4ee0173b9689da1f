"""Curriculum: which level the next problems are of, from easy to hard (E2H, arXiv 2506.06632).

A schedule gives each of n levels, i = 0 (easiest) to n - 1, its share of the problems. u is how
much of the training is over, 0 to 1, and S = n (n + 1) / 2:

    uniform     1 / n
    steps       all problems of level floor(u n): the classical curriculum
    cosine      a (n - i) / S + (1 - a) (i + 1) / S, with a = (1 + cos(pi u)) / 2
    gaussian    floor + (1 - n floor) q_i, with q_i ~ exp(-(i - m)^2 / (2 sigma^2)) and
                m = u^beta (n - 1)
    adaptive    ~ floor + p_i (1 - p_i), where p_i is the measured success at level i

`steps`, `cosine` and `gaussian` follow the clock, and a run that learns faster or slower than they
were tuned for gets the wrong levels. `adaptive`, our own, follows success. p (1 - p) is the
variance of a reward of 0 or 1, and half the chance that two completions differ, without which a
pair teaches nothing; for larger groups it is a rule of thumb (docs/THEORY.md, claim 3). A level
with p from FADED on fades to the floor, which only watches for forgetting, and comes back when p
falls below BACK. A level that was never seen is taken to be as hard as its easier neighbour.

    python train.py --data truth:2-5 --curriculum adaptive
    python train.py --model DIR --data truth:2-4@2,gsm8k     # a mix: tasks are drawn by weight

data.stream_of makes a `Mixed` for a mix, and with --curriculum. train.py asks it for problems, and
gives it the log's line of each step.
"""
import math
import random

from config import CURRICULA

FADED = 0.95        # success above which a level fades out,
BACK = 0.9          # and below which it comes back
MEMORY = 16         # groups over which the mean of success forgets; only then can a level fade
UNKNOWN = 0.5       # success where nothing was measured yet, not even at an easier level


# ------------------------------------------------------------------------------- pure functions

def weights(schedule, progress, levels, success=None, *, beta=0.5, sigma=0.5, floor=None,
            faded=()):
    """Returns the share of each level, easiest first: `levels` floats that sum to 1.

    schedule: one of config.CURRICULA. progress: u, 0 to 1. success: of adaptive, a measured success
    rate a level, None where there is none yet. beta, sigma: of gaussian. floor: the least share of
    gaussian (None: 0; E2H's own is 2 / (n (n + 1))) and the least weight of adaptive (None: 0.02).
    faded: indices of levels that have faded out, see `fade`. Raises ValueError for another
    schedule, and for numbers that are out of range."""
    n = levels
    if schedule not in CURRICULA:
        raise ValueError(f"no curriculum is called {schedule!r}: choose {', '.join(CURRICULA)}")
    if n < 1 or not 0 <= progress <= 1:
        raise ValueError(f"a curriculum needs levels >= 1 and progress 0 to 1, not {n}, {progress}")
    if not (beta > 0 and sigma > 0 and 0 <= (floor or 0) <= 1):
        raise ValueError("a curriculum needs beta and sigma above 0 and a floor of 0 to 1, not "
                         f"{beta}, {sigma}, {floor}")

    if schedule == "uniform":
        raw = [1.0] * n
    elif schedule == "steps":
        now = min(n - 1, int(progress * n))
        raw = [float(i == now) for i in range(n)]
    elif schedule == "cosine":
        easy = (1 + math.cos(math.pi * progress)) / 2
        raw = [easy * (n - i) + (1 - easy) * (i + 1) for i in range(n)]
    elif schedule == "gaussian":
        raw = gaussian(progress, n, beta, sigma, floor or 0.0)
    else:
        raw = adaptive(n, success, 0.02 if floor is None else floor, faded)

    total = sum(raw)
    return [weight / total for weight in raw]


def gaussian(progress, n, beta, sigma, floor):
    """A bell over the levels whose middle moves from the easiest to the hardest."""
    if not 0 <= floor * n <= 1:
        raise ValueError(f"the floor of {n} levels must be 0 to {1 / n:.3g}, not {floor}")
    middle = progress ** beta * (n - 1)
    # from the nearest level on, so that a narrow bell does not vanish between two levels
    distances = [(i - middle) ** 2 for i in range(n)]
    bell = [math.exp((min(distances) - d) / (2 * sigma ** 2)) for d in distances]
    return [floor + (1 - n * floor) * q / sum(bell) for q in bell]


def adaptive(n, success, floor, faded):
    """The signal of each level, p (1 - p), on top of a floor; a faded level has the floor alone."""
    if success is None:
        success = [None] * n
    if len(success) != n:
        raise ValueError(f"{n} levels need as many success rates, not {len(success)}")
    if not all(p is None or 0 <= p <= 1 for p in success):
        raise ValueError(f"success rates must be 0 to 1, not {success}")

    raw, known = [], UNKNOWN
    for i, p in enumerate(success):
        known = known if p is None else p           # unseen: as hard as the easier neighbour
        signal = 0.0 if i in faded else known * (1 - known)
        raw.append(floor + signal)
    return raw if sum(raw) > 0 else [1.0] * n


def fade(success, faded):
    """Returns the levels that have faded out now, from those that had before.

    Two bounds, so that a level whose success lies near one does not come and go."""
    now = []
    for i, p in enumerate(success):
        bound = BACK if i in faded else FADED
        if p is not None and p >= bound:
            now.append(i)
    return now


def followed(old, new, groups):
    """The mean of success after some more groups: exponential, over about MEMORY groups."""
    if old is None:
        return new
    kept = (1 - 1 / MEMORY) ** groups
    return kept * old + (1 - kept) * new


# ------------------------------------------------------------------------------------ the stream

class Mixed:
    """Problems of several tasks and levels, in an endless stream.

    For each problem a task is drawn by the weights of the mix, then a level by the schedule, then
    the next problem of that kind, whose order is that of a data.Stream. The draws depend on the
    seed, the number of problems taken so far, progress and success, and on nothing else."""

    def __init__(self, streams, kinds, task_weights, config):
        """streams: {kind: data.Stream}; kinds: {kind: its task}, the easiest of a task first."""
        self.streams = streams
        self.kinds = kinds
        self.task_weights = task_weights
        self.seed = config.seed
        self.schedule = config.curriculum or "uniform"
        self.floor = config.curriculum_floor or None
        self.per_step = config.prompts_per_step

        self.levels = {}            # task -> its kinds, easiest first
        for kind, task in kinds.items():
            self.levels.setdefault(task, []).append(kind)

        self.cursor = 0             # problems taken
        self.groups = {}            # kind -> groups that its success was measured on
        self.success = {}           # kind -> mean of pass@1 over its last groups
        self.faded = []             # kinds

    def shares(self, progress):
        """Returns {kind: its share of the next problems}."""
        total = sum(self.task_weights.values())
        shares = {}
        for task, kinds in self.levels.items():
            success = [self.success.get(kind) for kind in kinds]
            faded = [i for i, kind in enumerate(kinds) if kind in self.faded]
            of_level = weights(self.schedule, progress, len(kinds), success, floor=self.floor,
                               faded=faded)
            for kind, share in zip(kinds, of_level):
                shares[kind] = share * self.task_weights[task] / total
        return shares

    def next(self, count, progress=0.0):
        """Returns the next `count` problems; progress: how much of the training is over, 0 to 1."""
        shares = self.shares(progress)
        picked = []
        for _ in range(count):
            rng = random.Random(f"curriculum/{self.seed}/{self.cursor}")
            kind = rng.choices(list(shares), list(shares.values()))[0]
            picked += self.streams[kind].next(1)
            self.cursor += 1
        return picked

    def feedback(self, line):
        """Follow success: pass@1/KIND and share/KIND of a step's line in the log."""
        drawn = self.per_step * (1 + line.get("refill_rounds", 0))
        for task, kinds in self.levels.items():
            for kind in kinds:
                groups = line.get(f"share/{kind}", 0) * drawn
                if groups > 0:
                    old = self.success.get(kind)
                    self.success[kind] = followed(old, line[f"pass@1/{kind}"], groups)
                    self.groups[kind] = self.groups.get(kind, 0) + groups

            # one lucky group does not say that a level is solved
            success = [self.success[kind] if round(self.groups.get(kind, 0)) >= MEMORY else None
                       for kind in kinds]
            before = [i for i, kind in enumerate(kinds) if kind in self.faded]
            now = [kinds[i] for i in fade(success, before)]
            self.faded = [kind for kind in self.faded if kind not in kinds] + now

    @property
    def state(self):
        """What a checkpoint has to keep, as JSON."""
        return {
            "cursor": self.cursor,
            "cursors": {kind: stream.cursor for kind, stream in self.streams.items()},
            "groups": dict(self.groups),
            "success": dict(self.success),
            "faded": list(self.faded),
        }

    @state.setter
    def state(self, state):
        self.cursor = state["cursor"]
        for kind, stream in self.streams.items():
            stream.cursor = state["cursors"][kind]
        self.groups = dict(state.get("groups", {}))     # checkpoints before 2026-11-29 lack it
        self.success = dict(state["success"])
        self.faded = list(state["faded"])
