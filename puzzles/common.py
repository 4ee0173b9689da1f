"""What the built-in tasks share: the row of a task in the table, names, and the road to a problem.

A puzzle begins as a structure: nested tuples of numbers and short words, without names or
sentences. Whether it is held out is decided by the structure alone, so another name or wording of
a training puzzle is never a test puzzle. Where a structure numbers people, others may number the
same people otherwise; there it is decided by the structure's shape (`anonymous`).
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
SALT = "facts"      # goes into the checksum that decides the split: of the words tried, the one by
                    # which the easiest levels hold out puzzles of nearly every answer
LONGEST = 2000      # characters of an answer that a checker reads: completions are untrusted

# behind "####" or a line "Final Answer", words at the very end: no code, no markup, no TeX
_LAST_LINE = re.compile(r"(?:####[ \t]*|^[ \t#*_]*(?:final )?answer[ \t:*_]*\n\s*)"
                        r"([A-Za-z\"][^\n#<{}\\]*)\Z", re.I | re.M)
_MARK = re.compile(r"(?:\\f?box(?:ed)?\{|<answer>)([^{}<]*)(?:\}|</answer>)")
_JOINED = re.compile(r"[\s$,;.*]*(?:(?:and|or)\b[\s$,;.*]*)?")
_TEXT = re.compile(r"\\(?:text|math)(?:rm|bf|it|sf|tt|up|normal)?\{([^{}]*)\}")
_SPACE = re.compile(r"\\[ ,;:!]|\\[{}]")


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


def puzzle(name, draw, write, *, check, perturb=None, shape=None, **row):
    """Returns the Task of a puzzle from its functions.

    draw(rng, level) returns a structure with exactly one answer, and write(rng, structure) a dict
    with "problem", "answer" and "solution". perturb(rng, structure) yields structures of another
    answer that differ in one statement. shape(structure) returns the same for all structures that
    are one puzzle, of which one side of the split has all; None: the structure itself."""
    belongs = functools.partial(in_split, shape or (lambda structure: structure))
    problems = functools.partial(collect, name, draw, write, belongs)
    changed = functools.partial(perturbed, perturb, write, belongs) if perturb else None
    return Task(problems=problems, check=check, perturb=changed, **row)


def collect(name, draw, write, belongs, count, split, seed, levels):
    """Returns `count` problems of a puzzle of levels within `levels`, equally often on average.

    The same arguments give the same problems, and no structure is in both splits."""
    rng = random.Random(f"{name}/{split}/{seed}")
    problems = []
    while len(problems) < count:
        level = rng.randint(*levels)
        structure = drawn(rng, name, draw, belongs, level, split)

        problems.append({
            **write(rng, structure),
            "task": name, "level": level, "id": f"{name}/{split}/{seed}/{len(problems)}",
            "structure": structure,
        })
    return problems


def drawn(rng, name, draw, belongs, level, split):
    """Draw a structure of this level until one belongs to the split, so that no level is rarer.

    Raises ValueError where a level has so few structures that none does."""
    for _ in range(MAX_DRAWS):
        structure = draw(rng, level)
        if belongs(structure, split):
            return structure
    raise ValueError(f"{name}: none of {MAX_DRAWS} puzzles of level {level} belongs to {split!r}")


def held_out(structure):
    """Tell whether a structure, or a shape, belongs to the split "test", as one in ten does."""
    return checksum(structure) % 10 == 0


def checksum(value):
    """Returns 32 bits that are the same in every process, of nested tuples of numbers and words."""
    return zlib.crc32(repr(value).encode())


def in_split(shape, structure, split):
    """Tell whether a structure belongs to the split "train" or "test", by its shape."""
    return held_out(shape(structure)) == (split == "test")


def anonymous(people, facts):
    """Returns facts about people 0, 1, ... without saying who is who.

    A fact is (label, group, ...). A group is a tuple of people who may change places: Ben sits left
    of Ana is ("left", (1,), (0,)), and Ana and Ben are neighbours ("next", (0, 1)). However people
    are numbered and facts are ordered, the result is the same. Two rounds of colour refinement
    (Weisfeiler and Leman, 1968): a person is told by the facts about him and the people in them.
    Rarely two puzzles become one, and are then on the same side of the split."""
    colours = [0] * people

    def in_colours():
        return [(label, *(tuple(sorted(colours[person] for person in group)) for group in groups))
                for label, *groups in facts]

    for _ in range(2):
        seen = list(zip(facts, in_colours()))
        roles = []
        for person in range(people):
            about = [([i for i, group in enumerate(groups) if person in group], fact)
                     for (_, *groups), fact in seen]
            roles.append(sorted(role for role in about if role[0]))
        colours = [checksum((colour, role)) for colour, role in zip(colours, roles)]

    return SALT, tuple(sorted(in_colours()))


def perturbed(perturb, write, belongs, problem, seed):
    """Returns the problem with one statement changed and so with another answer, or None.

    The changed one is a held-out puzzle, so that it was never trained on. Names and wordings are
    drawn anew from the seed."""
    rng = random.Random(f"perturbed/{problem['id']}/{seed}")
    others = perturb(rng, problem["structure"])
    structure = next((other for other in others if belongs(other, "test")), None)
    if structure is None:
        return None
    return {**problem, **write(rng, structure), "id": problem["id"] + "/perturbed",
            "structure": structure}


def final_answer(completion):
    r"""Returns the final answer of a completion, words included, or "" where there is none.

    "So Ben lies.\n#### Ben" gives "Ben". To extraction.py that last line is a heading, because its
    answers are mostly numbers; so is one that stands below "Final Answer". \text{} and the like
    around words are taken away. Never raises."""
    if not isinstance(completion, str):
        return ""

    text = _SPACE.sub(" ", _TEXT.sub(r"\1", tail(completion)))
    text = _LAST_LINE.sub(r"<answer>\1</answer>", text)
    answer = extract_answer(text) or ""
    return answer if len(answer) <= LONGEST and _stands_in(text, answer) else ""


def _stands_in(text, answer):
    r"""Tell whether an answer stands in the text as it is, or as a list of marks.

    Of \boxed{Ben} and \boxed{Cid} extract_answer makes "Ben, Cid". But of \boxed{Ben} \boxed{Cid}
    \boxed{Ben} it makes "Cid, Ben", which nobody said."""
    if answer in re.sub("[*`]", "", text):
        return True
    marks = list(_MARK.finditer(text))
    said = [mark[1].strip() for mark in marks]
    names = answer.split(", ")
    count = len(names)
    if said[-count:] != names:
        return False
    if len(said) == count or said[-count - 1] not in names:
        return True
    between = text[marks[-count - 1].end():marks[-count].start()]       # said before, and apart
    return not _JOINED.fullmatch(between)
