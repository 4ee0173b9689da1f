"""The supervised start as a run: it goes on by the same command, bit for bit, and leaves a log."""
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_train import equal, fast, run_train, start         # start is a fixture

import sft
import train
from engine.checkpoint import checkpoints
from model import Transformer

SMALL = ["--data", "arithmetic", "--steps", "6", "--terse-steps", "4", "--problems", "100", "--hidden-size", "32", "--layers", "1",
         "--heads", "2", "--vocab-size", "280", "--muon-lr", "0.02", "--save-every", "3", "--threads", "1", "--device", "cpu"]


def log_of(out):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (out / "log.jsonl").read_text().splitlines()]


def stop_after(monkeypatch, step, how):
    """Make the next run call `how` after the update of a step, before its line and its checkpoint."""
    usual = sft.Keeper.after_step

    def stopping(self, learner, sums, losses):
        if learner.progress.step == step:
            how()
        usual(self, learner, sums, losses)
    monkeypatch.setattr(sft.Keeper, "after_step", stopping)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    sft.main([*SMALL, "--out", str(out)])
    return out


def test_the_log_has_a_line_a_step_of_both_stages_and_no_checkpoint_stays(whole):
    lines = log_of(whole)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["trained_tokens"] for line in lines] == sorted({line["trained_tokens"] for line in lines})
    assert lines[0]["loss"] > lines[5]["loss"] > 0
    assert lines[5]["lr"] == pytest.approx(sft.share_of_peak(5, 6) * 2e-3)
    assert lines[6]["lr"] == pytest.approx(sft.share_of_peak(0, 4) * 2e-3 / 8)      # stage two: an eighth
    assert not (whole / "checkpoints").exists()
    assert json.loads((whole / "sft.json").read_text())["--muon-lr"] == 0.02


