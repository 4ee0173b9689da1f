"""Rejection sampling: what is kept, equations that hold, a corpus that sft.py reads and that goes on after a crash."""
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import data
import rejection
import sft
from test_train import HERE, start         # start is a fixture


@pytest.mark.parametrize("text, pairs, hold", [
    ("48/2=24 and 24 + 48 = 72.", [("48/2", "24"), ("24+48", "72")], True),
    ("Natalia sold 48/2 = <<48/2=24>>24 clips", [("48/2", "24")], True),
    ("7+5=12\n12/2=5\n#### 5", [("7+5", "12"), ("12/2", "5")], False),
    ("x = 5 and 5 apples = 6", [], True),
    ("10/3 = 3.33", [("10/3", "3.33")], True),
    ("10/3 = 3.34", [("10/3", "3.34")], False),
    ("10/3 = 3", [("10/3", "3")], False),
    ("It is 5. 3 = 3", [], True),
    ("1/2 = 0.5 = 50%", [("1/2", "0.5"), ("0.5", "50%")], True),
    ("$1,000 * 2 = $2,000 so", [("1000*2", "2000")], True),
    ("3 × 4 = 12, 12 ÷ 4 = 3", [("3*4", "12"), ("12/4", "3")], True),
    ("=", [], True), ("2 == 2", [], True)])
def test_equations_by_hand(text, pairs, hold):
    assert rejection.equations(text) == pairs and rejection.steps_hold(text) is hold


@pytest.mark.parametrize("text, hold", [
    ('x + 3 = 7', True),
    ('3x + 2 = 8', True),
    ('x1 = 5', True),
    ('5 apples * 2 = 10 apples', True),
    ('$5 per hour * 3 = $15', True),
    ('20% of 50 = 10', True),
    ('2^3 = 8', True),
    ('3 x 4 = 12', True),
    ('10 mod 3 = 1', True),
    ('Day 2 = 14', True),
    ('half of 10 = 5', True),
    ('17 / 5 = 3 remainder 2', True),
    ('7 + 5 = 13%', False),
    ('5/20 = 25%', True),
    ('5/20*100 = 25%', True),
    ('- 3 + 4 = 7', True),
    ('- 3 + 4 = 8', False),
    ('a\n- 3 + 4 = 7\n* 3+4=8', False),
    ('-3 + 5 = 2', True),
    ('So 5*2 = 11', False),
    ('so 3 + 4 = 7. Then 7 + 1 = 9.', False),
    ('(3+4)*2 = 14', True),
    ('has 3+4=8 pens', False),
    ('3 * 4 = 12 = 13', False),
    ('3*4 = 12 = 6*2', True),
    ('\\(3 + 4 = 8\\)', False),
    ('$3 + 4 = 8$', False),
    ('**3 + 4 = 8**', False),
    ('3 \\times 4 = 12', True),
    ('2*3 = 6x', True),
    ('3*3 = 3^2', True),
    ('= 5', True),
    ('5 * 2000 = 10 thousand', True),
    ('The sum is 2+2=5!', True),
    ('(3+4=8)', False),
    ('(3+4=7)', True),
    ('2*(3+4)=14', True),
    ('2*(3+4)=15', False),
    ('x is .5*2 = 1', True),
    ('3/4 * 2 = 1 1/2 feet', True),
    ('2+2 = 5 cats', False),
    ('<<2+2=5>>5', False),
    ("sqrt 16 + 2 = 6", True), ("negative 3 + 5 = 2", True), ("ln 1 + 5 = 5", True), ("add 2 to 3 + 4 = 9", True),
    ("10:30 + 1 = 11:30", True), ("at 5 + 6 = 11:30", True), ("Step 1: 3+4 = 8", False), ("17 / 5 = 3 R2", True),
    ("\u221a(144) = 12", True), ("1.5 is 1/4 + 1 = 1.25 cups", True)])
def test_only_what_is_read_whole_is_judged(text, hold):
    assert rejection.steps_hold(text) is hold


@settings(deadline=None, max_examples=200)
@given(st.integers(-99, 99), st.integers(1, 99), st.sampled_from("+-*"), st.integers(-3, 3))
def test_an_equation_holds_when_it_is_true(a, b, sign, error):
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    assert rejection.steps_hold(f"so {a} {sign} {b} = {result + error} pens") is (error == 0)


@pytest.mark.parametrize("text", ["(" * 100_000 + "=1" * 5000, "1+" * 50_000 + "1=3", "1 " * 50_000 + "=3", "9" * 90_000 + "=" + "9" * 9000])
def test_hostile_texts_take_no_time(text):
    begin = time.process_time()
    rejection.steps_hold(text)
    assert time.process_time() - begin < 20          # it was two minutes with a pattern over the whole text


