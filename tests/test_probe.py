"""The probe of group size: unbiased by enumeration, its gradients the trainer's own, and the program."""
import itertools
import json
import math

import numpy as np
import pytest
import torch

import grpo
import probe
import theory
from config import Config
from test_offpolicy import drawn, tiny

torch.set_num_threads(1)
RANDOM = np.random.default_rng(0)
P, REWARDS, SCORES = np.array([.5, .3, .2]), np.array([1., 0, 1]), RANDOM.normal(size=(3, 5))
SCORES -= P @ SCORES                                    # scores of a softmax have the mean 0


def test_pair_products_are_unbiased_by_enumeration_of_every_group():
    """All 81 groups of 4 of three completions. 4 zeta_1 = c2 and 2 zeta_2 - 4 zeta_1 = c3 of theory.py, at G = 4 and 5."""
    gradient, c2, c3 = theory.prompt_constants(P, SCORES, REWARDS)
    for G in (4, 5):
        mean = np.zeros(3)
        for group in itertools.product(range(3), repeat=G):
            s = SCORES[list(group)]
            mean += P[list(group)].prod() * np.array(probe.pair_products(s @ s.T, REWARDS[list(group)]))
        none, one, both = mean
        assert none == pytest.approx(gradient @ gradient)
        assert 4 * (one - none) == pytest.approx(c2)
        assert 2 * (both - none) - 4 * (one - none) == pytest.approx(c3)


def test_constants_by_hand():
    """Gradients (1, 0), (0, 1), (1, 1): variance 1/3 in each of two directions, with n - 1. None, one and both are means."""
    gradients = np.array([[1., 0], [0, 1], [1, 1]])
    by_prompt = np.array([[1., 2, 5], [1, 2, 5], [2, 3, 6]])
    c1, c2, c3 = probe.constants(by_prompt, gradients @ gradients.T)
    assert (c1, c2, c3) == (pytest.approx(2 / 3), pytest.approx(4), pytest.approx(4))
    assert c1 == pytest.approx(gradients.var(0, ddof=1).sum())
    assert probe.best_size(c1, c3) == pytest.approx(1 + math.sqrt(6))
    assert probe.best_size(-.1, c3) == probe.best_size(0, c3) == math.inf


def test_the_jackknife_is_the_plain_one():
    gradients = RANDOM.normal(size=(12, 4)) + 1
    squares = (gradients ** 2).sum(1)
    by_prompt = np.stack([squares, squares + 1, squares + 9 + RANDOM.random(12)], 1)
    values = []
    for i in range(12):
        rest = np.delete(gradients, i, 0)
        c1, _, c3 = probe.constants(np.delete(by_prompt, i, 0), rest @ rest.T)
        values.append(.5 * math.log(c3 / c1))
    assert probe.jackknife(by_prompt, gradients @ gradients.T) == pytest.approx(math.sqrt(11 / 12 * ((np.array(values) - np.mean(values)) ** 2).sum()))
    assert probe.jackknife(by_prompt, 100 * gradients @ gradients.T) == math.inf       # c1 below 0: no difference is seen


def test_a_sketch_keeps_inner_products():
    """Exact where it fits; else right on average, within |a| |b| / sqrt(size) each."""
    a, b = torch.randn(2, 600, generator=torch.Generator().manual_seed(0))
    a += .3 * b
    exact = (a @ b).item()
    fits = [probe.sketch([v[:100], v[100:].view(50, 10)], 600) for v in (a, b)]
    assert torch.equal(fits[0], a) and (fits[0] @ fits[1]).item() == pytest.approx(exact)
    found = torch.tensor([(probe.sketch([a], 64, seed) @ probe.sketch([b], 64, seed)).item() for seed in range(2000)])
    spread = (a.norm() * b.norm()).item() / 8
    assert .5 * spread < found.std() < 2 * spread
    assert abs(found.mean().item() - exact) < 4 * spread / math.sqrt(2000)


def test_its_mean_gradient_is_that_of_the_trainer():
    """(1/(G-1)) sum (r - mean) s of each prompt, added up over prompts, against the loss of --advantage-scale loo."""
    model = tiny()
    rollout, rewards = drawn(model)
    total = 0
    for i, r in enumerate(rewards):
        s = probe.scores_of(model, rollout, range(4 * i, 4 * i + 4), 10 ** 5, 1.0)
        total = total + probe.of_prompt(s, r.double().numpy())[1]
    assert (total.norm() > 0).item()

    config = Config(advantage_scale="loo", aggregation="sequence")
    batch = grpo.prepare(rollout, rewards, config)
    logp, _ = model.token_logps(batch.tokens, batch.mask)
    per_token = grpo.policy_loss(logp, batch.old_logp, batch.advantages, batch.mask)
    gradient = torch.autograd.grad(per_token.sum(), list(model.parameters()))
    flat = torch.cat([g.flatten() for g in gradient])
    torch.testing.assert_close(-flat / 4, total[:len(flat)], atol=1e-5, rtol=1e-4)


def test_the_program(tmp_path, capsys, monkeypatch):
    import sft
    sft.main(["--data", "arithmetic", "--levels", "2-2", "--steps", "7", "--problems", "200", "--hidden-size", "32",
              "--threads", "1", "--out", str(tmp_path / "start")])
    solved = itertools.cycle([1., 0, 1, 0, 0])
    monkeypatch.setattr(probe.reward, "correct", lambda problems, groups: [[next(solved) for _ in g] for g in groups])
    capsys.readouterr()
    probe.main(["--model", str(tmp_path / "start"), "--levels", "2-2", "--prompts", "10", "--group-size", "4",
                "--max-new-tokens", "8", "--threads", "1", "--json", str(tmp_path / "out.json")])
    result, shown = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert result["informative"] == 1 and .3 < result["success"] < .5 and result["c3"] > 0
    assert f"success {result['success']:.3f}" in shown and ("G* = " in shown or "more --prompts" in shown)


def test_one_line_for_what_cannot_work(tmp_path):
    for flags, line in (([], "give --model"), (["--model", "x", "--group-size", "3"], "--group-size 3"),
                        (["--model", str(tmp_path / "none")], "none")):
        with pytest.raises(SystemExit) as stop:
            probe.main(flags)
        assert line in str(stop.value) and "\n" not in str(stop.value).strip()
