"""Truth-tellers and liars: one answer, sound solutions, an exact checker (puzzles/truth.py)."""
import itertools
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from puzzles import truth
from puzzles.common import NAMES, final_answer, held_out

LEVELS = range(2, 9)
FEW = {2: 120, 3: 120, 4: 100, 5: 60, 6: 30, 7: 15, 8: 10}     # puzzles a level in the fast tests


def some(level, count=None, split="train", seed=0):
    return truth.TASK.problems(count or FEW[level], split, seed, (level, level))


# ------------------------------------------- a second solver, which reads the text of the problem

NAME = "([A-Z][a-z]+)"
READ = [
    (f"{NAME} (?:is a liar|always lies|never tells the truth)", lambda w, x: not w[x]),
    (f"{NAME} (?:tells the truth|is no liar|never lies)", lambda w, x: w[x]),
    (f"{NAME} and (?:{NAME}|I) are (?:of the same kind|alike)", lambda w, x, y: w[x] == w[y]),
    (f"{NAME} and (?:{NAME}|I) are (?:of different kinds|not alike)",
     lambda w, x, y: w[x] != w[y]),
    (r"(?:at least (\d) of us (?:is a liar|are liars)|(\d) or more of us lie)",
     lambda w, *k: list(w.values()).count(False) >= int(k[0] or k[1])),
    (r"(?:exactly (\d) of us (?:is a liar|are liars)|the number of liars among us is (\d))",
     lambda w, *k: list(w.values()).count(False) == int(k[0] or k[1])),
]


class Puzzle:
    """The people of a problem's text, and what they say as (speaker, the worlds where it is so).

    A world is {name: is honest}; sets of worlds hold their numbers."""

    def __init__(self, text):
        opening, *sentences = text.split(". ")
        self.people = [name for name in re.findall(NAME, opening) if name != "Each"]
        kinds = itertools.product([True, False], repeat=len(self.people))
        self.worlds = [dict(zip(self.people, world)) for world in kinds]
        self.all = frozenset(range(len(self.worlds)))
        self.where = {(name, kind): self.set_of(lambda world: world[name] == kind)
                      for name in self.people for kind in (True, False)}
        self.said = [self.understood(sentence) for sentence in sentences if ": " in sentence]

    def set_of(self, holds):
        return frozenset(i for i, world in enumerate(self.worlds) if holds(world))

    def understood(self, sentence):
        speaker, words = re.fullmatch(f"{NAME} (?:says|claims): (.*)", sentence).groups()
        [(kind, about, holds)] = [(kind, found.groups(), holds)
                                  for kind, (pattern, holds) in enumerate(READ)
                                  if (found := re.fullmatch(pattern, words))]
        if kind < 4:
            assert speaker not in about                     # nobody is named by themselves
            about = [name or speaker for name in about]
        return speaker, self.set_of(lambda world: holds(world, *about))

    def fitting(self):
        left = self.all
        for speaker, so in self.said:
            honest, lies = self.where[speaker, True], self.where[speaker, False]
            left = left & (so & honest | (self.all - so) & lies)
        return left

    def answers(self):
        worlds = [self.worlds[i] for i in sorted(self.fitting())]
        return [", ".join(sorted(x for x in world if not world[x])) or "nobody" for world in worlds]


