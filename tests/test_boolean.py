"""puzzles/boolean.py against a second evaluation of the text, by Python's own operators."""
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzles import boolean
from puzzles.boolean import TASK, check, draw, evaluate, in_words, neighbours, perturb, solutions, write
from puzzles.common import held_out

LEVELS = range(TASK.least, TASK.most + 1)
BRACKET = re.compile(r"\((not \w+|\w+ (?:and|or|implies) \w+)\)")
TRUTH = {"not true": "false", "not false": "true",
         "true and true": "true", "true and false": "false", "false and true": "false", "false and false": "false",
         "true or true": "true", "true or false": "true", "false or true": "true", "false or false": "false",
         "true implies true": "true", "true implies false": "false", "false implies true": "true",
         "false implies false": "true"}


def formula_of(text):
    [formula] = re.fullmatch(r"[A-Z][a-z ,]*\? (.*)", text).groups()
    return formula


def value_of(formula):
    """By Python: "A implies B" is A <= B, as everything is in brackets."""
    assert re.fullmatch(r"(?:true|false|and|or|not|implies|[() ])+", formula)
    return str(eval(formula.replace("implies", "<=").replace("true", "True").replace("false", "False"))).lower()


def operators_of(formula):
    return len(re.findall("not|and|or|implies", formula))


def some(level, count, seed=0):
    rng = random.Random(f"{level}/{seed}")
    return [write(rng, formula) | {"structure": formula} for formula in (draw(rng, level) for _ in range(count))]


def proved(problem, level):
    """The answer is the value, each line one reduction of the line above, and only the answer is accepted."""
    formula = formula_of(problem["problem"])
    answer = problem["answer"]
    assert operators_of(formula) == level and value_of(formula) == answer
    assert solutions(problem["structure"]) == [answer]

    *lines, last = problem["solution"].split("\n")
    assert last == f"#### {answer}" and len(lines) == level
    for line in lines:
        inner = BRACKET.search(formula)
        formula = formula[:inner.start()] + TRUTH[inner[1]] + formula[inner.end():] if inner else TRUTH[formula]
        assert line == formula
    assert check(problem, problem["solution"])
    assert [word for word in ("true", "false") if check(problem, f"#### {word}")] == [answer]


@pytest.mark.parametrize("level", LEVELS)
def test_every_answer_is_the_value_and_every_line_one_reduction(level):
    for problem in some(level, 80):
        proved(problem, level)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_ten_thousand_of_every_level(level):
    problems = some(level, 10_000, seed=1)
    for problem in problems:
        proved(problem, level)
    assert 0.485 < sum(problem["answer"] == "true" for problem in problems) / 10_000 < 0.515     # 3 sigma


@pytest.mark.parametrize("formula, words, steps", [
    (("not", "true"), "not true", ["false"]),
    (("implies", ("and", "true", ("not", "false")), ("or", "false", "false")),
     "(true and (not false)) implies (false or false)",
     ["(true and true) implies (false or false)", "true implies (false or false)", "true implies false", "false"]),
    (("not", ("not", "false")), "not (not false)", ["not true", "false"])])
def test_formulas_by_hand(formula, words, steps):
    problem = write(random.Random(0), formula)
    assert in_words(formula) == words and problem["problem"].endswith("? " + words)
    assert problem["solution"].split("\n") == [*steps, f"#### {steps[-1]}"]


def test_truth_tables():
    for words, value in TRUTH.items():
        *left, operator, right = words.split()
        assert evaluate((operator, *left, right)) == value


@pytest.mark.parametrize("level", LEVELS)
def test_half_of_the_answers_are_true(level):
    rng = random.Random(level)
    answers = Counter(evaluate(draw(rng, level)) for _ in range(1000))
    assert 0.45 < answers["true"] / 1000 < 0.55


def test_shapes_and_operators_vary():
    formulas = [draw(random.Random(seed), 4) for seed in range(600)]
    assert {formula[0] for formula in formulas} == {"not", "and", "or", "implies"}
    assert len({re.sub("true|false", "x", in_words(formula)) for formula in formulas}) > 250


@pytest.mark.parametrize("levels", [(1, 1), (2, 2), (2, 4), (12, 12)])
def test_splits_share_no_structure_and_repeat(levels):
    train, test = (TASK.problems(60, split, 0, levels) for split in ("train", "test"))
    assert all(held_out(problem["structure"]) for problem in test)
    assert not any(held_out(problem["structure"]) for problem in train)
    assert {problem["answer"] for problem in test} == {"true", "false"}
    assert train == TASK.problems(60, "train", 0, levels) != TASK.problems(60, "train", 1, levels)


def test_perturbed_problems_have_the_other_answer():
    found = 0
    for problem in TASK.problems(300, "train", 0, (1, 12)):
        changed = TASK.perturb(problem, 0)
        if changed is None:
            assert not any(evaluate(other) != problem["answer"] and held_out(other)
                           for other in neighbours(problem["structure"]))
            continue
        found += 1
        assert held_out(changed["structure"])
        assert changed["answer"] != problem["answer"] and changed["level"] == problem["level"]
        before, after = (re.findall(r"\w+", in_words(p["structure"])) for p in (problem, changed))
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        assert value_of(formula_of(changed["problem"])) == changed["answer"]
        assert changed == TASK.perturb(problem, 0)
    assert found > 50 and not list(perturb(random.Random(0), ("or", "true", "true")))


@pytest.mark.parametrize("said", [
    "#### true", "#### True.", "so #### nothing\n#### TRUE", "The answer is true.", r"\boxed{true}",
    r"\boxed{\text{True}}", "<answer>True</answer>", "Answer: **true**", '#### "true"'])
def test_ways_to_say_it(said):
    assert check({"answer": "true"}, said) and not check({"answer": "false"}, said)


@pytest.mark.parametrize("said", [
    "", "true", "#### not true", "#### true or false", "#### true false", "#### untrue", "#### truefalse", "#### t",
    "#### 1", "#### yes", "#### true and true", "#### (true", r"\boxed{true} or \boxed{false}", "The answer is not true.",
    "#### true\n#### false\n#### maybe", "#### trues", "#### " + "true" * 3000, None, 7])
def test_what_is_no_answer(said):
    assert not check({"answer": "true"}, said) and not check({"answer": "false"}, said)


@given(st.text(alphabet="truefalsno #.\n\\{}", max_size=40), st.sampled_from(["true", "false"]))
def test_no_other_text_is_accepted(text, answer):
    if check({"answer": answer}, "#### " + text):
        assert re.sub(r"[^a-z]", "", text.split("####")[-1].lower().replace("text", "")) == answer
    assert not (check({"answer": "true"}, text) and check({"answer": "false"}, text))


def test_guessing():
    assert boolean.guess(2) == 0.5
