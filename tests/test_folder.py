"""What a run was started from is remembered, and what lies in its folder can run no code."""
import json
import os
import pickle
import random
import shutil
from dataclasses import asdict, field, make_dataclass, replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import folder
import train
from config import Config, stored_config
from engine import checkpoint
from engine.checkpoint import Progress
from model import Transformer
from test_train import equal, fast, log_of, run_train, start, stored, whole      # fixtures among them

torch.set_num_threads(1)
TENSORS = {"model.a": torch.arange(600.0).view(20, 30), "exp_avg.a": torch.ones(20, 30)}


def saved(folder):
    checkpoint.save_checkpoint(folder, Progress(step=3), TENSORS, {"buffer": torch.arange(9)})
    return folder / "step-000003"


def load(path):
    return checkpoint.load_checkpoint(path, {name: torch.zeros_like(t) for name, t in TENSORS.items()})


# ---------------------------------------------------------------------------------- the index of a checkpoint is a pickle

class Bomb:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def sign(path):
    """Let state.json say of the files what is true now, as whoever made them would."""
    whole = json.loads((path / "state.json").read_text())
    state = json.loads(whole["state"])
    state["files"] = {n: [(path / n).stat().st_size, checkpoint.checksum(path / n)] for n in state["files"]}
    text = json.dumps(state)
    (path / "state.json").write_text(json.dumps({"state": text, "checksum": checkpoint.zlib.crc32(text.encode())}))


def index_of(path):
    return pickle.loads((path / ".metadata").read_bytes())      # of our own making, a line above


@pytest.mark.parametrize("bomb", [
    lambda p: Bomb(os.system, f"touch {p}/PWNED"), lambda p: Bomb(eval, f"open('{p}/PWNED', 'w')"),
    lambda p: Bomb(os.mkdir, f"{p}/PWNED"), lambda p: Bomb(torch.load, f"{p}/extra.pt", None, None),
    lambda p: Bomb(getattr, "abc", "upper")], ids=["system", "eval", "mkdir", "torch.load", "getattr"])
@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_meta", "tensor"])
def test_an_index_that_would_run_something_is_refused_by_name(bomb, place, tmp_path):
    path = saved(tmp_path)
    index = index_of(path)
    if place == "whole":
        index = bomb(path)
    elif place == "tensor":
        index.state_dict_metadata["model.a"] = bomb(path)
    else:
        setattr(index, place, bomb(path))
    (path / ".metadata").write_bytes(pickle.dumps(index))
    sign(path)
    with pytest.raises(ValueError, match=r"step-000003 cannot be read \(.metadata names .*could run code\)") as stop:
        load(path)
    assert "\n" not in str(stop.value) and not (path / "PWNED").exists()


def test_what_is_stored_as_bytes_is_refused(tmp_path):
    """dcp would give it to a torch.load that allows everything."""
    path = saved(tmp_path)
    index = index_of(path)
    index.state_dict_metadata["model.a"] = BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(index))
    sign(path)
    with pytest.raises(ValueError, match="BytesStorageMetadata"):
        load(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "extra.pt", "__0_0.distcp/../../x"])
def test_the_index_names_no_file_outside_of_the_checkpoint(name, tmp_path):
    path = saved(tmp_path)
    index = index_of(path)
    for info in index.storage_data.values():
        info.relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(index))
    sign(path)
    with pytest.raises(ValueError, match="points to"):
        load(path)


