"""The loop from the command line: contract of the run folder, resume bit for bit, world size, bad input."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

from engine import checkpoint
import folder
import data
import grpo
import dist
import sft
import heldout
import train
import learner
from config import Config, learning_rate, parse
from model import ModelConfig, Transformer

HERE = Path(__file__).parents[1]
KEYS = {"step", "reward", "reward_std", "frac_reward_zero_std", "loss", "grad_norm", "lr", "entropy", "kl", "clip_ratio",
        "ratio_max_dev", "completion_length", "truncated_frac", "num_tokens", "rollout_time", "rollout_tokens_per_s",
        "train_time", "step_time", "peak_memory_mb"}
TIMES = {"rollout_time", "rollout_tokens_per_s", "train_time", "step_time", "peak_memory_mb"}
OPTIONS = ["--steps", "4", "--prompts-per-step", "6", "--group-size", "4", "--max-new-tokens", "8", "--eval-every", "2",
        "--eval-problems", "6", "--eval-samples", "2", "--save-every", "2", "--threads", "1", "--lr", "1e-3",
        "--device", "cpu"]


def fast(start):
    """A run of a few seconds on the tiny model's own problems."""
    return [*OPTIONS, "--data", str(start.parent / "problems.jsonl")]


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A tiny model that has learned to guess among three answers: right a third of the time, so there is a gradient.

    Its folder also holds the problems as a jsonl file."""
    folder = tmp_path_factory.mktemp("start")
    rows = [{"problem": f"Which one, {i}?", "answer": str(i % 3), "solution": f"#### {i % 3}"} for i in range(200)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = sft.SFTConfig(device="cpu", data=str(folder / "problems.jsonl"), out=str(folder / "model"), steps=60, hidden_size=32, layers=1,
                           heads=2, vocab_size=280, lr=8e-3)
    sft.warm_start(config, progress=False)
    return folder / "model"


def stored(out, step):
    """All tensors of a checkpoint, whole, {"model.NAME" | "exp_avg.NAME" | ...: tensor}."""
    reader = dcp.FileSystemReader(Path(out) / "checkpoints" / f"step-{step:06d}")
    tensors = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in reader.read_metadata().state_dict_metadata.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def equal(a, b):
    """Two dicts of tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run_train(*args, nproc=0, check=True, program="train.py"):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)] if nproc else []
    done = subprocess.run([sys.executable, *launcher, str(HERE / program), *map(str, args)], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def log_of(folder, times=False):
    lines = [json.loads(x) for x in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [x if times else {k: v for k, v in x.items() if k not in TIMES} for x in lines]


def same_on_ranks(ranks, start, folder, *options):
    """The log of a run of one process, after seeing that torchrun with each number of ranks gives the same."""
    train.main(["--model", str(start), "--out", str(folder / "one"), *fast(start), *options])
    lines = log_of(folder / "one")
    for n in ranks:
        run_train("--model", start, "--out", folder / str(n), *fast(start), *options, nproc=n)
        for one, many in zip(lines, log_of(folder / str(n)), strict=True):
            assert one == pytest.approx(many, rel=1e-4, abs=1e-5)
    return lines


def same_when_resumed(start, folder, *options, steps=4):
    """The log of a run, after seeing that one that was stopped at step 2 and went on is equal bit for bit."""
    options = ["--model", str(start), *fast(start), *options]
    train.main([*options, "--out", str(folder / "whole"), "--steps", str(steps)])
    train.main([*options, "--out", str(folder / "two"), "--steps", "2"])
    train.main(["--resume", "--out", str(folder / "two"), "--steps", str(steps)])
    assert equal(stored(folder / "whole", steps), stored(folder / "two", steps))
    assert log_of(folder / "whole") == log_of(folder / "two")
    return log_of(folder / "whole")


@pytest.fixture(scope="session")
def whole(start, tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run_train("--model", start, "--out", out, *fast(start))
    return out, done


def test_run_folder_and_log_keep_the_contract(whole):
    out, done = whole
    for name in ("config.json", "log.jsonl", "samples.jsonl", "curve.png", "checkpoints", "model/config.json"):
        assert (out / name).exists(), name
    lines = log_of(out, times=True)
    assert [x["step"] for x in lines] == [0, 1, 2, 3, 4]
    assert all(KEYS <= set(x) for x in lines[1:])
    assert [x["step"] for x in lines if {"eval_pass@1", "eval_greedy"} <= set(x)] == [0, 2, 4]
    assert done.stdout.strip().splitlines()[-1].startswith("pass@1 ")
    sample = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    assert {"step", "problem", "answer", "completion", "reward"} <= set(sample)


def test_first_update_is_on_policy_and_something_is_learned_from(whole):
    lines = log_of(whole[0])[1:]
    assert all(x["ratio_max_dev"] < 1e-4 for x in lines)      # one update a rollout: the sampler is the trainer
    assert any(x["grad_norm"] > 0 for x in lines) and any(0 < x["reward"] < 1 for x in lines)


def test_the_written_model_loads_in_transformers_with_its_tokenizer(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = whole[0] / "model"
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), Transformer.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Mia has 7 shells.", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=0)


def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(whole, start, tmp_path):
    """Stop at step 2 (with junk after the checkpoint, as a crash in step 3 leaves it), resume, compare everything."""
    out = tmp_path / "run"
    train.main(["--model", str(start), "--out", str(out), *fast(start), "--steps", "2"])
    with open(out / "log.jsonl", "a") as f:
        f.write(json.dumps({"step": 3, "reward": 9}) + "\n")
    (out / "checkpoints" / ".part-000003").mkdir()
    run_train("--resume", "--out", out, "--steps", "4")
    assert equal(stored(whole[0], 4), stored(out, 4))
    assert log_of(out) == log_of(whole[0])
    before, after = (load_file(f) for f in (start / "model.safetensors", out / "model" / "model.safetensors"))
    assert any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("extra", [["--dtype", "bfloat16"], ["--beta", ".1", "--epochs", "2", "--minibatches", "3"]])
def test_resume_is_exact_with_options(start, tmp_path, extra):
    """In one process: 4 steps against 2 and 2. The master weights and Adam's moments must come back as they were."""
    same_when_resumed(start, tmp_path, *extra)


def test_a_checkpoint_is_whole_or_absent(start, tmp_path, monkeypatch):
    """A crash while it is written leaves the one before; a truncated file is one clear line."""
    out = tmp_path / "run"
    train.main(["--model", str(start), "--out", str(out), *fast(start), "--steps", "2"])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", lambda *a: (_ for _ in ()).throw(OSError("disk gone")))
        with pytest.raises(SystemExit, match="disk gone"):
            train.main(["--resume", "--out", str(out), "--steps", "4"])
    assert [f.name for f in checkpoint.checkpoints(out / "checkpoints")] == ["step-000002"]
    train.main(["--resume", "--out", str(out), "--steps", "4"])
    assert not list((out / "checkpoints").glob(".part-*")) and log_of(out)[-1]["step"] == 4
    file = out / "checkpoints" / "step-000004" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="step-000004 cannot be read"):
        train.main(["--resume", "--out", str(out), "--steps", "6"])


@pytest.mark.slow
def test_the_warm_start_is_made_once_for_all_runs_beside_it(tmp_path, monkeypatch):
    """Whole or absent, in the run folder and beside it; a run moved elsewhere keeps its own; another seed has another."""
    options = ["--steps", "1", "--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "4", "--eval-problems",
               "2", "--eval-samples", "1", "--threads", "1", "--device", "cpu", "--warm-start-steps", "7"]
    train.main(["--out", str(tmp_path / "a"), *options])
    made = list(tmp_path.glob("warm-start-seed0-*"))
    before = (tmp_path / "a" / "warm_start" / "model.safetensors").read_bytes()
    assert len(made) == 1 and (made[0] / "model.safetensors").read_bytes() == before

    monkeypatch.setattr(sft, "train", lambda *a: pytest.fail("trained again"))
    train.main(["--out", str(tmp_path / "b"), "--algo", "gtpo", *options])
    assert (tmp_path / "b" / "warm_start" / "model.safetensors").read_bytes() == before
    shutil.copytree(tmp_path / "b", tmp_path / "elsewhere" / "b")
    train.main(["--resume", "--out", str(tmp_path / "elsewhere" / "b"), "--steps", "2"])
    with pytest.raises(pytest.fail.Exception):
        train.main(["--out", str(tmp_path / "c"), *options, "--seed", "1"])
    assert list(tmp_path.glob("warm-start-*")) == made and not list(tmp_path.glob(".warm-start*"))


def test_a_warm_start_that_cannot_be_shared_is_a_warning(tmp_path, capsys):
    """A parent folder that cannot be written to, or another file system: the run has its own all the same."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")
    (tmp_path / "file").write_text("no folder")
    sft.share(own, tmp_path / "file" / "warm-start")
    assert "warning: " in capsys.readouterr().err and sorted(x.name for x in tmp_path.iterdir()) == ["file", "own"]


def test_the_learning_rate_follows_from_the_model(start):
    """A pretrained model must not be trained at the rate of the built-in one, nor one of our size at that of a large one."""
    def lr(*args):
        return parse(list(args)).lr
    assert lr() == lr("--model", str(start)) == lr("--algo", "offpolicy") == 2e-4
    assert lr("--model", "Qwen/Qwen3-4B", "--data", "gsm8k") == 1e-6
    assert lr("--model", "Qwen/Qwen3-4B", "--data", "gsm8k", "--lr", "3e-6") == 3e-6
    with pytest.raises(ValueError, match="--lr -1"):
        lr("--lr", "-1")


@pytest.mark.parametrize("lr_end, expected", [(1, [.5, 1, 1, 1, 1]), (0, [.5, 1, .75, .5, .25]), (.2, [.5, 1, .8, .6, .4])])
def test_the_rate_of_a_step_rises_and_then_goes_on_a_straight_line_to_its_end(lr_end, expected):
    """By hand: a warm-up of one step, then four quarters of the way to the end."""
    c = parse(["--lr", "1", "--steps", "5", "--warmup-steps", "1", "--lr-end", str(lr_end)])
    assert [learning_rate(c, step) for step in range(1, 6)] == pytest.approx(expected)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (3, 3), (3, 5), (40, 2)])
def test_without_a_warm_up_the_rate_is_that_of_transformers_and_it_is_never_0(steps, warmup):
    flags = ["--lr", "1", "--steps", str(steps), "--lr-end", "0", "--warmup-steps"]
    assert all(learning_rate(parse([*flags, str(warmup)]), step) > 0 for step in range(1, steps + 1))

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    for step in range(1, steps + 1):
        assert learning_rate(parse([*flags, "0"]), step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_without_evaluations_a_run_learns_the_same_and_says_what_it_can(start, whole, tmp_path, capsys):
    same_when_resumed(start, tmp_path, "--eval-every", "0")
    said, folder = capsys.readouterr(), tmp_path / "two"
    assert "pass@1" not in said.out and "curve.png" not in said.err
    assert re.search(r"\n\d+ min \d+ s, model in ", said.out)
    for mine, other in zip(log_of(folder), log_of(whole[0])[1:], strict=True):     # another process rounds otherwise
        assert mine == pytest.approx({k: v for k, v in other.items() if not k.startswith("eval_")}, rel=1e-4, abs=1e-5)
    assert (folder / "curve.png").stat().st_size > 1000
    assert {json.loads(x)["step"] for x in (folder / "samples.jsonl").read_text().splitlines()} == {1, 3}


def test_a_run_takes_the_settings_of_another_where_no_flag_says_otherwise(tmp_path):
    """All but where it is and on which machine; with another objective those that both have."""
    file = tmp_path / "config.json"
    other = parse(["--algo", "gtpo", "--lr", "3e-4", "--levels", "4-5", "--gtpo-gamma", "0.01", "--threads", "1", "--out", "there"])
    file.write_text(json.dumps(asdict(other)))

    again = parse(["--config", str(file), "--seed", "3"])
    assert asdict(again) == {**asdict(other), "config": str(file), "seed": 3, "threads": 0, "out": ""}
    grpo_run = parse(["--config", str(file), "--algo", "grpo", "--lr", "1e-4"])
    assert (grpo_run.algo, grpo_run.lr, grpo_run.levels) == ("grpo", 1e-4, "4-5")
    assert not hasattr(grpo_run, "gtpo_gamma") and grpo_run.clip_low == Config().clip_low


def test_what_another_run_has_only_filled_in_is_not_taken(tmp_path):
    """Defaults of its objective, and what followed from its other settings."""
    def beside(base, *flags):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(asdict(parse(base))))
        return parse(["--config", str(file), *flags])

    for algo in ("gtpo", "dpo", "offpolicy"):
        with_file, plain = asdict(beside(["--clip-low", "0.1"], "--algo", algo)), asdict(parse(["--algo", algo]))
        own = {name for name in plain if with_file[name] != plain[name]}
        assert own <= {"config", "clip_low"}
    assert beside(["--algo", "dpo"], "--algo", "grpo").beta == 0
    assert beside([], "--lora-rank", "4").lr == parse(["--lora-rank", "4"]).lr
    off = ["--algo", "offpolicy", "--prompts-per-step", "3"]
    assert beside(off, "--prompts-per-step", "60").buffer_groups == parse([*off, "--prompts-per-step", "60"]).buffer_groups
    assert beside(off, "--steps", "7").prompts_per_step == 3


@pytest.mark.parametrize("text, says", [
    (None, "No such file"), ("[1]", "no settings"), ("{", "Expecting"), ('{"speed": 1}', "speed is no setting of this version"),
    ('{"steps": "5"}', "steps must be int, not '5'"), ('{"algo": "ppo"}', "choose grpo"), ('{"algo": ["grpo"]}', "choose grpo"),
    ('{"steps": true}', "steps must be int, not True"), ('{"steps": 0}', "--steps 0")])
def test_settings_of_another_run_that_are_none_are_refused_in_one_line(text, says, tmp_path):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=says) as refused:
        parse(["--config", str(file)])
    assert "\n" not in str(refused.value)


def test_only_matrices_decay():
    model = Transformer(ModelConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                                    num_key_value_heads=1, qkv_bias=True, tie_word_embeddings=True)).init_weights(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = learner.adamw(model, 0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim == 2 else 1.0))
    assert {p.ndim for p in model.parameters()} == {1, 2}


def test_ranks_with_other_settings_are_named():
    one, two = ({"lr": lr, "steps": 4, "model": "m"} for lr in (1e-3, 0.5))
    assert folder.differing([one, two, one]) == {"lr": ["0.001", "0.5"]} and not folder.differing([one, one])


def test_help_is_help_also_beside_other_flags(capsys):
    for args in (["--resume", "--help"], ["--algo", "nope", "-h"], ["--algo", "gtpo", "--help"]):
        with pytest.raises(SystemExit) as stop:
            train.main(args)
        out = capsys.readouterr().out
        assert stop.value.code == 0 and "--lr" in out and ("--gtpo-gamma" in out) == ("gtpo" in args)


@pytest.mark.parametrize("file", ["config.py", "grpo.py", "gtpo.py", "offpolicy.py", "dpo.py", "distill.py", "sft.py", "evaluate.py", "judge.py",
                                  "pipeline.py", "probe.py", "rejection.py", "study.py"])
def test_no_comment_on_a_setting_is_lost_to_its_help(file):
    """Help is read from comments behind a field, and from lines that hold nothing else below it."""
    setting = ""
    for line in (HERE / file).read_text().split("\n"):
        if re.match(r"    \w+: .* = ", line):
            setting = line
        elif not re.match(r" {5,}\S", line):
            setting = ""
        elif setting and not line.strip().startswith("#"):
            assert "  # " not in line, line


def test_a_run_goes_on_with_its_own_objective(whole):
    with pytest.raises(SystemExit, match="--algo was grpo, not gtpo"):
        train.main(["--resume", "--out", str(whole[0]), "--algo", "gtpo", "--gtpo-gamma", "1"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks, options", [
    ([2, 3], ["--prompts-per-step", "7", "--minibatches", "2"]), ([3], ["--prompts-per-step", "2", "--micro-batch-tokens", "50"])])
def test_any_world_size_gives_the_single_process_run(start, tmp_path, ranks, options):
    """7 prompts in two minibatches, which go by the prompts' global numbers; and fewer prompts than ranks."""
    same_on_ranks(ranks, start, tmp_path, *options)


@pytest.mark.parametrize("extra", [
    ["--beta", "0.1"], ["--beta", "0.1", "--kl-kind", "k3_is", "--zero-variance", "keep"],
    ["--epochs", "2", "--minibatches", "2"], ["--aggregation", "constant", "--advantage-scale", "loo", "--mask-truncated"],
    ["--dtype", "bfloat16", "--activation-checkpointing", "--lr", "1e-6"], ["--ratio-level", "sequence", "--dual-clip", "3"],
    ["--format-reward", "1", "--consistency-reward", ".5", "--template", "reasoning"]])
def test_options_run_and_change_the_weights(start, tmp_path, extra, capsys):
    train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--steps", "2", *extra])
    line = log_of(tmp_path / "run")[-1]
    assert all(torch.isfinite(torch.tensor(float(v))) for v in line.values())
    if "--beta" in extra:
        assert line["kl"] > 0
    if "--epochs" in extra:
        assert line["ratio_max_dev"] < 1e-4      # of the first update; later ones move away, as they should
    before = Transformer.from_pretrained(start)
    after = stored(tmp_path / "run", 2)
    assert any(x["grad_norm"] > 0 for x in log_of(tmp_path / "run")[1:])
    assert any(not torch.equal(p, after["model." + n]) for n, p in before.named_parameters())


def test_form_alone_is_not_taken_for_a_right_answer(start, tmp_path, monkeypatch, capsys):
    """Every completion is well-formed and wrong: the format reward is 1, pass@G is 0 and the warning says so."""
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.batch_decode",
                        lambda self, ids, **k: ["<reasoning>a</reasoning><answer>77</answer>"] * len(ids))
    train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--steps", "1", "--format-reward", "1"])
    line = log_of(tmp_path / "run")[-1]
    assert line["reward"] == 1 and line["pass@G"] == 0 and line["grad_norm"] == 0
    assert "warning: pass@G is 0" in "".join(capsys.readouterr())


def test_cut_completions_are_warned_about(start, tmp_path, capsys):
    train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--steps", "1", "--max-new-tokens", "1"])
    assert "every completion was cut at --max-new-tokens 1" in "".join(capsys.readouterr())


def test_a_problem_is_never_both_trained_on_and_held_out(start, tmp_path, capsys):
    rows = [json.loads(x) for x in open(start.parent / "problems.jsonl")]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(map(json.dumps, rows[:50])))
    config = Config(model=str(start), data=str(start.parent / "problems.jsonl"), eval_data=str(held_out))
    said = []
    trained, evaluated = data.load_split(config, said.append)
    assert len(trained) == 150 and len(evaluated) == 50 and "left 50 of 200" in said[0]


