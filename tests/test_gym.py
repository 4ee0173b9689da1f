"""gym:NAME: tasks of reasoning-gym through a stand-in of the package, and some real ones where it is installed."""
import sys
from types import SimpleNamespace

import pytest

import data
import reward
import tasks
from puzzles import gym
from test_data import take_away


class Doubles:
    """A data set of the package's kind: double a number; its scorer is strict, and raises at letters."""

    def __init__(self, size, seed):
        self.entries = [{"question": f"Double {seed % 50 + i}?", "answer": str(2 * (seed % 50 + i)), "metadata": {}} for i in range(size)]

    def __iter__(self):
        return iter(self.entries)

    def score_answer(self, answer, entry):
        return 1.0 if int(answer) == int(entry["answer"]) else 0.1


@pytest.fixture
def package(monkeypatch):
    fake = SimpleNamespace(factory=SimpleNamespace(DATASETS={"double": None}), create_dataset=lambda name, size, seed: Doubles(size, seed))
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)
    gym.dataset.cache_clear()
    yield
    gym.dataset.cache_clear()


def test_its_problems_are_checked_by_its_scorer(package):
    problems = data.load_problems("gym:double", count=5)
    assert len(problems) == 5
    for p in problems:
        assert p["task"] == "gym:double" and p["level"] is None
        assert reward.right(p, p["solution"]) and reward.right(p, f"so \\boxed{{{p['answer']}}}")
        assert not reward.right(p, "#### 7777") and not reward.right(p, "#### no number") and not reward.right(p, "")
        assert not reward.right(p, "#### " + "1" * 10 ** 5) and not reward.right(p, "<think>" + p["solution"])


def test_splits_and_seeds_differ_and_repeat(package):
    texts = {(split, seed): [p["problem"] for p in tasks.problems("gym:double", 3, split, seed)] for split in ("train", "test") for seed in (0, 1)}
    assert len({tuple(x) for x in texts.values()}) > 1
    assert texts["train", 0] == [p["problem"] for p in tasks.problems("gym:double", 3, "train", 0)]


def test_an_unknown_name_and_levels_are_one_line(package):
    with pytest.raises(ValueError, match="reasoning-gym has no such task; it has double"):
        tasks.problems("gym:triple", 1)
    with pytest.raises(ValueError, match="has no levels"):
        data.parts_of("gym:double:2-3")
    with pytest.raises(ValueError, match="cannot be perturbed"):
        tasks.perturbed(tasks.problems("gym:double", 1)[0])


def test_without_the_package_the_way_out_is_named(monkeypatch):
    take_away(monkeypatch, "reasoning_gym")
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        tasks.problems("gym:double", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knights_knaves", "family_relationships", "chain_sum", "sudoku", "calendar_arithmetic"])
def test_real_tasks_accept_their_own_answers(name):
    pytest.importorskip("reasoning_gym")
    for problem in tasks.problems(f"gym:{name}", 5):
        assert tasks.correct(problem, "Let me see.\n" + problem["solution"]) and not tasks.correct(problem, "#### no idea")
