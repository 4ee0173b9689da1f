"""What a run writes, and several runs side by side, worked by hand."""
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import report
from engine.checkpoint import Progress
from rollout import Rollout


def write(path, values, **more):
    """Write a log with one evaluation a step; each step takes two seconds and eight samples."""
    lines = []
    for step, value in enumerate(values):
        line = {"step": step, "eval_pass@1": value}
        if step > 0:
            line |= {"step_time": 2.0, "num_samples": 8 * step, **more}
        lines.append(line)

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ------------------------------------------------------------------------------------------ one run

def lines_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_log_line_is_json_also_where_a_number_is_not_finite(tmp_path):
    report.write_line(tmp_path, {"step": 1, "loss": math.nan, "kl": math.inf, "reward": .5})
    report.write_line(tmp_path, {"step": 2, "gate": None})
    assert lines_of(tmp_path / "log.jsonl") == [
        {"step": 1, "loss": None, "kl": None, "reward": .5}, {"step": 2, "gate": None}]


def test_samples_are_the_first_completions_of_each_problem(tmp_path):
    problems = [{"problem": "1 + 1?", "answer": "2", "check": len},
                {"problem": "é?", "answer": "3"}]
    groups = [["a", "b", "c", "d", "e"], ["é"]]
    report.write_samples(tmp_path, 7, problems, groups, [[1., 0., 0., 0., 1.], [.5]])
    samples = lines_of(tmp_path / "samples.jsonl")
    assert [s["completion"] for s in samples] == ["a", "b", "c", "d", "é"]
    assert samples[4] == {
        "step": 7, "problem": "é?", "answer": "3", "completion": "é", "reward": .5}


def test_the_means_of_a_rollout_by_hand():
    """Two rounds of a group of two: rewards 1 0 and 1 1, completions of 1 2 and 3 4 tokens behind prompts of 2, one of them
    cut. The standard deviation within a group is that of its G rewards, 1/2 and 0."""
    def round_of(lengths, finished, rewards):
        rollout = Rollout(torch.zeros(2, 6, dtype=torch.int64), torch.full((2,), 2), torch.tensor(lengths),
                          torch.full((2, 6), -.25), torch.tensor(finished))
        rewards = torch.tensor([rewards])
        return SimpleNamespace(problems=[{}], rollout=rollout, rewards=rewards, parts={"correct": rewards - .5})

    learner = SimpleNamespace(config=SimpleNamespace(group_size=2), device=torch.device("cpu"),
                              progress=Progress(step=3, num_tokens=100, num_samples=8))
    drawn = [round_of([3, 4], [True, True], [1., 0.]), round_of([5, 6], [False, True], [1., 1.])]
    assert report.rollout_metrics(learner, drawn, 5.0) == pytest.approx({
        "step": 3, "reward": .75, "reward_std": .25, "frac_reward_zero_std": .5, "rewards/correct": .25,
        "completion_length": 2.5, "truncated_frac": .25, "terminated_length": 7 / 3, "num_tokens": 118, "num_samples": 12, "entropy": 24 * .25 / 10,
        "pass@G": 1, "rollout_time": 5, "rollout_tokens_per_s": 2})


def test_other_rewards_stand_apart_for_right_and_wrong_completions():
    """Form applies to 8 completions. 2 are right and earn 1.5 of it together, the 6 wrong ones 3; without a right one its mean
    is absent."""
    sums = {"rows/form": 8, "right rows/form": 2, "right/form": 1.5, "rewards/form": 4.5}
    assert report.apart(sums, ["form"]) == {"rewards/form/right": .75, "rewards/form/wrong": .5}
    assert report.apart({**sums, "right rows/form": 0, "right/form": 0}, ["form"]) == {"rewards/form/wrong": 4.5 / 8}
    assert report.apart(sums, []) == {}


