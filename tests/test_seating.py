"""Seating puzzles: a second solver that reads the text, the solutions line by line, the checker."""
import collections
import functools
import itertools
import random
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzles import seating
from puzzles.common import held_out
from puzzles.seating import TASK, check, draw, perturb, solutions, write

LEVELS = (3, 4, 5, 6, 7)


# ------------------------------------------------------------------------------ the second solver

NUMBER = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
SAYINGS = [     # (pattern, kind, whether the people come in the other order)
    (r"(?P<a>\w+) sits directly left of (?P<b>\w+)\.", "just left", False),
    (r"(?P<a>\w+) sits directly right of (?P<b>\w+)\.", "just left", True),
    (r"(?P<a>\w+) sits somewhere left of (?P<b>\w+)\.", "left", False),
    (r"(?P<a>\w+) sits somewhere right of (?P<b>\w+)\.", "left", True),
    (r"Clockwise, (?P<a>\w+) sits directly before (?P<b>\w+)\.", "clockwise", False),
    (r"Clockwise, (?P<a>\w+) sits directly after (?P<b>\w+)\.", "clockwise", True),
    (r"(?P<a>\w+) sits next clockwise after (?P<b>\w+)\.", "clockwise", True),
    (r"(?P<a>\w+) sits next to (?P<b>\w+)\.", "beside", False),
    (r"(?P<a>\w+) and (?P<b>\w+) sit next to each other\.", "beside", False),
    (r"(?P<a>\w+) does not sit next to (?P<b>\w+)\.", "not beside", False),
    (r"(?P<a>\w+) and (?P<b>\w+) do not sit next to each other\.", "not beside", False),
    (r"(?P<a>\w+) sits at (an end|one of the ends)\.", "outside", False),
    (r"(?P<a>\w+) (does not sit at an end|sits at neither end)\.", "inside", False),
    (r"Exactly (?P<k>\w+) seats? (is|are) between (?P<a>\w+) and (?P<b>\w+)\.", "gap", False),
    (r"(?P<a>\w+) and (?P<b>\w+) have exactly (?P<k>\w+) seats? between them\.", "gap", False),
    (r"(?P<a>\w+) sits in seat (?P<k>\d) from the left\.", "place", False),
    (r"Seat (?P<k>\d) from the left is for (?P<a>\w+)\.", "place", False),
]
REASONS = [
    (r"(?P<a>\w+) directly left of (?P<b>\w+)", "just left", False),
    (r"(?P<a>\w+) left of (?P<b>\w+)", "left", False),
    (r"(?P<a>\w+) directly before (?P<b>\w+)", "clockwise", False),
    (r"(?P<a>\w+) next to (?P<b>\w+)", "beside", False),
    (r"(?P<a>\w+) not next to (?P<b>\w+)", "not beside", False),
    (r"(?P<a>\w+) at an end", "outside", False),
    (r"(?P<a>\w+) not at an end", "inside", False),
    (r"(?P<k>\w+) seats? between (?P<a>\w+) and (?P<b>\w+)", "gap", False),
    (r"(?P<a>\w+) in seat (?P<k>\d)", "place", False),
]
WAYS = {"beside", "not beside", "gap"}      # that hold in both directions


def read_clue(sentence, sayings=SAYINGS):
    """(kind, people, number) of a sentence, the same for each of its wordings."""
    found = []
    for pattern, kind, swapped in sayings:
        match = re.fullmatch(pattern, sentence)
        if match:
            named = match.groupdict()
            people = [named[key] for key in "ab" if named.get(key)]
            people = people[::-1] if swapped else sorted(people) if kind in WAYS else people
            number = named.get("k")
            found.append((kind, tuple(people), NUMBER.get(number) or int(number or 0)))
    [clue] = found
    return clue


