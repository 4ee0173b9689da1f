"""Stories of several steps, the task of the default run; a level is the number of steps.

    Mia has 7 shells. She finds 5 more. She gives half to Ben. How many shells does Mia have?

A tiny model learns the single steps of such a story. Their composition it does not learn, neither
told step by step nor guessed at once, and so there is something left for reinforcement learning.
Training and held-out stories differ in start and operations, not only in words (`held_out`).
"""
import functools
import random

from puzzles.common import Task, held_out, perturbed

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
        if _belongs((start, steps), split):
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


def _belongs(structure, split):
    """Tell whether the story of a start and operations belongs to the split "train" or "test"."""
    start, steps = structure
    return held_out((start, list(steps))) == (split == "test")


def _apply(value, sign, number):
    """Returns the result of one step; divisions are without remainder."""
    results = {"+": value + number, "-": value - number,
               "*": value * number, "/": value // number}
    return results[sign]


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
            "task": "arithmetic", "level": len(steps), "id": name,
            "structure": (start, tuple(steps))}


def perturb(rng, structure):
    """Yield stories with another operation in one step, and another result."""
    start, steps = structure
    result = _values(start, steps)[-1]
    for _ in range(100):
        changed = list(steps)
        changed[rng.randrange(len(steps))] = (rng.choice("+-"), rng.randint(1, 9))
        values = _values(start, changed)
        if all(1 <= value <= LARGEST for value in values) and values[-1] != result:
            yield start, tuple(changed)


def write(rng, structure):
    """Returns a story of this structure, in words that are drawn from the rng."""
    return _story(rng, *structure, name="")


def _values(start, steps):
    """Returns the number of things after each step; 0 from where half of an odd number is taken."""
    values, value = [], start
    for sign, number in steps:
        value = 0 if sign == "/" and value % 2 else _apply(value, sign, number)
        values.append(value)
    return values


def guess(level):
    """Returns the accuracy of guessing among all numbers that may be an answer."""
    return 1 / LARGEST


TASK = Task(problems=arithmetic, levels=(4, 6), level_is="steps", guess=guess,
            perturb=functools.partial(perturbed, perturb, write, _belongs))
