"""Several runs side by side, worked by hand."""
import json
import math

import pytest

import report


def write(path, values, **more):
    """A log with one evaluation a step: step 0 at values[0], then a step of two seconds and eight samples each."""
    lines = [{"step": k, "eval_pass@1": v, **({"step_time": 2.0, "num_samples": 8 * k, **more} if k else {})}
             for k, v in enumerate(values)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_runs_that_differ_in_the_seed_are_one_line_with_their_standard_error(tmp_path, capsys):
    """Ends .4 and .8: mean .6, std .2828, standard error .2. Level .3 is crossed at 1 + 1/2 and at 3/4 steps of 8 samples."""
    write(tmp_path / "a-s0" / "log.jsonl", [0., .2, .4])
    write(tmp_path / "a-s1.jsonl", [0., .4, .8])
    write(tmp_path / "b-seed7.jsonl", [0., .1, .2])
    report.main([str(tmp_path / x) for x in ("a-s0", "a-s1.jsonl", "b-seed7.jsonl")] + ["--x", "num_samples", "--reach", ".3"])
    assert capsys.readouterr().out.splitlines() == [
        "| name | runs | eval_pass@1 | num_samples to 0.3 |", "| --- | --- | --- | --- |",
        "| a | 2 | 0.600 ± 0.200 | 9.000 ± 3.000 |", "| b | 1 | 0.200 | 0 of 1 runs |"]


def test_seconds_add_up_the_steps_and_a_level_met_at_the_start_costs_nothing(tmp_path):
    name, lines = report.read_log(write(tmp_path / "x-s3.jsonl", [.5, .5, .9]))
    assert name == "x" and report.curve(lines, "seconds", "eval_pass@1") == [(0, .5), (2, .5), (4, .9)]
    points = report.curve(lines, "seconds", "eval_pass@1")
    assert report.first_reach(points, .5) == 0 and report.first_reach(points, .8) == pytest.approx(3.5)
    assert report.first_reach(points, .95) is None
    mean, se = report.mean_se([3.])
    assert mean == 3 and math.isnan(se)


def test_curves_are_drawn_for_every_key_that_some_run_has(tmp_path):
    runs = [write(tmp_path / "a-s0.jsonl", [0., .2], ess=.9), write(tmp_path / "b-s0.jsonl", [0., .2, .3])]
    report.main([*map(str, runs), "--y", "eval_pass@1", "ess", "--png", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


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