def test_nothing_of_the_program_is_changed_by_an_index(tmp_path):
    """BUILD sets attributes: here that of every path of the process, which would lead each write to the victim."""
    path, victim = saved(tmp_path), tmp_path / "victim"
    victim.write_text("precious")
    name, text = (b"X" + len(x).to_bytes(4, "little") + x for x in (b"_str", str(victim).encode()))
    patch = b"\x8c\x07pathlib\x8c\tPosixPath\x93" + b"N}(" + name + text + b"u\x86b0"
    whole = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(whole[:2] + patch + whole[2:] if whole[2:3] != b"\x95" else whole[:2] + patch + whole[11:])
    sign(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load(path)
    assert str(type(tmp_path)("a")) == "a" and victim.read_text() == "precious"


@pytest.mark.parametrize("spoil", [
    lambda t: t.chunks.clear(), lambda t: t.chunks.append(t.chunks[0]), lambda t: setattr(t, "size", torch.Size([21, 30])),
    lambda t: setattr(t.chunks[0], "sizes", torch.Size([20, 29])), lambda t: setattr(t.chunks[0], "offsets", torch.Size([1, 0]))])
def test_the_parts_of_a_tensor_make_it_whole(spoil, tmp_path):
    """Else memory that was never written would be taken for weights."""
    path = saved(tmp_path)
    index = index_of(path)
    spoil(index.state_dict_metadata["model.a"])
    (path / ".metadata").write_bytes(pickle.dumps(index))
    sign(path)
    with pytest.raises(ValueError, match="parts of model.a do not make it whole|cannot be read"):
        load(path)


@pytest.mark.parametrize("index", [b"\x80\x02Nr" + (2 ** 30).to_bytes(4, "little") + b".", b"\x80\x05\x96" + (2 ** 33).to_bytes(8, "little"),
                                   b"\x80\x04}(" + b")" + b"\x85\x94" * 3 + b"Nu.", b"\x80\x04N(K\x01K\x02u."])
def test_an_index_takes_no_memory_beyond_its_size(index, tmp_path):
    path = saved(tmp_path)
    (path / ".metadata").write_bytes(index)
    sign(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load(path)


@pytest.mark.parametrize("index", [b"", b"\x80\x04", pickle.dumps({}), pickle.dumps([1, 2]), b"\x00" * 50])
def test_an_index_that_is_none_is_one_line(index, tmp_path):
    path = saved(tmp_path)
    (path / ".metadata").write_bytes(index)
    sign(path)
    with pytest.raises(ValueError, match="step-000003 cannot be read") as stop:
        load(path)
    assert "\n" not in str(stop.value)


def test_a_run_of_a_stranger_is_one_line_on_resume(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    step = sorted((out / "checkpoints").glob("step-*"))[-1]
    (step / ".metadata").write_bytes(pickle.dumps(Bomb(os.system, f"touch {tmp_path}/PWNED")))
    sign(step)
    done = run_train("--resume", "--out", out, "--steps", "6", check=False)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and ".metadata names posix.system" in lines[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "PWNED").exists()


def test_every_flipped_bit_is_found(tmp_path):
    path = saved(tmp_path)
    rng = random.Random(0)
    for name in ("__0_0.distcp", ".metadata", "extra.pt", "state.json"):
        content = (path / name).read_bytes()
        for _ in range(40):
            place, bit = rng.randrange(len(content)), rng.randrange(8)
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            (path / name).write_bytes(flipped)
            with pytest.raises(ValueError, match="cannot be read"):
                load(path)
        (path / name).write_bytes(content)
    assert load(path)[0].step == 3


# ------------------------------------------------------------------------------------------ what a run was started from

@pytest.fixture
def begun(start, tmp_path):
    """A run of two steps with a reference or without, from copies of the model and the data that a test may spoil."""
    def make(*options):
        shutil.copytree(start, tmp_path / "model")
        shutil.copy(start.parent / "problems.jsonl", tmp_path / "problems.jsonl")
        train.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "run"), *fast(start), "--data",
                    str(tmp_path / "problems.jsonl"), "--steps", "2", *options])
        return tmp_path
    return make


def go_on(folder):
    train.main(["--resume", "--out", str(folder / "run"), "--steps", "4"])
    return log_of(folder / "run")


def train_further(folder):
    """Another model of the same shapes, as a later run would leave it there."""
    model = Transformer.from_pretrained(folder / "model")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    model.save_pretrained(folder / "model")


def test_a_reference_that_was_replaced_is_refused(begun):
    folder = begun("--beta", "0.1")
    train_further(folder)
    with pytest.raises(SystemExit, match="the starting model .* has changed since the run began, and this run needs it"):
        go_on(folder)
    assert log_of(folder / "run")[-1]["step"] == 2


def test_a_reference_that_is_gone_is_refused(begun):
    folder = begun("--beta", "0.1")
    shutil.rmtree(folder / "model")
    with pytest.raises(SystemExit, match="the starting model .* is not there any more, and this run needs it"):
        go_on(folder)


@pytest.mark.parametrize("spoil, says", [(train_further, "has changed since the run began"),
                                         (lambda folder: shutil.rmtree(folder / "model"), "is not there any more")])
def test_the_model_under_an_adapter_is_needed(spoil, says, begun):
    """A checkpoint with LoRA holds the adapter alone."""
    folder = begun("--lora-rank", "2")
    spoil(folder)
    with pytest.raises(SystemExit, match=f"the starting model .* {says}, and this run needs it"):
        go_on(folder)
    assert log_of(folder / "run")[-1]["step"] == 2


@pytest.mark.parametrize("spoil, says", [(train_further, "has changed since"),
                                         (lambda folder: shutil.rmtree(folder / "model"), "is not there any more"),
                                         (lambda folder: (folder / "model" / "config.json").write_text("{"), "has changed since")])
