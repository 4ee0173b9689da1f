"""What a reader adds: an objective, a reward and a task are one file and one line each."""
import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import config
import reward
import tasks
import train
from model import Transformer
from puzzles.common import held_out
from test_train import HERE, fast, log_of, start         # start is a fixture
from test_train import stored

WITH_REINFORCE = "import sys, config, train; config.ALGOS += ('reinforce',); train.main(sys.argv[1:])"


@pytest.fixture
def reinforce(monkeypatch):
    monkeypatch.setattr(config, "ALGOS", (*config.ALGOS, "reinforce"))


def test_an_objective_is_a_file_and_a_word(start, tmp_path, reinforce):
    """Two steps change the weights; the policy gradient is that of the definition, at the first step."""
    train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--steps", "2",
                "--algo", "reinforce", "--baseline", "mean"])
    lines = log_of(tmp_path / "run")[1:]
    assert all(line["kept"] == 1 and line["entropy"] > 0 for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)
    first, second = (stored(tmp_path / "run", step) for step in (2, 2))
    before = Transformer.from_pretrained(start)
    assert any(not torch.equal(p, first["model." + n]) for n, p in before.named_parameters())


def test_its_flags_are_its_own(start, tmp_path, reinforce):
    for args, message in ((["--algo", "grpo", "--baseline", "none"], "it is a setting of reinforce"),
                          (["--algo", "reinforce", "--beta", "1"], "it is a setting of grpo and offpolicy"),
                          (["--algo", "reinforce", "--baseline", "x"], "choose mean, none")):
        with pytest.raises(SystemExit, match=message):
            train.main(["--model", str(start), "--out", str(tmp_path / "run"), *args])


@pytest.mark.slow
def test_it_runs_on_two_ranks_and_gives_the_same_numbers(start, tmp_path, reinforce):
    options = [*fast(start), "--steps", "2", "--algo", "reinforce"]
    train.main(["--model", str(start), "--out", str(tmp_path / "one"), *options])
    program = tmp_path / "program.py"
    program.write_text(WITH_REINFORCE)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'tests'}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(program), "--model", str(start), "--out", str(tmp_path / "two"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)


def test_a_reward_is_a_function_and_a_line(start, tmp_path, monkeypatch):
    """Each completion's length in letters, times 0.01, on top of correctness; logged before its weight."""
    def letters(problems, groups):
        return [[float(len(text)) for text in group] for group in groups]

    monkeypatch.setitem(reward.REWARDS, "letters", letters)
    out = tmp_path / "run"
    train.main(["--model", str(start), "--out", str(out), *fast(start), "--steps", "2",
                "--reward", "letters=0.01"])
    for line in log_of(out)[1:]:
        assert line["rewards/letters"] > 0 and 0 <= line["rewards/correct"] <= 1
        total = line["rewards/correct"] + 0.01 * line["rewards/letters"]
        assert line["reward"] == pytest.approx(total, abs=1e-5)
    for sample in map(json.loads, open(out / "samples.jsonl")):
        right = reward.verify(sample["completion"], sample["answer"])
        assert sample["reward"] == pytest.approx(right + 0.01 * len(sample["completion"]), abs=1e-5)


@pytest.mark.parametrize("value, message", [
    ("tone=1", "choose correct"), ("format=much", "'much' is not a finite number"),
    ("format=nan", "is not a finite number"), ("format=1,format=2", "format is given twice")])
def test_a_wrong_reward_is_one_line_and_nothing_is_written(start, tmp_path, value, message):
    with pytest.raises(SystemExit, match=message):
        train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--reward", value])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("function, message", [
    (lambda problems, groups: None, "reward own: "),
    (lambda problems, groups: [1.0] * len(groups), r"reward own gave \(2,\)"),
    (lambda problems, groups: [[1.0] * len(groups)] * 3, r"reward own gave \(3, 2\)"),
    (lambda problems, groups: [[1.0, 2.0, float("nan")]] * 2, "reward own gave .* not finite"),
    (lambda problems, groups: 1 / 0, "reward own: ZeroDivisionError")])
def test_a_reward_function_that_fails_is_named(function, message):
    """Two problems with three completions each. The transposed shape must not be taken for the right one."""
    problems, groups = [{"problem": "a", "answer": "1"}] * 2, [["1", "2", "3"]] * 2
    with pytest.raises(ValueError, match=message):
        reward.parts([("own", 1.0, function)], problems, groups, 3)
    good = reward.parts([("own", 1.0, lambda p, g: [[1, 2, 3]] * 2), ("correct", 1.0, reward.correct)], problems, groups, 3)
    assert good["own"].tolist() == [[1, 2, 3]] * 2 and good["correct"].shape == (2, 3)
    assert reward.parts([("own", 1.0, lambda p, g: [])], [], [], 3)["own"].shape == (0, 3)