def read(text):
    """(names as listed, the person that a round table begins with or None, clues) of a problem."""
    opening, *clues, question, way = re.split(r"(?<=[.?]) ", text)
    assert question == "Who sits where?"
    names = re.findall(r"[A-Z][a-z]+", opening.removeprefix("A row"))
    assert len(set(names)) == len(names)

    if "round table" in opening:
        first = re.fullmatch(
            r"Give the names clockwise, beginning with (\w+), separated by commas\.", way)[1]
        assert first in names
    else:
        first = None
        assert way == "Give the names from left to right, separated by commas."
        word = re.search(r"(\w+) seats", opening)[1]
        assert {**NUMBER, "six": 6, "seven": 7}[word] == len(names)
    clues = [read_clue(sentence) for sentence in clues]
    assert all(person in names for _, people, _ in clues for person in people)
    return names, first, clues


def true(clue, seat, n, around):
    """Whether a clue holds, by the seats 1 to n."""
    kind, people, number = clue
    x, y = (*(seat[person] for person in people), None)[:2]
    following = {k: k + 1 for k in range(1, n)}
    if around:
        following[n] = 1
    touching = following.get(x) == y or following.get(y) == x
    if kind in ("just left", "clockwise"):
        assert around == (kind == "clockwise")
        return following.get(x) == y
    if kind in ("beside", "not beside"):
        return touching == (kind == "beside")

    assert not around
    if kind == "left":
        return x < y
    if kind in ("outside", "inside"):
        return (x in (1, n)) == (kind == "outside")
    if kind == "gap":
        return len(range(min(x, y) + 1, max(x, y))) == number
    assert kind == "place"
    return x == number


def solve(names, first, clues, most=2):
    """Orders that fit, at most `most`: seats are given to people, the most talked-of first."""
    n = len(names)
    talk = collections.Counter(person for _, people, _ in clues for person in people)
    people = sorted(names, key=lambda name: (name != first, -talk[name]))
    found = []

    def place(seat):
        if len(seat) == n:
            found.append(sorted(names, key=seat.get))
            return
        person = people[len(seat)]
        for number in [1] if person == first else range(1, n + 1):
            if number not in seat.values() and len(found) < most:
                now = {**seat, person: number}
                known = [clue for clue in clues if person in clue[1] and set(clue[1]) <= now.keys()]
                if all(true(clue, now, n, first is not None) for clue in known):
                    place(now)

    place({})
    return found


def examine(problem, minimal=True):
    """Assert that the text has exactly one answer, that it is the answer, and no needless clue."""
    names, first, clues = read(problem["problem"])
    assert solve(names, first, clues) == [problem["answer"].split(", ")]
    if minimal:
        for clue in clues:
            assert len(solve(names, first, [other for other in clues if other != clue])) == 2
    return names, first, clues


# ------------------------------------------------------------------------- the solution's lines

def examine_lines(problem):
    """Assert that each line of a solution follows from a clue, and no order is passed over."""
    names, first, clues = read(problem["problem"])
    answer = tuple(problem["answer"].split(", "))
    *lines, last, final = problem["solution"].split("\n")
    assert final == "#### " + problem["answer"]

    # all beginnings that each clue alone allows
    orders = [order for order in itertools.permutations(names) if first in (None, order[0])]
    alive = {}
    for clue in clues:
        good = [order for order in orders if true(
            clue, {name: i for i, name in enumerate(order, 1)}, len(names), first is not None)]
        alive[clue] = {order[:i] for order in good for i in range(len(names) + 1)}

    def refusing(beginning):
        return [clue for clue in clues if beginning not in alive[clue]]

    seen = []
    for line in [*lines, last]:
        tried, reason = re.fullmatch(r"(>?\w+(?:[ >]\w+)*?) (?:yes|no, (.+))", line).groups()
        tokens = re.findall(r"(>?)(\w+)", tried)
        beginning = tuple(name for _, name in tokens)

        # refused by the first clue that refuses it, and not before
        assert all(not refusing(beginning[:i]) for i in range(len(beginning)))
        if line is last:
            assert reason is None and beginning == answer and not refusing(beginning)
        else:
            assert read_clue(reason, REASONS) == refusing(beginning)[0]

        # a ">" stands where a clue, the first such, leaves one person, and only there
        for i, (mark, name) in enumerate(tokens):
            before = beginning[:i]
            nexts = [name for name in names if name not in before]
            allowed = [[name for name in nexts if (*before, name) in alive[clue]] for clue in clues]
            forced = [only[0] for only in allowed if len(only) == 1]
            if first and i == 0:
                assert mark and name == first
            elif len(nexts) > 1:
                assert forced[:1] == ([name] if mark else [])
        seen.append(tokens)

    # the next line changes a free name into one that is listed later
    for one, other in itertools.pairwise(seen):
        at = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
        assert one[at][0] == other[at][0] == ""
        assert names.index(one[at][1]) < names.index(other[at][1])

    # whatever comes before the answer begins as a refused line does, or leaves a line at a ">"
    for order in orders:
        if [names.index(name) for name in order] < [names.index(name) for name in answer]:
            refused = any(
                order[:len(line)] == tuple(name for _, name in line) for line in seen[:-1])
            forced = any(
                mark and order[:i] == tuple(name for _, name in line[:i]) and order[i] != name
                for line in seen for i, (mark, name) in enumerate(line))
            assert refused or forced


