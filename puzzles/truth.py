"""Truth-tellers and liars: everybody says something about who lies, and one answer fits.

    Ana, Ben and Cid each always tell the truth or always lie. Ana says: Ben is a liar. Ben says:
    Cid tells the truth. Cid says: Ana and Ben are of different kinds. Who are the liars?

The answer is "Ana": if she were honest, Ben and so Cid would lie, but what Cid says would be right.
What a truth-teller says is true, what a liar says is false (R. Smullyan, What Is the Name of This
Book?, 1978; the puzzle of arXiv 2410.23123 and 2502.14768). A level is the number of people, n.
A statement is about one person (a liar or not), about two (of the same kind or not), or about the
number of liars (at least k, exactly k). Of more than two people nobody names themselves.

Who lies is drawn first, uniformly from all 2^n possibilities. Everybody then says something that
agrees with their kind, drawn again until no other possibility fits. The answer is unique because
all 2^n were looked at. A set of them is an integer of 2^n bits, so a statement costs one "and".

Every possibility has puzzles, at every n. With two people this needs "Ben and I are of the same
kind", because two liars could say all else that two truth-tellers can. The puzzles of two with one
statement each are only 33, so there each person may make a second one.

The worked solution is a search that does not know who lies. It supposes that the first person is
honest and draws conclusions, one person a line. A conclusion follows from one statement and from
the kinds that are known by then. A contradiction ends the last supposition, whose opposite is then
so, and what was concluded since falls with it. Where no conclusion is left, the next person is
supposed honest. The search ends where all statements fit, because that happens only once.

Left out: and, or, if; people who sometimes lie. Needs puzzles/common.py; tasks.py needs this file.
"""
import functools
import itertools
import re

from puzzles.common import NAMES, anonymous, final_answer, puzzle

OPENINGS = (
    "{people} each always tell the truth or always lie.",
    "Each of {people} always lies or always tells the truth.")
SAYINGS = ("{speaker} says: {words}.", "{speaker} claims: {words}.")
WORDINGS = {
    "lies": ("{x} is a liar", "{x} always lies", "{x} never tells the truth"),
    "true": ("{x} tells the truth", "{x} is no liar", "{x} never lies"),
    "same": ("{x} and {y} are of the same kind", "{x} and {y} are alike"),
    "different": ("{x} and {y} are of different kinds", "{x} and {y} are not alike"),
    "least": ("at least {k} of us {are}", "{k} or more of us lie"),
    "exactly": ("exactly {k} of us {are}", "the number of liars among us is {k}"),
}
QUESTIONS = (
    "Who are the liars? Give their names in alphabetical order, or nobody.",
    "Which of them are liars? Give the names in alphabetical order, or nobody.")

# the lines of a solution; what somebody says is right or wrong, who says it is honest or lies
LINES = {
    "suppose": "Suppose {x} is honest.",
    "so": "So {x} lies.",
    "honest": "By {speaker}, {x} is honest.",
    "lies": "By {speaker}, {x} lies.",
    "right": "{x} is right and honest.",
    "wrong": "{x} is wrong and lies.",
    "but right": "But {x} is right.",
    "but wrong": "But {x} is wrong.",
}


# ------------------------------------------------------------------------ statements and who lies

def people_in(structure):
    """Returns how many people a structure has: its statements are in the order of the speakers."""
    return structure[-1][0] + 1


def holds(statement, liars):
    """Tell whether the words of a statement, (speaker, kind, whom or how many), are true."""
    _, kind, *about = statement
    if kind == "least":
        return len(liars) >= about[0]
    if kind == "exactly":
        return len(liars) == about[0]

    lying = [person in liars for person in about]
    if kind == "lies":
        return lying[0]
    if kind == "true":
        return not lying[0]
    return (lying[0] == lying[1]) == (kind == "same")


def solutions(structure):
    """Returns all sets of liars that fit, as tuples, by trying each of the 2^n."""
    people = people_in(structure)
    found = []
    for count in range(people + 1):
        for liars in itertools.combinations(range(people), count):
            if all(holds(said, liars) == (said[0] not in liars) for said in structure):
                found.append(liars)
    return found


# Below, a possibility is an integer: bit i says that person i lies. A set of possibilities is an
# integer of 2^n bits: bit p says that possibility p is in it. `people` is their number, n.

