"""DPO: losses by hand, pairs, and a gradient that is autograd's through the pair whatever the split."""
import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import dpo
import learner
import prompts
import sft
import train
from config import Config
from engine.checkpoint import Progress
from model import trainable
from rollout import Sampler
from test_decode import small_model
from test_train import fast, log_of, run_train, same_on_ranks, same_when_resumed, start        # start is a fixture

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


def test_every_seed_is_one():
    assert len(dpo.pairs(torch.tensor([[1., 0., 0.]]), 1, 2 ** 63 - 1)[0]) == 1


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
    (["--preference", "kto"], "choose sigmoid, ipo, hinge"), (["--reward", "format=1"], "pairs right answers with wrong ones"),
    (["--overlong-buffer", "2"], "no other reward may count"), (["--consistency-reward", "0.5"], "no other reward may count")])
def test_settings_of_others_and_wrong_ones_are_one_line(start, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        train.main(["--model", str(start), "--out", str(tmp_path / "run"), *fast(start), "--algo", "dpo", *options])


# ------------------------------------------------------------------------------- pairs of a file

QUESTION = {"role": "user", "content": "Which one, 3?"}
LAYOUTS = [         # TRL's: of text, of conversations beside a prompt, and of whole conversations; with a system message
    {"prompt": "Which one, 3?", "chosen": "#### 0", "rejected": "#### 1"},
    {"prompt": [QUESTION], "chosen": [{"role": "assistant", "content": "#### 0"}], "rejected": [{"role": "assistant", "content": "#### 1"}]},
    {"chosen": [QUESTION, {"role": "assistant", "content": "#### 0"}], "rejected": [QUESTION, {"role": "assistant", "content": "#### 1"}]},
    {"problem": "Which one, 3?", "answer": ["0"], "chosen": "#### 0", "rejected": "#### 1", "level": 2, "id": None}]


def pairs_file(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def pairs_of(path):
    return data.load_problems(path, answered=False, report=lambda line: None)


def test_sft_offers_the_losses_that_there_are():
    assert sft.PREFERENCES == ("", *dpo.KINDS)


def test_pairs_of_any_layout_are_the_same_tokens(start, tmp_path):
    tokenizer = prompts.load_tokenizer(start)
    pairs = pairs_of(pairs_file(tmp_path / "p.jsonl", LAYOUTS))
    found = sft.encode(pairs, list(map(dpo.texts_of, pairs)), tokenizer, sft.SFTConfig())
    prompt, chosen, rejected = found[0]
    assert found == [found[0]] * 4
    assert tokenizer.decode(prompt) == "Which one, 3?\n"
    assert tokenizer.decode(chosen) == "#### 0" + prompts.EOS and tokenizer.decode(rejected) == "#### 1" + prompts.EOS


@pytest.mark.parametrize("row, what", [
    ({"prompt": "a", "chosen": "b"}, 'no text in the field "rejected"'),
    ({"prompt": "a", "chosen": "b", "rejected": 3}, 'no text in the field "rejected"'),
    ({"prompt": "a", "chosen": [{"role": "system", "content": "b"}], "rejected": "c"}, 'no text in the field "chosen"'),
    ({"prompt": "a", "chosen": [QUESTION, {"role": "assistant", "content": "b"}], "rejected": "c"}, "chosen answers another question"),
    ({"chosen": [QUESTION, {"role": "assistant", "content": "b"}], "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "c"}]},
     "rejected answers another question"),
    ({"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "\ud800"}]}, "a lone surrogate"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same text"),
    ({"prompt": "a", "chosen": "b", "rejected": [QUESTION, {"role": "assistant", "content": "c"}, QUESTION]}, "a conversation of several turns"),
    ({"chosen": "b", "rejected": "c"}, "no text in the field \"problem\"")])
def test_a_row_that_is_no_pair_is_one_line(row, what, tmp_path):
    file = pairs_file(tmp_path / "p.jsonl", [LAYOUTS[0], row])
    with pytest.raises(ValueError, match=f"p.jsonl:2: .*{what}"):
        list(map(dpo.texts_of, pairs_of(file)))


@pytest.mark.parametrize("options, what", [
    (["--data", "PAIRS"], "--preference needs --model"),
    (["--data", "PAIRS", "--model", "START", "--terse-steps", "3"], "--terse-steps needs solutions"),
    (["--data", "PAIRS", "--model", "START", "--teacher", "START"], "--teacher needs solutions"),
    (["--data", "arithmetic", "--model", "START"], "needs a file of pairs")])
def test_what_pairs_do_not_go_with_is_one_line(options, what, start, tmp_path):
    named = {"PAIRS": pairs_file(tmp_path / "p.jsonl", LAYOUTS), "START": str(start)}
    options = [named.get(word, word) for word in options]
    with pytest.raises(SystemExit, match=what):
        sft.main([*options, "--preference", "sigmoid", "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("kind, sft_weight", [("sigmoid", 0.0), ("ipo", 0.5), ("hinge", 1.0)])
def test_the_gradient_of_pairs_of_a_file_is_that_of_the_definition(kind, sft_weight, monkeypatch):
    model, reference = small_model(), small_model().init_weights(7)
    c = sft.SFTConfig(model="x", preference=kind, sft_weight=sft_weight, beta=0.3, micro_batch_tokens=9)
    offline = dpo.FilePairs(reference)
    one = learner.Learner(c, offline, model, learner.adamw(model, 1e-4), Progress(), reference=reference)
    pairs = [([1, 2], [3, 4, 7], [5, 7]), ([6], [4, 7], [4, 5, 6, 7]), ([2, 3, 4], [5, 5, 7], [6, 7])]

    twin = copy.deepcopy(model)
    batch = sft.collate(pairs, torch.device("cpu"))
    batch.chosen = torch.tensor([True, False] * 3)
    batch.active, batch.partner = torch.ones(6, dtype=torch.bool), torch.tensor([1, 0, 3, 2, 5, 4])
    value, expected = gradient_by_autograd(twin, reference, batch, c)

    found = {}
    monkeypatch.setattr(one, "descend", lambda loss: found.update(loss=loss, grads=[p.grad.clone() for p in trainable(model)]) or 0.0)
    sums = offline.update(one, sft.collate(pairs, torch.device("cpu")), list(range(6)))
    assert found["loss"] == pytest.approx(value, rel=1e-5)
    largest = max(1.0, max(want.abs().max().item() for want in expected))
    for got, want in zip(found["grads"], expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6 * largest, rtol=1e-5)
    assert sums["rewards/margins"] == pytest.approx(sums["rewards/chosen"] - sums["rewards/rejected"], abs=1e-5)


def file_run(start, tmp_path, *options):
    """Learn from 40 pairs of which 0 is always the right answer. Returns the log."""
    rows = [{"prompt": f"Which one, {i}?", "chosen": "#### 0", "rejected": f"#### {1 + i % 2}"} for i in range(40)]
    sft.main(["--data", pairs_file(tmp_path / "p.jsonl", rows), "--model", str(start), "--out", str(tmp_path / "out"), "--preference", "sigmoid",
              "--steps", "20", "--batch-size", "8", "--device", "cpu", "--threads", "1", *options])
    return [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [["--lr", "2e-3"], ["--lr", "5e-3", "--lora-rank", "4", "--beta", "0.2"]])
def test_pairs_of_a_file_are_learned_with_all_weights_and_with_lora(options, start, tmp_path):
    """At the start pi is the reference, also through the adapter that has just been attached."""
    held_out = pairs_file(tmp_path / "e.jsonl", [{"prompt": "Which one, 99?", "chosen": "#### 0", "rejected": "#### 1"}] * 2)
    lines = file_run(start, tmp_path, *options, "--eval-data", held_out, "--eval-every", "19")
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [19, 20]
    margin = evaluated[-1]["eval_rewards/margins"]
    assert evaluated[-1]["eval_loss"] == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-4)     # both pairs are the same
    assert margin > 0.1 and evaluated[-1]["eval_rewards/accuracies"] == 1
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(lines[0]["rewards/margins"]) < 1e-5
    assert lines[-1]["rewards/accuracies"] == 1 and lines[-1]["rewards/margins"] > 0.3 and lines[-1]["loss"] < 0.6
    assert lines[-1]["logps/chosen"] > lines[-1]["logps/rejected"]


@pytest.mark.slow
def test_pairs_of_a_file_on_two_ranks_are_those_of_one(start, tmp_path):
    (tmp_path / "one").mkdir()
    lines = file_run(start, tmp_path / "one", "--steps", "3", "--batch-size", "5")
    run_train("--data", tmp_path / "one" / "p.jsonl", "--model", start, "--out", tmp_path / "two", "--preference", "sigmoid", "--steps", "3",
              "--batch-size", "5", "--device", "cpu", "--threads", "1", nproc=2, program="sft.py")
    others = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    for one, two in zip(lines, others, strict=True):
        one.pop("seconds"), two.pop("seconds")
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