# --------------------------------------------------------------------------------------- the tests

@functools.lru_cache
def training(level):
    count = {3: 200, 4: 200, 5: 100, 6: 30, 7: 12}[level]
    return TASK.problems(count, "train", 0, (level, level))


class First:
    """A stand-in for random.Random that always takes what comes first."""

    def sample(self, things, count):
        return list(things)[:count]

    def choice(self, things):
        return things[0]

    def shuffle(self, things):
        pass


@pytest.mark.parametrize("structure, problem, solution", [
    ((3, (), (("apart", 0, 1, 0), ("before", 0, 2, 0))),
     "Ana, Ben and Cid sit in a row of three seats. Ben does not sit next to Ana. Cid sits "
     "directly left of Ana. Who sits where? Give the names from left to right, separated by "
     "commas.",
     "Ana no, Cid directly left of Ana\nBen>Cid Ana yes\n#### Ben, Cid, Ana"),
    ((4, (2,), (("clockwise", 0, 1, 0), ("apart", 0, 0, 2))),
     "Ana, Ben, Cid and Dora sit around a round table. Clockwise, Ben sits directly before Ana. "
     "Ana does not sit next to Cid. Who sits where? Give the names clockwise, beginning with Cid, "
     "separated by commas.",
     ">Cid Ana no, Ben directly before Ana\n>Cid Ben>Ana Dora yes\n#### Cid, Ben, Ana, Dora"),
    ((4, (2,), (("clockwise", 0, 1, 2), ("clockwise", 0, 0, 3))),       # once around the table
     "Ana, Ben, Cid and Dora sit around a round table. Clockwise, Ben sits directly before Cid. "
     "Clockwise, Ana sits directly before Dora. Who sits where? Give the names clockwise, "
     "beginning with Cid, separated by commas.",
     ">Cid Ana>Dora Ben yes\n#### Cid, Ana, Dora, Ben"),
    ((4, (), (("between", 2, 1, 3), ("left", 0, 3, 1), ("left", 0, 2, 0))),
     "Ana, Ben, Cid and Dora sit in a row of four seats. Exactly two seats are between Ben and "
     "Dora. Dora sits somewhere left of Ben. Cid sits somewhere left of Ana. Who sits where? Give "
     "the names from left to right, separated by commas.",
     "Ana no, two seats between Ben and Dora\nBen no, Dora left of Ben\n"
     "Cid no, two seats between Ben and Dora\nDora Ana no, Cid left of Ana\n"
     "Dora Ben no, two seats between Ben and Dora\nDora Cid>Ana Ben yes\n"
     "#### Dora, Cid, Ana, Ben"),
])
def test_puzzles_worked_by_hand(structure, problem, solution):
    made = write(First(), structure)
    assert made == {"problem": problem, "solution": solution,
                    "answer": solution.rpartition("#### ")[2]}
    examine_lines(made)