@functools.cache
def possibilities(people):
    """Returns all of them, a list of those where person i lies, and of those with k liars."""
    lying = [0] * people
    counted = [0] * (people + 1)
    for possibility in range(2 ** people):
        counted[possibility.bit_count()] |= 1 << possibility
        for person in range(people):
            if possibility >> person & 1:
                lying[person] |= 1 << possibility
    return sum(counted), lying, counted


def where_true(statement, people):
    """Returns the possibilities in which the words of a statement are true."""
    every, lying, counted = possibilities(people)
    _, kind, *about = statement
    if kind == "least":
        return sum(counted[about[0]:])
    if kind == "exactly":
        return counted[about[0]]

    if kind in ("lies", "true"):
        differ = lying[about[0]]
    else:
        differ = lying[about[0]] ^ lying[about[1]]
    return differ if kind in ("lies", "different") else every ^ differ


def where_fits(statement, people):
    """Returns the possibilities in which a statement is as true as its speaker."""
    _, lying, _ = possibilities(people)
    # a liar's words are false: where the speaker lies, it fits where it is not true
    return where_true(statement, people) ^ lying[statement[0]]


@functools.cache
def statements(people, speaker):
    """Returns what a person can say: {kind: [(statement, where it fits)]}.

    That at least all are liars is left out, for it says that exactly all are."""
    others = [(person,) for person in range(people) if person != speaker]
    pairs = [x + y for x, y in itertools.combinations(others, 2)]
    pairs = pairs or [(*others[0], speaker)]
    numbers = [(k,) for k in range(1, people + 1)]
    abouts = {"lies": others, "true": others, "same": pairs, "different": pairs,
              "least": numbers[:-1], "exactly": numbers}

    said = {}
    for kind, choices in abouts.items():
        all_of_kind = [(speaker, kind, *about) for about in choices]
        said[kind] = [(statement, where_fits(statement, people)) for statement in all_of_kind]
    return said


# ------------------------------------------------------------------------------- draw and perturb

def draw(rng, level):
    """Returns the statements (speaker, kind, whom or how many) of a puzzle with one answer."""
    liars = rng.getrandbits(level)
    choices = [agreeing(level, speaker, liars) for speaker in range(level)]
    while True:
        drawn = {}
        for speaker, kinds in enumerate(choices):
            for _ in range(rng.randint(1, 2) if level == 2 else 1):
                statement, fits = rng.choice(rng.choice(kinds))
                drawn[speaker, fits] = statement        # nobody says the same in other words

        left, _, _ = possibilities(level)
        for _, fits in drawn:
            left &= fits
        if left == 1 << liars:
            return tuple(sorted(drawn.values()))


def agreeing(people, speaker, liars):
    """Returns what a person can say in one possibility: a list of (statement, fits) a kind."""
    kinds = []
    for choices in statements(people, speaker).values():
        kinds.append([choice for choice in choices if choice[1] >> liars & 1])
    return [choices for choices in kinds if choices]


def perturb(rng, structure):
    """Yield the puzzles with one statement changed and so with another answer."""
    people = people_in(structure)
    [answer] = solutions(structure)
    before = sum(1 << person for person in answer)
    changed = []

    for place, old in enumerate(structure):
        rest = structure[:place] + structure[place + 1:]
        said = {(statement[0], where_fits(statement, people)) for statement in rest}
        left, _, _ = possibilities(people)
        for _, fits in said:
            left &= fits

        speaker = old[0]
        for new, fits in itertools.chain(*statements(people, speaker).values()):
            is_unique = (left & fits).bit_count() == 1
            if is_unique and left & fits != 1 << before and (speaker, fits) not in said:
                changed.append(tuple(sorted((*rest, new))))
    yield from rng.sample(changed, len(changed))


def shape(structure):
    """Returns the structure without saying who is who, for names are drawn."""
    facts = []
    for speaker, kind, *about in structure:
        if kind in ("least", "exactly"):
            facts.append((f"{kind} {about[0]}", (speaker,)))
        else:
            facts.append((kind, (speaker,), tuple(about)))
    return anonymous(people_in(structure), facts)


# --------------------------------------------------------------------------------- worked solution

def steps(structure):
    """Returns the steps of the search, (key of LINES, person, speaker), and the answer as a set."""
    every, _, _ = possibilities(people_in(structure))
    taken = []
    left = search(structure, every, taken)
    return taken, left


