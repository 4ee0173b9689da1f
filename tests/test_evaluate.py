"""The metrics by worked numbers and by enumeration; the command line from checkpoint to JSON."""
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import reward
import sft
import heldout
import policies
from config import Config
from evaluate import majority_at_k, pass_at_k, subsets, vote_labels
from report import standard_error

HERE = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------- pass@k

def test_pass_at_k_worked_numbers():
    """8 samples, 2 right: 1 - C(6, k) / C(8, k). The plug-in 1 - (6/8)^k is lower from k = 2 on."""
    expected = {1: .25, 2: 13 / 28, 4: 11 / 14, 7: 1., 8: 1.}
    for k, value in expected.items():
        assert pass_at_k(8, 2, k) == pytest.approx(value, abs=1e-12)
    assert round(pass_at_k(8, 2, 2), 6) == .464286 and round(pass_at_k(8, 2, 4), 6) == .785714
    assert 1 - .75 ** 2 == .4375 < pass_at_k(8, 2, 2) and 1 - .75 ** 4 < .6836 < pass_at_k(8, 2, 4)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        held = [any(i < c for i in subset) for subset in itertools.combinations(range(n), k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(held) / len(held), abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(.5)
    assert pass_at_k(10_000, 0, 100) == 0 and pass_at_k(10_000, 10_000, 1) == 1


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass_at_k needs"):
        pass_at_k(n, c, k)


# -------------------------------------------------------------------------------------------- maj@k

def vote(answers, gold, k=None):
    """maj@k from answer texts, as grade() and metrics() do it."""
    right = [a is not None and reward.equal(a, gold) for a in answers]
    return majority_at_k(vote_labels(answers), right, k or len(answers))


def test_majority_worked_numbers():
    assert vote(["5", "5", "7"], "5") == 1
    assert vote(["7", "5", "7"], "5") == 0
    assert vote(["5", "5", "7", "7"], "5") == .5                        # a tie of two
    assert vote(["5", "6", "7", "8"], "5") == .25                       # of four
    assert vote(["6", "6", "7", "7", "5"], "5") == 0                    # a tie of others
    assert vote(["5", "5", "7"], "5", 1) == pytest.approx(2 / 3)        # maj@1 is the mean
    # pairs of 5, 5, 7, 7: one pair of 5s, one of 7s, four that are split
    assert vote(["5", "5", "7", "7"], "5", 2) == pytest.approx((1 + 0 + 4 * .5) / 6)
    # three of 5, 5, 7, 7, 7: 5-5-7 wins three times, 5-7-7 and 7-7-7 lose seven times
    assert vote(["5", "5", "7", "7", "7"], "5", 3) == pytest.approx(.3)


def test_equivalent_answers_are_one_candidate():
    assert vote_labels(["1/2", "7", "0.5", r"\frac{1}{2}", "7", "x"]) == [0, 1, 0, 0, 1, 2]
    # by their spelling 7 would win
    assert vote(["1/2", "0.5", "7", "7", r"\frac12"], "0.5") == 1


def test_votes_for_words():
    """Where the task has a checker, a worded last line is an answer that others can agree with."""
    texts = ["So it is these two.\n#### Ben, Cid", "#### Cid, Ben", "#### Ana", "no idea"]
    graded = evaluate.grade(texts, "Ben, Cid", lambda text: "Ben" in text)
    assert graded["strict"] == graded["lenient"]
    assert graded["strict"]["right"] == [True, True, False, False]
    assert graded["strict"]["labels"] == [0, 0, 1, -1]
    assert majority_at_k(graded["strict"]["labels"], [1, 1, 0, 0], 4) == 1


def test_votes_for_an_order_and_for_several_lines():
    """Of three people in a row each order is an answer of its own; a grid is one answer, wherever it begins."""
    texts = ["#### Ana, Ben, Cid", "#### Ben, Ana, Cid", "#### Cid, Ben, Ana", "#### ben,  ana, cid"]
    assert evaluate.grade(texts, "Ana, Ben, Cid", lambda text: "Ana, B" in text)["strict"]["labels"] == [0, 1, 2, 1]
    grids = ["####\n1 2\n3 4", "#### 1 2\n3 4", "#### 1 2\n4 3", "it is 5"]
    assert evaluate.grade(grids, "", lambda text: text.endswith("3 4"))["lenient"]["labels"] == [0, 0, 1, -1]


def test_no_answer_casts_no_vote():
    assert vote_labels([None, "3", None, "4"]) == [-1, 0, -1, 1]
    assert vote([None, None, None, "5"], "5") == 1
    assert vote([None, None, "5", "7"], "5") == .5
    assert vote([None, None], "5") == 0
    # of the pairs of (None, None, 5) one holds no vote and two elect 5
    assert vote([None, None, "5"], "5", 2) == pytest.approx(2 / 3)


def enumerated(labels, right_label, k):
    """maj@k by its definition: every k-subset, every tied winner."""
    total = count = 0
    for subset in itertools.combinations(labels, k):
        cast = [a for a in subset if a >= 0]
        most = max((cast.count(a) for a in cast), default=0)
        winners = {a for a in cast if cast.count(a) == most}
        total += (right_label in winners) / max(len(winners), 1)
        count += 1
    return total / count


@settings(max_examples=100, deadline=None)
@given(labels=st.lists(st.integers(-1, 3), min_size=1, max_size=9),
       right_label=st.integers(0, 3), data=st.data())
def test_majority_equals_enumeration(labels, right_label, data):
    k = data.draw(st.integers(1, len(labels)))
    right = [label == right_label for label in labels]
    expected = enumerated(labels, right_label, k)
    assert majority_at_k(labels, right, k) == pytest.approx(expected, abs=1e-6)
    assert majority_at_k(labels, right, 1) == pytest.approx(sum(right) / len(right), abs=1e-6)


def test_random_subsets_are_fixed_and_near_the_enumeration():
    """C(16, 8) = 12870 subsets exceed SUBSETS, so 1000 random ones are looked at.

    Their standard error is below .5 / sqrt(1000) = .016."""
    labels = [0] * 5 + [1] * 5 + [2] * 3 + [-1] * 3
    random.Random(0).shuffle(labels)
    right = [label == 0 for label in labels]
    assert subsets(16, 8).shape == (evaluate.SUBSETS, 16) and (subsets(16, 8).sum(1) == 8).all()
    value = majority_at_k(labels, right, 8)
    assert value == pytest.approx(enumerated(labels, 0, 8), abs=.05)
    subsets.cache_clear()
    assert majority_at_k(labels, right, 8) == value
    assert len(np.unique(subsets(8, 4), axis=0)) == 70      # few: each of the C(8, 4) once


def test_majority_refuses_impossible_counts():
    for labels, right, k in (([0], [1], 2), ([0], [1], 0), ([0, 1], [1], 1), ([], [], 1)):
        with pytest.raises(ValueError, match="majority_at_k needs"):
            majority_at_k(labels, right, k)


# --------------------------------------------------------------------- standard errors, the metrics

def test_standard_error_by_hand():
    # sqrt(p (1 - p) / (N - 1))
    assert standard_error([1, 0, 0, 1]) == pytest.approx(math.sqrt(.25 / 3))
    assert standard_error([0., .5, 1.]) == pytest.approx(.5 / math.sqrt(3))
    assert standard_error([1, 1, 1]) == 0
    assert standard_error([1]) is None


def test_grading_is_reward_verify_in_both_columns():
    texts = ["#### 4", "it is 4", "#### 4\nor 5", "nothing", r"so \boxed{8/2}", "#### 5 and not 4"]
    graded = evaluate.grade(texts, "4")
    for kind in evaluate.READINGS:
        verified = [reward.verify(text, "4", lenient=kind == "lenient") for text in texts]
        assert graded[kind]["right"] == verified
    assert graded["strict"]["labels"] == [0, -1, 0, -1, 0, 1]
    assert graded["lenient"]["labels"][:5] == [0, 0, 0, -1, 0]


def test_a_tasks_own_checker_decides_in_both_columns():
    graded = evaluate.grade(["#### 4", "four", "#### 5"], "4", check=lambda text: "5" in text)
    for kind in evaluate.READINGS:
        assert graded[kind]["right"] == [False, False, True]
        assert graded[kind]["labels"] == [0, -1, 1]


def test_metrics_of_two_problems():
    """Four samples; answers a a b - (a right) and c d d d (c right)."""
    def one(right, labels):
        return {"strict": {"right": right, "labels": labels}}

    sampled = [one([1, 1, 0, 0], [0, 0, 1, -1]), one([1, 0, 0, 0], [0, 1, 1, 1])]
    m = evaluate.metrics([one([1], [0]), one([0], [0])], sampled, "strict")
    means = {
        "greedy": .5, "avg@4": 3 / 8,
        "pass@1": 3 / 8, "pass@2": (5 / 6 + 1 / 2) / 2, "pass@4": 1.,
        # the pairs aa, ab ab, a- a-, b-; and cd cd cd, dd dd dd
        "maj@2": ((1 + 2 * .5 + 2 * 1 + 0) / 6 + 3 * .5 / 6) / 2, "maj@4": .5,
    }
    assert {k: v["mean"] for k, v in m.items()} == pytest.approx(means)
    assert m["greedy"]["se"] == pytest.approx(.5) and m["avg@4"]["se"] == pytest.approx(.125)
    assert m["pass@4"]["se"] == 0


@pytest.mark.parametrize("n, ks", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_which_k(n, ks):
    graded = [{"strict": {"right": [0] * n, "labels": [0] * n}}]
    names = list(evaluate.metrics([{"strict": {"right": [0]}}], graded, "strict"))
    passes = [f"pass@{k}" for k in ks]
    votes = [f"maj@{k}" for k in ks[1:]]
    assert names == ["greedy", f"avg@{n}", *passes, *votes]


# --------------------------------------------------------------------------------- the command line

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model that guesses among three answers, and a file of problems.

    Their prompts have many lengths, in no order."""
    torch.set_num_threads(1)                # on a busy machine two are slower
    folder = tmp_path_factory.mktemp("evaluate")
    rows = [{"problem": f"Which{' one' * (7 * i % 5)}, {i}?", "answer": str(i % 3), "id": f"p{i}"}
            for i in range(30)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = sft.SFTConfig(data=str(folder / "problems.jsonl"), out=str(folder / "model"), steps=60,
                           hidden_size=32, layers=1, heads=2, vocab_size=280, lr=8e-3)
    sft.warm_start(config, progress=False)
    return folder


def options(folder, *more):
    given = {"--model": folder / "model", "--data": folder / "problems.jsonl", "--samples": 4,
             "--max-new-tokens": 8, "--device": "cpu", "--threads": 1,
             **dict(zip(more[::2], more[1::2]))}
    return [str(x) for pair in given.items() for x in pair]


def run(folder, tmp_path, *more):
    """The JSON of one evaluation, without what may differ between equal runs."""
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    evaluate.main(options(folder, *more, "--json", file))
    result = json.loads(file.read_text())
    for part in ("greedy", "sampled"):
        assert result[part].pop("tokens_per_s") > 0
    result.pop("config")
    return result


@pytest.fixture(scope="module")
def first(folder, tmp_path_factory):
    return run(folder, tmp_path_factory.mktemp("first"))


def test_json_in_the_files_order_and_consistent(first):
    assert first["num_problems"] == 30 and first["num_dropped"] == 0
    assert [p["id"] for p in first["problems"]] == [f"p{i}" for i in range(30)]
    counts = [p["c"] for p in first["problems"]]
    assert all(p["n"] == 4 for p in first["problems"]) and 0 < sum(counts) < 120
    strict = {name: cell["mean"] for name, cell in first["strict"].items()}
    names = ["greedy", "avg@4", "pass@1", "pass@2", "pass@4", "maj@2", "maj@4"]
    assert list(strict) == names == list(first["lenient"])

    greedy = [p["greedy_correct"] for p in first["problems"]]
    assert strict["greedy"] == pytest.approx(np.mean(greedy))
    assert strict["avg@4"] == pytest.approx(sum(counts) / 120) == strict["pass@1"]
    assert strict["pass@4"] == pytest.approx(np.mean([c > 0 for c in counts]))
    error = np.std([c / 4 for c in counts], ddof=1) / math.sqrt(30)
    assert first["strict"]["avg@4"]["se"] == pytest.approx(error)
    assert first["lenient"]["avg@4"]["mean"] >= strict["avg@4"]
    assert 1 <= first["sampled"]["completion_length"] <= 8
    assert 0 <= first["sampled"]["truncated_frac"] < 1


@pytest.mark.parametrize("rows", [1, 4, 20, 1000])
def test_the_chunk_size_does_not_change_a_number(folder, first, tmp_path, rows):
    assert run(folder, tmp_path, "--rows-at-once", rows) == first


def test_seeds(folder, first, tmp_path):
    assert run(folder, tmp_path) == first
    other = run(folder, tmp_path, "--seed", 1)
    assert other["strict"]["greedy"] == first["strict"]["greedy"]
    assert other["problems"] != first["problems"]


def test_a_problems_numbers_do_not_depend_on_the_others(folder, first, tmp_path):
    """Neither on those after it (--limit) nor on those that are dropped."""
    limited = run(folder, tmp_path, "--limit", 7)
    assert limited["num_problems"] == 7 and limited["problems"] == first["problems"][:7]
    shorter = run(folder, tmp_path, "--max-prompt-tokens", 7)
    assert 0 < shorter["num_dropped"] == 30 - shorter["num_problems"] < 30
    by_id = {p["id"]: p for p in first["problems"]}
    assert all(p == by_id[p["id"]] for p in shorter["problems"])


def test_the_training_log_and_this_file_agree(folder, first):
    """eval_greedy and eval_pass@1 of log.jsonl are the same numbers, when the problems are."""
    c = evaluate.EvalConfig(model=str(folder / "model"), data=str(folder / "problems.jsonl"),
                            device="cpu", threads=1)
    sampler, tokenizer, problems, _ = evaluate.start(c)
    line = heldout.evaluate(sampler, tokenizer, problems, Config(max_new_tokens=8, eval_samples=4))
    assert line["eval_greedy"] == pytest.approx(first["strict"]["greedy"]["mean"])
    assert line["eval_pass@1"] == pytest.approx(first["strict"]["pass@1"]["mean"])
    assert line["eval_length"] == pytest.approx(first["sampled"]["completion_length"])


def test_top_k_of_one_is_greedy(folder, tmp_path):
    result = run(folder, tmp_path, "--top-k", 1, "--samples", 2)
    assert all(p["c"] == 2 * p["greedy_correct"] for p in result["problems"])


def test_one_sample_and_one_problem(folder, tmp_path, capsys):
    result = run(folder, tmp_path, "--samples", 1, "--limit", 1)
    assert list(result["strict"]) == ["greedy", "avg@1", "pass@1"]
    assert result["strict"]["greedy"]["se"] is None
    assert "greedy" in capsys.readouterr().out


def test_every_completion_cut_is_said(folder, capsys):
    evaluate.main(options(folder, "--max-new-tokens", 1, "--limit", 3))
    assert "every completion was cut at --max-new-tokens 1" in capsys.readouterr().err


def test_the_built_in_task_from_a_shell(folder, tmp_path):
    """As a user types it: the table on stdout, the bar on stderr, the same numbers in the file."""
    arguments = options(folder, "--data", "arithmetic", "--limit", 3, "--samples", 2,
                        "--json", tmp_path / "a.json")
    command = [sys.executable, str(HERE / "evaluate.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    lines = done.stdout.splitlines()
    assert result["num_problems"] == 3 and "3 problems" in lines[0] and "completions" in done.stderr
    shown = {line.split()[0]: line.split()[1] for line in lines[2:2 + len(result["strict"])]}
    for name, cell in result["strict"].items():
        assert shown[name] == f"{cell['mean']:.4f}"
    assert list(result["config"]) == [f.name for f in fields(evaluate.EvalConfig)]


def test_a_table_that_fails_costs_no_numbers(folder, tmp_path, capsys, monkeypatch):
    """The file is written all the same; without a file the failure is an error."""
    def fail(result):
        raise ValueError("cannot encode")

    monkeypatch.setattr(evaluate, "table", fail)
    arguments = options(folder, "--limit", 2)
    evaluate.main([*arguments, "--json", str(tmp_path / "a.json")])
    assert json.loads((tmp_path / "a.json").read_text())["num_problems"] == 2
    assert "warning: the table was not printed (cannot encode)" in capsys.readouterr().err
    assert "cannot encode" in fails(capsys, arguments)


# ---------------------------------------------------------------------------------------- bad input

def fails(capsys, arguments):
    """The one line of a refused command; nothing on stdout, no traceback."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    captured = capsys.readouterr()
    line = stop.value.code if isinstance(stop.value.code, str) else captured.err.splitlines()[-1]
    assert stop.value.code not in (0, None) and not captured.out and "\n" not in line
    return line


@pytest.mark.parametrize("option, value, message", [
    ("--samples", 0, "--samples 0: must be at least 1"),
    ("--samples", "x", "invalid int value"),
    ("--limit", -1, "--limit -1: must be at least 0"),
    ("--temperature", 0, "--temperature 0.0: must be above 0"),
    ("--temperature", "nan", "--temperature nan: must be a finite number"),
    ("--top-p", 0, "--top-p 0.0: must be above 0"),
    ("--template", "fancy", "choose auto, chat"),
    ("--template", "chat", "no chat template"),
    ("--dtype", "float8", "choose float32"),
    ("--device", "tpu", "choose cpu"),
    ("--levels", "4", "such as 4-6"),
    ("--sample", 4, "unrecognized arguments: --sample"),
    ("--model", "", "give --model"),
    ("--model", "./absent", "neither a checkpoint folder nor a hub id"),
    ("--data", "absent.jsonl", "absent.jsonl: no such file"),
    ("--json", "absent/folder/a.json", "does not exist"),
    ("--json", "absent/", "is the name of a folder"),
    ("--max-prompt-tokens", 1, "no problem is left"),
    ("--max-new-tokens", 5000, "lower --max-new-tokens"),
])
def test_bad_options(folder, capsys, option, value, message):
    assert message in fails(capsys, options(folder, option, value))


def test_bad_files(folder, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": \n')
    assert "broken.jsonl:2: " in fails(capsys, options(folder, "--data", tmp_path / "broken.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no problems" in fails(capsys, options(folder, "--data", tmp_path / "empty.jsonl"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    assert "no weights" in fails(capsys, options(folder, "--model", tmp_path / "bare"))
    weights = (folder / "model" / "model.safetensors").read_bytes()
    (tmp_path / "bare" / "model.safetensors").write_bytes(weights)
    # no tokenizer
    assert fails(capsys, options(folder, "--model", tmp_path / "bare")).startswith("error: ")


def test_a_result_is_never_overwritten(folder, tmp_path, capsys):
    (tmp_path / "old.json").write_text("precious")
    assert "already exists" in fails(capsys, options(folder, "--json", tmp_path / "old.json"))
    assert (tmp_path / "old.json").read_text() == "precious"


# ------------------------------------------------------------------------------ stopped, and on ranks

class Stop(Exception):
    pass


def test_an_evaluation_that_was_stopped_goes_on(folder, tmp_path, monkeypatch):
    """After two of the batches it is killed; the second start draws the rest only, and gives the same result.

    Its name has signs that a search for files reads otherwise."""
    monkeypatch.setattr(evaluate, "FIRST_BATCH", 4)
    monkeypatch.setattr(evaluate, "BATCH_SECONDS", 0.0)
    whole = run(folder, tmp_path / "whole")
    drawn, real = [], evaluate.draw_groups

    def counted(sampler, tokenizer, problems, *args, **named):
        if len(drawn) == 2:
            raise Stop
        drawn.append(len(problems))
        return real(sampler, tokenizer, problems, *args, **named)

    monkeypatch.setattr(evaluate, "draw_groups", counted)
    (tmp_path / "b").mkdir()
    arguments = options(folder, "--json", tmp_path / "b" / "a[1].json")
    with pytest.raises(Stop):
        evaluate.main(arguments)
    part = tmp_path / "b" / ".a[1].json.part-0"
    before = part.read_text()
    part.write_text(before + '{"kind": "gre')           # a crash cuts the last line
    drawn.clear()
    drawn.append(0)

    def rest(sampler, tokenizer, problems, samples, *args, **named):
        drawn.append(len(problems) * samples)
        return real(sampler, tokenizer, problems, samples, *args, **named)

    monkeypatch.setattr(evaluate, "draw_groups", rest)
    evaluate.main(arguments)
    result = json.loads((tmp_path / "b" / "a[1].json").read_text())
    kept = before.count('"kind"')
    assert kept and sum(drawn) < 5 * result["num_problems"] and not part.exists()
    for name in ("strict", "lenient", "problems"):
        assert result[name] == whole[name]


def test_what_drew_nothing_now_has_no_speed(folder, tmp_path):
    """All rows of it were kept. Two completions of 2 and 4 tokens, one of them cut; 6 tokens in 2 seconds are 3 a second."""
    rows = [{"lengths": [2, 4], "cut": [False, True]}]
    about = {"completion_length": 3.0, "truncated_frac": 0.5}
    assert evaluate.statistics(evaluate.EvalConfig(), rows, (6, 2.0)) == {**about, "tokens_per_s": 3.0}
    assert evaluate.statistics(evaluate.EvalConfig(), rows, (0, 2.0)) == {**about, "tokens_per_s": None}

    evaluate.main(options(folder, "--limit", 2, "--json", tmp_path / "a.json"))
    result = json.loads((tmp_path / "a.json").read_text())
    result["greedy"]["tokens_per_s"] = None
    assert re.fullmatch(r"tokens_per_s +- +\d+", evaluate.table(result).splitlines()[-1])


def test_a_part_of_another_evaluation_is_refused(folder, tmp_path, capsys):
    (tmp_path / ".a.json.part-0").write_text('[{"model": "another"}, ""]\n')
    assert "is a part of another evaluation" in fails(capsys, options(folder, "--json", tmp_path / "a.json"))


def test_the_same_completions_at_a_smaller_limit(folder, tmp_path):
    """Cut at 3 tokens, graded again: as an evaluation with that limit."""
    long = run(folder, tmp_path / "long", "--also-at", 3)
    short = run(folder, tmp_path / "short", "--max-new-tokens", 3)
    assert long["strict_at_3"] == short["strict"] and long["lenient_at_3"] == short["lenient"]
    for name in ("greedy_correct", "c", "greedy_correct_lenient", "c_lenient"):
        assert [p[f"{name}_at_3"] for p in long["problems"]] == [p[name] for p in short["problems"]]


def test_it_must_be_smaller(folder, capsys):
    assert "--also-at 8: must be below --max-new-tokens 8" in fails(capsys, options(folder, "--also-at", 8))


@pytest.mark.slow
def test_ranks_give_the_result_of_one_process(folder, tmp_path):
    (tmp_path / "one").mkdir(), (tmp_path / "three").mkdir()
    evaluate.main(options(folder, "--json", tmp_path / "one" / "a.json"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(HERE / "evaluate.py"),
               *options(folder, "--json", tmp_path / "three" / "a.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    one, three = (json.loads((tmp_path / name / "a.json").read_text()) for name in ("one", "three"))
    for name in ("strict", "lenient", "problems", "num_problems"):
        assert one[name] == three[name]
    assert done.stdout.count("problems, 4 samples") == 1 and len(list((tmp_path / "three").iterdir())) == 1


def test_merged_weights_are_known_by_the_adapter_beside_them(tmp_path, monkeypatch):
    """train.py writes RUN/model and RUN/adapter, sft.py FOLDER and FOLDER/adapter; an adapter has nothing merged."""
    for place in ("run/model", "run/adapter", "sft/adapter", "plain/model", "other/model/adapter"):
        (tmp_path / place).mkdir(parents=True)
        if place.endswith("adapter"):
            (tmp_path / place / "adapter_config.json").write_text("{}")
    for place, merged in (("run/model", True), ("sft", True), ("run/adapter", False), ("plain/model", False), ("sft/adapter", False),
                          ("other/model", True)):
        assert policies.is_merged(tmp_path / place) is merged is policies.is_merged(str(tmp_path / place))

    # a model that was set aside, a link, and the folder that one is in
    (tmp_path / "run" / "model-at-3").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run" / "model")
    assert policies.is_merged(tmp_path / "run" / "model-at-3") and policies.is_merged(tmp_path / "link")
    monkeypatch.chdir(tmp_path / "run" / "model")
    assert policies.is_merged(".")


def test_an_adapter_is_evaluated_on_its_base(folder, tmp_path):
    import lora
    from model import Transformer
    model = lora.attach(Transformer.from_pretrained(folder / "model"), 4)
    lora.save_adapter(model, tmp_path / "adapter", base=folder / "model")
    plain, live = run(folder, tmp_path / "a"), run(folder, tmp_path / "b", "--model", tmp_path / "adapter")
    assert plain["problems"] == live["problems"]

    # where the base is gone, the line says where it is named; and training takes no adapter alone
    lora.save_adapter(model, tmp_path / "adapter", base=tmp_path / "gone")
    with pytest.raises(ValueError, match="adapter_config.json names .*gone as its base_model_name_or_path: .*; mend it there"):
        evaluate.load_model(tmp_path / "adapter", torch.device("cpu"), torch.float32)
    with pytest.raises(FileNotFoundError, match="holds an adapter alone; give that of the merged model"):
        Transformer.from_pretrained(tmp_path / "adapter")


# ------------------------------------------------------------------- tasks, levels, perturbed puzzles

def graded(right):
    """Grades of one problem's completions, strict ones only."""
    return {"grades": {"strict": {"right": right, "labels": [0] * len(right)}}}


def test_each_task_and_level_by_hand():
    problems = [{"task": "a", "level": 1}, {"task": "a", "level": 2}, {"task": "b", "level": None}, {"task": "a", "level": 1}]
    greedy = [graded([True]), graded([False]), graded([True]), graded([False])]
    sampled = [graded([True, True]), graded([True, False]), graded([False, False]), graded([True, False])]
    kinds = evaluate.by_kind(problems, greedy, sampled)
    found = {name: (cell["problems"], cell["greedy"]["mean"], cell["avg@2"]["mean"]) for name, cell in kinds.items()}
    assert found == {"a:1": (2, 0.5, 0.75), "a:2": (1, 0.0, 0.5), "b": (1, 1.0, 0.0), "a": (3, 1 / 3, 2 / 3)}
    assert evaluate.by_kind(problems[2:3], greedy[2:3], sampled[2:3]) == {}


def test_memorisation_by_hand():
    """Four problems, three solved, one of the three also when changed: LiMem = 3/4 (1 - 1/3). The fifth lost its other half."""
    ids = [("p", True, True), ("q", True, False), ("r", True, False), ("s", False, True)]
    problems, greedy = [], []
    for name, original, changed in ids:
        problems += [{"id": name}, {"id": name + "/perturbed", "perturbs": name}]
        greedy += [graded([original]), graded([changed])]
    problems += [{"id": "t"}, {"id": "u/perturbed", "perturbs": "u"}]
    greedy += [graded([True]), graded([True])]
    found = evaluate.memorisation(problems, greedy)
    assert found == {"problems": 4, "accuracy": 0.75, "accuracy_perturbed": 0.5, "consistency": pytest.approx(1 / 3),
                     "LiMem": pytest.approx(0.5)}
    none = evaluate.memorisation(problems[6:8], greedy[6:8])
    assert none["consistency"] is None and none["LiMem"] == 0
    nothing = evaluate.memorisation(problems[8:], greedy[8:])
    assert nothing == {"problems": 0, "accuracy": 0.0, "accuracy_perturbed": 0.0, "consistency": None, "LiMem": 0.0}


def test_a_mix_is_evaluated_by_kind_and_its_changed_puzzles_too(folder, tmp_path, capsys):
    out = tmp_path / "e.json"
    evaluate.main(["--model", str(folder / "model"), "--data", "arithmetic:2-3,truth:2@2", "--limit", "12", "--samples", "2",
                   "--max-new-tokens", "8", "--threads", "1", "--perturb", "--train-seed", "3", "--json", str(out)])
    result = json.loads(out.read_text())
    assert 4 <= result["memorisation"]["problems"] <= 12 and result["num_problems"] == result["memorisation"]["problems"]
    assert set(result["kinds"]) <= {"arithmetic:2", "arithmetic:3", "truth:2", "arithmetic", "truth"}
    assert sum(result["kinds"][task]["problems"] for task in ("arithmetic", "truth")) == result["num_problems"]
    # a changed puzzle is in no mean: it would count its original twice
    assert len(result["problems"]) == result["num_problems"] and not any("perturbed" in p["id"] for p in result["problems"])
    assert result["strict"]["greedy"]["mean"] == result["memorisation"]["accuracy"]
    said = capsys.readouterr().out
    assert "truth:2 " in said and "LiMem" in said
    assert result["problems"][0]["id"].startswith("arithmetic/train/3/")


def test_problems_of_a_file_cannot_be_changed(folder, capsys):
    with pytest.raises(SystemExit, match="cannot be changed; choose of arithmetic"):
        evaluate.main(["--model", str(folder / "model"), "--data", str(folder / "problems.jsonl"), "--perturb"])


def test_puzzles_without_a_held_out_neighbour_are_one_line(folder, monkeypatch):
    monkeypatch.setattr(evaluate.tasks, "perturbed", lambda problem: None)
    with pytest.raises(SystemExit, match="none of these 5 problems has a held-out puzzle as its neighbour"):
        evaluate.main(["--model", str(folder / "model"), "--data", "truth:2", "--limit", "5", "--perturb"])


def test_whoever_measures_on_the_file_that_a_model_was_trained_on_is_told(folder, tmp_path, monkeypatch, capsys):
    """The run held some out of it, and evaluate.py takes all; another file with the same problems says nothing."""
    trained = folder / "problems.jsonl"
    for data in (str(trained), "arithmetic:2-3", ""):
        monkeypatch.setattr(evaluate.prompts, "settings_of_run", lambda model: {"data": data, "template": "plain"})
        run(folder, tmp_path / "e", "--limit", 2, "--samples", 1)
        assert ("problems.jsonl is what" in capsys.readouterr().err) == (data == str(trained))


def test_a_file_of_a_mix_that_a_model_was_trained_on_is_told_too(folder, tmp_path, monkeypatch, capsys):
    trained = folder / "problems.jsonl"
    monkeypatch.setattr(evaluate.prompts, "settings_of_run", lambda model: {"data": f"{trained},boolean:1-2", "template": "plain"})
    run(folder, tmp_path / "e", "--limit", 2, "--samples", 1)
    assert "problems.jsonl is what" in capsys.readouterr().err


def test_who_asks_for_the_problems_of_training_hears_where_the_run_had_others(monkeypatch, capsys):
    """Other levels, another seed and a curriculum; what the run held out of its file is left out as well."""
    was = {"algo": "grpo", "data": "arithmetic", "levels": "2-3", "seed": 7, "curriculum": "uniform", "eval_problems": 200}
    monkeypatch.setattr(evaluate.prompts, "settings_of_run", lambda model: was)
    evaluate.load_problems(evaluate.EvalConfig(model="m", data="arithmetic", train_seed=0, limit=3))
    said = capsys.readouterr().err
    assert "trained with --levels 2-3, not empty" in said and "--seed 7, not 0" in said and "--curriculum uniform, not empty" in said
    was |= {"seed": 0, "curriculum": ""}
    evaluate.load_problems(evaluate.EvalConfig(model="m", data="arithmetic", levels="2-3", train_seed=0, limit=3))
    evaluate.load_problems(evaluate.EvalConfig(model="m", data="arithmetic", limit=3))
    assert capsys.readouterr().err == ""


def test_a_file_is_the_run_s_by_whatever_path_and_a_part_of_its_mix_is_not(tmp_path, monkeypatch, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(30)))
    monkeypatch.chdir(tmp_path)
    for data, other in ((str(file), False), (f"{file},boolean:1-2", True)):
        was = {"algo": "grpo", "data": data, "seed": 0, "eval_problems": 4}
        monkeypatch.setattr(evaluate.prompts, "settings_of_run", lambda model: was)
        evaluate.load_problems(evaluate.EvalConfig(model="m", data="p.jsonl", train_seed=0))
        assert ("was trained with --data" in capsys.readouterr().err) == other


def test_as_many_are_left_out_as_the_run_held_out(tmp_path, monkeypatch):
    """Of 100 lines a tenth at most; of a run with 4 held out, 96 are of training."""
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(100)))
    for settings, count in (({}, 90), ({"algo": "grpo", "data": str(file), "seed": 0, "eval_problems": 4}, 96)):
        monkeypatch.setattr(evaluate.prompts, "settings_of_run", lambda model: settings)
        assert len(evaluate.load_problems(evaluate.EvalConfig(model="m", data=str(file), train_seed=0))) == count


def test_the_problems_of_a_run_are_those_that_it_takes_first():
    config = evaluate.EvalConfig(model="x", data="arithmetic:2-3", train_seed=4)
    train, _ = evaluate.data.load_split(evaluate.Config(data="arithmetic:2-3", seed=4))
    assert evaluate.trained_on(config, 40, {}) == evaluate.data.Stream(train, 4).next(40)
