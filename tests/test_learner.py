"""From a rollout to optimizer steps: gradient variance, and whole off-policy runs from the command line."""
import itertools
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import grpo
import train
import learner
from config import Config, parse
from model import Transformer
from engine.checkpoint import Progress
from offpolicy import ReplayBuffer
from rollout import Sampler
from test_decode import small_model
from test_train import fast, log_of, same_on_ranks, start, stored       # start is a fixture

torch.set_num_threads(1)
CORRECTED = ("standard", "clipped", "truncated", "masked", "self_normalized")


# ---------------------------------------------------------------------------------------------- gradient variance

def estimate(first, second):
    """learner.gradient_variance for a loss that is linear: every row is the gradient of a group with respect to (a, b)."""
    n, params, grads = len(first) + len(second), [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)], []
    for rows in (first, second):
        (torch.tensor(rows).view(-1, 2) @ torch.cat(params)).sum().div(n).backward()
        grads.append([p.grad.clone() for p in params])
    return learner.gradient_variance(params, grads[0], [float(len(first)), float(len(second))])


@pytest.mark.parametrize("size", [3, 2, 1])
def test_gradient_variance_is_unbiased_also_for_unequal_halves(size):
    """Over all splits of six groups its mean is S^2 / 6, S^2 = sum |x - mean|^2 / 5. Means (3, 1), (1, -1): (2^2 + 2^2) / 4."""
    assert estimate([(4., 1.), (2., 1.)], [(1., 0.), (1., -2.)]) == pytest.approx(2) and math.isnan(estimate([], [(1., 0.)]))
    X = [(1., 0.), (0., 2.), (-1., 1.), (3., 1.), (0., 0.), (2., 2.)]               # the mean is (5/6, 1)
    variance = sum((a - 5 / 6) ** 2 + (b - 1) ** 2 for a, b in X) / 5 / 6
    splits = [(s, [i for i in range(6) if i not in s]) for s in itertools.combinations(range(6), size)]
    assert np.mean([estimate([X[i] for i in s], [X[i] for i in rest]) for s, rest in splits]) == pytest.approx(variance)


# ------------------------------------------------------------------------------------------------ what costs nothing

def test_groups_that_are_all_right_or_all_wrong_never_reach_the_model(monkeypatch):
    """Four groups of three completions, of which two teach something: the tokens that go through the model are theirs, the
    prompt once a group, without the last token of a completion (nothing comes after it)."""
    model, seen = small_model(), []
    one = learner.Learner(Config(group_size=3), grpo, model, learner.adamw(model, 1e-4), Progress())
    out = Sampler(model, []).generate([[1, 2], [3, 4, 5], [6], [7, 8]], 3, [4, 5, 6] * 4)
    rewards = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]])
    forward = Transformer.hidden_states
    monkeypatch.setattr(Transformer, "hidden_states", lambda self, tokens, *more: seen.append(len(tokens)) or forward(
        self, tokens, *more))
    one.make_pass(grpo.prepare(out, rewards, one.config), 4)
    assert seen == [2 + 1 + 2 * (3 + 4 + 5)]