def unsound(puzzle, solution):
    """The first line of a solution that does not follow from the lines above it, or None.

    Each is tried by going through all worlds that agree with what holds at this place."""
    facts, supposed, wrong = {}, [], None

    def possible():
        left = puzzle.all
        for fact in facts.items():
            left = left & puzzle.where[fact]
        return left

    def follows(speaker, name, kind):
        """Whether one statement of a known speaker makes the person so, with a world left."""
        lefts = [now & (so if facts[speaker] else puzzle.all - so)
                 for who, so in puzzle.said if who == speaker]
        return any(left and left <= puzzle.where[name, kind] for left in lefts)

    def settled(name, right):
        """Whether one of the person's statements is right (or wrong) whatever else is the case."""
        return any(now <= (so if right else puzzle.all - so)
                   for who, so in puzzle.said if who == name)

    *lines, last = solution.split("\n")
    for line in lines:
        now = possible()
        found = (re.fullmatch(f"(Suppose) {NAME} is honest[.]", line)
                 or re.fullmatch(f"(So) {NAME} lies[.]", line)
                 or re.fullmatch(f"(By) {NAME}, {NAME} (is honest|lies)[.]", line)
                 or re.fullmatch(f"(But) {NAME} is (right|wrong)[.]", line)
                 or re.fullmatch(f"(){NAME} is (right and honest|wrong and lies)[.]", line)
                 or re.fullmatch("(All) fits[.]", line))
        if not found or (wrong and line != f"So {wrong} lies."):
            return line
        what, name, *rest = [*found.groups(), None]

        if what == "Suppose":
            # only where nothing follows from one statement
            unknown = [x for x in puzzle.people if x not in facts]
            ends = [follows(s, x, kind) for s in facts for x in unknown for kind in (True, False)]
            ends += [settled(x, right) for x in unknown for right in (True, False)]
            if name in facts or any(ends):
                return line
            supposed.append((name, dict(facts)))
            facts[name] = True
        elif what == "By":
            about, kind = rest[0], rest[1] == "is honest"
            if about in facts or name not in facts or not follows(name, about, kind):
                return line
            facts[about] = kind
        elif what == "":
            kind = rest[0] == "right and honest"
            if name in facts or not settled(name, kind):
                return line
            facts[name] = kind
        elif what == "But":
            right = rest[0] == "right"
            if facts.get(name) != (not right) or not settled(name, right) or not supposed:
                return line
            wrong, facts = supposed.pop()
        elif what == "So":
            if not wrong:
                return line
            facts[name], wrong = False, None
        elif len(facts) < len(puzzle.people) or not now <= puzzle.fitting():
            return line

    liars = ", ".join(sorted(x for x in facts if not facts[x])) or "nobody"
    return None if lines.index("All fits.") == len(lines) - 1 and last == f"#### {liars}" else last


def candidates(people):
    """All answers there are for these people, as texts."""
    found = ["nobody"]
    for count in range(1, len(people) + 1):
        found += [", ".join(names) for names in itertools.combinations(sorted(people), count)]
    return found


def prove(problem):
    """One answer by the second solver, the solution right and sound, its kind as promised."""
    puzzle = Puzzle(problem["problem"])
    assert len(puzzle.people) == problem["level"] == truth.people_in(problem["structure"])
    assert puzzle.answers() == [problem["answer"]]
    assert problem["solution"].endswith(f"\n#### {problem['answer']}")
    assert truth.check(problem, problem["solution"])
    assert unsound(puzzle, problem["solution"]) is None

    # nothing that is always so, or never, and nobody says the same twice
    assert all(so and so < puzzle.all for _, so in puzzle.said)
    assert len(set(puzzle.said)) == len(puzzle.said)
    counts = Counter(speaker for speaker, _ in puzzle.said)
    assert list(counts) == puzzle.people == sorted(puzzle.people)
    assert max(counts.values()) <= (2 if problem["level"] == 2 else 1)
    return puzzle


# -------------------------------------------------------------------------------------- the puzzles

