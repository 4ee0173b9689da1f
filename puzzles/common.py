"""What the built-in tasks share: the row of a task in the table, names, and the road to a problem.

A puzzle begins as a structure: nested tuples of numbers and short words, without names or
sentences. Whether it is held out is decided by the structure alone, so another name or wording of
a training puzzle is never a test puzzle.
"""
import functools
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from extraction import extract_answer
from thoughts import tail

NAMES = ("Ana", "Ben", "Cid", "Dora", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jan", "Kim", "Leo",
         "Mia", "Nora", "Omar", "Pia", "Ruth", "Sam", "Tom", "Zoe")
MAX_DRAWS = 10_000  # of structures, until one belongs to the split; one in ten is held out
LONGEST = 2000      # characters of an answer that a checker reads: completions are untrusted
# "#### " and words, at the very end: no code, no markup, no TeX
_LAST_LINE = re.compile(r"####[ \t]*([A-Za-z][^\n#<{}\\]*)\Z")
_TEXT = re.compile(r"\\(?:text|mathrm)\{([^{}]*)\}")


@dataclass
class Task:
    """A row of the table: how the problems of a task are made, and how a completion is checked."""
    problems: Callable                  # (count, split, seed, levels) -> list of problems
    check: Callable | None = None       # (problem, completion) -> bool; None: reward.verify
    least: int = 1                      # the easiest level that there is
    most: int | None = None             # the hardest; None: there is no end
    levels: tuple = (1, 1)              # (easiest, hardest) where nothing else is said
    level_is: str = "level"             # what the number of a level counts
    guess: Callable | None = None       # level -> accuracy of guessing among all answers
    perturb: Callable | None = None     # (problem, seed) -> a changed problem, or None


def puzzle(name, draw, write, *, check, perturb=None, **row):
    """Returns the Task of a puzzle from its functions.

    draw(rng, level) returns a structure with exactly one answer, and write(rng, structure) a dict
    with "problem", "answer" and "solution". perturb(rng, structure) returns a structure of another
    answer that differs in one statement, or None where it found none; it may be None itself."""
    problems = functools.partial(collect, name, draw, write)
    changed = functools.partial(perturbed, perturb, write) if perturb else None
    return Task(problems=problems, check=check, perturb=changed, **row)


def collect(name, draw, write, count, split, seed, levels):
    """Returns `count` problems of a puzzle of levels within `levels`, equally often on average.

    The same arguments give the same problems, and no structure is in both splits."""
    rng = random.Random(f"{name}/{split}/{seed}")
    problems = []
    while len(problems) < count:
        level = rng.randint(*levels)
        structure = drawn(rng, name, draw, level, split)

        problems.append({
            **write(rng, structure),
            "task": name, "level": level, "id": f"{name}/{split}/{seed}/{len(problems)}",
            "structure": structure,
        })
    return problems


def drawn(rng, name, draw, level, split):
    """Draw a structure of this level until one belongs to the split, so that no level is rarer.

    Raises ValueError where a level has so few structures that none does."""
    for _ in range(MAX_DRAWS):
        structure = draw(rng, level)
        if held_out(structure) == (split == "test"):
            return structure
    raise ValueError(f"{name}: none of {MAX_DRAWS} puzzles of level {level} belongs to {split!r}")


def held_out(structure):
    """Tell whether a structure belongs to the split "test", as one in ten does."""
    return zlib.crc32(repr(structure).encode()) % 10 == 0


def perturbed(perturb, write, problem, seed):
    """Returns the problem with one statement changed and so with another answer, or None.

    Names and wordings are drawn anew from the seed."""
    rng = random.Random(f"perturbed/{problem['id']}/{seed}")
    structure = perturb(rng, problem["structure"])
    if structure is None:
        return None
    return {**problem, **write(rng, structure), "id": problem["id"] + "/perturbed",
            "structure": structure}


def final_answer(completion):
    r"""Returns the final answer of a completion, words included, or "" where there is none.

    "So Ben lies.\n#### Ben" gives "Ben". To extraction.py that last line is a heading, because its
    answers are mostly numbers. \text{} around words is taken away. Never raises."""
    if not isinstance(completion, str):
        return ""

    text = _LAST_LINE.sub(r"<answer>\1</answer>", tail(completion))
    answer = extract_answer(text) or ""
    # of \boxed{Ben} \boxed{Cid} \boxed{Ben} extract_answer makes "Cid, Ben", which would say that
    # names were given in an order that nobody wrote: an answer has to stand in the text as it is
    if len(answer) > LONGEST or answer not in re.sub("[*`]", "", text):
        return ""
    return _TEXT.sub(r"\1", answer)