@pytest.mark.parametrize("type_, expected", [("cuda", "cpu"), ("mps", "cpu")])
def test_a_build_for_an_absent_accelerator_runs_on_the_cpu(monkeypatch, type_, expected):
    """current_accelerator() names what PyTorch was built for; only check_available says that it is here."""
    def current_accelerator(check_available=False):
        return torch.device(type_) if type_ == "mps" or not check_available else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert dist.setup("").type == expected
    with pytest.raises(ValueError, match="--device cuda: no such device"):
        dist.setup("cuda")


@pytest.fixture
def bfloat16():
    """A tiny model that computes in bfloat16, in one process."""
    model = Transformer(ModelConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1)).init_weights()
    yield dist.Sharding(torch.device("cpu"), torch.bfloat16)(model)
    dist.close()


def test_a_learning_rate_of_1e_6_changes_bfloat16_training(bfloat16):
    """bf16 alone would round the update away; the float32 master keeps it, and in time it reaches the bf16 weights."""
    optimizer = learner.adamw(bfloat16, 1e-6)
    before = [p.full_tensor().detach().clone() for p in bfloat16.parameters()]
    tokens = torch.arange(12).view(2, 6)
    bfloat16.token_logps(tokens, torch.ones(2, 6))[0].sum().backward()
    optimizer.step()
    after = [p.full_tensor() for p in bfloat16.parameters()]
    assert bfloat16.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in after)
    assert all(not torch.equal(a, b) for a, b in zip(before, after))
    rounded = [torch.equal(a.bfloat16(), b.bfloat16()) for a, b in zip(before, after)]
    assert any(rounded)                                     # what bf16 weights would have lost


