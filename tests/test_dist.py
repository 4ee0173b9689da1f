"""Several ranks are one process: gradients, rollouts, files, checkpoints; and what happens when a rank is lost.

What needs several ranks is a check below, run by torchrun as `test_dist.py CHECK ...`; it fails by its exit status.
"""
import itertools
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

import folder
from engine import checkpoint
from engine.checkpoint import Progress
import dist
import grpo
import train
import learner
from config import Config
from model import ModelConfig, Transformer
from rollout import Rollout, Sampler, empty_rollout
from test_train import HERE, equal, fast, log_of, run_train, start, stored, whole       # two fixtures
from engine.weights import own_rows

torch.set_num_threads(1)
SHAPE = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8)
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def launch(*args, nproc, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'tests'}"}
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=env, **options)


@pytest.mark.slow
@pytest.mark.parametrize("nproc, name", [
    (1, "gradients_are_those_of_one_process"), (2, "gradients_are_those_of_one_process"),
    (3, "gradients_are_those_of_one_process"), (5, "gradients_are_those_of_one_process"),
    (4, "rollouts_and_files_are_those_of_one_process"), (2, "a_lost_rank_is_named_by_the_others")])
def test_on_several_ranks(nproc, name, tmp_path):
    done = launch(__file__, name, tmp_path, nproc=nproc)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


# --------------------------------------------------------------------------------------------------------- the checks

PLAIN = dist.Sharding(torch.device("cpu"), torch.float32)       # made before there is a process group


def sharded_copy(model, shard=0, dtype=torch.float32):
    """The same weights, spread over the ranks."""
    with torch.device("meta"):
        new = Transformer(model.config)
    place = dist.Sharding(torch.device("cpu"), dtype, shard)
    place(new)
    new.to_empty(device="cpu")
    new.tie()
    with torch.no_grad():
        for p, old in zip(new.parameters(), model.parameters(), strict=True):
            part, rows = own_rows(p)
            part.copy_(old[rows])
    return new


