"""What is shown never ends what is computed: terminals, pipes, logs and pictures that fail."""
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import report
import train
from engine.machine import Shown
from test_train import HERE, fast, log_of, start       # start is a fixture


def test_letters_that_the_terminal_lacks_are_escapes():
    raw = io.BytesIO()
    shown = Shown(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    print("0.5 ± 0.1 \ud83d ✓", file=shown)
    assert raw.getvalue() == rb"0.5 \xb1 0.1 \ud83d \u2713" + b"\n"


@pytest.mark.parametrize("kind", ["broken pipe", "full disk", "closed"])
def test_a_stream_that_nobody_takes_ends_nothing(kind, tmp_path):
    if kind == "broken pipe":
        reads, writes = os.pipe()
        stream = os.fdopen(writes, "w")
        os.close(reads)
    else:
        stream = open("/dev/full" if kind == "full disk" else tmp_path / "x", "w")
    if kind == "closed":
        stream.close()
    shown = Shown(stream)
    for _ in range(3):
        print("x" * 10_000, file=shown, flush=True)
    if kind != "closed":
        stream.close()          # flushes what is left, into nothing


@pytest.mark.parametrize("ending", ["interrupt", "hang up"])
def test_a_run_is_saved_when_its_pipe_and_terminal_go(ending, start, tmp_path):
    """Ctrl-C reaches the whole pipeline `train.py 2>&1 | tee log`, so tee is gone when the trainer says what it does."""
    out = tmp_path / "run"
    command = " ".join([sys.executable, str(HERE / "train.py"), "--model", str(start), "--out", str(out), *fast(start),
                        "--steps", "4000", "--eval-every", "4000", "--save-every", "4000"])
    process = subprocess.Popen(["bash", "-c", f"{command} 2>&1 | tee {tmp_path}/log > /dev/null"], start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 240
    try:
        while time.time() < deadline and not ((out / "log.jsonl").exists() and len(log_of(out)) > 2):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT if ending == "interrupt" else signal.SIGHUP)
        process.wait(timeout=120)
        while time.time() < deadline and not list((out / "checkpoints").glob("step-*")):
            time.sleep(0.1)                 # tee's end is bash's, not the trainer's
        [saved] = (out / "checkpoints").glob("step-*")
        assert int(saved.name[5:]) >= 2
    finally:
        subprocess.run(["pkill", "-9", "-f", str(out)])


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_stream_that_was_closed_before_the_start_ends_nothing(closed, start, tmp_path):
    command = " ".join([sys.executable, str(HERE / "train.py"), "--model", str(start), "--out", str(tmp_path / "run"), *fast(start),
                        "--steps", "1"])
    done = subprocess.run(["bash", "-c", f"{command} {closed}"], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and (tmp_path / "run" / "model" / "config.json").exists()


def test_a_backend_of_a_notebook_ends_no_run(start, tmp_path):
    done = subprocess.run([sys.executable, str(HERE / "train.py"), "--model", str(start), "--out", str(tmp_path / "run"),
                           *fast(start)], capture_output=True, text=True,
                          env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and (tmp_path / "run" / "curve.png").exists()


class Full(io.FileIO):
    """A disk that takes ten bytes more."""

    def write(self, data):
        super().write(bytes(data)[:10])
        raise OSError(28, "No space left on device")


def test_a_log_line_that_does_not_fit_is_a_warning_and_leaves_no_half(tmp_path, monkeypatch, capsys):
    report.write_line(tmp_path, {"step": 1, "reward": 0.5})
    monkeypatch.setattr(report, "open", lambda file, mode: Full(file, mode), raising=False)
    report.write_line(tmp_path, {"step": 2, "reward": 0.5})
    report.write_samples(tmp_path, 2, [{"problem": "p", "answer": "1"}], [["text"]], [[1.0]])
    monkeypatch.undo()
    report.write_line(tmp_path, {"step": 3, "reward": 0.5})
    assert [x["step"] for x in log_of(tmp_path)] == [1, 3] and (tmp_path / "samples.jsonl").read_bytes() == b""
    said = capsys.readouterr().err
    assert "log.jsonl lacks some lines" in said and "samples.jsonl lacks some lines" in said and "No space left" in said


def test_samples_with_half_a_letter_are_written(tmp_path):
    report.write_samples(tmp_path, 1, [{"problem": "p \ud83d", "answer": "1"}], [["\udce2"]], [[1.0]])
    json.loads((tmp_path / "samples.jsonl").read_text())


@pytest.mark.parametrize("junk", ["", "  ", "{", "null", "[]", '{"reward": 1}', '{"step": null}', "\x00\x00"])
def test_a_log_that_was_edited_does_not_stop_a_resume(junk, start, tmp_path, monkeypatch):
    """Junk between the lines and at the end; the lines themselves stay."""
    import folder
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step}) for step in (0, 1, 2, 3)]
    log.write_text("\n".join([lines[0], junk, *lines[1:], junk]) + "\n")
    folder.cut_log(log, 2)
    assert log.read_text() == "\n".join(lines[:3]) + "\n"


def test_resuming_with_fewer_steps_than_are_made_says_so(start, tmp_path, capsys):
    train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--steps", "2"])
    train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "1"])
    assert "--steps 1: the run has made 2 steps" in capsys.readouterr().out
    assert [x["step"] for x in log_of(tmp_path / "run")] == [0, 1, 2]