@pytest.mark.parametrize("level", LEVELS)
def test_the_text_has_one_answer_and_no_needless_clue(level):
    problems = training(level)
    for problem in problems:
        names, first, _ = examine(problem)
        assert len(names) == level
        found = [[names[person] for person in order] for order in solutions(problem["structure"])]
        assert found == [problem["answer"].split(", ")]
        assert check(problem, problem["solution"])

    around = sum("round table" in problem["problem"] for problem in problems) / len(problems)
    assert around == 0 if level == 3 else 0 < around < 0.45


@pytest.mark.parametrize("level, count", [(3, 100), (4, 100), (5, 60), (6, 4)])
def test_each_line_of_a_solution_follows_from_one_clue(level, count):
    for problem in training(level)[:count]:
        examine_lines(problem)


def test_every_wording_occurs_and_is_read():
    texts = [write(rng, draw(rng, 5))["problem"] for rng in map(random.Random, range(250))]
    sentences = [sentence for text in texts for sentence in re.split(r"(?<=[.?]) ", text)]
    for pattern, *_ in SAYINGS:
        assert any(re.fullmatch(pattern, sentence) for sentence in sentences), pattern
    wordings = sum(len(wordings) - 1 for wordings in seating.WORDINGS.values())
    assert wordings == len(SAYINGS) + 2         # two patterns read two wordings each

    # and a numbered seat is rare
    kinds = [kind for text in texts for kind, _, _ in read(text)[2]]
    assert kinds.count("place") < 0.08 * len(kinds)


@pytest.mark.parametrize("level, draws, bound", [(3, 1500, 20.5), (4, 1500, 49.7)])
def test_the_answer_does_not_depend_on_the_listing(level, draws, bound):
    """Chi-square of the answers as permutations of the listing, at p = 0.001."""
    rng = random.Random(level)
    counts = collections.Counter()
    for _ in range(draws):
        [order] = solutions(draw(rng, level))
        counts[tuple(order)] += 1
    cells = {3: 6, 4: 24}[level]
    assert len(counts) == cells
    assert sum((count - draws / cells) ** 2 for count in counts.values()) / (draws / cells) < bound


@pytest.mark.slow
@pytest.mark.parametrize("level", [3, 4])
def test_no_answer_is_too_frequent_in_training(level):
    counts = collections.Counter()
    for problem in TASK.problems(6000, "train", 0, (level, level)):
        names = read(problem["problem"])[0]
        counts[tuple(names.index(name) for name in problem["answer"].split(", "))] += 1
    assert max(counts.values()) < 1.5 * 6000 / {3: 6, 4: 24}[level]


def test_held_out_structures_are_never_trained_on():
    train = {problem["structure"] for problem in TASK.problems(200, "train", 0, (3, 4))}
    test = {problem["structure"] for problem in TASK.problems(40, "test", 0, (3, 4))}
    assert not train & test
    assert all(held_out(seating.shape(s)) for s in test) and not any(held_out(seating.shape(s)) for s in train)

    # neither a shuffle of the clues nor swapped neighbours make another structure
    for _, _, clues in train | test:
        assert list(clues) == sorted(clues)
        for kind, _, *people in clues:
            assert kind not in seating.MUTUAL or people == sorted(people)


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 6), st.integers(0, 10 ** 6))
def test_other_names_never_carry_a_puzzle_to_the_other_side(level, seed):
    rng = random.Random(seed)
    n, start, clues = draw(rng, level)
    order = rng.sample(range(n), n)
    moved = []
    for kind, number, *people in clues:
        people = [order[person] for person in people]
        moved.append((kind, number, *(sorted(people) if kind in seating.MUTUAL else people)))
    other = (n, tuple(order[person] for person in start), tuple(sorted(moved)))
    assert seating.shape(other) == seating.shape((n, start, clues))
    assert [[order[person] for person in seats] for seats in solutions((n, start, clues))] == solutions(other)