def test_gradients_of_micro_batches_add_up_in_float32(bfloat16):
    """1 + 2^-9 is lost in bfloat16 (8 bits) and kept by the master: the last norm's weight gets both, one a backward."""
    weight = bfloat16.model.norm.weight
    tokens = torch.arange(12).view(2, 6)
    parts = []
    for scale in (1.0, 2.0 ** -9):
        bfloat16.token_logps(tokens, torch.ones(2, 6))[0].sum().mul(scale).backward()
        parts.append(bfloat16.model.norm.weight.grad.full_tensor().clone())
    one = parts[0]
    assert weight.dtype == torch.float32 and torch.equal(one, one.bfloat16().float())       # each is a bf16 sum
    assert torch.equal(parts[1], one * (1 + 2.0 ** -9)) and not torch.equal(parts[1], parts[1].bfloat16().float())


def test_a_non_finite_loss_is_skipped_and_five_in_a_row_end_the_run(start, tmp_path, monkeypatch):
    real = grpo.loss
    monkeypatch.setattr(grpo, "loss", lambda *a: (real(*a)[0] * float("nan"), real(*a)[1]))
    with pytest.raises(SystemExit, match="five non-finite updates in a row"):
        train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--steps", "20", "--eval-every", "20",
                    "--save-every", "1"])
    weights = stored(tmp_path / "run", 4)
    assert all(torch.equal(p, weights["model." + n]) for n, p in Transformer.from_pretrained(start).named_parameters())
    assert log_of(tmp_path / "run")[-1]["loss"] is None             # NaN is not JSON


