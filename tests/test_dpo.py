"""DPO: losses by hand, pairs, and a gradient that is autograd's through the pair whatever the split."""
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpo
import learner
import train
from config import Config
from engine.checkpoint import Progress
from model import trainable
from rollout import Sampler
from test_decode import small_model
from test_train import fast, log_of, same_on_ranks, same_when_resumed, start        # start is a fixture

torch.set_num_threads(1)
NAMES = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
         "logps/rejected")


# -------------------------------------------------------------------------------------- the loss

@pytest.mark.parametrize("kind, expected", [
    # margins 0, 4 and -6; beta 0.5: D is 0, 2 and -3
    ("sigmoid", [math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(3))]),
    ("ipo", [1.0, 9.0, 49.0]),              # (margin - 1)^2
    ("hinge", [1.0, 0.0, 4.0])])
def test_losses_by_hand(kind, expected):
    chosen, rejected = torch.tensor([-5., -3., -9.]), torch.tensor([-7., -8., -4.])
    ref_chosen, ref_rejected = torch.tensor([-5., -4., -6.]), torch.tensor([-7., -5., -7.])
    loss = dpo.preference_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5, kind)
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_a_loss_far_out_is_finite():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = dpo.preference_loss(far, torch.zeros(2), torch.zeros(2), torch.zeros(2))
    assert loss.tolist() == [0.0, 1000.0]
    assert torch.autograd.grad(loss.sum(), far)[0].tolist() == pytest.approx([0.0, -0.1])


@pytest.mark.parametrize("options", [{"kind": "kto"}, {"beta": 0.0}, {"beta": -1.0}, {"beta": math.nan}])
def test_wrong_arguments_are_one_line(options):
    with pytest.raises(ValueError):
        dpo.preference_loss(*torch.zeros(4, 1), **options)


# -------------------------------------------------------------------------------------- the pairs

def test_pairs_by_hand():
    """Group 0: one right, two wrong. Group 1 teaches nothing. Group 2: two of each."""
    rewards = torch.tensor([[0., 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]])
    chosen, rejected = dpo.pairs(rewards, per_prompt=2)
    assert chosen.dtype == torch.int64
    assert chosen.tolist()[0] == 1 and rejected.tolist()[0] in (0, 2, 3)
    assert sorted(chosen.tolist()[1:]) == [8, 10] and sorted(rejected.tolist()[1:]) == [9, 11]


def test_the_closest_in_length_come_first_and_similar_ones_are_left_out():
    rewards, lengths = torch.tensor([[1., 1, 0, 0]]), torch.tensor([[10, 50, 48, 13]])
    assert [x.tolist() for x in dpo.pairs(rewards, 2, lengths=lengths)] == [[1, 0], [2, 3]]
    assert [x.tolist() for x in dpo.pairs(rewards, 2, lengths=lengths, allowed=lambda i, j: j != 2)] == [[0], [3]]
    assert dpo.overlap([1, 2, 3, 3], [2, 3, 4]) == 0.5 and dpo.overlap([], []) == 0


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.1]), min_size=5, max_size=5), min_size=1, max_size=6),
       st.integers(1, 4), st.integers(0, 99))
