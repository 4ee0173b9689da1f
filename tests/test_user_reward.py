"""Reward functions of a user's file, in TRL's signature; and the punishment of long completions."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import reward
import train
import user_reward
from config import Config
from rollout import Rollout
from test_train import fast, log_of, start         # start is a fixture

# three functions of the kinds in TRL's documentation, written anew
THEIRS = '''
import re
from helper_of_mine import SCALE

def reward_tokens(completion_ids, **kwargs):
    """Longer completions score higher."""
    return [float(len(ids)) for ids in completion_ids]

def reward_format(completions, **kwargs):
    """A conversation's completion that thinks and then answers."""
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think><answer>.*?</answer>$", text) else 0.0 for text in texts]

def reward_truth(prompts, completions, answer, kind, **kwargs):
    """Against a column of the data, and only for the problems that it is meant for."""
    return [SCALE * (gold in text) if k == "number" else None for text, gold, k in zip(completions, answer, kind)]

def plain(completions, prompts):
    return [len(text) - len(prompt) for text, prompt in zip(completions, prompts)]
'''
PROBLEMS = [{"problem": "1 + 1?", "answer": "2", "kind": "number", "prompt": [1]},
            {"problem": "Sky?", "answer": "blue", "kind": "word", "prompt": [2]}]
GROUPS = [["2", "it is 2", "3"], ["blue", "red", ""]]
IDS = [[5], [5, 6, 7], [5, 6], [1, 1, 1, 1], [2], [3]]


# a file of several tasks, as in TRL's documentation; its dataclass needs the file's module in sys.modules
TASKS = '''
from __future__ import annotations
from dataclasses import dataclass

COUNT = []

@dataclass
class Weight:
    value: float = 1.0

def of_math(prompts, completions, task, answer, log_extra=None, **kwargs):
    COUNT.append(1)
    log_extra("answer", answer)
    return [Weight().value * (float(text) == gold) if name == "math" else None
            for text, name, gold in zip(completions, task, answer)]

def of_code(completions, task, log_metric, **kwargs):
    from helper_late import SCALE           # at a call, not at the start
    log_metric("calls", len(COUNT))
    return [SCALE * len(COUNT) if name == "code" else None for name in task]

def stateful(completions, trainer_state, **kwargs):
    return [0.0] * len(completions)