@pytest.fixture
def ready(start, tmp_path):
    """A run that is set up, with a second copy of the weights that draws."""
    config = Config(algo="offpolicy", model=str(start), data=str(start.parent / "problems.jsonl"), sync_every=2, max_new_tokens=6,
                    eval_problems=3, eval_samples=2, format_reward=.25, consistency_reward=.5)
    yield train.start(config, tmp_path / "run", torch.device("cpu"))
    folder.release()


def test_each_reward_has_its_own_weight(ready):
    assert {name: weight for name, weight, _ in ready.reward_functions} == {"correct": 1, "format": .25, "consistency": .5}


def test_evaluation_is_by_the_weights_that_are_trained(ready):
    """Not by the older ones that draw. Here the trained ones never stop, and the older ones at once."""
    assert ready.sampler_of_mu is not ready.sampler_of_pi
    ready.sampler_of_pi.eos_ids, ready.sampler_of_mu.eos_ids = torch.tensor([], dtype=torch.int64), torch.arange(280)
    assert heldout.evaluate_run(ready)["eval_length"] == 6


def test_a_held_out_problem_is_drawn_alike_on_any_rank(ready, monkeypatch):
    """Its seed is its number in the set, not its place among those of a rank."""
    drawn, generate = [], ready.sampler_of_pi.generate

    def recorded(*args, **more):
        drawn.append(generate(*args, **more))
        return drawn[-1]
    monkeypatch.setattr(ready.sampler_of_pi, "generate", recorded)
    for mine in (range(3), range(1, 3)):
        monkeypatch.setattr(dist, "split", lambda count: mine)
        heldout.evaluate_run(ready)
    _, sampled, _, of_the_last_two = [rollout.completions() for rollout in drawn]
    assert of_the_last_two == sampled[2:]