@pytest.mark.parametrize("level", LEVELS)
def test_one_answer_and_a_sound_solution(level):
    for problem in some(level) + some(level, FEW[level] // 5, "test"):
        puzzle = prove(problem)
        refused = [a for a in candidates(puzzle.people) if not truth.check(problem, f"#### {a}")]
        assert len(refused) == 2 ** level - 1 and problem["answer"] not in refused


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_ten_thousand_a_level(level):
    answers = Counter()
    for problem in some(level, 10_000, seed=1):
        puzzle = prove(problem)
        for answer in candidates(puzzle.people)[::max(1, 2 ** level // 16)]:
            right = answer == problem["answer"]
            assert truth.check(problem, f"#### {answer}") == right
        answers[truth.solutions(problem["structure"])[0]] += 1

    expected = 10_000 / 2 ** level
    assert len(answers) == 2 ** level
    if level < 7:
        assert max(answers.values()) <= 1.5 * expected
    chi_square = sum((count - expected) ** 2 / expected for count in answers.values())
    freedom = 2 ** level - 1
    if level > 2:           # of the few puzzles of two, a part is held out
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("level", [2, 3, 4])
def test_every_answer_is_drawn_as_often(level):
    rng = random.Random(level)
    draws = 100 * 2 ** level
    answers = Counter(truth.solutions(truth.draw(rng, level))[0] for _ in range(draws))
    assert len(answers) == 2 ** level and truth.guess(level) == 1 / len(answers)
    assert max(answers.values()) <= 150 and min(answers.values()) >= 50


class FirstBits(random.Random):
    """A random source whose first bits are given; `choice` asks for bits as well."""
    first = None

    def getrandbits(self, bits):
        drawn, self.first = self.first, None
        return super().getrandbits(bits) if drawn is None else drawn


@pytest.mark.parametrize("level", LEVELS)
def test_every_possibility_has_puzzles(level):
    for count in range(level + 1):
        rng = FirstBits(level)
        rng.first = 2 ** count - 1                      # the liars that draw asks for
        assert truth.solutions(truth.draw(rng, level)) == [tuple(range(count))]


def test_how_many_puzzles_of_two_there_are():
    first, second = [list(itertools.chain(*truth.statements(2, i).values())) for i in (0, 1)]
    pairs = [(a[0], b[0]) for a in first for b in second]
    answers = Counter(len(truth.solutions(pair)) for pair in pairs)
    assert len(first) == len(second) == 7
    assert answers[1] == 33                                 # as the docstring says

    # with one or two statements each, those of one person of different meaning
    said = [[(a,) for a in choices] + [(a, b) for a, b in itertools.combinations(choices, 2) if a[1] != b[1]]
            for choices in (first, second)]
    every = {tuple(sorted(statement for statement, _ in one + other)) for one, other in itertools.product(*said)}
    assert sum(len(truth.solutions(structure)) == 1 for structure in every) == 138      # as docs/tasks.md says

    held = {truth.solutions(p["structure"])[0] for p in some(2, 100, "test")}
    assert len(held) == 4                                   # held-out puzzles of two: each answer


@pytest.mark.parametrize("level", LEVELS)
def test_sets_of_bits_are_what_plain_evaluation_says(level):
    every, lying, counted = truth.possibilities(level)
    assert every == 2 ** 2 ** level - 1 and len(counted) == level + 1

    rng = random.Random(level)
    said = [choice for speaker in range(level)
            for choice in itertools.chain(*truth.statements(level, speaker).values())]
    worlds = [tuple(i for i in range(level) if p >> i & 1) for p in range(2 ** level)]
    for statement, fits in rng.sample(said, min(len(said), 60)):
        true = truth.where_true(statement, level)
        assert true not in (0, every)
        for p, liars in enumerate(worlds):
            assert true >> p & 1 == truth.holds(statement, liars)
            assert fits >> p & 1 == (truth.holds(statement, liars) == (statement[0] not in liars))


def test_held_out_structures_are_never_in_train():
    train, test = set(), set()
    for seed in (0, 1):
        train |= {p["structure"] for p in truth.TASK.problems(300, "train", seed, (2, 4))}
    test |= {p["structure"] for p in truth.TASK.problems(100, "test", 0, (2, 4))}
    assert not train & test
    assert all(held_out(truth.shape(s)) for s in test) and not any(held_out(truth.shape(s)) for s in train)


def renumbered(structure, order):
    """The same puzzle with person i called order[i]; the two of "same" and "different" are sorted."""
    statements = []
    for speaker, kind, *about in structure:
        if kind not in ("least", "exactly"):
            about = sorted(order[person] for person in about)
        statements.append((order[speaker], kind, *about))
    return tuple(sorted(statements))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10 ** 6))
def test_other_names_never_carry_a_puzzle_to_the_other_side(level, seed):
    rng = random.Random(seed)
    structure = truth.draw(rng, level)
    other = renumbered(structure, rng.sample(range(level), level))
    assert truth.shape(other) == truth.shape(structure)
    [answer], [there] = truth.solutions(structure), truth.solutions(other)
    assert len(answer) == len(there)


def test_shapes_worked_by_hand():
    """Who lies about whom is told apart: in a circle of three, and where two accuse one."""
    circle, renamed = ((0, "lies", 1), (1, "lies", 2), (2, "lies", 0)), ((0, "lies", 2), (1, "lies", 0), (2, "lies", 1))
    accused = ((0, "lies", 1), (1, "lies", 0), (2, "lies", 0))
    assert truth.shape(circle) == truth.shape(renamed) != truth.shape(accused)
    assert truth.shape(((0, "least", 1), (1, "true", 0))) != truth.shape(((0, "least", 2), (1, "true", 0)))


def test_the_same_seed_gives_the_same_puzzles_in_another_process():
    code = ("from puzzles import truth\n"
            "for p in truth.TASK.problems(20, 'train', 3, (2, 6)):\n"
            "    print(p, truth.TASK.perturb(p, 1))")
    outputs = set()
    for hash_seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, text=True,
                              cwd=Path(__file__).parents[1], capture_output=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1 and outputs != {""}
    assert some(3, 20) == some(3, 20) != some(3, 20, seed=1)


@pytest.mark.parametrize("level", LEVELS)
def test_perturb_changes_one_statement_and_the_answer(level):
    count = 40 if level < 6 else 10
    found = 0
    for problem in some(level, count):
        changed = truth.TASK.perturb(problem, 0)
        if changed is None:
            continue
        found += 1
        assert held_out(truth.shape(changed["structure"]))
        prove(changed)
        old, new = Counter(problem["structure"]), Counter(changed["structure"])
        assert (old - new).total() == (new - old).total() == 1
        assert [s[0] for s in problem["structure"]] == [s[0] for s in changed["structure"]]
        assert truth.solutions(problem["structure"]) != truth.solutions(changed["structure"])
        assert changed["id"] == problem["id"] + "/perturbed"
    assert found >= count * (0.2 if level == 2 else 0.4)


# ---------------------------------------------------------------------------------- worked by hand

def test_a_contradiction_worked_by_hand():
    """0: 1 lies. 1: 2 is honest. 2: 0 and 1 differ."""
    structure = ((0, "lies", 1), (1, "true", 2), (2, "different", 0, 1))
    assert truth.solutions(structure) == [(0,)]
    taken, left = truth.steps(structure)
    assert left == 1 << 0b001
    assert taken == [
        ("suppose", 0, None), ("lies", 1, 0), ("lies", 2, 1), ("but right", 2, None),
        ("so", 0, None), ("honest", 1, 0), ("honest", 2, 1)]


def test_counts_worked_by_hand():
    """0: exactly 3 of us lie, which no honest person of three says. 1: 2 lies. 2: at least 2 lie.

    1 honest: 2 lies, so do 0 and 2, and 2 is right. So 1 lies, 2 is honest, and 2 of 3 lie."""
    structure = ((0, "exactly", 3), (1, "lies", 2), (2, "least", 2))
    assert truth.solutions(structure) == [(0, 1)]
    taken, _ = truth.steps(structure)
    assert taken == [
        ("suppose", 0, None), ("but wrong", 0, None), ("so", 0, None),
        ("suppose", 1, None), ("lies", 2, 1), ("but right", 2, None), ("so", 1, None),
        ("honest", 2, 0)]


def test_three_honest_people_worked_by_hand():
    """0: 1 and 2 are alike. 1 and 2: 0 is honest. All lie: 0 would be right. So nobody lies."""
    structure = ((0, "same", 1, 2), (1, "true", 0), (2, "true", 0))
    assert truth.solutions(structure) == [()]
    taken, _ = truth.steps(structure)
    assert taken == [("suppose", 0, None), ("right", 1, None), ("honest", 2, 0)]
    assert truth.write(random.Random(0), structure)["answer"] == "nobody"


def test_all_lie_worked_by_hand():
    """0: 1 is honest. 1: exactly 1 of us lies. 1 honest makes 0 right, and then nobody lies."""
    structure = ((0, "true", 1), (1, "exactly", 1))
    assert truth.solutions(structure) == [(0, 1)]
    text = truth.write(random.Random(1), structure)
    a, b = text["answer"].split(", ")
    assert text["solution"].split("\n") == [
        f"Suppose {a} is honest.", f"By {a}, {b} is honest.", f"But {b} is wrong.",
        f"So {a} lies.", f"By {a}, {b} lies.", "All fits.", f"#### {a}, {b}"]


def test_a_changed_line_is_found_unsound():
    """The checker of solutions sees wrong kinds, and lines left out that are needed later."""
    found = tried = 0
    for problem in some(4, 40):
        puzzle = Puzzle(problem["problem"])
        lines = problem["solution"].split("\n")
        for i, line in enumerate(lines[:-2]):
            swap = {"is honest": "lies", "lies": "is honest", "right": "wrong", "wrong": "right"}
            other = re.sub("is honest|lies|right|wrong", lambda word: swap[word[0]], line)
            assert unsound(puzzle, "\n".join([*lines[:i], other, *lines[i + 1:]])) is not None
            if line.startswith("Suppose"):
                continue
            tried += 1
            found += unsound(puzzle, "\n".join(lines[:i] + lines[i + 1:])) is not None
    assert tried > 100 and found > 0.95 * tried


# --------------------------------------------------------------------------------------- the check

BEN_EVA = {"answer": "Ben, Eva"}
NOBODY = {"answer": "nobody"}


@pytest.mark.parametrize("said", [
    "#### Ben, Eva", "#### Eva, Ben", "#### ben and eva.", "#### Ben and Eva", "####Ben,Eva",
    "#### BEN , EVA", "Ana is honest.\n#### Ben, and Eva.\n", "\\boxed{Ben, Eva}",
    "Answer: Ben, Eva",
    "\\boxed{\\text{Ben, Eva}}", "\\boxed{\\text{Ben} \\text{ and } \\text{Eva}}",
    "<answer>Eva and Ben</answer>", "The answer is Ben and Eva.", "#### Ana\n#### Ben, Eva",
    "\\boxed{Ana} No.\n#### Ben, Eva", "<think>#### Ana</think>#### Ben, Eva",
    "#### Ben, Eva</s> Ana", "The liars are \\boxed{Ben} and \\boxed{Eva}.", "\\boxed{Eva}, \\boxed{Ben}",
    "\\boxed{\\text{Ben}} and \\boxed{\\text{Eva}}", "\\boxed{ Ben } and \\fbox{Eva}",
    "<answer> Ben </answer> <answer> Eva </answer>",
    "So \\boxed{Ben} lies. Hence Eva does. The liars are \\boxed{Ben} and \\boxed{Eva}.",
    "\\boxed{\\text{Ben},\\ \\textbf{Eva}}", "\\boxed{\\{Ben, Eva\\}}", "<answer>\nBen\nEva\n</answer>",
    "#### \"Ben, Eva\"", "### Final Answer\nBen, Eva", "**Final Answer:**\n\nBen and Eva.",
])
def test_accepted(said):
    assert truth.check(BEN_EVA, said)
    assert not truth.check(NOBODY, said) and not truth.check({"answer": "Ben"}, said)


@pytest.mark.parametrize("said", [
    "", "#### Ben", "#### Ben, Eva, Ana", "#### Ben, Ben, Eva", "#### Ben Eva", "#### BenEva",
    "#### Ben or Eva", "#### not Ben, Eva", "#### Ben, Eva lie", "#### the liars are Ben, Eva",
    "#### Ben, Eva, nobody", "#### nobody", "Ben, Eva", "#### Ben, Eva\n#### Ana",
    "#### Ben,, Eva", "#### Ben, Eva,", "#### Ben; Eva", "#### Ben & Eva", "#### and Ben, Eva",
    "#### Benn, Eva", "\\boxed{Ben}\n#### Eva", "#### Ben\n#### Eva", "#### Ben. Eva", "####",
    "#### ", "#### Ben, Eva..", "It is not #### Ben, Eva", "<think>\n#### Ben, Eva",
    "</s>#### Ben, Eva", "\\boxed{Ben} \\boxed{Eva} \\boxed{Ben}", "### Final Answer\nBen",
    "### Final Answer\nBen, Eva\nOr not.", "#### Ben\nEva",
    None, 7, "#### " + "Ben, " * 5000 + "Eva", "#### Ben" + " " * 100_000 + "Eva",
])
def test_refused(said):
    assert not truth.check(BEN_EVA, said)


def test_nobody():
    for said in ("#### nobody", "#### Nobody.", "\\boxed{nobody}", "Answer: NOBODY"):
        assert truth.check(NOBODY, said) and not truth.check(BEN_EVA, said)
    for said in ("#### nobody lies", "#### no", "#### none", "#### Ana", "#### nobody, nobody"):
        assert not truth.check(NOBODY, said)


def words_of(text):
    return sorted(word for word in re.findall(r"\w+", text.lower()) if word != "and")


pieces = st.sampled_from([
    *NAMES[:4], "nobody", "and", "or", "not", ",", ".", " ", "\n", "####", "#### ", "\\boxed{", "}",
    "\\text{", "<answer>", "</answer>", "Answer: ", "lies", "x"])


@given(st.one_of(st.text(), st.lists(pieces, max_size=12).map("".join)),
       st.sampled_from(["nobody", "Ana", "Ana, Ben", "Ana, Ben, Cid"]))
@example("#### Ana, Ben.", "Ana, Ben")
@settings(max_examples=150, deadline=None)
def test_text_is_accepted_only_if_it_says_the_answer(said, answer):
    for text in (said, "#### " + said, f"\\boxed{{{said}}}"):
        if truth.check({"answer": answer}, text):
            assert words_of(final_answer(text)) == words_of(answer)
            assert all(word in text.lower() for word in words_of(answer))


@given(st.sets(st.sampled_from(NAMES), min_size=1, max_size=8),
       st.randoms(use_true_random=False), st.data())
@settings(max_examples=60, deadline=None)
def test_mangled_answers(liars, rng, data):
    names = sorted(liars)
    problem = {"answer": ", ".join(names)}
    shuffled = rng.sample(names, len(names))
    cases = [rng.choice([str.lower, str.upper, str.title])(name) for name in shuffled]
    listed = cases[0]
    for name in cases[1:]:
        listed += rng.choice([", ", " and ", ", and ", ","]) + name
    assert truth.check(problem, f"#### {listed}{rng.choice(['', '.', ' ', ' .'])}")

    # one name less, one more, one twice, one misspelt
    place = data.draw(st.integers(0, len(names) - 1))
    others = [name for name in NAMES if name not in liars]
    wrong = [names[:place] + names[place + 1:], [*names, rng.choice(others)],
             [*names, names[place]],
             names[:place] + [names[place] + "a"] + names[place + 1:],
             names[:place] + [rng.choice(others)] + names[place + 1:]]
    for listing in wrong:
        assert not truth.check(problem, "#### " + ", ".join(listing))


# ----------------------------------------------------------------------------------- reasoning-gym

def in_our_form(speaker, said):
    """A statement of reasoning-gym as one of ours, or None where there is no such form."""
    kind, *parts = said
    if kind in ("lying", "telling-truth"):
        ours = speaker, "lies" if kind == "lying" else "true", parts[0]
        return ours if parts[0] != speaker else None
    if kind == "not":
        opposite = {"lies": "true", "true": "lies", "same": "different", "different": "same"}
        ours = in_our_form(speaker, parts[0])
        return ours and (speaker, opposite[ours[1]], *ours[2:])
    if kind == "<=>" and all(part[0] in ("lying", "telling-truth") for part in parts):
        (left, x), (right, y) = parts
        return (speaker, "same" if left == right else "different", x, y) if x != y else None
    return None


def where_so(said, people):
    """The possibilities, as ours, in which a statement of reasoning-gym is true."""
    every, _, _ = truth.possibilities(people)
    kind, *parts = said
    if kind in ("lying", "telling-truth"):
        return truth.where_true((None, "lies" if kind == "lying" else "true", parts[0]), people)
    inner = [where_so(part, people) for part in parts]
    if kind == "not":
        return every ^ inner[0]
    if kind == "->":
        return every ^ inner[0] | inner[1]
    if kind == "<=>":
        return every ^ inner[0] ^ inner[1]
    joined = inner[0]
    for other in inner[1:]:
        joined = joined & other if kind == "and" else joined | other
    return joined


def in_their_form(statement, people):
    """One of our statements as one of reasoning-gym; a count says which people lie, in all ways."""
    _, kind, *about = statement
    if kind in ("lies", "true"):
        return "lying" if kind == "lies" else "telling-truth", about[0]
    if kind in ("same", "different"):
        alike = "<=>", ("telling-truth", about[0]), ("telling-truth", about[1])
        return alike if kind == "same" else ("not", alike)

    ways = []
    for lying in itertools.product([True, False], repeat=people):
        count = sum(lying)
        if count == about[0] or kind == "least" and count > about[0]:
            told = [("lying" if lies else "telling-truth", i) for i, lies in enumerate(lying)]
            ways.append(("and", *told))
    return ("or", *ways)


def test_reasoning_gym_agrees_on_its_puzzles():
    """All of their puzzles by our sets; those in our forms by solutions and by our search too."""
    gym = pytest.importorskip("reasoning_gym")
    in_forms = 0
    for people, size in ((2, 160), (3, 60), (4, 30)):
        for theirs in gym.create_dataset("knights_knaves", n_people=people, size=size, seed=people):
            said = theirs["metadata"]["statements"]
            honest = theirs["metadata"]["solution"]
            liars = tuple(i for i in range(people) if not honest[i])
            answer = 1 << sum(1 << i for i in liars)

            left, lying, _ = truth.possibilities(people)
            for speaker, statement in enumerate(said):
                left &= where_so(statement, people) ^ lying[speaker]
            assert left == answer

            ours = tuple(in_our_form(i, statement) for i, statement in enumerate(said))
            if None not in ours:
                assert truth.solutions(ours) == [liars]
                assert truth.steps(ours)[1] == answer
                in_forms += 1
    assert in_forms >= 10


@pytest.mark.parametrize("level, count", [(3, 120), (4, 80), (5, 20)])
def test_reasoning_gym_agrees_on_our_puzzles(level, count):
    knights = pytest.importorskip("reasoning_gym.logic.knights_knaves").KnightsKnavesDataset
    for problem in some(level, count):
        structure = problem["structure"]
        theirs = knights.find_solution([in_their_form(said, level) for said in structure])
        [liars] = truth.solutions(structure)
        assert theirs == [tuple(i not in liars for i in range(level))]