def test_shapes_worked_by_hand():
    """"left" has a direction, "next" has none; another seat is another puzzle."""
    def shape(*clues):
        return seating.shape((3, (), clues))
    assert shape(("left", 0, 0, 1), ("end", 0, 0)) == shape(("left", 0, 2, 1), ("end", 0, 2))
    assert shape(("left", 0, 0, 1), ("end", 0, 0)) != shape(("left", 0, 1, 0), ("end", 0, 0))
    assert shape(("next", 0, 0, 1), ("end", 0, 0)) == shape(("next", 0, 0, 1), ("end", 0, 1))
    assert shape(("seat", 1, 0)) != shape(("seat", 2, 0))


def test_the_same_seed_gives_the_same_problems():
    assert TASK.problems(20, "train", 3, (3, 7)) == TASK.problems(20, "train", 3, (3, 7))
    assert TASK.problems(20, "train", 3, (3, 7)) != TASK.problems(20, "train", 4, (3, 7))


@pytest.mark.parametrize("level", LEVELS)
def test_perturb_changes_one_clue_and_the_answer(level):
    found = 0
    for problem in training(level)[:60 if level < 6 else 6]:
        changed = TASK.perturb(problem, 0)
        if changed is None:
            continue
        found += 1
        assert held_out(seating.shape(changed["structure"]))
        assert changed == TASK.perturb(problem, 0)
        examine(changed, minimal=False)
        examine_lines(changed) if level < 6 else None

        before, after = problem["structure"], changed["structure"]
        assert before[:2] == after[:2] and len(before[2]) == len(after[2])
        assert len(set(before[2]) - set(after[2])) == len(set(after[2]) - set(before[2])) == 1
        assert solutions(before) != solutions(after)
    assert found >= (30 if level < 6 else 3)


def test_guess():
    assert seating.guess(3) == pytest.approx(1 / 6)
    assert seating.guess(4) == pytest.approx(0.75 / 24 + 0.25 / 6)
    assert seating.guess(7) == pytest.approx(0.75 / 5040 + 0.25 / 720)


# ------------------------------------------------------------------------------------- the checker

PROBLEM = {"answer": "Ben, Cid, Ana"}


@pytest.mark.parametrize("completion", [
    "#### Ben, Cid, Ana", "#### ben, cid and ana.", "####Ben,Cid,Ana", "#### BEN CID ANA",
    "#### Ben -> Cid -> Ana", "#### Ben-Cid-Ana", "#### Ben, Cid, and Ana",
    "#### **Ben, Cid, Ana**", "The answer is Ben, Cid, Ana.", "The answer is Ben, Cid and Ana.",
    "\\boxed{Ben, Cid, Ana}", "\\boxed{\\text{Ben, Cid, Ana}}",
    "\\boxed{\\text{Ben}, \\text{Cid}, \\text{Ana}}", "<answer>Ben, Cid, Ana</answer>",
    "<answer>\nBen → Cid → Ana\n</answer>",
    "Ana no, Cid directly left of Ana\nBen>Cid Ana yes\n#### Ben, Cid, Ana",
    "#### Ana, Ben, Cid\nNo.\n#### Ben, Cid, Ana",
    "<think>#### Ana, Ben, Cid</think>#### Ben, Cid, Ana",
    "#### Step 2\nThe answer is Ben, Cid, Ana.", "#### Ben, Cid, Ana<|endoftext|>#### Ana",
])
def test_right_answers(completion):
    assert check(PROBLEM, completion)


@pytest.mark.parametrize("completion", [
    "", "####", "#### Ben, Cid", "#### Ben, Cid, Ana, Ana", "#### Ben, Ben, Cid, Ana",
    "#### Ana, Cid, Ben", "#### Cid, Ana, Ben", "#### Ben, Cid, Anabel", "#### BenCidAna",
    "#### Ben, Cid, Ana or Ana, Cid, Ben", "#### Ben, Cid, Ana, Dora", "#### Ben, Cid, not Ana",
    "#### Ben, Cid, Ana\n#### Ana, Cid, Ben", "#### Ben, Cid, Ana #### Ana, Cid, Ben",
    "Ben, Cid, Ana", "Ben Cid Ana yes", "#### 3", "<think>#### Ben, Cid, Ana",
    "The answer is not Ben, Cid, Ana.", "#### Ben sits left of Cid, Ana",
    "The answer is Ben, Cid, Ana or Ana, Cid, Ben.", "#### Seat 1 Ben, Cid, Ana",
    "\\boxed{Ben, Cid, Ana} or \\boxed{Ana, Cid, Ben}", "<reasoning>#### Ben, Cid, Ana",
    "\\boxed{Ana}, \\boxed{Ben}, \\boxed{Cid}, \\boxed{Ana}",
    "#### Ben, Cid, Ana." + "." * 5000 + " Ana", None, 7,
])
def test_wrong_answers(completion):
    assert not check(PROBLEM, completion)