@pytest.mark.parametrize("changes, expected", [
    ({"step": 1}, {"first": "first rollout: 25% of the prompts have"}),
    ({"step": 1, "pass@G": 0.}, {"first": "first rollout: 0% of", "never right": "warning: pass@G is 0"}),
    ({"pass@G": 0.}, {}),
    ({"truncated_frac": .2}, {}),
    ({"truncated_frac": .46}, {"cut": "warning: step 2: 46% of the completions were cut at --max-new-tokens 16"}),
    ({"truncated_frac": 1.}, {"all cut": "warning: step 2: every completion was cut at --max-new-tokens 16"}),
    ({"grad_norm": 0.}, {"no gradient": "warning: step 2: the gradient is 0, although"}),
    ({"grad_norm": 0., "frac_reward_zero_std": 1.}, {}),            # nothing to learn from
    ({"ess": .1, "ratio_max_dev": .009}, {}),
    ({"ess": .09}, {"old samples": "warning: step 2: ess is 0.09"}),
    ({"ratio_max_dev": .02}, {"disagree": "warning: step 2: ratio_max_dev is 0.02"}),
    ({"ratio_max_dev": .02, "exact": False}, {}),                   # rounding of bfloat16
    ({"ratio_mean_dev": .19, "ratio_max_dev": 3., "exact": False}, {}),
    ({"ratio_mean_dev": .21, "exact": False}, {"drawn otherwise": "warning: step 2: ratio_mean_dev is 0.21, more than rounding"}),
    ({"ratio_mean_dev": .21, "exact": False, "sync_every": 2}, {}),
    ({"ratio_max_dev": .02, "sync_every": 2}, {}),                  # drift
])
def test_what_a_beginner_should_see(changes, expected):
    line = {"step": 2, "pass@G": .25, "truncated_frac": .1, "frac_reward_zero_std": .5, "grad_norm": .3, **changes}
    config = SimpleNamespace(group_size=8, max_new_tokens=16, sync_every=line.pop("sync_every", 1))
    said = report.warnings_of(line, config, exact=line.pop("exact", True))
    assert said.keys() == expected.keys()
    for kind, start in expected.items():
        assert said[kind].startswith(start) and "\n" not in said[kind]


def test_a_warning_is_said_once_a_run():
    config, before = SimpleNamespace(group_size=8, max_new_tokens=16), set()
    line = {"step": 2, "truncated_frac": .5, "frac_reward_zero_std": 1.}
    assert len(report.new_warnings(line, config, torch.float32, before)) == 1
    assert report.new_warnings(line, config, torch.float32, before) == []
    assert len(report.new_warnings({**line, "ess": .01, "ratio_max_dev": 1.}, config, torch.bfloat16, before)) == 1


def test_the_curve_is_drawn_and_one_that_fails_is_a_warning(tmp_path, capsys):
    write(tmp_path / "log.jsonl", [0., .2])
    report.draw_curve(tmp_path)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == ""

    (tmp_path / "log.jsonl").write_text("{\n")
    report.draw_curve(tmp_path)
    report.draw_curve(tmp_path / "absent")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(x.startswith("warning: curve.png was not drawn") for x in said)


# ------------------------------------------------------------------------------------- several runs

def test_runs_that_differ_in_the_seed_are_one_line_with_their_standard_error(tmp_path, capsys):
    """Ends .4 and .8: mean .6, std .2828, standard error .2.

    Level .3 is crossed at 1 + 1/2 and at 3/4 steps of 8 samples."""
    write(tmp_path / "a-s0" / "log.jsonl", [0., .2, .4])
    write(tmp_path / "a-s1.jsonl", [0., .4, .8])
    write(tmp_path / "b-seed7.jsonl", [0., .1, .2])
    runs = [str(tmp_path / name) for name in ("a-s0", "a-s1.jsonl", "b-seed7.jsonl")]
    report.main([*runs, "--x", "num_samples", "--reach", ".3"])
    assert capsys.readouterr().out.splitlines() == [
        "| name | runs | eval_pass@1 | num_samples to 0.3 |", "| --- | --- | --- | --- |",
        "| a | 2 | 0.600 ± 0.200 | 9.000 ± 3.000 |", "| b | 1 | 0.200 | 0 of 1 runs |"]