def test_without_a_reference_the_starting_weights_are_not_needed(spoil, says, begun, whole, capsys):
    """The run goes on and says so, and its numbers are those of a run that nothing happened to."""
    folder = begun()
    spoil(folder)
    lines = go_on(folder)
    assert says in capsys.readouterr().out
    assert lines == log_of(whole[0])
    assert (folder / "run" / "model" / "tokenizer.json").exists()


def test_weights_that_lag_are_in_the_checkpoint(begun):
    folder = begun("--algo", "offpolicy", "--sync-every", "4")
    before = stored(folder / "run", 2)["behaviour.model.embed_tokens.weight"]
    shutil.rmtree(folder / "model")
    assert go_on(folder)[-1]["step"] == 4
    assert torch.equal(stored(folder / "run", 4)["behaviour.model.embed_tokens.weight"], before)


@pytest.mark.parametrize("change", [
    lambda text: text + '\n{"problem": "One more?", "answer": "1"}\n',
    lambda text: text.replace('"answer": "2"', '"answer": "1"', 1),
    lambda text: "\n".join(reversed(text.splitlines()))], ids=["more", "another answer", "another order"])
def test_data_that_changed_are_refused(change, begun):
    folder = begun()
    file = folder / "problems.jsonl"
    file.write_text(change(file.read_text()))
    with pytest.raises(SystemExit, match="problems of .*problems.jsonl have changed since the run began"):
        go_on(folder)
    assert log_of(folder / "run")[-1]["step"] == 2


