"""Pipelines: every command parses, stages are skipped or go on, a gate stops, kill -9 changes nothing."""
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import config
import pipeline
import rejection
import sft
from pipeline import PIPELINES, PipelineConfig, Stage
from test_train import HERE, equal, start         # start is a fixture


def stages_of(name, out="X", **settings):
    return pipeline.build(name, PipelineConfig(out=str(out), **settings)).stages


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("task", ["family", "truth", "arithmetic"])
@pytest.mark.parametrize("quick", [True, False])
def test_every_command_is_one_that_its_program_takes(name, quick, task, tmp_path):
    if name == "principles-curriculum":
        task = "arithmetic"
    stages = stages_of(name, tmp_path, quick=quick, data=task)
    assert len({stage.name for stage in stages}) == len(stages) >= 2
    for stage in stages:
        out = ["--out", str(tmp_path / "out")]
        if stage.program == "sft.py":
            sft.parse([*stage.args, *out])
        elif stage.program == "rejection.py":
            rejection.parse([*stage.args, *out])
        else:
            config.parse([*stage.args, *out])
        mix = stage.args[stage.args.index("--data") + 1] if "--data" in stage.args else ""
        if not mix.endswith(".jsonl"):
            names = [part.partition(":")[0] for part in mix.split(",")]
            assert len(set(names)) == len(names)            # no task twice


@pytest.mark.parametrize("name", PIPELINES)
def test_a_stage_starts_from_a_model_that_is_made_before_it(name):
    made = set()
    for stage in stages_of(name):
        for flag in ("--model", "--teacher"):
            if flag in stage.args:
                assert stage.args[stage.args.index(flag) + 1] in made
        model = pipeline.model_of(stage, PipelineConfig(out="X"))
        made.add(str(model))


def test_r1_without_each_stage():
    names = [stage.name for stage in stages_of("r1")]
    assert names == ["base", "cold-start", "grpo", "right-answers", "sft-of-base", "grpo-2"]
    for without in names[1:]:
        left = stages_of("r1", without=without)
        assert without not in [stage.name for stage in left]
        steps = sum(int(s.args[s.args.index("--steps") + 1]) for s in left if s.program == "train.py")
        assert steps == 100                         # as many rollouts
    by_name = {stage.name: stage for stage in stages_of("r1", without="right-answers")}
    assert by_name["grpo-2"].args[1] == "X/grpo/run/model" and "sft-of-base" not in by_name
    by_name = {stage.name: stage for stage in stages_of("r1", without="sft-of-base")}
    assert by_name["grpo-2"].args[1] == "X/grpo/run/model"
    by_name = {stage.name: stage for stage in stages_of("dpo-self-training", without="sft-1")}
    assert by_name["dpo-2"].args[1] == "X/dpo-1/run/model"
    by_name = {stage.name: stage for stage in stages_of("r1", without="cold-start")}
    assert by_name["grpo"].args[1] == "X/base/model"


@pytest.mark.parametrize("argv, message", [
    ([], "give a pipeline, one of r1"), (["r2", "--out", "X"], "one of r1"), (["r1"], "give --out"),
    (["r1", "--out", "X", "--without", "sft"], "r1 has the stages cold-start"),
    (["distill-grpo", "--out", "X", "--without", "student-base"], "what comes behind it needs it"),
    (["r1", "--out", "a,b"], "choose a path without a comma or ="), (["principles-curriculum", "--out", "a=1"], "--out a=1: choose a path")])