def search(structure, remaining, taken):
    """Add the steps that follow among the possibilities that remain. Returns the answer as a set.

    Those remain in which everybody whose kind is known is of that kind. The empty set, 0, comes
    back if there is no answer among them."""
    people = people_in(structure)
    _, lying, _ = possibilities(people)
    step = next_step(structure, remaining)
    while step:
        taken.append(step)
        what, person, _ = step
        if what.startswith("but"):
            return 0
        remaining &= lying[person] if what in ("lies", "wrong") else ~lying[person]
        step = next_step(structure, remaining)

    if remaining.bit_count() <= 1:
        return remaining
    person = min(p for p in range(people) if kind_of(p, remaining, lying) is None)
    taken.append(("suppose", person, None))
    found = search(structure, remaining & ~lying[person], taken)
    if not found:
        taken.append(("so", person, None))
        found = search(structure, remaining & lying[person], taken)
    return found


def next_step(structure, remaining):
    """Returns a contradiction, else the first conclusion from one statement, else None."""
    people = people_in(structure)
    _, lying, _ = possibilities(people)
    kinds = [kind_of(person, remaining, lying) for person in range(people)]

    for statement in structure:
        speaker = statement[0]
        if kinds[speaker] and not remaining & where_fits(statement, people):
            what = "but wrong" if kinds[speaker] == "honest" else "but right"
            return what, speaker, None

    for statement in structure:
        speaker = statement[0]
        if not kinds[speaker]:
            right = remaining & where_true(statement, people)
            if right in (0, remaining):
                return "right" if right else "wrong", speaker, None
            continue

        # what the words of a known speaker leave
        left = remaining & where_fits(statement, people)
        for person in range(people):
            kind = kind_of(person, left, lying)
            if kind and not kinds[person]:
                return kind, person, speaker
    return None


def kind_of(person, remaining, lying):
    """Returns "honest" or "lies" if the person is so in all the possibilities given, else None."""
    if not remaining & lying[person]:
        return "honest"
    return None if remaining & ~lying[person] else "lies"


# --------------------------------------------------------------------------------- text and answer

def write(rng, structure):
    """Returns the problem, its answer and the worked solution, with names and wordings drawn."""
    people = people_in(structure)
    names = sorted(rng.sample(NAMES, people))
    listed = ", ".join(names[:-1]) + " and " + names[-1]
    said = [in_words(rng, statement, names) for statement in structure]
    sentences = [rng.choice(OPENINGS).format(people=listed), *said, rng.choice(QUESTIONS)]
    problem = " ".join(sentences)

    taken, left = steps(structure)
    lines = []
    for what, person, speaker in taken:
        by = None if speaker is None else names[speaker]
        lines.append(LINES[what].format(x=names[person], speaker=by))

    _, lying, _ = possibilities(people)
    liars = [name for person, name in enumerate(names) if left & lying[person]]
    answer = ", ".join(liars) or "nobody"
    solution = "\n".join([*lines, "All fits.", f"#### {answer}"])
    return {"problem": problem, "answer": answer, "solution": solution}


def in_words(rng, statement, names):
    """Returns a statement as a sentence, in one of its wordings."""
    speaker, kind, *about = statement
    words = rng.choice(WORDINGS[kind])
    if kind in ("least", "exactly"):
        words = words.format(k=about[0], are="is a liar" if about[0] == 1 else "are liars")
    else:
        said = ["I" if person == speaker else names[person] for person in about]
        words = words.format(x=said[0], y=said[-1])
    return rng.choice(SAYINGS).format(speaker=names[speaker], words=words)


def check(problem, completion):
    """Tell whether the final answer of a completion names the liars, all and only them."""
    named = parse(final_answer(completion))
    return len(set(named)) == len(named) and set(named) == set(parse(problem["answer"]))


def parse(answer):
    """Returns the names of an answer such as "Ana, Ben and Cid." in lower case."""
    text = answer.lower().strip(" \n\"").removesuffix(".").rstrip()
    names = re.split(r"\s*,\s*(?:and\s)?|\s+and\s+|\n", text)
    return [" ".join(name.split()) for name in names]


def guess(level):
    """Returns the accuracy of guessing: each of 2^n answers is as likely."""
    return 1 / 2 ** level


TASK = puzzle(
    "truth", draw, write, check=check, perturb=perturb, shape=shape,
    least=2, most=8, levels=(2, 4), level_is="people", guess=guess)