def test_the_puzzle_of_the_page_is_whole(monkeypatch):
    """docs/tasks.md prints a puzzle: it draws, splits, checks and perturbs as it stands there."""
    page = (HERE / "docs" / "tasks.md").read_text()
    [code] = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    names = {}
    exec(compile(code, "parity.py", "exec"), names)
    monkeypatch.setitem(tasks.TASKS, "parity", names["TASK"])

    seen = {split: tasks.problems("parity", 300, split=split, level=(6, 9)) for split in ("train", "test")}
    structures = {split: {problem["structure"] for problem in made} for split, made in seen.items()}
    assert not structures["train"] & structures["test"] and {p["level"] for p in seen["test"]} == {6, 7, 8, 9}
    found = 0
    for problem in seen["test"]:
        ones = sum(problem["structure"])
        assert problem["answer"] == ("odd" if ones % 2 else "even")
        assert tasks.correct(problem, problem["solution"]) and not tasks.correct(problem, "#### neither")
        changed = tasks.perturbed(problem)
        if changed is None:                     # none of its neighbours is held out
            continue
        found += 1
        assert held_out(changed["structure"]) and changed["answer"] != problem["answer"] and not tasks.correct(problem, changed["solution"])
    assert found > 50


def test_the_examples_of_the_page_are_drawn_as_it_says():
    rows = re.findall(r"^\| `(\w+):(\d)` \| (.*) \| (.*) \|$", (HERE / "docs" / "tasks.md").read_text(), re.M)
    assert len(rows) > 20
    for name, level, problem, answer in rows:
        shortest = min(tasks.problems(name, 5, level=int(level)), key=lambda p: len(p["problem"]))
        assert (shortest["problem"], shortest["answer"]) == (problem, answer), f"{name}:{level}"


def test_a_task_is_a_function_and_a_line(start, tmp_path, monkeypatch):
    """Say the first digit of a number, anywhere: not what reward.verify asks, so the task brings its own checker."""
    def first_digits(count, split, seed, levels):
        return [{"problem": f"The first digit of {number}, {split}?", "answer": str(number)[0], "solution": "",
                 "task": "digit", "level": 1, "id": f"digit/{split}/{number}"}
                for number in range(1000, 1000 + count)]

    def check(problem, completion):
        return problem["answer"] in completion

    monkeypatch.setitem(tasks.TASKS, "digit", tasks.Task(first_digits, check))
    out = tmp_path / "run"
    options = [*fast(start), "--steps", "2"]
    del options[options.index("--data"):][:2]
    train.main(["--model", str(start), "--out", str(out), *options, "--data", "digit"])
    for sample in map(json.loads, open(out / "samples.jsonl")):
        assert sample["reward"] == (sample["answer"] in sample["completion"])


RECIPES = (HERE / "docs" / "recipes.md").read_text()


@pytest.mark.parametrize("flags", re.findall(r"`(--[^`]+)`", RECIPES[RECIPES.index("## Methods"):RECIPES.index("## From TRL")]))
def test_every_recipe_is_a_command_that_train_takes(flags):
    """Each cell of docs/recipes.md: its flags parse, and none of them does nothing."""
    made = config.parse([*shlex.split(flags), *([] if "--model" in flags else ["--model", "m"])])
    plain = config.Config(made.algo, model=made.model)
    assert made != plain or flags == f"--algo {made.algo}"


def test_what_trl_calls_otherwise_is_a_flag_here():
    """Every flag in the table from TRL's names is one of train.py; names of TRL's are its own where it is installed."""
    table = RECIPES[RECIPES.index("## From TRL"):RECIPES.index("## Training on a file")]
    known = {config.flag(f.name) for f in fields(config.Config("grpo"))}
    flags = set(re.findall(r"`(--[a-z-]+)", table))
    assert len(flags) > 20 and flags <= known
    found = importlib.util.find_spec("trl")
    if found:
        source = (Path(found.origin).parent / "trainer" / "grpo_config.py").read_text()
        names = {n.target.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.AnnAssign)}
        of_transformers = {"bf16", "gradient_checkpointing", "gradient_accumulation_steps", "max_steps", "max_grad_norm", "weight_decay",
                           "save_steps", "save_total_limit", "resume_from_checkpoint", "report_to", "reward_funcs"}
        rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
        assert {name for row in rows for name in re.findall(r"`([a-z0-9_]+)`", row)} <= names | of_transformers
