"""Built-in tasks: problems that a program makes, so that nothing has to be downloaded.

`TASKS`, at the end, has one row a task. Its first row is "arithmetic", stories of several steps:

    Mia has 7 shells. She finds 5 more. She gives half to Ben. How many shells does Mia have?

A tiny model learns the single steps of such a story. Their composition it does not learn, neither
told step by step nor guessed at once, and so there is something left for reinforcement learning.
Training and held-out stories differ in start and operations, not only in words (`_held_out`).

Needs reward.py, for tasks without a checker of their own. data.py loads the problems.
"""
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import reward


# ---------------------------------------------------------------------------------- arithmetic

LARGEST = 20      # no number in a story exceeds it: the single steps are a small, learnable table
NAMES = {
    "Mia": "She", "Ben": "He", "Ana": "She", "Tom": "He", "Eva": "She", "Sam": "He",
    "Lily": "She", "Max": "He", "Zoe": "She", "Leo": "He", "Ruth": "She", "Omar": "He",
    "Ines": "She", "Hugo": "He", "Nora": "She", "Ivan": "He"}
THINGS = (
    "shells", "apples", "coins", "books", "stamps", "marbles", "pens", "cards", "beads", "plums",
    "stones", "buttons", "tickets", "cookies", "candles", "roses")
OPENINGS = (
    "{name} has {n} {things}.", "{name} starts with {n} {things}.",
    "There are {n} {things} on the table of {name}.", "{name} owns {n} {things}.",
    "In the box of {name} there are {n} {things}.")
WORDINGS = {
    "+": ("{She} finds {n} more.", "{She} buys {n} more.", "{friend} brings {n}.",
          "{She} gets {n} from {friend}.", "Then {n} more arrive.", "{She} wins {n} of them.",
          "{friend} adds {n}."),
    "-": ("{She} loses {n}.", "{She} gives {n} to {friend}.", "{She} sells {n} of them.",
          "{friend} takes {n}.", "Then {n} break.", "{She} puts {n} away.",
          "{She} drops {n} of them."),
    "*": ("Then the number doubles.", "{friend} brings as many again.",
          "{She} gets twice as many."),
    "/": ("{She} loses half of them.", "{She} gives half to {friend}.",
          "{friend} takes half of them."),
}
QUESTIONS = (
    "How many {things} does {name} have?", "How many {things} are left?",
    "How many {things} are there now?", "What is the number of {things} now?",
    "How many {things} does {name} have in the end?")


def arithmetic(count, split="train", seed=0, levels=(4, 6)):
    """Returns `count` word problems whose number of steps, their level, lies within `levels`.

    The same arguments give the same problems. Split "test" holds stories whose start and operations
    never occur in "train", whatever the seeds. The solution is in GSM8K's format, one equation a
    line and then "#### answer"; sft.py makes terse answers of it. Raises ValueError for levels
    below 1 or in the wrong order."""
    fewest, most = levels
    if not 1 <= fewest <= most:
        raise ValueError(f"levels must be 1 <= fewest <= most, not {fewest}-{most}")

    rng = random.Random(f"arithmetic/{split}/{seed}")
    stories = []
    while len(stories) < count:
        start, steps = _chain(rng, rng.randint(fewest, most))
        if _held_out(start, steps) == (split == "test"):
            stories.append(_story(rng, start, steps, f"arithmetic/{split}/{seed}/{len(stories)}"))
    return stories


def _chain(rng, length):
    """Draw a start and `length` operations (sign, number) whose results stay in 1 to LARGEST."""
    start = rng.randint(2, LARGEST)
    value = start
    steps = []

    while len(steps) < length:
        sign = rng.choice("++--*/")         # sums are twice as frequent as doubling and halving
        number = rng.randint(1, 9)
        if sign in "*/":
            number = 2
        if sign == "/" and value % 2 == 1:
            continue                        # an odd number has no half

        result = _apply(value, sign, number)
        if 1 <= result <= LARGEST:
            steps.append((sign, number))
            value = result
    return start, steps


def _apply(value, sign, number):
    """Returns the result of one step; divisions are without remainder."""
    results = {"+": value + number, "-": value - number,
               "*": value * number, "/": value // number}
    return results[sign]


def _held_out(start, steps):
    """Tell whether a story is held out, as one in ten is.

    A checksum of its numbers and operations decides, so words can not move it to the other side."""
    return zlib.crc32(repr((start, steps)).encode()) % 10 == 0


def _story(rng, start, steps, name):
    """Put a chain of operations into words that are drawn at random. Returns the problem."""
    who, friend = rng.sample(sorted(NAMES), 2)
    words = {"name": who, "friend": friend, "She": NAMES[who], "things": rng.choice(THINGS)}
    sentences = [rng.choice(OPENINGS).format(n=start, **words)]
    equations = []
    value = start

    for sign, number in steps:
        sentences.append(rng.choice(WORDINGS[sign]).format(n=number, **words))
        result = _apply(value, sign, number)
        equations.append(f"{value}{sign}{number}={result}")
        value = result
    sentences.append(rng.choice(QUESTIONS).format(**words))

    solution = "\n".join([*equations, f"#### {value}"])
    return {"problem": " ".join(sentences), "answer": str(value), "solution": solution,
            "task": "arithmetic", "level": len(steps), "id": name}


# ----------------------------------------------------------------------------------- the table

@dataclass
class Task:
    """A built-in task: how its problems are made, and how a completion is checked."""
    problems: Callable                  # (count, split, seed, levels) -> list of problems
    check: Callable | None = None       # (problem, completion) -> bool; None: reward.verify


# To add a task, write one function that makes its problems, and add one line here. The function
# takes the arguments of `arithmetic` and returns dicts with the keys that `_story` returns. Where
# comparing answers is not enough, a second function checks a completion: Task(stories, check).
TASKS = {
    "arithmetic": Task(arithmetic),
}


def problems(name, count, split="train", seed=0, level=(4, 6)):
    """Returns `count` problems of a built-in task; the same arguments give the same problems.

    level is an integer or a pair (fewest, most). Each problem is a dict with "problem", "answer",
    "solution", "task", "level" and "id". Raises ValueError for an unknown task or split."""
    if name not in TASKS:
        raise ValueError(f"no built-in task is called {name!r}: choose {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, not {split!r}")

    levels = (level, level) if isinstance(level, int) else level
    return TASKS[name].problems(count, split, seed, levels)


def correct(problem, completion):
    """Tell whether a completion solves a problem, by the checker of the problem's task.

    reward.verify compares the answers where the task has no checker and where there is no task."""
    task = TASKS.get(problem.get("task"))
    if task is None or task.check is None:
        return reward.verify(completion, problem["answer"])
    return bool(task.check(problem, completion))