@pytest.mark.parametrize("level, count", [(3, 40), (4, 20), (5, 4)])
def test_every_other_order_is_refused(level, count):
    for problem in TASK.problems(count, "train", 0, (level, level)):
        names = read(problem["problem"])[0]
        right = []
        for size in (level - 1, level):
            told = [", ".join(order) for order in itertools.permutations(names, size)]
            right += [answer for answer in told if check(problem, "#### " + answer)]
        assert right == [problem["answer"]]


MARKS = ("#### {}", "The answer is {}", "\\boxed{{{}}}", "<answer>{}</answer>", "So.\n\n#### {}\n")
BETWEEN = st.sampled_from([", ", ",", " ", " and ", ", and ", " -> ", "->", " - ", "-", "  "])


@given(st.permutations(["Ana", "Ben", "Cid"]), st.lists(BETWEEN, min_size=2, max_size=2),
       st.sampled_from([str.lower, str.upper, str.title]), st.sampled_from(["", "."]),
       st.sampled_from(MARKS))
@settings(max_examples=100, deadline=None)
def test_harmless_variants_are_right_and_other_orders_wrong(order, between, case, stop, mark):
    told = case(order[0] + between[0] + order[1] + between[1] + order[2])
    right = list(order) == ["Ben", "Cid", "Ana"]
    assert check(PROBLEM, mark.format(told + stop)) == right


PIECES = ["Ana", "Ben", "Cid", "Dora", "and", "or", "not", ",", "->", ".", "\n", "####", "\\boxed{",
          "}", "<answer>", "</answer>", "The answer is", "<think>", "</think>", "yes", "?", "**"]


@given(st.lists(st.sampled_from(PIECES), max_size=14), st.sampled_from(["", " "]))
@settings(max_examples=150, deadline=None)
def test_what_is_accepted_says_the_answer(words, space):
    told = space.join(words)
    if check(PROBLEM, told):
        assert re.search(r"ben(\W|and)*cid(\W|and)*ana", told.lower())


@given(st.text(string.printable, max_size=60))
@settings(max_examples=40, deadline=None)
def test_random_text_is_refused(text):
    for completion in (text, "#### " + text, "<answer>" + text + "</answer>"):
        assert not check(PROBLEM, completion)


def test_long_hostile_text_is_read():
    for piece in ("#### Ana ", "####", "<answer>", "#### Cid, Ana, ", "- ", "\\text{", "\n####\n"):
        assert not check(PROBLEM, piece * 50_000)


# ---------------------------------------------------------------------------------- the long tests

@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_ten_thousand_puzzles_of_a_level(level):
    rng = random.Random(level)
    counts = collections.Counter()
    for i in range(10_000):
        structure = draw(rng, level)
        problem = write(rng, structure)
        names, _, _ = examine(problem, minimal=level < 5 or i < 1000)
        assert check(problem, problem["solution"])
        if level < 5 or i < {5: 1000, 6: 50, 7: 3}[level]:
            examine_lines(problem)

        # 24 cells at most, so that each has enough
        counts[tuple(names.index(name) for name in problem["answer"].split(", ")[:2])] += 1
        if level < 6 or i < 500:
            changed = next(perturb(rng, structure))
            assert changed and len(solutions(changed)) == 1
            assert solutions(changed) != solutions(structure)
    assert len(counts) == level * (level - 1)
    assert max(counts.values()) < 1.5 * 10_000 / len(counts)