def test_a_run_goes_on_that_leaves_problems_out(begun, start):
    """A file of more held-out problems than --eval-problems, and one of each too long: it could not be gone on with."""
    rows = [json.loads(line) for line in (start.parent / "problems.jsonl").read_text().splitlines()]
    longer = {"problem": "Which one? " * 60, "answer": "1", "solution": "#### 1"}
    for name, part in (("more", [longer, *rows[:150]]), ("held-out", [*rows[150:], longer])):
        (start.parent / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    folder = begun("--data", str(start.parent / "more.jsonl"), "--eval-data", str(start.parent / "held-out.jsonl"), "--max-prompt-tokens", "64")
    assert json.loads((folder / "run" / "sources.json").read_text())["eval_data"].endswith(", 51 problems")
    assert [line["step"] for line in go_on(folder)] == [0, 1, 2, 3, 4]


def test_a_run_that_had_ended_and_goes_on_has_no_model_until_it_ends_again(begun, monkeypatch, capsys):
    """Else explain.py, study.py and a user would take an old model for that of the end."""
    folder = begun()
    run, old = folder / "run", load_file(folder / "run" / "model" / "model.safetensors")
    step, calls = train.train_step, []

    def fails(run):
        calls.append(run)
        if len(calls) == 2:
            raise ValueError("power cut")
        return step(run)

    monkeypatch.setattr(train, "train_step", fails)
    with pytest.raises(SystemExit, match="power cut"):
        go_on(folder)
    assert "its model of step 2 is" in capsys.readouterr().err and not (run / "model").exists()
    assert equal(load_file(run / "model-at-2" / "model.safetensors"), old)
    go_on(folder)
    assert not equal(load_file(run / "model" / "model.safetensors"), old)
    train.main(["--resume", "--out", str(run)])         # nothing is left to do: the model stays
    assert (run / "model").exists()


def test_a_run_is_gone_on_with_from_another_folder(start, tmp_path, monkeypatch):
    """Its checkpoint and its problems were named from where it began; LoRA needs them all the time."""
    shutil.copytree(start, tmp_path / "model")
    shutil.copy(start.parent / "problems.jsonl", tmp_path / "problems.jsonl")
    monkeypatch.chdir(tmp_path)
    train.main(["--model", "model", "--out", "run", *fast(start), "--data", "problems.jsonl", "--steps", "2", "--lora-rank", "2"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [line["step"] for line in go_on(tmp_path)] == [0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "model")


def test_the_command_that_began_a_run_goes_on_with_it(start, tmp_path, monkeypatch):
    """Its paths are relative, and --lr 0 is what the program chose; another value of either is a change."""
    shutil.copytree(start, tmp_path / "model")
    shutil.copy(start.parent / "problems.jsonl", tmp_path / "problems.jsonl")
    monkeypatch.chdir(tmp_path)
    command = ["--model", "model/", "--out", "run", *fast(start), "--data", "problems.jsonl", "--lr", "0"]
    train.main([*command, "--steps", "1"])
    train.main([*command, "--steps", "2", "--resume"])
    assert [line["step"] for line in map(json.loads, open("run/log.jsonl"))][-1] == 2
    for change in (["--data", "other.jsonl"], ["--model", "run"], ["--lr", "1e-3"]):
        with pytest.raises(SystemExit, match=f"continues the run as it was: {change[0]} was"):
            train.main([*command, *change, "--steps", "3", "--resume"])


def test_a_later_version_with_more_settings_goes_on_with_a_run(begun):
    """A setting that the run did not know has its default: it changes nothing. One that differs does."""
    run = begun() / "run"
    c = stored_config(run)
    later = make_dataclass("Later", [("new_setting", float, field(default=1.0))], bases=(type(c),))
    found = folder.fingerprint_of_run(c, run)
    assert folder.fingerprint_of_run(later(**asdict(c)), run) == found
    assert folder.fingerprint_of_run(later(**asdict(c), new_setting=0.5), run) != found
    assert folder.fingerprint_of_run(replace(c, temperature=0.5), run) != found


def test_files_in_a_list_become_absolute_too(tmp_path, monkeypatch):
    """Of a mix with shares, and of --reward; what is no file stays, and so does a path that would part the list."""
    (tmp_path / "a,b").mkdir()
    for name in ("p.jsonl", "mine.py", "a,b/q.jsonl"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    config = Config(data="truth:2-4@2, p.jsonl@3,gsm8k", eval_data="p.jsonl", reward="format=0.5,mine.py:f=1,no.py:g")
    found = folder.absolute(config)
    assert found == {"data": f"truth:2-4@2,{tmp_path}/p.jsonl@3,gsm8k", "eval_data": f"{tmp_path}/p.jsonl",
                     "reward": f"format=0.5,{tmp_path}/mine.py:f=1,no.py:g"}
    monkeypatch.chdir(tmp_path / "a,b")
    assert folder.absolute(Config(data="q.jsonl,truth"))["data"] == "q.jsonl,truth"


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew(begun, capsys):
    folder = begun("--save-every", "2")
    shutil.rmtree(folder / "run" / "checkpoints")
    assert [x["step"] for x in go_on(folder)] == [0, 1, 2, 3, 4]
    assert "there is no checkpoint yet: the run begins again" in capsys.readouterr().err
    shutil.rmtree(folder / "run" / "checkpoints")
    train_further(folder)
    with pytest.raises(SystemExit, match="has changed since the run began, and this run needs it"):
        go_on(folder)


@pytest.mark.parametrize("spoil", [
    lambda run: edit(run / "config.json", lambda c: c.update(group_size=2)), lambda run: edit(run / "config.json", lambda c: c.update(seed=5)),
    lambda run: (run / "sources.json").write_text(json.dumps({"model": "", "data": "", "eval_data": ""})),
    lambda run: edit(run / "start" / "config.json", lambda c: c.update(rms_norm_eps=0.1)),
    lambda run: edit(run / "config.json", lambda c: c.update(algo="offpolicy"))])
def test_files_of_the_run_that_were_edited_are_refused(spoil, begun):
    folder = begun()
    spoil(folder / "run")
    with pytest.raises(SystemExit, match="have changed since|is not a run of this version"):
        go_on(folder)
    assert log_of(folder / "run")[-1]["step"] == 2


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"model": 1}'])
def test_a_broken_list_of_sources_is_named(content, begun):
    folder = begun()
    (folder / "run" / "sources.json").write_text(content)
    with pytest.raises(SystemExit, match="sources.json"):
        go_on(folder)


@pytest.mark.parametrize("name, value", [("step", "3"), ("step", 3.5), ("updates", None), ("first", []), ("run", 3)])
def test_progress_of_another_type_is_one_line(name, value):
    with pytest.raises(ValueError, match=f"state.json: {name} is"):
        Progress(**{name: value})


def test_a_run_says_what_made_it_each_time_it_goes_on(start, tmp_path, monkeypatch):
    """Commit and packages; without git the commit is null, and nothing ends."""
    out = tmp_path / "run"
    train.main(["--model", str(start), "--out", str(out), *fast(start)])
    steps = len(log_of(out)) - 1
    monkeypatch.setenv("PATH", "")
    train.main(["--resume", "--out", str(out), "--steps", str(steps + 1)])
    first, second = map(json.loads, (out / "made_by.jsonl").read_text().splitlines())
    assert first["torch"] == torch.__version__.partition("+")[0] or first["torch"] == torch.__version__
    assert first["ranks"] == 1 and first["transformers"] and first["cores"] >= 1
    assert second["commit"] is None and second["edited"] is None