def test_pairs_stay_within_a_prompt_and_no_row_comes_twice(rewards, per_prompt, seed):
    rewards = torch.tensor(rewards)
    chosen, rejected = dpo.pairs(rewards, per_prompt, seed)
    again = dpo.pairs(rewards, per_prompt, seed)
    assert torch.equal(chosen, again[0]) and torch.equal(rejected, again[1])

    flat = rewards.flatten()
    assert (chosen // 5 == rejected // 5).all() and (flat[chosen] > flat[rejected]).all()
    rows = torch.cat([chosen, rejected]).tolist()
    assert len(set(rows)) == len(rows)
    for n, group in enumerate(rewards):
        wanted = min(per_prompt, int((group > 0.55).sum()), int((group < 0.55).sum()))
        if group.max() > 0.55 and group.min() < 0.55:
            assert int((chosen // 5 == n).sum()) == wanted


@pytest.mark.parametrize("rewards, per_prompt", [(torch.zeros(4), 1), (torch.zeros(2, 2), 0)])
def test_wrong_shapes_are_one_line(rewards, per_prompt):
    with pytest.raises(ValueError):
        dpo.pairs(rewards, per_prompt)


# ----------------------------------------------------------------------------------- the gradient

def gradient_by_autograd(model, reference, batch, c):
    """The gradient of the mean over pairs of the loss, straight through both completions of each pair."""
    sums = (model.token_logps(batch.tokens, batch.mask)[0] * batch.mask).sum(1)
    with torch.no_grad():
        ref = (reference.token_logps(batch.tokens, batch.mask)[0] * batch.mask).sum(1)
    right = (batch.chosen & batch.active).nonzero()[:, 0]
    wrong = batch.partner[right]
    loss = dpo.preference_loss(sums[right], sums[wrong], ref[right], ref[wrong], c.beta, c.preference)
    loss = loss - c.sft_weight * sums[right] / batch.mask[right].sum(1)
    loss.mean().backward()
    return loss.mean().item(), [p.grad.clone() for p in trainable(model)]


@pytest.mark.parametrize("budget", [1, 40, 10 ** 6])
@pytest.mark.parametrize("kind, sft_weight", [("sigmoid", 0.0), ("ipo", 0.5), ("hinge", 1.0)])
def test_the_gradient_is_that_of_the_pairs_for_any_micro_batch(budget, kind, sft_weight, monkeypatch):
    model, reference = small_model(), small_model().init_weights(7)
    c = Config("dpo", group_size=4, prompts_per_step=4, preference=kind, sft_weight=sft_weight, beta=0.3,
               pairs_per_prompt=2, most_overlap=1.0, micro_batch_tokens=budget)
    one = learner.Learner(c, dpo, model, learner.adamw(model, 1e-4), Progress(), reference=reference)
    out = Sampler(model, []).generate([[1, 2], [3, 4, 5], [6], [7, 8]], 4, [4, 5, 6, 2] * 4)
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0]])

    twin = copy.deepcopy(model)
    batch = one.batch(out, rewards)
    value, expected = gradient_by_autograd(twin, reference, batch, c)
    found = {}
    monkeypatch.setattr(one, "descend", lambda loss: found.update(
        loss=loss, grads=[p.grad.clone() for p in trainable(model)]) or 0.0)
    updates, line = one.objective.learn(one, out, rewards)
    assert line["pairs"] == 5 and found["loss"] == pytest.approx(value, rel=1e-5)
    largest = max(1.0, max(want.abs().max().item() for want in expected))       # ipo's are large
    for got, want in zip(found["grads"], expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6 * largest, rtol=1e-5)
    assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-5)


# ----------------------------------------------------------------------------------------- runs

def test_a_run_raises_the_margin_and_logs_its_names(start, tmp_path):
    train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--algo", "dpo", "--epochs", "6",
                "--steps", "2", "--most-overlap", "1", "--warmup-steps", "0"])
    lines = log_of(tmp_path / "run")[1:]
    assert all(name in line for line in lines for name in NAMES)
    assert lines[0]["pairs"] > 0 and lines[0]["rewards/margins"] > 0 and lines[0]["loss"] < math.log(2)


@pytest.mark.parametrize("extra", [["--minibatches", "2", "--epochs", "2"], ["--lora-rank", "2"]])
def test_resume_is_exact(start, tmp_path, extra):
    same_when_resumed(start, tmp_path, "--algo", "dpo", "--most-overlap", "1", *extra)


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_numbers(start, tmp_path):
    same_on_ranks([2, 5], start, tmp_path, "--algo", "dpo", "--most-overlap", "1", "--minibatches", "2", "--epochs", "2")


@pytest.mark.parametrize("options, message", [
    (["--clip-low", "0.1"], "it is a setting of grpo"), (["--beta", "0"], "must be above 0"),
    (["--preference", "kto"], "choose sigmoid, ipo, hinge")])
def test_settings_of_others_and_wrong_ones_are_one_line(start, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--algo", "dpo", *options])