'''


@pytest.fixture
def file(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("SCALE = 2.0\n")
    (tmp_path / "mine.py").write_text(THEIRS)
    return tmp_path / "mine.py"


def rollout():
    lengths = torch.tensor([len(ids) + 1 for ids in IDS])
    tokens = torch.zeros(6, 5, dtype=torch.int64)
    for row, ids in enumerate(IDS):
        tokens[row, 1:1 + len(ids)] = torch.tensor(ids)
    return Rollout(tokens, torch.ones(6, dtype=torch.int64), lengths, torch.zeros(6, 5), torch.ones(6, dtype=torch.bool))


def short_rollout():
    """Three completions of one token each."""
    return Rollout(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, dtype=torch.int64), torch.full((3,), 2), torch.zeros(3, 2),
                   torch.ones(3, dtype=torch.bool))


def parts(text, problems=PROBLEMS, groups=GROUPS):
    functions = reward.weighted(text)
    return {name: part.tolist() for name, part in reward.parts(functions, problems, groups, 3, rollout()).items()}


def test_functions_written_for_trl_work_unchanged(file):
    found = parts(f"{file}:reward_tokens=0.5,{file}:reward_truth,{file}:plain")
    assert found["reward_tokens"] == [[1, 3, 2], [4, 1, 1]]
    assert found["reward_truth"][0][:2] == [2, 2] and found["reward_truth"][0][2] == 0
    assert all(map(math.isnan, found["reward_truth"][1]))           # None: it does not apply
    assert found["plain"] == [[-5, 1, -5], [0, -1, -4]]
    assert found["correct"] == [[0, 0, 0], [0, 0, 0]]               # no mark
    assert [(name, weight) for name, weight, _ in reward.weighted(f"{file}:reward_tokens=0.5")] == [
        ("correct", 1.0), ("reward_tokens", 0.5)]


def test_the_rewards_are_the_weighted_sum_by_hand():
    """nan, where a function does not apply, adds nothing: 1 + .5 x 2, and 1 alone."""
    functions = [("correct", 1.0, None), ("form", 0.5, None)]
    parts = {"correct": torch.tensor([[1., 1, 0]]), "form": torch.tensor([[2., math.nan, -1]])}
    assert reward.total(functions, parts).tolist() == [[2, 1, -.5]]


def test_a_chat_gives_messages(file):
    problems = [{**p, "check": len, "messages": [{"role": "user", "content": p["problem"]}]} for p in PROBLEMS]
    groups = [["<think>a</think><answer>2</answer>", "2", "<think>"], ["", "x", "<think></think><answer></answer>"]]
    assert parts(f"{file}:reward_format", problems, groups)["reward_format"] == [[1, 0, 0], [0, 0, 1]]
    seen = user_reward.columns(problems, groups, IDS)
    assert seen["prompts"][0] == [{"role": "user", "content": "1 + 1?"}] and seen["kind"] == ["number"] * 3 + ["word"] * 3
    assert not {"prompt", "check", "messages"} & set(seen) and seen["completion_ids"] == IDS


def test_the_example_of_the_page_is_that_of_the_docstring_and_pays_right_answers_alone(tmp_path):
    """\\boxed{2} is right and has 9 signs: 1 / 10; a wrong or empty one earns nothing. The same with a chat template."""
    page = (Path(reward.__file__).parent / "docs/rewards.md").read_text(encoding="utf-8")
    example = page.split("where mine.py has, for example,\n\n```\n")[1].split("```")[0]
    code = [line.strip() for line in example.splitlines() if "def " not in line]
    assert all(line in user_reward.__doc__ for line in code)
    (tmp_path / "brief.py").write_text(example)

    problems, groups = [{"problem": "1 + 1?", "answer": "2", "prompt": [1]}], [[r"\boxed{2}", r"\boxed{3}", ""]] * 1
    for more in ({}, {"messages": [{"role": "user", "content": "1 + 1?"}]}):
        functions = reward.weighted(f"{tmp_path}/brief.py:brief")
        found = reward.parts(functions, [{**p, **more} for p in problems], groups, 3, short_rollout())
        assert found["brief"].tolist() == [[1 / 10, 0, 0]]


def test_a_rank_without_prompts_asks_nothing(file):
    functions = reward.weighted(f"{file}:reward_tokens")
    assert reward.parts(functions, [], [], 3, rollout())["reward_tokens"].shape == (0, 3)


@pytest.mark.parametrize("text, message", [
    ("nowhere.py:f", "there is no file nowhere.py"), ("{file}:nothing", "has no function nothing.*; it has reward_tokens, reward_format"),
    ("{file}:SCALE", "has no function SCALE"), ("{file}:plain=much", "'much' is not a finite number"),
    ("{file}:plain,{file}:plain", "plain is given twice; two functions need two names"), ("tone", "choose correct, format, think, consistency or FILE.py:FUNCTION")])
def test_what_cannot_be_loaded_is_one_line(text, message, file):
    with pytest.raises(ValueError, match=message) as stop:
        reward.weighted(text.format(file=file))
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("body, message", [
    ("def f(: pass", "SyntaxError"), ("import no_such_module", "bad.py:1: ModuleNotFoundError"), ("raise SystemExit(3)", "SystemExit"),
    ("async def f(**k): return 1", "f is async, which nothing waits for here: write def f$"),
    ("f = max", "f does not say which arguments it takes"), ("f = 3", "has no function f; it has none"), ("def correct(**k): return []", "correct is the name of a function here")])
def test_a_file_that_fails_is_one_line(body, message, tmp_path):
    (tmp_path / "bad.py").write_text(body)
    name = "correct" if "correct" in body else "f"
    with pytest.raises(ValueError, match=message) as stop:
        reward.weighted(f"{tmp_path}/bad.py:{name}")
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("body, message", [
    ("return [1.0] * 5", "reward f: gave 5 numbers for 6 completions"), ("return 1.0", "gave '1.0', not a list"),
    ("return ['a'] * 6", "not a list of numbers"), ("return [float('nan')] * 6", "not finite"),
    ("x = {}\n    return x['gold']", "reward f: .*bad.py:3: KeyError: 'gold'"), ("raise ValueError('two\\nlines')", "ValueError: two$"),
    ("return map(int, ['x'] * 6)", "bad.py: ValueError: invalid literal"), ("yield from [1] * 5\n    exit(0)", "bad.py:3: SystemExit: 0"),
    ("return [1e39] * 6", "not finite in float32"),
    ("exit(0)", "reward f: .*bad.py:2: SystemExit: 0"), ("import sys\n    sys.exit()", "reward f: .*bad.py:3: SystemExit")])
def test_a_function_that_fails_is_one_line_with_its_place(body, message, tmp_path):
    (tmp_path / "bad.py").write_text(f"def f(completions, **kwargs):\n    {body}\n")
    with pytest.raises(ValueError, match=message) as stop:
        parts(f"{tmp_path}/bad.py:f")
    assert "\n" not in str(stop.value)


def test_a_relative_file_is_named_with_its_line_too(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("def f(completions, **kwargs):\n    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"reward f: bad\.py:2: ZeroDivisionError"):
        parts("bad.py:f")


def test_no_column_of_the_data_takes_the_place_of_an_argument(tmp_path):
    mine = {"completions": ["x"], "completion_ids": [9], "prompts": "y", "kind": "word"}
    found = user_reward.columns([{**PROBLEMS[0], **mine}], [["2", "3"]], [[5], [6]])
    assert found["completions"] == ["2", "3"] and found["completion_ids"] == [[5], [6]]
    assert found["prompts"] == ["1 + 1?"] * 2 and found["kind"] == ["word"] * 2


def test_each_completion_has_values_of_its_own(tmp_path):
    """A function that empties its list, or writes into its prompt, changes neither the next completion nor the data."""
    (tmp_path / "mine.py").write_text("""
def keys(completions, keywords, **kwargs):
    return [len([own.pop() for _ in list(own)]) for own in keywords]

def turns(prompts, completions, **kwargs):
    for prompt, completion in zip(prompts, completions):
        prompt.extend(completion)
    return [len(prompt) for prompt in prompts]
""")
    problem = {"problem": "2?", "answer": "2", "prompt": [1], "messages": [{"role": "user", "content": "2?"}], "keywords": ["a", "b"]}
    for name in ("keys", "turns"):
        for _ in range(2):
            found = reward.parts(reward.weighted(f"{tmp_path}/mine.py:{name}"), [problem], [["2", "3", "4"]], 3, short_rollout())
            assert found[name].tolist() == [[2, 2, 2]]
    assert problem["keywords"] == ["a", "b"] and len(problem["messages"]) == 1


def test_what_lies_beside_the_file_may_have_names_of_ours(tmp_path):
    """config.py, reward.py and lora.py of the user's, loaded or not by us before; ours are in their places afterwards."""
    for name in ("config", "reward", "lora", "verifier"):
        (tmp_path / f"{name}.py").write_text(f"WEIGHT = {len(name)}\n")
    (tmp_path / "mine.py").write_text('''
