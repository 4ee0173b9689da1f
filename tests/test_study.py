"""Studies: every command parses, tables by hand, a killed study goes on."""
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import config
import report
import sft
import study
import theory
from studies import MEASURES, STUDIES, Study
from study import StudyConfig
from test_train import HERE


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", STUDIES)
def test_every_command_is_one_that_its_program_takes(name, quick, tmp_path):
    made = STUDIES[name](StudyConfig(quick=quick, base=str(tmp_path)))
    assert made.runs and made.starts
    for flags in made.starts.values():
        sft.parse([*map(str, flags), "--out", str(tmp_path / "out")])
    for flags in made.runs.values():
        flags = list(map(str, flags))
        assert flags[flags.index("--model") + 1].removeprefix("START/") in made.starts
        config.parse([*flags, "--out", str(tmp_path / "out")])


def test_lines_over_a_number_name_runs_that_there_are():
    """And the number is the run's own: at N = 16 the scaled learning rate is the usual one."""
    for name, flag in (("group-size", "--group-size"), ("batch-size", "--prompts-per-step")):
        for quick in (False, True):
            made = STUDIES[name](StudyConfig(quick=quick))
            for line, members in made.ends[1].items():
                assert len(members) >= 2 or line == "lr 2e-4"
                for number, run in members.items():
                    flags = list(map(str, made.runs[run]))
                    assert flags[len(flags) - 1 - flags[::-1].index(flag) + 1] == str(number)
    scaled = STUDIES["batch-size"](StudyConfig()).ends[1]["lr * sqrt(N / 16)"]
    assert scaled == {4: "N4-scaled", 16: "N16", 64: "N64-scaled", 128: "N128-scaled"}