@pytest.mark.parametrize("step", [1, 6, 8])
def test_ctrl_c_then_the_same_command_gives_the_same_bits(whole, step, tmp_path, monkeypatch, capsys):
    """In the first step, at the end of the first stage, and in the second."""
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_after(patched, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        sft.main([*SMALL, "--out", str(tmp_path)])
    assert "the same command goes on" in capsys.readouterr().err
    assert [x.name for x in checkpoints(tmp_path / "checkpoints")] == [f"step-{step:06d}"]

    sft.main([*SMALL, "--out", str(tmp_path)])
    assert f"goes on at step {step}" in capsys.readouterr().out
    assert log_of(tmp_path) == log_of(whole)
    assert equal(load_file(tmp_path / "model.safetensors"), load_file(whole / "model.safetensors"))


@pytest.mark.parametrize("step", [2, 5, 10])
def test_a_crash_goes_on_from_the_checkpoint_before_it_or_begins_anew(whole, step, tmp_path, monkeypatch):
    def crash():
        raise OSError("the machine is gone")

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_after(patched, step, crash)
        sft.main([*SMALL, "--out", str(tmp_path)])
    sft.main([*SMALL, "--out", str(tmp_path)])
    assert log_of(tmp_path) == log_of(whole)
    assert equal(load_file(tmp_path / "model.safetensors"), load_file(whole / "model.safetensors"))


def test_a_run_under_way_is_not_gone_on_with_by_other_settings_or_data(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_after(patched, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        sft.main([*SMALL, "--out", str(tmp_path)])

    for change, what in ((["--muon-lr", "0.01"], "--muon-lr 0.02, not 0.01"), (["--data", "boolean"], "--data 'arithmetic', not 'boolean'"),
                         (["--template", "r1-zero"], "--template 'auto', not 'r1-zero'")):
        with pytest.raises(SystemExit, match=f"holds a run that began with {what}.*choose another folder"):
            sft.main([*SMALL, *change, "--out", str(tmp_path)])
    sft.main([*SMALL, "--save-every", "5", "--out", str(tmp_path)])         # this may change


def test_a_run_under_way_is_not_gone_on_with_by_other_solutions_of_the_same_problems(tmp_path, monkeypatch):
    """Their texts decide the tokenizer too, and so what each row of the embedding means."""
    rows = [{"problem": f"Which, {i}?", "answer": str(i % 3), "solution": f"It is\n#### {i % 3}"} for i in range(40)]
    file = tmp_path / "p.jsonl"
    options = [*SMALL, "--data", str(file), "--hold-out", "0", "--out", str(tmp_path / "out")]
    file.write_text("\n".join(map(json.dumps, rows)))
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_after(patched, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        sft.main(options)

    file.write_text("\n".join(json.dumps({**row, "solution": "So:\n#### " + row["answer"]}) for row in rows))
    with pytest.raises(SystemExit, match="began with examples '.*40 of them', not '"):
        sft.main(options)


def test_what_fails_while_the_model_is_written_goes_on_there(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(sft.prompts, "save_tokenizer", lambda *a: (_ for _ in ()).throw(OSError("No space left")))
        sft.main([*SMALL, "--out", str(tmp_path)])
    sft.main([*SMALL, "--out", str(tmp_path)])
    assert log_of(tmp_path) == log_of(whole) and not (tmp_path / "checkpoints").exists()
    assert equal(load_file(tmp_path / "model.safetensors"), load_file(whole / "model.safetensors"))


def test_a_crash_in_the_first_checkpoint_begins_anew(whole, tmp_path, monkeypatch):
    """What it leaves is half a checkpoint, under a hidden name."""
    def crash():
        (tmp_path / "checkpoints" / ".part-000002").mkdir(parents=True)
        raise OSError("the machine is gone")

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_after(patched, 2, crash)
        sft.main([*SMALL, "--out", str(tmp_path)])
    sft.main([*SMALL, "--out", str(tmp_path)])
    assert log_of(tmp_path) == log_of(whole)


def test_the_folder_of_another_program_s_run_is_left_alone(whole, start, tmp_path):
    train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start)])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="is not empty"):
        sft.main([*SMALL, "--out", str(tmp_path / "run")])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_is_whole_is_not_trained_over(whole):
    with pytest.raises(SystemExit, match="is not empty"):
        sft.main([*SMALL, "--out", str(whole)])


def test_the_held_out_loss_is_that_of_problems_not_trained_on_and_changes_nothing(start, tmp_path, monkeypatch):
    """Three of five held-out problems are training problems too; then three steps of the rest are trained."""
    rows = [{"problem": f"{a} + 1 = ?", "answer": str(a + 1), "solution": f"{a} + 1 = {a + 1}.\n#### {a + 1}"} for a in range(20)]
    for name, part in (("train", rows[:15]), ("test", rows[12:17])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    options = ["--data", str(tmp_path / "train.jsonl"), "--model", str(start), "--hold-out", "0", "--steps", "3", "--threads", "1",
               "--device", "cpu", "--eval-data", str(tmp_path / "test.jsonl"), "--eval-every", "2"]
    seen, usual = [], sft.train
    monkeypatch.setattr(sft, "train", lambda model, examples, *more: seen.append((len(examples), more[-1])) or usual(model, examples, *more))
    sft.main([*options, "--out", str(tmp_path / "out")])

    lines = log_of(tmp_path / "out")
    assert ["eval_loss" in line for line in lines] == [False, True, True]       # every two steps, and the last
    (trained, unseen), = seen
    assert trained == 12 and len(unseen) == 5

    model = Transformer.from_pretrained(tmp_path / "out")
    total = count = 0
    with torch.no_grad():
        for prompt, completion in unseen:
            tokens = torch.tensor(prompt + completion)
            logp = model(tokens[None])[0].log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
            total -= logp[len(prompt) - 1:].sum().item()
            count += len(completion)
    assert lines[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-5)

    sft.main([*options, "--eval-every", "1", "--out", str(tmp_path / "again")])
    one, two = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert equal(one, two)


@pytest.mark.slow
def test_two_ranks_go_on_with_what_one_began(start, tmp_path, monkeypatch):
    """With --model, whose weights the checkpoint's stand for, and Muon's momentum gathered."""
    data = ["--data", str(start.parent / "problems.jsonl"), "--model", str(start), "--hold-out", "0", "--steps", "4", "--terse-steps", "2",
            "--muon-lr", "0.02", "--threads", "1", "--device", "cpu"]
    sft.main([*data, "--out", str(tmp_path / "one")])
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_after(patched, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        sft.main([*data, "--out", str(tmp_path / "two")])
    run_train(*data, "--out", tmp_path / "two", nproc=2, program="sft.py")

    one, two = load_file(tmp_path / "one" / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors")
    assert all((one[name] - two[name]).abs().max() < 1e-4 for name in one)