def test_wrong_commands_are_one_line_and_write_nothing(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        pipeline.main(argv)
    assert not list(tmp_path.iterdir())


def test_a_comma_above_the_folder_is_found_too(tmp_path, monkeypatch):
    (tmp_path / "a,b").mkdir()
    monkeypatch.chdir(tmp_path / "a,b")
    with pytest.raises(SystemExit, match="--out p: choose a path without a comma or =, not .*/a,b/p"):
        pipeline.main(["r1", "--out", "p"])
    assert not list((tmp_path / "a,b").iterdir())


def test_a_folder_is_taken_once_and_goes_on_as_it_was(tmp_path):
    first = PipelineConfig(out=str(tmp_path / "p"), seed=1)
    pipeline.claim("r1", first)
    for other, message in ((first, "go on with --resume"), (PipelineConfig(out=first.out, seed=2, resume=True), "seed was 1, not 2")):
        with pytest.raises(ValueError, match=message):
            pipeline.claim("r1", other)
    pipeline.claim("r1", PipelineConfig(out=first.out, seed=1, resume=True, gate=0.0))


def test_stages_draw_other_problems_and_solutions_share_a_tokenizer():
    def seeds(name, program):
        return [s.args[s.args.index("--seed") + 1] for s in stages_of(name, seed=3) if s.program == program]
    for program in ("train.py", "rejection.py"):
        assert len(set(seeds("dpo-self-training", program))) == 3
    assert set(seeds("distill-grpo", "sft.py")) == {"3"}


def test_principles_are_for_arithmetic():
    assert "arithmetic:2-3" in stages_of("principles-curriculum")[1].args
    with pytest.raises(ValueError, match="--data family: principles-curriculum is for arithmetic"):
        stages_of("principles-curriculum", data="family")


def test_a_folder_that_holds_something_is_not_taken(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        pipeline.claim("r1", PipelineConfig(out=str(tmp_path / "full")))


def test_a_whole_stage_is_skipped_and_a_failing_one_says_why(tmp_path):
    c = PipelineConfig(out=str(tmp_path))
    bad = Stage("bad", "sft.py", ["--data", "nothing.jsonl"])
    with pytest.raises(ValueError, match="sft.py ended with status 1: .*nothing.jsonl.*--resume"):
        pipeline.run_stage(bad, c)
    assert not (tmp_path / "bad" / "stage.json").exists()
    (tmp_path / "bad" / "stage.json").write_text("{}")
    pipeline.run_stage(bad, c)                      # does not run again


def test_a_run_that_outlived_its_pipeline_is_left_alone(tmp_path):
    """Nothing of it is removed: it has no checkpoint yet."""
    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for program in ("train.py", "sft.py"):
            with pytest.raises(ValueError, match="another run is writing there"):
                pipeline.prepare_resume(tmp_path, [program])
    assert (tmp_path / "config.json").exists()
    assert pipeline.prepare_resume(tmp_path, ["train.py"]) == ["train.py"] and not tmp_path.exists()


# a shell's background jobs ignore SIGINT, and so would these
CTRL_C = """
import signal, subprocess, sys, pipeline
signal.signal(signal.SIGINT, signal.default_int_handler)
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
pipeline.wait_for(child)
"""
SLOW_TO_SAVE = """
import pathlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    pathlib.Path("begun").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    pathlib.Path("saved").touch()
"""


def test_ctrl_c_gives_a_stage_the_time_to_save(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", CTRL_C, SLOW_TO_SAVE], cwd=tmp_path, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(HERE)}, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode and "waiting until this stage is saved" in said and (tmp_path / "saved").exists()


QUICK = ["curriculum-grpo", "--quick", "--threads", "1"]


@pytest.mark.slow
def test_a_stage_is_measured_on_the_device_that_was_asked_for(tmp_path, monkeypatch):
    calls = []

    def call(args, *rest, **more):
        calls.append(args)
        Path(args[args.index("--json") + 1]).write_text("{}")
    monkeypatch.setattr(pipeline, "call", call)
    for device in ("cpu", ""):
        plan = pipeline.build("r1", PipelineConfig(out=str(tmp_path / f"x{device}"), data="truth", device=device))
        (tmp_path / f"x{device}" / "base").mkdir(parents=True)
        pipeline.measure(plan.stages[0], plan)
    assert calls[0][calls[0].index("--device") + 1] == "cpu" and "--device" not in calls[1]


def test_a_gate_stops(tmp_path):
    with pytest.raises(SystemExit, match="stage base: held-out pass@1 0.* is below --gate 0.99"):
        pipeline.main([*QUICK, "--out", str(tmp_path / "p"), "--gate", "0.99"])


@pytest.mark.slow
def test_kill_minus_9_in_any_stage_gives_the_same_end(tmp_path):
    pipeline.main([*QUICK, "--out", str(tmp_path / "whole"), "--gate", "0"])
    out = tmp_path / "killed"
    command = [sys.executable, str(HERE / "pipeline.py"), *QUICK, "--out", str(out), "--gate", "0"]
    for awaited in ("base/output.txt", "base/stage.json", "sft/output.txt", "grpo-adaptive/run/checkpoints/step-000005"):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (out / awaited).exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        command = [*command, "--resume"] if "--resume" not in command else command
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    for stage in ("base", "sft", "grpo-adaptive"):
        one, two = (json.loads((folder / stage / "eval.json").read_text()) for folder in (tmp_path / "whole", out))
        assert one["strict"] == two["strict"] and one["kinds"] == two["kinds"]
    models = [load_file(folder / "grpo-adaptive" / "run" / "model" / "model.safetensors") for folder in (tmp_path / "whole", out)]
    assert equal(*models)
    assert "grpo-adaptive" in (out / "table.md").read_text() and (out / "pipeline.png").exists()


# ------------------------------------------------------------------------------------ real problems

def two_files(start, folder):
    """Problems to train on, and others."""
    rows = (start.parent / "problems.jsonl").read_text().splitlines()
    for name, part in (("train.jsonl", rows[:150]), ("test.jsonl", rows[150:])):
        (folder / name).write_text("\n".join(part))
    return str(folder / "train.jsonl"), str(folder / "test.jsonl")


def on_problems(start, folder, **more):
    file, held_out = two_files(start, folder)
    return PipelineConfig(**{"out": str(folder / "p"), "model": str(start), "data": file, "eval_data": held_out, "quick": True, "threads": 1, **more})


@pytest.mark.parametrize("name", ["r1", "dpo-self-training"])
def test_real_problems_begin_at_the_checkpoint_and_go_by_the_programs_own_rates(name, start, tmp_path):
    config_of = on_problems(start, tmp_path, max_new_tokens=77, train_flags="--prompts-per-step 4", sft_flags="--lora-rank 2")
    plan = pipeline.build(name, config_of)
    pipeline.check_stages(plan)
    stages = plan.stages
    assert stages[0].program == "sft.py" and stages[0].args[1] == str(start)
    for stage in stages:
        assert "--lr" not in stage.args and "--levels" not in stage.args
        if stage.program == "sft.py":
            assert sft.parse([*stage.args, "--out", "o"]).lora_rank == 2 and stage.args[1] == str(start)
            assert stage.args[stage.args.index("--hold-out") + 1] == "0"       # what is tested stands in another file
        elif stage.program == "train.py":
            made = config.parse([*stage.args, "--out", "o"])
            assert made.prompts_per_step == 4 and made.max_new_tokens == 77 and made.eval_data == config_of.eval_data
    without = pipeline.build(name, on_problems(start, tmp_path, without=stages[0].name)).stages
    assert [s.name for s in without] == [s.name for s in stages][1:] and without[0].args[1] == str(start)


@pytest.mark.parametrize("name, changes, message", [
    ("progressive", {}, "progressive needs levels"), ("r1", {"model": ""}, "needs --model"), ("r1", {"eval_data": ""}, "--eval-data another"),
    ("r1", {"data": "gsm9k"}, "must be family, truth, arithmetic, gsm8k, math"), ("r1", {"train_flags": "--learning 1"}, "unrecognized arguments"),
    ("r1", {"sft_flags": "--lora-rang 1"}, "stage cold-start: unrecognized arguments: --lora-rang"),
    ("dpo-self-training", {"train_flags": "--clip-low 1"}, "stage dpo-1: .*--clip-low"), ("r1", {"train_flags": "--group-size 1"}, "--group-size 1"),
    ("r1", {"grpo_steps": 1}, "--grpo-steps: too few: stage grpo would make no step"),
    ("progressive", {"data": "", "grpo_steps": 3}, "--grpo-steps: too few"), ("r1", {"data": "", "sft_steps": 1}, "--sft-steps: too few: stage base")])
def test_what_cannot_run_is_said_at_once(name, changes, message, start, tmp_path):
    with pytest.raises(ValueError, match=message):
        pipeline.check_stages(pipeline.build(name, on_problems(start, tmp_path, **changes)))


def test_files_that_share_problems_or_are_called_as_ours_are_refused(start, tmp_path):
    same = str(start.parent / "problems.jsonl")
    with pytest.raises(ValueError, match="50 of its problems stand in --eval-data too"):
        pipeline.build("r1", on_problems(start, tmp_path, data=same))
    ours = tmp_path / "corpus.jsonl"
    ours.write_text((tmp_path / "train.jsonl").read_text())
    with pytest.raises(ValueError, match="rename it"):
        pipeline.build("r1", on_problems(start, tmp_path, data=str(ours)))


def test_other_contents_of_a_file_or_checkpoint_are_no_way_to_go_on(start, tmp_path):
    c = on_problems(start, tmp_path)
    pipeline.claim("r1", c)
    c.resume = True
    pipeline.claim("r1", c)
    file = tmp_path / "test.jsonl"
    before = file.read_text()
    file.write_text(before.replace("Which", "What"))
    with pytest.raises(ValueError, match="hold something else than when the pipeline began"):
        pipeline.claim("r1", c)
    file.write_text(before)
    pipeline.claim("r1", c)


def test_a_folder_of_an_older_version_goes_on_and_with_other_processes(tmp_path):
    first = PipelineConfig(out=str(tmp_path / "p"))
    pipeline.claim("r1", first)
    file = tmp_path / "p" / "pipeline.json"
    old = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("eval_data", "ranks", "sft_flags", "sources")}
    file.write_text(json.dumps(old))
    pipeline.claim("r1", PipelineConfig(out=first.out, resume=True, ranks=2))


@pytest.mark.slow
def test_r1_on_a_file_by_two_processes(start, tmp_path):
    """It ends in a table with a row a stage; every program ran under torchrun."""
    file, held_out = two_files(start, tmp_path)
    out = tmp_path / "p"
    pipeline.main(["r1", "--model", str(start), "--data", file, "--eval-data", held_out, "--quick", "--threads", "1", "--ranks", "2", "--sft-steps", "4",
                   "--grpo-steps", "2", "--max-new-tokens", "8", "--gate", "0", "--train-flags", "--prompts-per-step 4", "--out", str(out)])
    rows = (out / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["cold-start", "grpo", "right-answers", "sft-of-base", "grpo-2"]
    assert (out / "pipeline.png").exists()