def test_an_equal_start_of_another_study_is_copied_and_another_one_is_not(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(study, "call", lambda command, *a, **k: (made.append(command), Path(command[-3]).mkdir(parents=True)))
    for name, flags in (("one", ["--steps", 3]), ("two", ["--steps", 3]), ("three", ["--steps", 4])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which.json").write_text(json.dumps({"start weak": shlex.join(map(str, flags))}))
        study.make_start(tmp_path / name, "weak", flags, 1, [tmp_path / other for other in ("one", "two", "three", "none")])
        assert (tmp_path / name / "start" / "weak").is_dir()
    assert [command[2] for command in made] == ["3", "4"]


def test_fixed_budgets_are_fixed():
    """Group sizes share 128 completions a step; batch sizes 1,536 prompts a run."""
    def value(flags, name):
        return float(flags[len(flags) - 1 - flags[::-1].index(name) + 1])
    for flags in STUDIES["group-size"](StudyConfig()).runs.values():
        assert value(flags, "--group-size") * value(flags, "--prompts-per-step") == 128
    for flags in STUDIES["batch-size"](StudyConfig()).runs.values():
        assert value(flags, "--prompts-per-step") * value(flags, "--steps") == 1536


def test_the_table_by_hand():
    """a ends at .5 and .7, b at .6 and .9: the paired difference is .15 with standard error .05."""
    made = Study({}, {"a": ["--x"], "b": ["--y"]})
    ends = {("a", 0): .5, ("a", 1): .7, ("b", 0): .6, ("b", 1): .9}
    logs = {item: [{"step": 0, "eval_pass@1": .2, "seconds": 0}, {"step": 1, "reward": 1},
                   {"step": 2, "eval_pass@1": end, "num_samples": 10, "seconds": 3}] for item, end in ends.items()}
    runs = study.summary(made, logs)
    assert [run["last"]["eval_pass@1"] for run in runs] == [.5, .7, .6, .9] and runs[0]["first"] == {"eval_pass@1": .2}
    assert runs[0]["curve"] == [{"step": 0, "eval_pass@1": .2}, {"step": 2, "eval_pass@1": .5}]
    lines = study.table(made, runs).split("\n")
    assert lines[2] == "| start |  | 0.200 |  |"
    assert lines[3] == "| a | 2 | 0.600 ± 0.100 |  |" and lines[4] == "| b | 2 | 0.750 ± 0.150 | 0.150 ± 0.050 |"
    assert math.isnan(study.last_value(logs["a", 0], "ess"))


def test_the_samples_to_where_the_first_row_ends_by_hand():
    """a ends at .7, the mean of its last two, which it has after 25 completions, b after 15, c never."""
    curves = {"a": [.2, .4, .6, .8], "b": [.2, .6, .8, .1], "c": [.2, .3, .3, .69]}
    logs = {(name, 0): [{"step": i, "num_samples": 10 * i, "eval_pass@1": y} for i, y in enumerate(ys)] for name, ys in curves.items()}
    made = Study({}, {name: ["--x"] for name in curves}, x="num_samples")
    runs = study.summary(made, logs)
    assert study.share_to_end(runs[1], runs[0], "eval_pass@1") == pytest.approx(.6)
    assert study.share_to_end(runs[0], runs[0], "eval_pass@1") == 1
    lines = [line.split("|") for line in study.table(made, runs).split("\n")]
    assert len({len(line) for line in lines}) == 1 and lines[0][-2].strip() == "samples to a's end"
    assert [line[-2].strip() for line in lines[3:]] == ["", report.cell_text((.6, math.nan)), "0 of 1 runs"]


def test_what_is_computed_of_a_log_by_hand():
    """Six steps of 4 prompts: the last two rewards .3 and .5, .8 as best evaluation, 0.6 reached half way between two."""
    lines = [{"step": 0, "eval_pass@1": .2, "num_samples": 0}]
    lines += [{"step": s, "reward": s / 10, "num_samples": 32 * s, "rollout_time": 3., "train_time": 2.} for s in range(1, 7)]
    lines[3] |= {"eval_pass@1": .4, "grad_variance": None, "grad_norm": 9}           # a nan stands in the log as null
    lines[5] |= {"eval_pass@1": .8, "grad_variance": 1., "grad_norm": 2., "kl_pi_mu": .05, "completion_length": 10, "ess": .25}
    lines[6] |= {"eval_pass@1": .7, "grad_variance": 2., "grad_norm": 1., "kl_pi_mu": .1, "completion_length": 20, "ess": .5}
    value = {name: measure(lines) for name, measure in MEASURES.items()}
    assert value["reward swing"] == pytest.approx(.05) and value["fall"] == pytest.approx(.1)
    assert value["samples to 0.6"] == pytest.approx(128) and value["draw / train"] == 1.5
    assert value["mean ess"] == .375 and value["exp(-2 KL)"] == pytest.approx((math.exp(-1) + math.exp(-4)) / 2)
    assert value["noise scale"] == pytest.approx(4 * 1.5 / (2.5 - 1.5))         # null is no estimate
    lines[5]["grad_norm"] = 1.                                                  # all of the norm is noise
    assert math.isnan(MEASURES["noise scale"](lines)) and math.isnan(MEASURES["noise scale"](lines[:5]))
    assert math.isnan(MEASURES["samples to 0.7"](lines[:5])) and math.isnan(MEASURES["mean ess"](lines[:5]))
    assert report.mean_of_all([1, math.nan, 3]) == "2 of 3 runs" and report.cell_text(report.mean_of_all([1, 3])) == "2.000 ± 1.000"


def test_the_theory_is_drawn_without_a_run(tmp_path):
    study.main(["theory", "--out", str(tmp_path / "t")])
    assert [file.name for file in (tmp_path / "t").iterdir()] == ["theory.png"]
    by_title = {title: dict((label, dict(zip(map(float, xs), ys))) for label, xs, ys in lines)
                for title, _, lines in theory.curves()}
    assert by_title["groups that teach nothing"]["G = 8"][.5] == pytest.approx(2 / 2 ** 8)
    assert min(by_title["error of a step, best = 1 (c2 = 0)"]["c3 / c1 = 50"].values()) == pytest.approx(1, abs=.01)
    drops = by_title["what KL(pi || mu) allows J to fall"]
    assert all(drops["J = 0.5"][kl] <= drops["Pinsker"][kl] + 1e-9 for kl in drops["Pinsker"])


def test_a_folder_keeps_the_flags_of_its_runs(tmp_path):
    """Another start, other flags of a run, another study: refused. A new run of the same study is welcome."""
    made = Study({"s": ["--steps", 3]}, {"a": ["--lr", 1]})
    study.claim(tmp_path, "x", made)
    study.claim(tmp_path, "x", Study(made.starts, {"b": ["--lr", 2]}))
    for name, other, said in (("x", Study({"s": ["--steps", 4]}, {}), "start s was '--steps 3', not '--steps 4'"),
                              ("x", Study({}, {"b": ["--lr", 3]}), "run b was '--lr 2'"), ("y", made, "study was 'x'")):
        with pytest.raises(ValueError, match=said):
            study.claim(tmp_path, name, other)
    study.claim(tmp_path, "x", made)


def test_commands_behind_the_runs_are_made_once_and_shown(tmp_path, monkeypatch):
    """The probes of group-size: their flags parse, START and STUDY are folders, what is there is not made again."""
    import probe
    made, called = STUDIES["group-size"](StudyConfig()), []

    def call(command, *rest, **more):
        called.append(command)
        if command[0] == "train.py":
            config.parse(command[1:])
            (tmp_path / command[command.index("--out") + 1] / "model").mkdir(parents=True)
        else:
            probe.parse(command[1:])
            numbers = {"c1": .5, "c2": 2, "c3": 8, "best_group_size": 5, "between": [4, 7] if len(called) > 3 else None}
            (tmp_path / command[command.index("--json") + 1]).write_text(json.dumps(numbers))

    monkeypatch.setattr(study, "call", call)
    study.run_after(made, tmp_path, 1)
    assert [c[0] for c in called] == ["train.py"] * 2 + ["probe.py"] * 3
    assert str(tmp_path / "start" / "weak") in called[0] and str(tmp_path / "end" / "model") in called[4]
    study.run_after(made, tmp_path, 1)
    assert len(called) == 5
    lines = study.table_of_probes(sorted(tmp_path.glob("probe-*.json"))).split("\n")
    assert lines[2] == "| end | 0.5 | 2 | 8 | 5 | 4 to 7 |" and lines[4] == "| start | 0.5 | 2 | 8 | 5 |  |"


@pytest.mark.parametrize("argv, message", [([], "give a study, one of theory, curricula"), (["all"], "give --out"), (["x", "--out", "y"], "one of theory, curricula"),
                                           (["lora", "--out", "y"], "lora needs --base")])
def test_wrong_commands_are_one_line(argv, message):
    with pytest.raises(SystemExit, match=message):
        study.main(argv)


@pytest.mark.slow
def test_a_killed_study_goes_on_and_a_folder_is_of_one_study(tmp_path):
    out = tmp_path / "s"
    command = [sys.executable, str(HERE / "study.py"), "leaderboard", "--quick", "--out", str(out)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "runs" / "gtpo-s0" / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    whole = (out / "runs" / "grpo-s0" / "log.jsonl").stat().st_mtime
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "runs" / "grpo-s0" / "log.jsonl").stat().st_mtime == whole        # not made again
    found = json.loads((out / "study.json").read_text())
    assert len(found["runs"]) == 6 and (out / "study.png").exists() and "| dpo | 1 |" in (out / "table.md").read_text()
    with pytest.raises(SystemExit, match="holds other runs"):
        study.main(["reuse", "--quick", "--out", str(out)])