def test_halves_of_the_gradient_variance_lie_within_each_minibatch():
    """Six groups in two minibatches: 0 2 4 and 1 3 5. Every second one of a minibatch is in its second half."""
    model, seen = small_model(), []
    one = learner.Learner(Config(group_size=2, minibatches=2, variance_every=1), grpo, model, None, Progress())
    out = Sampler(model, []).generate([[1, 2]] * 6, 2, 3)
    one.update_in_halves = lambda batch, *halves: seen.append([sorted({row // 2 for row in rows}) for rows in halves[:2]])
    one.make_pass(grpo.prepare(out, torch.tensor([[1.0, 0]] * 6), one.config), 6)
    assert seen == [[[0, 4], [2]], [[1, 5], [3]]]


# ------------------------------------------------------------------------------------------------ scoring and steps

def test_the_divisor_counts_the_rows_of_all_ranks(monkeypatch):
    """Here are 2 tokens and 3 rows, on the other rank 5 and 4; a rank without rows has the same divisor."""
    others = {"token": 5.0, "sequence": 4.0}
    for aggregation, whole in (("token", 7), ("sequence", 7)):
        monkeypatch.setattr(learner.dist, "all_reduce",
                            lambda sums, device: {"count": sums["count"] + others[aggregation]})
        one = learner.Learner(Config(aggregation=aggregation), grpo, small_model(), None, Progress())
        batch = SimpleNamespace(mask=torch.tensor([[1., 0.], [0., 0.], [0., 1.]]))
        assert one.normalizer(batch, [0, 1, 2], one.config) == whole
        assert one.normalizer(batch, [], one.config) == others[aggregation]


def test_a_rank_with_less_to_do_has_as_many_micro_batches(monkeypatch):
    """The busiest rank has three: here one of rows and two of none follow, because each pass is a collective."""
    monkeypatch.setattr(learner.dist, "all_reduce", lambda sums, device, op: {"parts": 3.0})
    out = Sampler(small_model(), []).generate([[1, 2]], 2, 3)
    batch = grpo.prepare(out, torch.tensor([[1.0, 0]]), Config())
    found = learner.micro_batches_of(batch, [0, 1], Config(group_size=2))
    assert [part for part, _ in found] == [[0, 1], [], []] and [len(micro.mask) for _, micro in found] == [2, 0, 0]


def test_the_log_of_two_updates_by_hand():
    """Sums over 10 and 30 tokens are divided by 40; loss and norm are plain means. How far pi is from the sampler's mu is said
    of the first update alone: in the second pi has moved."""
    first = {"loss": 1.0, "grad_norm": 2.0, "tokens": 10.0, "rows": 2.0, "entropy": 5.0, "kl": 1.0, "clip_ratio": 0.0,
             "ratio_mean_dev": 1.0, "ratio_max_dev": 0.5}
    second = {"loss": 3.0, "grad_norm": 4.0, "tokens": 30.0, "rows": 2.0, "entropy": 15.0, "kl": 3.0, "clip_ratio": 6.0,
              "ratio_mean_dev": 60.0, "ratio_max_dev": 7.0}
    one = learner.Learner(Config(), grpo, None, None, Progress())
    assert one.means([first, second]) == pytest.approx({
        "entropy": 0.5, "kl": 0.1, "clip_ratio": 0.15, "loss": 2.0, "grad_norm": 3.0, "ratio_mean_dev": 0.1, "ratio_max_dev": 0.5})


@pytest.mark.parametrize("parameters, device, trimmed", [(10 ** 8, "cpu", 1), (10 ** 8 - 1, "cpu", 0), (10 ** 9, "meta", 0)])
def test_freed_memory_of_large_models_goes_back(parameters, device, trimmed, monkeypatch):
    model = SimpleNamespace(device=torch.device(device), parameters=lambda: [torch.empty(parameters, device="meta")])
    calls = []
    monkeypatch.setattr(learner.dist.ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=calls.append))
    learner.dist.give_memory_back(model)
    assert calls == [0] * trimmed
    monkeypatch.setattr(learner.dist.ctypes, "CDLL", lambda name: SimpleNamespace())      # no glibc
    learner.dist.give_memory_back(model)


def test_the_reference_is_scored_at_the_temperature_of_the_run():
    """Before the first update pi is the reference, so its log-probs are those that the tokens were drawn at."""
    model = small_model()
    config = Config(group_size=2, temperature=0.5, beta=0.1)
    one = learner.Learner(config, grpo, model, None, Progress(), reference=small_model())
    out = Sampler(model, []).generate([[1, 2], [3]], 2, 5, temperature=0.5)
    batch = one.batch(out, torch.tensor([[1.0, 0], [0, 1]]))
    torch.testing.assert_close(batch.ref_logp, out.logps, atol=1e-4, rtol=0)
    assert (model.token_logps(out.tokens, batch.mask)[0] - out.logps).abs().max() > 0.1         # at temperature 1


def test_two_steps_of_adam_by_hand():
    """Gradients 1 and -2, betas .9 and .95: m = .9 x .1 - .2 = -.11, v = .95 x .05 + .2 = .2475, over 1 - .81 and 1 - .9025."""
    p = torch.nn.Parameter(torch.tensor([[1.0]]))       # a matrix, so it decays
    optimizer = learner.adamw(None, 0.1, weight_decay=0.5, parameters=[p])
    first = 1.0 * (1 - 0.1 * 0.5) - 0.1
    second = first * (1 - 0.1 * 0.5) + 0.1 * (0.11 / 0.19) / math.sqrt(0.2475 / 0.0975)
    for gradient, expected in ((1.0, first), (-2.0, second)):
        p.grad = torch.tensor([[gradient]])
        optimizer.step()
        assert p.item() == pytest.approx(expected, abs=1e-6)


def descending():
    """A learner whose gradient is 1 everywhere, and its `descend`."""
    model = small_model()
    one = learner.Learner(Config(), grpo, model, learner.adamw(model, 1e-3), Progress(), say=lambda line: None)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return one


@pytest.mark.parametrize("loss, factor", [(math.nan, 1), (math.inf, 1), (0.5, math.nan), (0.5, math.inf)])
def test_a_loss_or_a_gradient_that_alone_is_not_finite_makes_no_step(loss, factor):
    """The gradient is finite all the same where only a constant of the loss is not. A good update ends the count."""
    one = descending()
    before = [p.detach().clone() for p in one.model.parameters()]
    next(one.model.parameters()).grad *= factor
    assert math.isfinite(one.descend(loss)) == (factor == 1)
    assert one.progress.bad_steps == 1 and one.progress.updates == 0
    assert all(map(torch.equal, before, one.model.parameters()))

    for p in one.model.parameters():
        p.grad = torch.ones_like(p)
    one.descend(0.5)
    assert one.progress.bad_steps == 0 and one.progress.updates == 1
    assert not any(map(torch.equal, before, one.model.parameters()))


def test_only_five_bad_updates_in_a_row_end_the_run():
    one = descending()
    for loss in [math.nan] * 4 + [0.5] + [math.nan] * 4:
        one.descend(loss)
    with pytest.raises(ValueError, match="five non-finite updates in a row"):
        one.descend(math.nan)
    assert one.progress.updates == 1


# ------------------------------------------------------------------------------------------- from the command line

QUICK = ["--eval-every", "100", "--eval-problems", "2", "--eval-samples", "1"]


def run(start, out, *args):
    """A run of four quick steps; the lines of its log without the first evaluation."""
    train.main(["--model", str(start), "--out", str(out), *fast(start), *QUICK, *" ".join(args).split()])
    return log_of(out)[1:]


def checkpoint(out, step=4):
    """Tensors and the rest of a checkpoint."""
    return stored(out, step), torch.load(out / "checkpoints" / f"step-{step:06d}" / "extra.pt", weights_only=True)


def equal(a, b):
    """Dicts of tensors and numbers, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(x, b[k]) if torch.is_tensor(x) else x == b[k] for k, x in a.items())


@pytest.fixture(scope="module")
def on_policy(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("on_policy") / "run"
    return out, run(start, out, "--algo grpo")


def test_replay_ratio_1_is_grpo_bit_for_bit(start, on_policy, tmp_path):
    for form in ("bypass", "decoupled"):
        lines = run(start, tmp_path / form, "--algo offpolicy --replay-ratio 1 --correction", form)
        assert equal(checkpoint(tmp_path / form)[0], checkpoint(on_policy[0])[0])
        for line, expected in zip(lines, on_policy[1], strict=True):
            assert {k: line[k] for k in expected} == expected
            assert line["staleness"] == 0 and line["replay_ratio"] == 1 and 0 <= line["kl_pi_mu"] < 1e-6
            assert line["ess"] == pytest.approx(1) and line["is_weight_max"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("form", ["bypass", "decoupled"])
def test_reuse_is_another_run_with_its_own_numbers_in_the_log(start, on_policy, tmp_path, form):
    lines = run(start, tmp_path / "run", "--algo offpolicy --replay-ratio 3 --correction", form)
    assert not equal(checkpoint(tmp_path / "run")[0], checkpoint(on_policy[0])[0])
    for line, before in zip(lines, [dict.fromkeys(lines[0], 0), *lines]):
        assert line["replay_ratio"] == 3 and .5 < line["ess"] <= 1 and line["kl_pi_mu"] > 1e-6 and line["is_weight_max"] > 1
        assert all(line[k] > before[k] for k in ("buffer_mb", "buffer_groups"))
    assert lines[0]["staleness_max"] == 0 and lines[3]["staleness_max"] > 0 and lines[3]["staleness"] > lines[1]["staleness"]
    assert [x["num_samples"] for x in lines] == [x["num_samples"] for x in on_policy[1]]


def test_sync_every_3_draws_by_weights_up_to_two_updates_old(start, tmp_path):
    lines = run(start, tmp_path / "run", "--algo offpolicy --replay-ratio 1 --sync-every 3 --steps 6")
    assert [x["staleness"] for x in lines] == [x["staleness_max"] for x in lines] == [0, 1, 2, 0, 1, 2]
    assert [x["ratio_max_dev"] < 1e-4 for x in lines] == [x["kl_pi_mu"] < 1e-7 for x in lines] == [True, False, False] * 2


@pytest.mark.parametrize("form, passes", [("decoupled", [1, 1, 1, 1]), ("bypass", [2, 1, 2, 1])])
def test_the_kl_limit_ends_reuse_and_the_clip_follows(start, tmp_path, form, passes):
    """Steps 1 and 3 are on-policy, 2 and 4 stale: their first pass is made all the same. Of a pass over the buffer the
    decoupled form knows in advance that it would begin too far away; bypass finds it out on the way."""
    lines = run(start, tmp_path / "run", "--algo offpolicy --replay-ratio 3 --sync-every 2 --kl-limit 1e-6 --adaptive-clip "
                f"--correction {form}")
    assert [x["replay_ratio"] for x in lines] == passes and all(x["grad_norm"] > 0 for x in lines)
    assert all(x["kl_last"] > 1e-6 for x in lines)              # also of a pass that was not made: it says why
    assert [x["clip"] for x in lines] == pytest.approx([.2 / 1.1 ** k for k in range(4)])


def test_no_group_is_drawn_too_often_or_too_old_also_within_a_step(start, tmp_path, monkeypatch):
    seen, sample = [], ReplayBuffer.sample
    monkeypatch.setattr(ReplayBuffer, "sample", lambda self, *a: seen.append(sample(self, *a)) or seen[-1])
    lines = run(start, tmp_path / "reuse", "--algo offpolicy --replay-ratio 4 --max-reuse 1 --prompts-per-step 3")
    assert max(g.uses for groups, _ in seen for g in groups) == 1
    for updates in ("", "--epochs 2", "--minibatches 2"):       # the age is that of rollouts, however often each is learned from
        lines = run(start, tmp_path / f"old{updates}", f"--algo offpolicy --replay-ratio 4 --max-staleness 2 {updates}")
        assert [x["staleness_max"] for x in lines] == [0, 1, 2, 2] and lines[-1]["buffer_groups"] <= 3 * 6


def test_a_buffer_that_cannot_hold_a_rollout_is_said(start, tmp_path, capsys):
    with pytest.raises(SystemExit, match="--buffer-groups 5: less than a rollout"):
        run(start, tmp_path / "few", "--algo offpolicy --buffer-groups 5")
    run(start, tmp_path / "small", "--algo offpolicy --buffer-mb 1e-4 --steps 1")
    assert "of this rollout: raise --buffer-mb" in capsys.readouterr().out


@pytest.mark.parametrize("stop, extra", [
    ("steps", "--sync-every 3"),
    ("crash", "--priority .6 --adaptive-replay --adaptive-clip --kl-limit 1e-4 --replay-ratio 4 --correction bypass"),
    ("crash", "--sync-every 3 --importance self_normalized --max-reuse 2 --min-ess .5 --buffer-groups 9")])
def test_a_run_resumes_bit_for_bit_with_its_buffer_in_the_middle_of_a_period(start, tmp_path, stop, extra):
    """4 steps against 2 and 2: with --steps 2 first, or by the loss of all that came after the checkpoint of step 2."""
    a, b = tmp_path / "whole", tmp_path / "two"
    run(start, a, "--algo offpolicy", extra)
    if stop == "steps":
        run(start, b, "--algo offpolicy", extra, "--steps 2")
    else:
        shutil.copytree(a, b)
        shutil.rmtree(b / "checkpoints" / "step-000004")
    assert len(checkpoint(b, 2)[1]["buffer"]["sizes"]) >= 4
    train.main(["--resume", "--out", str(b), "--steps", "4"])
    (weights, more), (weights_b, more_b) = checkpoint(a), checkpoint(b)
    assert equal(weights, weights_b) and equal(more.pop("buffer"), more_b.pop("buffer"))
    assert more == more_b and any(name.startswith("behaviour.") for name in weights) == ("sync-every" in extra)
    logs = [[{k: v for k, v in line.items() if "eval" not in k} for line in log_of(x)] for x in (a, b)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("extra", [
    "--importance none", *(f"--importance {scheme} --importance-level {level}" for scheme, level in zip(
        CORRECTED, ("sequence", "geometric", "token", "geometric", "token"))),
    "--importance retrace --trace .9", "--importance tempered --trace .5", "--importance-normalize group --beta .1",
    "--correction bypass --trust-region second_moment --trust-delta .04", "--trust-region sequence --trust-delta 1e-3",
    "--trust-region token --trust-delta 1e-3 --min-ess 1 --buffer-mb .001", "--minibatches 2 --epochs 2 --variance-every 0"])
def test_every_scheme_and_trust_region_runs_and_changes_the_weights(start, tmp_path, extra):
    lines = run(start, tmp_path / "run", "--algo offpolicy --variance-every 1 --steps 2", extra)
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert all(x["replay_ratio"] == 2 and x.get("grad_variance", 1) > 0 for x in lines)
    before, after = load_file(start / "model.safetensors"), checkpoint(tmp_path / "run", 2)[0]
    assert any(not torch.equal(before[k], after["model." + k]) for k in before)


def test_the_variance_is_measured_every_k_steps_and_changes_nothing_else(start, on_policy, tmp_path):
    lines = run(start, tmp_path / "run", "--algo grpo --variance-every 2")
    assert [x.pop("grad_variance", 0) > 0 for x in lines] == [False, True, False, True]
    assert all(x == pytest.approx(expected, rel=1e-4, abs=1e-5) for x, expected in zip(lines, on_policy[1], strict=True))


@pytest.mark.parametrize("args, message", [
    ("offpolicy --correction bypass --importance clipped", "--importance needs --correction decoupled"),
    ("grpo --replay-ratio 3", "--replay-ratio has no effect with --algo grpo"),
    ("grpo --replay-ratio 2", "--replay-ratio has no effect with --algo grpo"),         # also when it is the default
    ("gtpo --sync-every 2", "--sync-every has no effect with --algo gtpo"), ("offpolicy --gtpo-gamma 1", "--gtpo-gamma"),
    ("offpolicy --replay-ratio 0", "--replay-ratio 0: must be at least 1"), ("offpolicy --adaptive-clip", "--kl-limit"),
    ("offpolicy --min-ess 2", "--min-ess 2.0"), ("offpolicy --trace 2", "--trace 2.0"),
    ("offpolicy --importance ppo", "--importance ppo: choose none"), ("offpolicy --trust-region kl", "--trust-region kl: choose")])
def test_combinations_without_a_meaning_are_one_line_that_names_the_flag(args, message, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train.main(["--algo", *args.split(), "--model", str(tmp_path / "none"), "--out", str(tmp_path / "run")])
    assert message in str(stop.value) and "\n" not in str(stop.value) and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("nproc, prompts", [(2, "7"), (3, "2")])
def test_several_ranks_give_the_run_of_one_process(start, tmp_path, nproc, prompts):
    options = ["--algo", "offpolicy", "--prompts-per-step", prompts, *"--micro-batch-tokens 60 --importance self_normalized "
               "--priority .6 --trust-region second_moment --trust-delta 1e-3 --adaptive-replay --variance-every 2".split()]
    lines = same_on_ranks([nproc], start, tmp_path, *QUICK, *options)
    assert any(x["staleness"] > 0 for x in lines[1:])


@pytest.mark.parametrize("flags, message", [
    ("--algo offpolicy --replay-ratio 1 --importance clipped", "--importance needs samples of older weights"),
    ("--algo offpolicy --replay-ratio 1 --adaptive-clip --kl-limit 1", "--adaptive-clip needs samples of older weights"),
    ("--algo offpolicy --importance masked --importance-cap 0.5", "keeps weights from 0 to 0.5"),
    ("--algo offpolicy --importance masked --importance-low 1.5", "keeps weights from 1.5 to 2"),
    ("--algo offpolicy --priority 1e4", "--priority 10000.0: must be at most 10"),
    ("--advantage-scale none --unbiased-std", "--unbiased-std needs --advantage-scale std or batch"),
    ("--model x --warm-start-steps 99", "--warm-start-steps needs no --model"),
    ("--model x --data y.jsonl --levels 2-2", "--levels needs a built-in task"),
    ("--steps 5 --variance-every 6", "above --steps 5")])
def test_settings_that_would_do_nothing_or_something_else_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(flags.split())