def test_bad_updates_in_a_row_are_counted_over_a_resume(ready):
    """Four before the checkpoint and one after it end the run."""
    progress = ready.learner.progress
    progress.step, progress.bad_steps = 1, 4
    train.save(ready)
    ready.learner.progress = checkpoint.Progress()
    train.restore(ready)
    for p in ready.learner.model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="five non-finite updates in a row at step 1"):
        ready.learner.descend(float("nan"))


@pytest.mark.parametrize("budget, lengths, expected", [
    (10, [3, 5, 2], [[2, 0, 1]]), (9, [3, 5, 2], [[2, 0], [1]]), (1, [3, 5], [[0], [1]]), (10, [], [])])
def test_micro_batches_are_sorted_and_within_budget(budget, lengths, expected):
    """Every row has a prompt of its own: what counts is the sum, 2 + 3 + 5, without padding."""
    assert learner.micro_batches(range(len(lengths)), lengths, [1] * len(lengths), 1, budget) == expected


@pytest.mark.parametrize("rows, budget, expected", [
    (range(6), 33, [[2, 3, 1, 0, 5, 4]]), (range(6), 32, [[2, 3, 1, 0, 5], [4]]),       # (6 + 2) + (5 + 6) + (4 + 10)
    (range(6), 19, [[2, 3, 1, 0], [5, 4]]),
    (range(6), 18, [[2, 3, 1], [0, 5], [4]]), (range(6), 13, [[2, 3, 1], [0, 5], [4]]),     # 8 + 5; then 9 + 4
    (range(6), 12, [[2, 3], [1, 0], [5], [4]]), (range(6), 1, [[2], [3], [1], [0], [5], [4]]),
    ([0, 3, 4], 28, [[3, 0, 4]]), ([4, 0, 3], 27, [[3, 0], [4]]), ([1, 3], 12, [[1, 3]]), ([], 12, [])])
