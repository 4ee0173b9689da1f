"""The built-in task, which needs no download: stories of several steps such as

    "Mia has 7 shells. She finds 5 more. She gives half of them to Ben. How many shells does Mia have?"

whose single steps a tiny model learns, while their composition, told step by step or guessed at once, it does not.
Training and held-out stories differ in start and operations, not only in words: see `_held_out`.
"""
import random
import zlib

LARGEST = 20      # no number in a story exceeds it: the single steps form a small table that can be learned
NAMES = {"Mia": "She", "Ben": "He", "Ana": "She", "Tom": "He", "Eva": "She", "Sam": "He", "Lily": "She", "Max": "He",
         "Zoe": "She", "Leo": "He", "Ruth": "She", "Omar": "He", "Ines": "She", "Hugo": "He", "Nora": "She", "Ivan": "He"}
THINGS = ("shells", "apples", "coins", "books", "stamps", "marbles", "pens", "cards", "beads", "plums", "stones",
          "buttons", "tickets", "cookies", "candles", "roses")
OPENINGS = ("{name} has {n} {things}.", "{name} starts with {n} {things}.", "There are {n} {things} on the table of {name}.",
            "{name} owns {n} {things}.", "In the box of {name} there are {n} {things}.")
WORDINGS = {
    "+": ("{She} finds {n} more.", "{She} buys {n} more.", "{friend} brings {n}.", "{She} gets {n} from {friend}.",
          "Then {n} more arrive.", "{She} wins {n} of them.", "{friend} adds {n}."),
    "-": ("{She} loses {n}.", "{She} gives {n} to {friend}.", "{She} sells {n} of them.", "{friend} takes {n}.",
          "Then {n} break.", "{She} puts {n} away.", "{She} drops {n} of them."),
    "*": ("Then the number doubles.", "{friend} brings as many again.", "{She} gets twice as many."),
    "/": ("{She} loses half of them.", "{She} gives half to {friend}.", "{friend} takes half of them."),
}
QUESTIONS = ("How many {things} does {name} have?", "How many {things} are left?", "How many {things} are there now?",
             "What is the number of {things} now?", "How many {things} does {name} have in the end?")


def arithmetic(count, split="train", seed=0, levels=(4, 6)):
    """`count` word problems; level = number of steps. The same arguments give the same problems.

    split "test" holds stories whose start and operations never occur in "train", whatever the seeds. The solution is
    in GSM8K's format: one equation a line, then "#### answer". Terse answers are made of it by sft.py."""
    low, high = levels
    if not 1 <= low <= high:
        raise ValueError(f"levels must be 1 <= fewest <= most, not {low}-{high}")
    rng = random.Random(f"arithmetic/{split}/{seed}")
    problems = []
    while len(problems) < count:
        start, steps = _chain(rng, rng.randint(low, high))
        if _held_out(start, steps) == (split == "test"):
            problems.append(_story(rng, start, steps, f"arithmetic/{split}/{seed}/{len(problems)}"))
    return problems


def _chain(rng, length):
    """A start and `length` operations (sign, number) whose results stay between 1 and LARGEST."""
    start = value = rng.randint(2, LARGEST)
    steps = []
    while len(steps) < length:
        sign, n = rng.choice("++--*/"), rng.randint(1, 9)
        n = 2 if sign in "*/" else n
        result = {"+": value + n, "-": value - n, "*": value * n, "/": value // 2 if value % 2 == 0 else 0}[sign]
        if 1 <= result <= LARGEST:
            steps.append((sign, n))
            value = result
    return start, steps


def _held_out(start, steps):
    """One story in ten, by a checksum of its numbers and operations: words can not move it to the other side."""
    return zlib.crc32(repr((start, steps)).encode()) % 10 == 0


def _story(rng, start, steps, name):
    who, friend = rng.sample(sorted(NAMES), 2)
    words = {"name": who, "friend": friend, "She": NAMES[who], "things": rng.choice(THINGS)}
    sentences = [rng.choice(OPENINGS).format(n=start, **words)]
    lines, value = [], start
    for sign, n in steps:
        sentences.append(rng.choice(WORDINGS[sign]).format(n=n, **words))
        result = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[sign]
        lines.append(f"{value}{sign}{n}={result}")
        value = result
    sentences.append(rng.choice(QUESTIONS).format(**words))
    return {"problem": " ".join(sentences), "answer": str(value), "solution": "\n".join([*lines, f"#### {value}"]),
            "level": len(steps), "id": name}
