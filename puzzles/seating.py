"""Seating: people in a row or around a table, and clues that only one order fits.

    Ana, Ben and Cid sit in a row of three seats. Ben does not sit next to Ana. Cid sits directly
    left of Ana. Who sits where? Give the names from left to right, separated by commas.

The level is the number of people. A quarter of the puzzles of 4 people or more is about a round
table. There the order is told clockwise and begins with a named person, so that a turned table is
no other answer. A mirrored one is.

The answer is unique because it is drawn first, uniformly, and true clues are added until no other
order fits. All n! orders are looked at, as boolean arrays that are kept: one a clue. Then each clue
is dropped that the others make needless, so every clue that is left has to be used.

The worked solution fills the seats from left to right and tries the people as the text lists them:

    Ana no, Cid directly left of Ana
    Ben>Cid Ana yes
    #### Ben, Cid, Ana

A line is a beginning of the order. It is refused if no order with this beginning fits the clue that
the line names, the first such clue in the text. Whoever is not refused gets no line, for the line
goes on. If a clue leaves one person alone for the next seat, that person is taken, with ">" in
front: here Cid, as Ana is not next to Ben. After a refusal the next line tries the next person at
the last seat without ">" that has one left. So a line follows from the clues and the line above it.
The mean is 2 lines for 3 people, 5 for 5 and 15 for 7; without ">" it would be 3, 10 and 35.

Left out: empty seats, conditions such as "if Ana sits at an end", and people who look inward.
Needs common.py and numpy.
"""
import functools
import itertools
import re
from math import factorial

import numpy as np

from puzzles.common import NAMES, anonymous, final_answer, puzzle

ROUND = 0.25        # share of round tables, from 4 people on: 3 around a table have only 2 orders
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven")

# A clue is (kind, number, person) or (kind, number, person, other). The number counts the seats in
# "between" and names the seat in "seat", from 1 on; elsewhere it is 0. Weights say how often a kind
# is drawn: a numbered seat gives so much away that it is rare.
ROW_KINDS = {"before": 3, "left": 3, "next": 3, "apart": 3, "end": 2, "inner": 2, "between": 2,
             "seat": 0.5}
ROUND_KINDS = {"clockwise": 1, "next": 1, "apart": 1}
MUTUAL = ("next", "apart", "between")       # the two people may change places
LONE = ("end", "inner", "seat")             # about one person

WORDINGS = {        # as a solution says it, then as a problem may
    "before": ("{0} directly left of {1}",
               "{0} sits directly left of {1}.", "{1} sits directly right of {0}."),
    "left": ("{0} left of {1}",
             "{0} sits somewhere left of {1}.", "{1} sits somewhere right of {0}."),
    "clockwise": ("{0} directly before {1}", "Clockwise, {0} sits directly before {1}.",
                  "Clockwise, {1} sits directly after {0}.", "{1} sits next clockwise after {0}."),
    "next": ("{0} next to {1}", "{0} sits next to {1}.", "{0} and {1} sit next to each other."),
    "apart": ("{0} not next to {1}",
              "{0} does not sit next to {1}.", "{0} and {1} do not sit next to each other."),
    "end": ("{0} at an end", "{0} sits at an end.", "{0} sits at one of the ends."),
    "inner": ("{0} not at an end", "{0} does not sit at an end.", "{0} sits at neither end."),
    "between": ("{seats} between {0} and {1}", "Exactly {seats} {are} between {0} and {1}.",
                "{0} and {1} have exactly {seats} between them."),
    "seat": ("{0} in seat {number}",
             "{0} sits in seat {number} from the left.", "Seat {number} from the left is for {0}."),
}
ROW_OPENINGS = (
    "{people} sit in a row of {count} seats.", "{people} sit on {count} seats in a row.",
    "A row of {count} seats is for {people}.")
ROUND_OPENINGS = ("{people} sit around a round table.", "{people} sit at a round table.")
APART = re.compile(r"->|→|\\rightarrow|\\to\b|\\text\{|[-,{}*`$]|\band\b")      # between names


# ---------------------------------------------------------------------------- orders and clues