def whole_batch(prompts, G, equal_groups, seed):
    """A rollout of prompts x G random completions, and rewards; groups numbered in equal_groups have equal ones."""
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(1, 5, (prompts,), generator=g).repeat_interleave(G)
    lengths = starts + torch.randint(1, 9, (prompts * G,), generator=g)
    tokens = torch.randint(0, 61, (prompts * G, 12), generator=g)
    for row in range(prompts * G):
        tokens[row, :starts[row]] = tokens[row // G * G, :starts[row]]
    logps = -torch.rand(tokens.shape, generator=g) * 4
    rewards = torch.randint(0, 2, (prompts, G), generator=g).float()
    rewards[:, 0], rewards[:, 1] = 1, 0
    rewards[list(equal_groups)] = 1.0
    return Rollout(tokens, starts, lengths, logps, torch.ones(len(tokens)).bool()), rewards


def share(rollout, rewards, G):
    """This rank's part of both."""
    mine = dist.split(len(rewards))
    if not len(mine):
        return empty_rollout(torch.device("cpu")), rewards[:0]
    rows = slice(mine.start * G, mine.stop * G)
    fields = {k: v[rows] for k, v in vars(rollout).items() if torch.is_tensor(v)}
    return Rollout(**fields), rewards[mine.start:mine.stop]


def gradient(model, rollout, rewards, config, count):
    """(loss, norm, whole gradient by name) of the update that train.py would make."""
    found = {}
    one = learner.Learner(config, grpo, model, learner.adamw(model, 0.0), Progress(step=1))

    def descend(loss):
        for name, p in model.named_parameters():
            found[name] = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        return dist.total(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    one.descend = descend
    return one.make_pass(one.batch(rollout, rewards), count)[0], found


@check
def gradients_are_those_of_one_process(folder):
    """Groups of equal rewards only on some ranks, fewer prompts than ranks, any budget, every mesh, tied or not; float32."""
    alone = {}
    cases = itertools.product((7, 2), ((), (0, 1, 2), range(7)), (20, 60, 8192))
    for i, (prompts, equal_groups, budget) in enumerate(cases):
        tied = i % 2 == 0
        config = Config(group_size=4, prompts_per_step=prompts, micro_batch_tokens=budget, temperature=0.7)
        model = PLAIN(Transformer(ModelConfig(**SHAPE, tie_word_embeddings=tied)).init_weights(3))
        batch = whole_batch(prompts, 4, [g for g in equal_groups if g < prompts], seed=prompts + budget)
        alone[prompts, tuple(equal_groups), budget, tied] = model, batch, config, gradient(model, *batch, config, prompts)
    dist.setup("cpu", 120)
    shards = [s for s in range(1, dist.world() + 1) if dist.world() % s == 0]
    for (prompts, *_), (model, batch, config, (one, expected)) in alone.items():
        for shard in shards:
            many, found = gradient(sharded_copy(model, shard), *share(*batch, 4), config, prompts)
            assert found.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
            assert many == pytest.approx(one, rel=1e-5, abs=1e-6)
    assert sum(bool(expected) for *_, (_, expected) in alone.values()) == len(alone) / 2      # the others have no signal anywhere
    close_to_bfloat16(*alone[7, (), 8192, True])


def close_to_bfloat16(model, batch, config, result):
    """bf16 compute, float32 gradients: near the float32 ones, and not the same."""
    copy = sharded_copy(model, dtype=torch.bfloat16)
    many, found = gradient(copy, *share(*batch, 4), config, 7)
    assert all(g.dtype == torch.float32 for g in found.values())
    norm = sum(g.square().sum() for g in result[1].values()).sqrt()
    off = sum((found[n] - g).square().sum() for n, g in result[1].items()).sqrt()
    assert 1e-5 < off / norm < 0.05 and abs(many["loss"] - result[0]["loss"]) < 0.05


@check
def rollouts_and_files_are_those_of_one_process(folder):
    model = PLAIN(Transformer(ModelConfig(**SHAPE)).init_weights(3))
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9], [10, 11]]
    expected = Sampler(model, [0]).generate(prompts, 3, 20, seed=1)
    dist.setup("cpu", 120)
    if dist.rank() == 0:
        model.save_pretrained(folder / "plain")
    dist.barrier()
    place = dist.Sharding(torch.device("cpu"), torch.float32, 2)
    loaded = Transformer.from_pretrained(folder / "plain", shard=place)
    for name, p in loaded.named_parameters():       # half of every tensor, and it is the right half
        assert p.to_local().numel() <= -(-p.shape[0] // 2) * p[0].numel()
        assert torch.equal(p.full_tensor(), dict(model.named_parameters())[name])
    loaded.save_pretrained(folder / "again", write=dist.rank() == 0)
    dist.barrier()
    if dist.rank() == 0:
        for file in ("config.json", "model.safetensors"):
            assert (folder / "again" / file).read_bytes() == (folder / "plain" / file).read_bytes()

    sampler, mine = Sampler(loaded, [0]), dist.split(len(prompts))
    with CommDebugMode() as collectives, sampler.loaded():
        if len(mine) and dist.rank() < 3:           # rank 3 draws nothing and is not missed
            out = sampler.generate([prompts[i] for i in mine], 3, 20, seed=[(1, i) for i in mine])
            rows = slice(mine.start * 3, mine.stop * 3)
            for row, other in zip(out.completions(), expected.completions()[rows], strict=True):
                assert row == other
            drawn = out.logps[out.logps != 0]
            torch.testing.assert_close(drawn, expected.logps[rows][expected.logps[rows] != 0], atol=1e-5, rtol=1e-5)
    assert collectives.get_total_counts() == len(loaded.model.layers) + 1       # once a block, however many tokens
    assert sampler.weights is None
    tokens, mask = expected.tokens, expected.completion_mask()
    with torch.no_grad():                           # no gathered weights are left behind that an update would make old
        batch = grpo.Batch(tokens, expected.prompt_lengths, expected.lengths, mask, None, None, torch.ones(15).bool(), None)
        learner.Learner(Config(group_size=3, micro_batch_tokens=40), grpo, loaded, None, Progress()).score(batch)
        for p in loaded.parameters():
            p.to_local().zero_()
        logps = loaded.token_logps(tokens, mask)[0][mask.bool()]
        torch.testing.assert_close(logps, torch.full_like(logps, -math.log(61)))


@check
def a_lost_rank_is_named_by_the_others(folder):
    dist.setup("cpu", 120)
    dist.watch(60)
    dist.phase("step 3: training")
    dist.all_reduce({"one": 1.0}, torch.device("cpu"))
    if dist.rank() == 1:
        os._exit(0)
    try:
        dist.all_reduce({"one": 1.0}, torch.device("cpu"))
    except RuntimeError as error:
        assert "rank 0 lost another rank in 'step 3: training, waiting for the others in all_reduce'" in dist.lost_contact(error)
        os._exit(0)
    raise AssertionError("nothing was lost")


# ----------------------------------------------------------------------------------------------- from the command line

@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(whole, start, tmp_path):
    """2 ranks, then 3, then one process: the run of one process, and the checkpoint's tensors are the same whoever wrote it."""
    out = tmp_path / "run"
    run_train("--model", start, "--out", out, *fast(start), "--steps", "2", "--shard", "1", nproc=2)
    two = stored(out, 2)
    run_train("--resume", "--out", out, "--steps", "3", "--shard", "3", nproc=3)
    train.main(["--resume", "--out", str(out), "--steps", "4", "--shard", "0"])
    assert stored(out, 4).keys() == two.keys() == stored(whole[0], 4).keys()
    for one, many in zip(log_of(whole[0]), log_of(out), strict=True):
        assert one == pytest.approx({k: many[k] for k in one}, rel=1e-4, abs=1e-5)      # the last of three steps is evaluated


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed(start, tmp_path):
    """kill -9 once the first checkpoint is there: the end is bit for bit that of an undisturbed run on two ranks."""
    options = ["--model", str(start), *fast(start), "--steps", "8"]
    run_train("--out", tmp_path / "calm", *options, nproc=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3",
               str(HERE / "train.py"), "--out", str(tmp_path / "wild"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not checkpoint.checkpoints(tmp_path / "wild" / "checkpoints"):
        time.sleep(.02)
    ranks = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.splitlines()
    os.kill(int(next(line for line in ranks[::-1] if "train.py" in line).split()[0]), signal.SIGKILL)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "resumed at step" in said, errors[-3000:]
    assert equal(stored(tmp_path / "calm", 8), stored(tmp_path / "wild", 8))
    assert log_of(tmp_path / "calm") == log_of(tmp_path / "wild")


def limited():
    """A file of more than 20 kB cannot be written, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(whole, tmp_path):
    """Two ranks, one line; the checkpoint before it stays, and the run can go on once there is room."""
    out = shutil.copytree(whole[0], tmp_path / "run")
    before = stored(out, 4)
    done = launch(str(HERE / "train.py"), "--resume", "--out", out, "--steps", "6", nproc=2, preexec_fn=limited)
    lines = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert done.returncode and len(lines) == 1, done.stderr[-2000:]
    assert "checkpoint of step 6 not written" in lines[0] and "step-000004 is whole" in lines[0]
    assert 'train.py", line' not in done.stderr and not list((out / "checkpoints").glob(".part-*"))
    assert equal(stored(out, 4), before)
    train.main(["--resume", "--out", str(out), "--steps", "6"])
    assert log_of(out)[-1]["step"] == 6


def test_two_runs_in_one_folder_are_one_line(whole, tmp_path):
    """Another process holds the folder: neither --resume nor a new run may write there."""
    out = whole[0]
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
                               "print('held', flush=True); sys.stdin.read()", str(out / ".lock")],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    done = run_train("--resume", "--out", out, "--steps", "6", check=False)
    holder.communicate()
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == (
        f"error: {out}: another run is writing there; stop it, or choose another --out")
    assert log_of(out)[-1]["step"] == 4


def test_a_restart_goes_on_with_its_own_run_and_leaves_another_alone(tmp_path, monkeypatch):
    """torchrun starts a program again also when it refused a folder that holds another run."""
    first = Config(out=str(tmp_path / "run"), steps=7, threads=2)
    folder.claim(first, tmp_path / "run")
    folder.release()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    same, _ = folder.agree_on_run(Config(out=str(tmp_path / "run"), steps=7))
    folder.release()
    assert same.resume and same.threads == 2
    with pytest.raises(ValueError, match="is not empty"):
        folder.agree_on_run(Config(out=str(tmp_path / "run"), steps=8))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(ValueError, match="is not empty"):
        folder.agree_on_run(Config(out=str(tmp_path / "run"), steps=7))


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / ".metadata").unlink(), ".metadata"),
    (lambda folder: (folder / "extra.pt").write_bytes(b"x"), "extra.pt has 1 bytes"),
    (lambda folder: (folder / "__0_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes()[:-1]), "__0_0.distcp has"),
    (lambda folder: (folder / "state.json").write_text("{"), "cannot be read")])
def test_a_damaged_checkpoint_is_one_line_that_names_it(damage, message, tmp_path):
    tensors = {"model.a": torch.arange(6.0)}
    checkpoint.save_checkpoint(tmp_path, Progress(step=3, stream={"cursor": 1}), tensors)
    damage(tmp_path / "step-000003")
    with pytest.raises(ValueError, match="step-000003 cannot be read") as stop:
        checkpoint.load_checkpoint(tmp_path / "step-000003", {"model.a": torch.zeros(6)})
    assert message in str(stop.value) and "\n" not in str(stop.value) and "the start: there is no other" in str(stop.value)


def test_checkpoints_come_back_as_they_were_and_the_newest_stay(tmp_path):
    for step in (1, 2, 3):
        tensors = {"a": torch.full((2, 3), float(step)), "s": torch.tensor(step * 1.5)}
        checkpoint.save_checkpoint(tmp_path, Progress(step=step, stream={"cursor": 10 * step}), tensors, {"buffer": [step]}, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    into = {"a": torch.zeros(2, 3), "s": torch.zeros(())}
    progress, extra = checkpoint.load_checkpoint(tmp_path / "step-000002", into)
    assert (into["a"] == 2).all() and into["s"] == 3 and extra == {"buffer": [2]}
    assert progress == Progress(step=2, stream={"cursor": 20})
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load_checkpoint(tmp_path / "step-000002", {"another": torch.zeros(1)})


def watched(monkeypatch):
    """A list of what happens to a disk: ("sync", file or folder's inode, names beside it) and ("rename", old, new)."""
    events, fsync, replace = [], os.fsync, os.replace

    def record_fsync(handle):
        inside = {path.name for folder in watch for path in folder.glob(".part-*/*")}
        events.append(("sync", os.fstat(handle).st_ino, inside))
        fsync(handle)

    def record_replace(old, new):
        events.append(("rename", Path(old).name, Path(new).name))
        replace(old, new)
    watch = []
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    return events, watch


def test_a_checkpoint_is_renamed_when_all_of_it_is_on_disk_and_then_the_rename_is_made_to_last(tmp_path, monkeypatch):
    """A power cut keeps what was synced, in any order. So: each rank its own part, rank 0 all files and the hidden folder;
    the rename; the folder that holds the new name."""
    events, watch = watched(monkeypatch)
    watch.append(tmp_path)
    checkpoint.save_checkpoint(tmp_path, Progress(step=3), {"a": torch.ones(3)}, {"buffer": [1]})
    final = tmp_path / "step-000003"
    renamed = events.index(("rename", ".part-000003", "step-000003"))
    before, after = ({e[1] for e in part if e[0] == "sync"} for part in (events[:renamed], events[renamed:]))
    assert {path.stat().st_ino for path in (*final.iterdir(), final)} <= before and len(before) >= 5
    assert tmp_path.stat().st_ino in after
    own = (final / "__0_0.distcp").stat().st_ino            # synced by its writer, before rank 0 adds state.json
    assert any(e[:2] == ("sync", own) and "state.json" not in e[2] for e in events)


def test_an_old_checkpoint_is_hidden_before_it_is_removed(tmp_path, monkeypatch):
    """A kill in the middle of its removal leaves no half of it under a name that counts."""
    checkpoint.save_checkpoint(tmp_path, Progress(step=1), {"a": torch.ones(3)})
    removed, rmtree = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **more: removed.append(Path(path).name) or rmtree(path, **more))
    checkpoint.save_checkpoint(tmp_path, Progress(step=2), {"a": torch.ones(3)}, keep=1)
    assert removed == [".part-step-000001"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path, monkeypatch):
    """config.json and the cut logs: at the moment of the rename both the old and the new text stand there in full."""
    file, seen, replace = tmp_path / "config.json", [], os.replace
    file.write_text("old")
    monkeypatch.setattr(os, "replace", lambda new, old: seen.append((Path(new).read_text(), Path(old).read_text())) or replace(new, old))
    checkpoint.write_whole(file, "new")
    assert seen == [("new", "old")] and file.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_holds_the_moments_of_every_weight():
    """Of a frozen weight it holds nothing."""
    model = Transformer(ModelConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)).init_weights()
    model.model.norm.weight.requires_grad_(False)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = checkpoint.tensors_of(model, learner.adamw(model, 1e-3))
    kinds = ("model", "step", "exp_avg", "exp_avg_sq")
    assert set(found) == {f"{kind}.{name}" for kind in kinds for name in names}


def test_the_count_of_bad_updates_comes_back_with_a_checkpoint(tmp_path):
    checkpoint.save_checkpoint(tmp_path, Progress(step=1, bad_steps=4), {"a": torch.ones(3)})
    progress, _ = checkpoint.load_checkpoint(tmp_path / "step-000001", {"a": torch.zeros(3)})
    assert progress.bad_steps == 4


def test_only_numbered_folders_are_checkpoints_and_they_go_by_their_number(tmp_path):
    for name in ("step-1000000", "step-999999", "step-000020.bad", "step-", ".part-000021"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_a_disk_that_fills_up_with_the_replay_buffer_is_no_whole_checkpoint(tmp_path, monkeypatch):
    """torch.save raises a RuntimeError then, after all ranks have written their parts."""
    checkpoint.save_checkpoint(tmp_path, Progress(step=1), {"a": torch.ones(3)})
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(RuntimeError("unexpected pos 576 vs 534")))
    with pytest.raises(ValueError, match=r"step 2 not written \(unexpected pos .* MB are free there\); step-000001 is whole"):
        checkpoint.save_checkpoint(tmp_path, Progress(step=2), {"a": torch.ones(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_ranks_share_in_order_and_alike_and_rank_0_has_the_most(monkeypatch):
    for count, ranks in itertools.product(range(12), range(1, 6)):
        monkeypatch.setattr(dist, "world", lambda: ranks)
        parts = []
        for rank in range(ranks):
            monkeypatch.setattr(dist, "rank", lambda: rank)
            parts.append(list(dist.split(count)))
        assert sum(parts, []) == list(range(count))
        assert len(parts[0]) == max(map(len, parts)) == -(-count // ranks) and min(map(len, parts)) == count // ranks


def test_the_watchdog_names_rank_and_phase(capfd, monkeypatch):
    monkeypatch.setattr(dist, "_watchdog", None)
    dist.watch(0.2)
    dist.phase("step 7: rollout")
    time.sleep(0.5)
    with dist.waiting("all_reduce"):
        time.sleep(0.5)
    dist._watchdog.stopped.set()
    said = capfd.readouterr().err
    assert f"rank 0 (pid {os.getpid()} on " in said and "has been in 'step 7: rollout' for" in said
    assert "'step 7: rollout, waiting for the others in all_reduce'" in said
    assert "test_the_watchdog_names_rank_and_phase" in said         # the stack


@pytest.mark.parametrize("args, message", [
    (["--shard", "2"], "--shard 2: 1 rank cannot be cut into groups of 2"), (["--offload"], "--offload moves"),
    (["--shard", "-1"], "--shard -1: must be at least 0")])
def test_sharding_that_cannot_be_is_one_line(args, message, start, tmp_path):
    import train
    with pytest.raises(SystemExit, match=message):
        train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), *args])
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    CHECKS[sys.argv[1]](Path(sys.argv[2]))
    dist.close()