def test_seconds_add_up_the_steps_and_a_level_met_at_the_start_costs_nothing(tmp_path):
    name, lines = report.read_log(write(tmp_path / "x-s3.jsonl", [.5, .5, .9]))
    points = report.curve(lines, "seconds", "eval_pass@1")
    assert name == "x" and points == [(0, .5), (2, .5), (4, .9)]
    assert report.first_reach(points, .5) == 0
    assert report.first_reach(points, .8) == pytest.approx(3.5)
    assert report.first_reach(points, .95) is None
    mean, se = report.mean_se([3.])
    assert mean == 3 and math.isnan(se)


def test_curves_are_drawn_for_every_key_that_some_run_has(tmp_path):
    runs = [write(tmp_path / "a-s0.jsonl", [0., .2], ess=.9),
            write(tmp_path / "b-s0.jsonl", [0., .2, .3])]
    report.main([*map(str, runs), "--y", "eval_pass@1", "ess", "--png", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_different_folders_are_no_seeds_of_each_other(tmp_path, capsys):
    """And where the names differ, no folder is named."""
    for folder, end in (("x", .2), ("y", .6)):
        write(tmp_path / folder / "run-s0" / "log.jsonl", [0., end])
        write(tmp_path / folder / "run-s1" / "log.jsonl", [0., end])
    write(tmp_path / "y" / "other.jsonl", [0., 1.])
    (tmp_path / "y" / "run-s1.txt").write_text("what a study writes beside its runs")
    report.main([str(tmp_path / name) for name in
                 ("x/run-s0", "x/run-s1/log.jsonl", "y/run-s0", "y/run-s1", "y/run-s1.txt", "y/other.jsonl")])
    said = capsys.readouterr()
    assert said.out.splitlines()[2:] == ["| x/run | 2 | 0.200 ± 0.000 |", "| y/run | 2 | 0.600 ± 0.000 |",
                                         "| other | 1 | 1.000 |"]
    assert said.err == ""


def test_a_run_that_is_given_twice_is_named(tmp_path):
    write(tmp_path / "a" / "log.jsonl", [0., .2])
    with pytest.raises(SystemExit, match="a is given twice"):
        report.main([str(tmp_path / "a"), str(tmp_path / "a" / "log.jsonl")])


def test_seeds_that_end_at_different_steps_are_said(tmp_path, capsys):
    write(tmp_path / "a-s0.jsonl", [0., .2, .8])
    write(tmp_path / "a-s1.jsonl", [0., .2])
    report.main([str(tmp_path / "a-s0.jsonl"), str(tmp_path / "a-s1.jsonl")])
    assert "warning: runs of a end at steps 1, 2" in capsys.readouterr().err


def test_the_log_of_sft_keeps_its_own_seconds_and_has_no_samples(tmp_path):
    file = tmp_path / "warm.jsonl"
    file.write_text('{"step": 1, "loss": 6.0, "seconds": 2.5}\n{"step": 2, "loss": "x", "seconds": 4}\n'
                    '{"step": 3, "loss": 3.0, "seconds": 5, "step_time": null}\n')
    _, lines = report.read_log(file)
    assert report.curve(lines, "seconds", "loss") == [(2.5, 6.0), (5, 3.0)]
    with pytest.raises(SystemExit, match="no line with both num_samples and loss"):
        report.main([str(file), "--x", "num_samples", "--y", "loss"])


# ---------------------------------------------------------------------------- several evaluations

def write_evaluation(path, temperature=1.0, **columns):
    """A result of evaluate.py with one problem an entry of the columns, b before a for the second."""
    entries = [dict(zip(columns, values)) for values in zip(*columns.values())]
    path.write_text(json.dumps({"problems": entries, "config": {"temperature": temperature}}))
    return str(path)


def test_evaluations_are_paired_by_problem_by_hand(tmp_path, capsys):
    """On a, b, c: greedy 1, 0, 0 and 1, 1, 0; samples 2/2, 0, 0 and 4/4, 2/4, 2/4.

    The gaps are 0, 1, 0 (mean 1/3, error sqrt(1/3) / sqrt 3 = 1/3) and 0, 1/2, 1/2 (mean 1/3, error
    sqrt(1/12) / sqrt 3 = 1/6), though the errors of the means are .333 and .333, .333 and .167. d is
    in one file only, and what only one file has measured is left out."""
    before = write_evaluation(
        tmp_path / "before.json", id=["a", "b", "c"], n=[2, 2, 2], greedy_correct=[True, False, False],
        c=[2, 0, 0], greedy_correct_lenient_at_320=[True, True, False], c_lenient_at_320=[2, 2, 0],
        greedy_correct_at_9=[True] * 3, c_at_9=[1] * 3)
    after = write_evaluation(
        tmp_path / "after.json", id=["c", "d", "b", "a"], n=[4] * 4, greedy_correct=[False, True, True, True],
        c=[2, 4, 2, 4], greedy_correct_lenient_at_320=[False, True, True, True], c_lenient_at_320=[0, 4, 4, 4])
    report.main([before, after])
    assert capsys.readouterr().out.splitlines() == [
        f"| 3 problems | {before} | {after} | minus the first |", "| --- | --- | --- | --- |",
        "| greedy | 0.333 ± 0.333 | 0.667 ± 0.333 | 0.333 ± 0.333 |",
        "| pass@1 | 0.333 ± 0.333 | 0.667 ± 0.167 | 0.333 ± 0.167 |",
        "| greedy, lenient at 320 | 0.667 ± 0.333 | 0.667 ± 0.333 | 0.000 ± 0.000 |",
        "| pass@1, lenient at 320 | 0.667 ± 0.333 | 0.667 ± 0.333 | 0.000 ± 0.000 |"]


def test_pass_at_k_is_compared_where_both_drew_as_many_by_hand(tmp_path, capsys):
    """One right of two is a pass: 1, 0, 0 and 1, 1, 0, so the gaps are 0, 1, 0 (mean 1/3, error 1/3)."""
    same = dict(id=["a", "b", "c"], n=[2, 2, 2], greedy_correct=[True] * 3)
    report.main([write_evaluation(tmp_path / "a.json", c=[1, 0, 0], **same), write_evaluation(tmp_path / "b.json", c=[2, 1, 0], **same)])
    assert "| pass@2 | 0.333 ± 0.333 | 0.667 ± 0.333 | 0.333 ± 0.333 |" in capsys.readouterr().out.splitlines()


def test_problems_with_one_id_that_differ_are_no_pair_and_other_settings_are_said(tmp_path, capsys):
    """Puzzles of level 2 and 4 share ids; a test file may have lost a line between two evaluations."""
    def file(name, sums, temperature):
        return write_evaluation(tmp_path / name, temperature, id=["x", "y"], checksum=sums, n=[1, 1], greedy_correct=[True, False],
                                c=[1, 0])
    report.main([file("a.json", ["1", "2"], 1.0), file("b.json", ["1", "3"], 0.7)])
    said = capsys.readouterr()
    assert said.out.startswith("| 1 problems |")
    assert said.err == "warning: the evaluations differ in --temperature: 1.0, 0.7\n"
    with pytest.raises(SystemExit, match="no problem is in all of"):
        report.main([file("a.json", ["1", "2"], 1.0), file("c.json", ["2", "1"], 1.0)])


def test_evaluations_that_cannot_be_compared_are_one_line(tmp_path):
    one = write_evaluation(tmp_path / "a.json", id=["x"], n=[1], greedy_correct=[True], c=[1])
    other = write_evaluation(tmp_path / "b.json", id=["y"], n=[1], greedy_correct=[True], c=[1])
    two = write_evaluation(tmp_path / "two.json", id=["x"], n=[1], greedy_correct=[True], c=[1])
    (tmp_path / "c.json").write_text('{"problems": [1]}')
    twice = write_evaluation(tmp_path / "f.json", id=[None, None], n=[1, 1], greedy_correct=[True, False], c=[1, 0])
    for files, message in (([one, other], "no problem is in all of"),
                           ([one, twice], "several problems have one id"), ([one, two, "--png", "p.png"], "no curve"),
                           ([one, one], "given twice"), ([one, str(tmp_path / ".." / tmp_path.name / "a.json")], "given twice"),
                           ([str(tmp_path / "c.json")], "c.json is no result of evaluate.py --json"),
                           ([str(tmp_path / "d.json")], "No such file")):
        with pytest.raises(SystemExit, match=message) as stop:
            report.main(files)
        assert "\n" not in str(stop.value)


@pytest.mark.parametrize("content, message", [
    ("", "is empty"), ("{", "is not a log of train.py"), ("[1]\n", "is not a log of train.py"),
    ('{"step": 0}\n', "no line with both"), (None, "No such file")])
def test_bad_input_is_one_line(content, message, tmp_path):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        report.main([str(path)])
    assert message in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("change", [
    {"problems": [{"id": "x", "greedy_correct": True, "c": 1}]}, {"problems": [{"id": "x", "n": 1, "greedy_correct": True}]},
    {"problems": [{"id": "x", "n": 0, "greedy_correct": True, "c": 0}]}, {"problems": [{"id": "x", "n": 1, "greedy_correct": True, "c": None}]},
    {"problems": [{"id": ["x"], "n": 1}]}, {"problems": None}, {"config": None}, {"config": [1]}])
def test_a_damaged_evaluation_is_one_line(change, tmp_path):
    good = write_evaluation(tmp_path / "a.json", id=["x"], n=[1], greedy_correct=[True], c=[1])
    (tmp_path / "b.json").write_text(json.dumps({**json.loads(Path(good).read_text()), **change}))
    with pytest.raises(SystemExit, match="b.json is no result of evaluate.py --json: ") as stop:
        report.main([good, str(tmp_path / "b.json")])
    assert "\n" not in str(stop.value)


def test_settings_that_are_lists_are_compared_too(tmp_path, capsys):
    files = [write_evaluation(tmp_path / f"{t}.json", [t], id=["x"], n=[1], greedy_correct=[True], c=[1]) for t in (1, 2)]
    report.main(files)
    assert "differ in --temperature: [1], [2]" in capsys.readouterr().err


def test_a_rate_of_runs_that_share_it_has_its_digits():
    assert report.cell_text((1e-6, math.nan)) == "1e-06" and report.cell_text((2e-4, 0.0)) == "0.0002"
    assert report.cell_text((0.002, 0.001)) == "0.002 ± 0.001" and report.cell_text((0.0, math.nan)) == "0.000"


def test_a_tensorboard_that_fails_ends_nothing(tmp_path, monkeypatch, capsys):
    """The lines of the log are whole, and it is said once."""
    class SummaryWriter:
        def __init__(self, folder, purge_step):
            pass

        def add_scalar(self, *args):
            raise OSError("no space left")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    for step in (1, 2):
        report.write_line(tmp_path, {"step": step, "loss": .5}, "tensorboard")
    assert [line["step"] for line in lines_of(tmp_path / "log.jsonl")] == [1, 2]
    assert capsys.readouterr().err.count("TensorBoard gets no more lines (no space left)") == 1


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path, monkeypatch):
    """By a stand-in for torch's SummaryWriter, which needs the package tensorboard."""
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def flush(self):
            seen.append("flush")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    report.write_line(tmp_path, {"step": 3, "loss": .5}, "tensorboard")
    report.write_line(tmp_path, {"step": 4, "loss": .25}, "tensorboard")
    assert seen == [(tmp_path / "tensorboard", 3), ("step", 3, 3), ("loss", .5, 3), "flush", ("step", 4, 4), ("loss", .25, 4), "flush"]
    assert [line["loss"] for line in lines_of(tmp_path / "log.jsonl")] == [.5, .25]


def test_tensorboard_itself_reads_the_numbers_back(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step in (3, 4):
        report.write_line(tmp_path, {"step": step, "loss": step / 8, "eval_pass@1/truth:2": .5, "rewards/form": -.25}, "tensorboard")
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["eval_pass@1/truth:2", "loss", "rewards/form", "step"]
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(3, 3 / 8), (4, 4 / 8)]


def test_tensorboard_that_is_not_installed_is_one_line(monkeypatch):
    import config
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--log-to tensorboard: pip install tensorboard"):
        config.parse(["--log-to", "tensorboard"])