def holds(clue, seats, n, is_round):
    """Tell whether a clue is true: seats[person] counts from 0, from the left or clockwise.

    Each entry of seats may be an array, of many orders; so is the result then."""
    kind, number, person, *others = clue
    seat = seats[person]
    if kind == "end":
        return (seat == 0) | (seat == n - 1)
    if kind == "inner":
        return (seat != 0) & (seat != n - 1)
    if kind == "seat":
        return seat == number - 1

    steps = seats[others[0]] - seat
    if kind == "before":
        return steps == 1
    if kind == "clockwise":
        return (steps == 1) | (steps == 1 - n)
    if kind == "left":
        return steps > 0
    if kind == "between":
        return abs(steps) == number + 1
    neighbours = (abs(steps) == 1) | (is_round & (abs(steps) == n - 1))
    return neighbours == (kind == "next")


@functools.lru_cache(maxsize=None)
def orders(n):
    """Returns all orders of n people, sorted, and the seat of each person in them."""
    every = np.array(list(itertools.permutations(range(n))))        # (n!, n)
    return every, np.argsort(every, axis=1).T                       # (n, n!)


@functools.lru_cache(maxsize=None)
def fits(n, is_round, clue):
    """Returns for each of the n! orders whether it fits a clue, as booleans."""
    return holds(clue, orders(n)[1], n, is_round)


def fit_all(n, start, clues):
    """Returns for each of the n! orders whether it begins with `start` and fits all clues."""
    together = np.zeros(factorial(n), dtype=bool)
    together[begun(n, start)] = True
    for clue in clues:
        together &= fits(n, bool(start), clue)
    return together


def begun(n, beginning):
    """Returns where the orders with this beginning stand in `orders`, as a slice."""
    left = list(range(n))
    first = 0
    for person in beginning:
        first += left.index(person) * factorial(len(left) - 1)
        left.remove(person)
    return slice(first, first + factorial(len(left)))


def solutions(structure):
    """Returns all orders that fit a structure (n, start, clues), as lists of people.

    start is () for a row, and (person,) for a round table whose order begins with that person."""
    n = structure[0]
    return orders(n)[0][fit_all(*structure)].tolist()


@functools.lru_cache(maxsize=None)
def all_clues(n, kind):
    """Returns every clue of a kind about n people. Mutual ones name the smaller number first."""
    numbers = {"between": range(1, n - 1), "seat": range(1, n + 1)}.get(kind, (0,))
    people = itertools.permutations(range(n), 1 if kind in LONE else 2)
    if kind in MUTUAL:
        people = itertools.combinations(range(n), 2)
    return [(kind, number, *those) for those in people for number in numbers]


# -------------------------------------------------------------------------------- the functions

def draw(rng, level):
    """Returns a structure (n, start, clues) with one answer and no needless clue.

    The clues are sorted, and `write` shuffles them: a shuffle makes no held-out puzzle."""
    order = rng.sample(range(level), level)
    seats = [order.index(person) for person in range(level)]
    is_round = level >= 4 and rng.random() < ROUND
    start = tuple(order[:1]) if is_round else ()
    kinds = ROUND_KINDS if is_round else ROW_KINDS

    # add true clues, each of which excludes an order, until one order is left
    clues = []
    left = fit_all(level, start, clues)
    while left.sum() > 1:
        [kind] = rng.choices(list(kinds), kinds.values())
        true = [clue for clue in all_clues(level, kind) if holds(clue, seats, level, is_round)]
        clue = rng.choice(true)
        fewer = left & fits(level, is_round, clue)
        if fewer.sum() < left.sum():
            clues.append(clue)
            left = fewer

    # one pass is enough: a clue that is needed among many is needed among few
    for clue in list(clues):
        others = [other for other in clues if other != clue]
        if fit_all(level, start, others).sum() == 1:
            clues = others
    return level, start, tuple(sorted(clues))


def write(rng, structure):
    """Returns the problem, the answer and the worked solution, in names and wordings drawn here."""
    n, start, clues = structure
    names = rng.sample(NAMES, n)
    people = ", ".join(names[:-1]) + " and " + names[-1]
    clues = rng.sample(clues, len(clues))

    opening = rng.choice(ROUND_OPENINGS if start else ROW_OPENINGS)
    sentences = [opening.format(people=people, count=COUNTS[n])]
    sentences += [say(clue, names, rng) for clue in clues]
    way = f"clockwise, beginning with {names[start[0]]}" if start else "from left to right"
    sentences.append(f"Who sits where? Give the names {way}, separated by commas.")

    lines = []
    for tried, refusing in search(n, start, clues, names):
        verdict = f"no, {say(refusing, names)}" if refusing else "yes"
        lines.append(f"{tried} {verdict}")

    [order] = solutions(structure)
    answer = ", ".join(names[person] for person in order)
    solution = "\n".join([*lines, f"#### {answer}"])
    return {"problem": " ".join(sentences), "answer": answer, "solution": solution}