def test_what_is_kept_by_hand():
    """Eight samples, four right, two of them the same: ceil(4 (1 - 1/2)) = 2 of three."""
    texts, right = ["a", "b", "a  b", "a b", "c", "d", "e", "f"], [0, 1, 1, 1, 1, 0, 0, 0]
    assert rejection.kept(texts, right, 4) == ["b", "a  b"]
    assert rejection.kept(texts, [1] * 8, 4) == ["a"]                  # easy: one is enough
    assert rejection.kept(texts, [0] * 8, 4) == [] and rejection.kept([], [], 4) == []
    assert rejection.kept(texts, [0, 0, 0, 0, 0, 0, 0, 1], 4) == ["f"]
    assert rejection.kept(texts, right, 4, success=1.0) == ["b"]       # some of the right ones were filtered out


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=9), st.integers(1, 5))
def test_kept_ones_are_right_and_differ(samples, per_problem):
    texts, right = [t for t, _ in samples], [r for _, r in samples]
    chosen = rejection.kept(texts, right, per_problem)
    assert len(set(chosen)) == len(chosen) <= per_problem and set(chosen) <= {t for t, r in samples if r}
    assert bool(chosen) == any(right)


# ------------------------------------------------------------------------------------ the program

def options(start, out, *more):
    return ["--model", str(start), "--data", str(start.parent / "problems.jsonl"), "--out", str(out), "--samples", "4",
            "--problems", "30", "--batch", "8", "--max-new-tokens", "8", "--threads", "1", "--device", "cpu", *more]


def test_a_corpus_is_right_and_sft_reads_it(start, tmp_path, capsys):
    out = tmp_path / "corpus.jsonl"
    rejection.main(options(start, out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert 10 < len(rows) and all(row["solution"].startswith("#### ") and 0 < row["success"] <= 1 for row in rows)
    assert all(row["solution"].split()[1] == row["answer"] for row in rows)
    assert f"{len(rows)} solutions of" in capsys.readouterr().out and not list(tmp_path.glob(".*part*"))
    assert all(p["solution"] for p in data.load_problems(str(out)))
    sft.main(["--data", str(out), "--model", str(start), "--steps", "2", "--out", str(tmp_path / "next"), "--device", "cpu"])


def test_it_goes_on_where_it_was(start, tmp_path, monkeypatch):
    """Stopped in the third batch: the same command ends with the same corpus, and draws only what is left."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    rejection.main(options(start, whole))
    draw, calls = rejection.draw_groups, []

    def stops(*arguments):
        calls.append(len(arguments[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(rejection, "draw_groups", stops)
    with pytest.raises(SystemExit):
        rejection.main(options(start, cut))
    assert not cut.exists()
    with open(tmp_path / ".cut.jsonl.part-0", "a") as file:
        file.write('[17, [{"probl')             # as a crash leaves it
    with pytest.raises(SystemExit, match="a part of another corpus"):
        rejection.main(options(start, cut, "--seed", "5"))
    rejection.main(options(start, cut, "--batch", "5"))
    assert sum(calls[3:]) == 30 - 16 and cut.read_text().splitlines() == whole.read_text().splitlines()


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_corpus(start, tmp_path):
    rejection.main(options(start, tmp_path / "one.jsonl"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "rejection.py")]
    done = subprocess.run([*command, *options(start, tmp_path / "two.jsonl")], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()


@pytest.mark.parametrize("change, message", [
    (["--model", ""], "give --model"), (["--out", "X/y.jsonl"], "its folder does not exist"), (["--samples", "0"], "at least 1"),
    (["--max-prompt-tokens", "1"], "no problem is left")])
def test_wrong_settings_are_one_line(start, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        rejection.main(options(start, tmp_path / "c.jsonl", *change))


def test_nothing_right_is_said(start, tmp_path):
    file = tmp_path / "hard.jsonl"
    file.write_text('{"problem": "Which one?", "answer": "77"}')
    with pytest.raises(SystemExit, match="no completion of 1 problems was right"):
        rejection.main(options(start, tmp_path / "c.jsonl", "--data", str(file)))
    assert not list(tmp_path.glob("*c.jsonl*"))


def test_other_weights_in_the_same_folder_do_not_go_on(start, tmp_path, monkeypatch):
    """What one model drew never becomes a part of another's corpus."""
    model, out = tmp_path / "model", tmp_path / "c.jsonl"
    same = ["--data", str(start.parent / "problems.jsonl")]
    shutil.copytree(start, model)
    draw = rejection.draw_groups
    drawn = []

    def stops(*arguments):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(draw(*arguments))
        return drawn[0]

    monkeypatch.setattr(rejection, "draw_groups", stops)
    with pytest.raises(SystemExit):
        rejection.main(options(model, out, *same))
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, model / "model.safetensors")
    with pytest.raises(SystemExit, match="a part of another corpus"):
        rejection.main(options(model, out, *same))