from config import WEIGHT
import lora, reward, verifier
def total(completions, **kwargs):
    return [WEIGHT + reward.WEIGHT + lora.WEIGHT + verifier.WEIGHT] * len(completions)
''')
    before = {name: sys.modules.get(name) for name in ("config", "reward", "lora", "verifier", "verifier.symbolic")}
    assert parts(f"{tmp_path}/mine.py:total")["total"] == [[24] * 3] * 2
    assert {name: sys.modules.get(name) for name in before} == before
    import lora
    assert hasattr(lora, "attach") and sys.modules["reward"] is reward


def test_a_path_may_hold_the_sign_before_a_weight(tmp_path, monkeypatch):
    import folder
    (tmp_path / "a=b").mkdir()
    file = tmp_path / "a=b" / "mine.py"
    file.write_text("def one(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    assert [(name, weight) for name, weight, _ in reward.weighted(f"{file}:one=0.5,correct=0")] == [("correct", 0), ("one", 0.5)]
    monkeypatch.chdir(file.parent)
    assert folder.absolute(Config(reward="mine.py:one=0.5"))["reward"] == f"{file}:one=0.5"


def test_a_function_that_asks_for_a_column_that_is_not_there(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions, target, other=1):\n    return [1.0] * 6\n")
    with pytest.raises(ValueError, match="reward f: asks for target; there are answer, completion_ids, .*kind") as stop:
        parts(f"{tmp_path}/mine.py:f")
    assert "\n" not in str(stop.value)


def test_the_name_of_the_punishment_is_no_function_of_the_users(tmp_path):
    (tmp_path / "mine.py").write_text("def overlong(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    with pytest.raises(ValueError, match="overlong is the name of a function here"):
        reward.weighted(f"{tmp_path}/mine.py:overlong")


def test_columns_are_what_stands_in_the_file(tmp_path):
    """A task that is not ours, and an answer that is a number; both functions are of one module."""
    import data
    rows = [{"prompt": "1 + 1?", "answer": 2, "task": "math"}, {"prompt": "print?", "answer": 5.5, "task": "code", "columns": [1]},
            {"prompt": "2?", "answer": None, "reward_model": {"ground_truth": "2"}}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(TASKS)
    (tmp_path / "helper_late.py").write_text("SCALE = 3.0\n")
    problems = data.load_problems(str(tmp_path / "d.jsonl"), "train")
    *problems, other = problems
    assert user_reward.columns([other], [["2"]], [[1]])["answer"] == ["2"]      # null says nothing
    assert [p["answer"] for p in problems] == ["2", "5.5"] and {p["task"] for p in problems} == {"d.jsonl"}
    assert user_reward.columns(problems, [["2"], ["x"]], [[1], [2]])["columns"] == [None, [1]]

    found = parts(f"{tmp_path}/mine.py:of_math,{tmp_path}/mine.py:of_code", problems, [["2", "2.0", "3"], ["x", "y", "z"]])
    assert found["of_math"][0] == [1, 1, 0] and all(map(math.isnan, found["of_math"][1]))
    assert found["of_code"][1] == [3, 3, 3] and all(map(math.isnan, found["of_code"][0]))
    with pytest.raises(ValueError, match="stateful asks for trainer_state"):
        reward.weighted(f"{tmp_path}/mine.py:stateful")


def test_a_function_is_given_every_column_of_the_data_whichever_problems_a_batch_holds(tmp_path):
    """Of two files one has `tests`, and one row of it has `hint`: None stands for them elsewhere, as in TRL."""
    import data
    from config import parse
    more = [{}] * 39 + [{"hint": "h"}]
    for name, extra in (("a", [{}] * 40), ("b", [{"tests": "t", **fields} for fields in more])):
        rows = [{"problem": f"{name} {i}?", "answer": str(i), **fields} for i, fields in enumerate(extra)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    c = parse(["--model", "M", "--data", f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", "--eval-problems", "8"])
    for problem in sum(data.load_split(c), []):
        seen = user_reward.columns([problem], [["x", "y"]], [[1], [1]])
        assert seen["tests"] == (["t"] if problem["problem"][0] == "b" else [None]) * 2
        assert seen["hint"] == (["h"] if problem["problem"] == "b 39?" else [None]) * 2
        assert {"problem", "answer", "solution", "level", "id"} <= set(seen) and "columns" not in seen


def test_the_flag_may_be_repeated_and_none_does_not_count(start, tmp_path):
    """Of 4 completions a prompt `half` applies to two: its mean is 1 and not .5; the weighted sum takes it as 0."""
    mine = tmp_path / "mine.py"
    mine.write_text("def half(completions, **columns):\n    return [1.0, None] * (len(completions) // 2)\n\n"
                    "def never(completions, **columns):\n    return [None] * len(completions)\n\n"
                    "def one(completions, **columns):\n    return [1.0] * len(completions)\n")
    flags = ["--reward", f"{mine}:half=0.5", "--reward", f"{mine}:never,{mine}:one=0.25"]
    train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), *flags, "--eval-samples", "2"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["reward"] == f"{mine}:half=0.5,{mine}:never,{mine}:one=0.25"
    for line in log_of(tmp_path / "run"):
        for prefix, right in (("", "rewards/correct"), ("eval_", "eval_rewards/correct")):
            if prefix + "reward" in line:
                assert line[f"{prefix}rewards/half"] == 1 == line[f"{prefix}rewards/one"]
                assert f"{prefix}rewards/never" not in line
                assert line[f"{prefix}reward"] == pytest.approx(line[right] + .5 / 2 + .25)


def test_a_run_with_a_function_of_the_users_and_one_that_fails_later(start, tmp_path, capsys):
    """What was learned before is saved, and the run goes on when the function is mended."""
    mine = tmp_path / "mine.py"
    mine.write_text("count = 0\n\ndef length(completions, id, **columns):\n    global count\n    count += 1\n"
                    "    if count > 5:\n        raise KeyError('gold')\n    return [len(text) for text in completions]\n")
    out = tmp_path / "run"
    arguments = ["--model", str(start), "--out", str(out), *fast(start), "--save-every", "100", "--reward", f"{mine}:length=0.01"]
    with pytest.raises(SystemExit, match="reward length: .*mine.py:7: KeyError: 'gold'"):
        train.main(arguments)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000003"]

    # again in the first step after the checkpoint, which needs no saving: the message is the same
    mine.write_text("def length(completions, **columns):\n    return 1 / 0\n")
    with pytest.raises(SystemExit, match="reward length: .*mine.py:2: ZeroDivisionError"):
        train.main(["--resume", "--out", str(out)])
    mine.write_text("def length(completions, **columns):\n    return [len(text) for text in completions]\n")
    capsys.readouterr()
    train.main(["--resume", "--out", str(out)])
    assert f"warning: {mine} has changed since the run was last started" in capsys.readouterr().err
    train.main([*arguments[:3], str(tmp_path / "whole"), *arguments[4:]])
    assert "has changed" not in capsys.readouterr().err
    assert log_of(out) == log_of(tmp_path / "whole")
    assert all(line["rewards/length"] > 0 for line in log_of(out)[1:])


# ----------------------------------------------------------------------------------------------------- overlong

def test_the_punishment_of_long_completions_by_hand():
    """Limit 10, buffer 4: 6 tokens pay nothing, 8 half, 10 all. A wrong answer that stopped pays nothing, however long.

    In the last group nothing is right. Were the cut one to pay, it would teach the others to give up early."""
    lengths = torch.tensor([[1, 6, 8], [10, 10, 9], [8, 10, 10], [2, 10, 3]])
    finished = torch.tensor([[True, True, True], [True, False, True], [True, True, False], [True, False, True]])
    correct = torch.tensor([[1., 1., 1.], [1., 0., 1.], [0., 0., 1.], [0., 0., 0.]])
    expected = [[0, 0, -0.5], [-1, -1, -0.75], [0, 0, -1], [0, 0, 0]]
    assert reward.overlong(lengths, finished, correct, 10, 4).tolist() == expected


@pytest.mark.parametrize("flags, expected", [("", [[0, 0], [-1, 0]]), ("correct=0", [[0, -1], [-1, 0]])])
def test_without_correctness_all_that_were_cut_pay(flags, expected):
    """Nothing is right in the first group. Limit 4, buffer 2: its second row was cut there. So was the first of the other."""
    drawn = Rollout(torch.zeros(4, 6, dtype=torch.int64), torch.full((4,), 2), torch.tensor([4, 6, 6, 4]), None,
                    torch.tensor([True, False, False, True]))
    correct = torch.tensor([[0., 0.], [0., 1.]])
    config = Config(max_new_tokens=4, overlong_buffer=2, reward=flags)
    assert reward.overlong_of(drawn, correct, config).tolist() == expected


def test_it_is_part_of_the_reward(start, tmp_path):
    train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--overlong-buffer", "8"])
    for line in log_of(tmp_path / "run")[1:]:
        assert line["rewards/overlong"] < 0
        assert line["reward"] == pytest.approx(line["rewards/correct"] + line["rewards/overlong"], abs=1e-6)
    for line in [line for line in log_of(tmp_path / "run") if "eval_pass@1" in line]:
        assert line["eval_reward"] == pytest.approx(line["eval_pass@1"] + line["eval_rewards/overlong"], abs=1e-6)
        assert line["eval_rewards/overlong"] < 0
    with pytest.raises(SystemExit, match="--overlong-buffer 9: at most --max-new-tokens 8"):
        train.main(["--model", str(start), "--out", str(tmp_path / "no"), *fast(start), "--overlong-buffer", "9"])


def test_columns_of_the_data_file_reach_the_function(tmp_path):
    import data
    file = tmp_path / "d.jsonl"
    rows = [{"problem": "a?", "answer": 1, "kind": "number", "weights": [1, 2], "prompt": "theirs"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    [problem] = data.load_problems(str(file), "train")
    assert problem["kind"] == "number" and problem["weights"] == [1, 2] and "prompt" not in problem


def test_a_run_on_rewards_of_ones_own_needs_no_answers(start, tmp_path):
    """With correct=0 a file without answers trains; eval_reward is the weighted sum of the functions on the evaluation's samples."""
    mine = tmp_path / "mine.py"
    mine.write_text("def length(completions, **columns):\n    return [len(text) for text in completions]\n")
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": f"Which, {i}?"}) + "\n" for i in range(30)))
    more = fast(start)
    more[more.index("--data") + 1] = str(file)
    out = tmp_path / "run"
    train.main(["--model", str(start), "--out", str(out), *more, "--reward", f"correct=0,{mine}:length=0.5"])
    for line in log_of(out):
        if "eval_reward" in line:
            assert line["eval_reward"] == pytest.approx(line["eval_rewards/length"] / 2) and line["eval_rewards/length"] > 0
            assert line["eval_pass@1"] == 0 == line["eval_rewards/correct"]
    assert log_of(out)[-1]["reward"] == pytest.approx(log_of(out)[-1]["rewards/length"] / 2, rel=1e-5)
    with pytest.raises(SystemExit, match="questions.jsonl:1: no \"answer\""):
        train.main(["--model", str(start), "--out", str(tmp_path / "no"), *more, "--reward", f"{mine}:length"])
    with pytest.raises(SystemExit, match="--refill follows correctness"):
        train.main(["--model", str(start), "--out", str(tmp_path / "no"), *more, "--reward", f"correct=0,{mine}:length", "--refill", "1"])


def test_a_function_that_fails_in_an_evaluation_is_shown_and_ends_nothing(start, tmp_path, capsys):
    """It gets as many completions a prompt as --eval-samples there, 2, and as --group-size in training."""
    mine = tmp_path / "mine.py"
    mine.write_text("def fussy(completions, prompts, **columns):\n    return [1 / (prompts.count(prompts[0]) - 2) for _ in completions]\n")
    arguments = ["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--reward", f"{mine}:fussy=0.1"]
    train.main([*arguments, "--eval-samples", "2", "--group-size", "4"])
    lines = log_of(tmp_path / "run")
    assert all("eval_reward" not in line for line in lines) and lines[-1]["rewards/fussy"] == .5
    assert "warning: evaluation: reward fussy: " in capsys.readouterr().err


def test_what_leaves_correctness_out():
    counts = {"": True, "format=0.5": True, "correct=0.5": True, "correct=0": False, "format=1,correct=0.0": False}
    assert {text: reward.correct_counts(text) for text in counts} == counts