def say(clue, names, rng=None):
    """Returns a clue in the words of a solution, or with an rng in words of a problem."""
    kind, number, *people = clue
    wording, *sentences = WORDINGS[kind]
    if rng:
        wording = rng.choice(sentences)
    if rng and kind in MUTUAL:
        rng.shuffle(people)

    seats = f"{COUNTS[number]} seat" + ("" if number == 1 else "s")
    are = "is" if number == 1 else "are"
    return wording.format(*(names[person] for person in people),
                          number=number, seats=seats, are=are)


def search(n, start, clues, names):
    """Yield the lines of a solution as (names so far, the first clue that refuses them).

    The last line has all names, and None for the clue."""
    waiting = [(start, "".join(">" + names[person] for person in start))]
    while waiting:
        beginning, tried = waiting.pop()
        left = [person for person in range(n) if person not in beginning]

        # the orders with this beginning lie in one block, sorted by the person who comes next
        block = begun(n, beginning)
        allowed = []
        for clue in clues:
            good = fits(n, bool(start), clue)[block].reshape(len(left), -1)
            allowed.append(good.any(axis=1))
        sizes = [possible.sum() for possible in allowed]

        if 0 in sizes:
            yield tried.strip(), clues[sizes.index(0)]
        elif len(left) == 1:
            yield f"{tried} {names[left[0]]}".strip(), None
            return
        elif 1 in sizes:
            person = left[allowed[sizes.index(1)].argmax()]
            waiting.append(((*beginning, person), f"{tried}>{names[person]}"))
        else:
            waiting += [((*beginning, person), f"{tried} {names[person]}")
                        for person in reversed(left)]


def check(problem, completion):
    """Tell whether the final answer of a completion is the order, and nothing else.

    Between names may stand commas, "and", arrows, hyphens or blanks; case does not matter."""
    given = final_answer(completion)
    return words_of(given) == problem["answer"].lower().split(", ")


def words_of(text):
    """Returns the words of a text without what may stand between and behind the names."""
    return APART.sub(" ", text.lower()).strip().removesuffix(".").split()


def perturb(rng, structure):
    """Yield the structures with one clue replaced so that another order fits.

    Clues about the same people, such as the opposite, come before all others."""
    n, start, clues = structure
    [answer] = solutions(structure)
    kinds = ROUND_KINDS if start else ROW_KINDS

    changes = [(old, new) for old in clues for kind in kinds for new in all_clues(n, kind)]
    rng.shuffle(changes)
    changes.sort(key=lambda change: set(change[0][2:]) != set(change[1][2:]))
    others = {old: fit_all(n, start, [clue for clue in clues if clue != old]) for old in clues}
    for old, new in changes:
        left = others[old] & fits(n, bool(start), new)
        if left.sum() == 1 and not left[begun(n, answer)].any():
            kept = [clue for clue in clues if clue != old]
            yield n, start, tuple(sorted([*kept, new]))


def shape(structure):
    """Returns the structure without saying who is who, for names are drawn.

    With whom the order of a round table begins is left out too: it turns the answer, no more."""
    n, start, clues = structure
    table = "round" if start else "row"
    facts = []
    for kind, number, *people in clues:
        groups = [tuple(people)] if kind in MUTUAL else [(person,) for person in people]
        facts.append((f"{table} {kind} {number}", *groups))
    return anonymous(n, facts)


def guess(level):
    """Returns the accuracy of guessing among all orders, rows and round tables together."""
    share = ROUND if level >= 4 else 0
    return (1 - share) / factorial(level) + share / factorial(level - 1)


TASK = puzzle("seating", draw, write, check=check, perturb=perturb, shape=shape, guess=guess,
              least=3, most=7, levels=(3, 4), level_is="number of people")