def test_micro_batches_keep_groups_together_and_count_a_prompt_once_in_each(rows, budget, expected):
    """Groups of two with prompts of 3, 5 and 2, the group of the shortest longest row first."""
    assert learner.micro_batches(rows, [9, 5, 6, 7, 12, 4], [3, 3, 5, 5, 2, 2], 2, budget) == expected


# ---------------------------------------------------------------------------------------------------- bad input

def broken_jsonl(folder):
    file = folder / "broken.jsonl"
    lines = [json.dumps({"problem": f"{i} + 1?", "answer": str(i + 1)}) for i in range(30)]
    lines[16] = '{"problem": "half a li'
    file.write_text("\n".join(lines))
    return file


BAD = {     # name -> (arguments, what the line must say); M is a good model, D an empty folder
    "flag": (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    "algo": (["--algo", "ppo"], "--algo ppo: choose grpo"),
    "file": (["--data", "D/no.jsonl", "--model", "M"], "no.jsonl: no such file"),
    "line 17": (["--data", "BROKEN", "--model", "M"], "broken.jsonl:17:"),
    "empty": (["--data", "EMPTY", "--model", "M"], "holds no problems"),
    "no model": (["--data", "BROKEN"], "needs --model"),
    "no weights": (["--model", "NOWEIGHTS"], "has no weights"),
    "no such model": (["--model", "D/none"], "neither a checkpoint folder nor a hub id"),
    "group": (["--group-size", "1"], "--group-size 1: must be at least 2"),
    "length": (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    "taken": (["--out", "TAKEN", "--model", "M"], "is not empty"),
    "resume nothing": (["--resume", "--out", "D"], "holds no run"),
    "resume where": (["--resume"], "--resume needs --out"),
    "levels": (["--levels", "6-4"], "--levels 6-4"),
    "type": (["--steps", "many"], "invalid int value"),
    "device": (["--device", "tpu"], "--device tpu: choose cpu, cuda, npu"),
    "context": (["--model", "M", "--max-new-tokens", "5000"], "leaves the context of 2048"),
    "built-in context": (["--max-new-tokens", "5000"], "leave the context of 2048 tokens of the built-in model"),
    "config of wrong types": (["--resume", "--out", "TYPES"], "is not a run of this version"),
    "temperature": (["--temperature", "inf"], "--temperature inf: must be a finite number"),
    "clip": (["--clip-low", "-3"], "--clip-low -3.0: must be at least 0"),
    "foreign config": (["--resume", "--out", "FOREIGN"], "is not a run of this version"),
    "long prompts": (["--model", "M", "--max-prompt-tokens", "3"], "every prompt exceeds --max-prompt-tokens 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_loses_nothing(name, start, tmp_path, capsys):
    taken, empty = tmp_path / "taken", tmp_path / "empty.jsonl"
    taken.mkdir()
    (taken / "config.json").write_text("{}")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    types = tmp_path / "types"
    types.mkdir()
    (types / "config.json").write_text('{"steps": "x"}')
    (foreign / "config.json").write_text('{"foo": 1}')
    empty.write_text("\n")
    weightless = tmp_path / "weightless"
    weightless.mkdir()
    for file in start.glob("*.json"):
        (weightless / file.name).write_bytes(file.read_bytes())
    words = {"M": str(start), "BROKEN": str(broken_jsonl(tmp_path)), "EMPTY": str(empty), "TAKEN": str(taken), "FOREIGN": str(foreign), "TYPES": str(types),
             "NOWEIGHTS": str(weightless), "D": str(tmp_path / "d")}
    (tmp_path / "d").mkdir()
    args, expected = BAD[name]
    args = [words.get(a, a.replace("D/", str(tmp_path / "d") + "/")) for a in args]
    out = [] if "--out" in args or name == "resume where" else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        train.main([*args, *out])
    message = str(stop.value) if isinstance(stop.value.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code != 0 and expected in message and "\n" not in message
    assert (taken / "config.json").read_text() == "{}" and not (tmp_path / "out").exists()      # nothing written, nothing lost


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_ctrl_c_saves_and_says_how_to_resume(start, tmp_path, signals):
    """Ctrl-C, and what schedulers send, sometimes twice."""
    out = tmp_path / "run"
    command = [sys.executable, str(HERE / "train.py"), "--model", str(start), "--out", str(out), *fast(start), "--steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not (out / "log.jsonl").exists() or len(log_of(out)) < 4):
        time.sleep(.1)
    for number in signals:
        process.send_signal(number)
        time.sleep(.02)
    error = process.communicate()[1]
    assert process.returncode == 130 and f"python train.py --resume --out {out}" in error and "Traceback" not in error
    last = log_of(out)[-1]["step"]
    assert checkpoint.checkpoints(out / "checkpoints")[-1].name == f"step-{last:06d}"
    train.main(["--resume", "--out", str(out), "--steps", str(last + 1)])
    assert [x["step"] for x in log_of(out)] == list(range(last + 2))


def test_a_micro_batch_has_few_keys_for_its_budget():
    """Prompt 90, completions of 1: eight rows are 98 tokens, within 100, but 728 keys; 4 x 100 keys are four rows of 91."""
    assert learner.micro_batches(range(8), [91] * 8, [90] * 8, 8, 100) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("more", [["--algo", "grpo"], ["--algo", "gtpo"], ["--algo", "offpolicy"], ["--algo", "dpo"],
                                  ["--algo", "offpolicy", "--replay-ratio", "1", "--sync-every", "3"]], ids=" ".join)
def test_every_objective_learns(more, start, tmp_path):
    """The start guesses among three answers; one of them is right always. Thirty steps of 16 completions find that out."""
    file = tmp_path / "always.jsonl"
    rows = [{"problem": f"Which one, {i}?", "answer": "1", "solution": "#### 1"} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    options = dict(zip(OPTIONS[::2], OPTIONS[1::2])) | {"--data": str(file), "--steps": "30", "--eval-every": "30", "--save-every": "30",
                                                        "--lr": "3e-3", "--prompts-per-step": "4", "--group-size": "4", "--warmup-steps": "0"}
    train.main(["--model", str(start), "--out", str(tmp_path / "run"), *[word for pair in options.items() for word in pair], *more])
    lines = log_of(tmp_path / "run")
    assert lines[0]["eval_pass@1"] < 0.6 and lines[-1]["eval_pass@1"] > 0.75
    if "--sync-every" not in more:
        assert max(line["ratio_max_dev"] for line in lines[1:]) < 1e-3
