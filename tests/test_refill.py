"""Refill: a step has as many informative groups as it asks for, at what it costs, on any number of ranks."""
import pytest
import torch

import refill
import train
from config import Config
from rollout import Rollout
from test_train import fast, log_of, same_on_ranks, start         # start is a fixture


def drawn(rewards, correct=None, first=0, width=6):
    """A round whose group i has completions of i + 1 tokens, each token the number of its group."""
    n, G = len(rewards), len(rewards[0])
    lengths = torch.tensor([2 + i % 4 for i in range(n) for _ in range(G)])
    tokens = torch.zeros(n * G, width, dtype=torch.int64)
    for row in range(n * G):
        tokens[row, :lengths[row]] = first + row // G + 1
    rollout = Rollout(tokens, torch.ones(n * G, dtype=torch.int64), lengths, tokens.float(), lengths > 2, version=7)
    rewards = torch.tensor(rewards)
    return train.Drawn([{}] * n, rollout, [[""] * G] * n, {"correct": torch.tensor(correct) if correct else rewards}, None, rewards)


RIGHT, WRONG, MIXED = [1., 1.], [0., 0.], [1., 0.]


def test_informative_groups_come_first_in_the_order_of_their_problems():
    rounds = [drawn([RIGHT, MIXED, WRONG]), drawn([MIXED, WRONG, MIXED], first=3, width=9)]
    assert not refill.enough(rounds[:1], 3) and refill.enough(rounds, 3) and not refill.enough(rounds, 4)
    rollout, rewards, line = refill.chosen(rounds, Config(refill=1, prompts_per_step=3))
    assert rewards.tolist() == [MIXED, MIXED, MIXED] and rollout.version == 7
    assert rollout.tokens[::2, 0].tolist() == [2, 4, 6] and rollout.tokens[1::2, 0].tolist() == [2, 4, 6]
    assert line == {"refill_rounds": 1, "refill_dropped": 0.5}
    for row in range(6):
        assert rollout.logps[row, 0] == rollout.tokens[row, 0]


def test_without_enough_the_first_others_fill_up():
    rollout, rewards, line = refill.chosen([drawn([RIGHT, WRONG]), drawn([WRONG, MIXED], first=2)], Config(refill=1, prompts_per_step=3))
    assert rewards.tolist() == [MIXED, RIGHT, WRONG] and rollout.tokens[::2, 0].tolist() == [4, 1, 2]
    assert line["refill_dropped"] == 0.25


def test_informative_is_what_differs_in_correctness_not_in_the_shaped_reward():
    shaped = drawn([[0.1, 0.2], [1.1, 0.3]], correct=[[0., 0.], [1., 0.]])
    assert not refill.enough([shaped], 2) and refill.enough([shaped], 1)
    _, rewards, _ = refill.chosen([shaped], Config(refill=1, prompts_per_step=1))
    torch.testing.assert_close(rewards, torch.tensor([[1.1, 0.3]]))


def test_a_run_refills_counts_what_it_costs_and_resumes(start, tmp_path):
    options = ["--model", str(start), *fast(start), "--refill", "2", "--prompts-per-step", "3"]
    train.main([*options, "--out", str(tmp_path / "whole")])
    lines = log_of(tmp_path / "whole")[1:]
    assert max(x["refill_rounds"] for x in lines) > 0
    total = 0
    for line in lines:
        total += 3 * 4 * (1 + line["refill_rounds"])
        assert line["num_samples"] == total
        assert line["refill_dropped"] == pytest.approx(1 - 1 / (1 + line["refill_rounds"]))
    train.main([*options, "--out", str(tmp_path / "two"), "--steps", "2"])
    train.main(["--resume", "--out", str(tmp_path / "two"), "--steps", "4"])
    assert log_of(tmp_path / "two") == log_of(tmp_path / "whole")


@pytest.mark.slow
def test_any_number_of_ranks_trains_on_the_same_groups(start, tmp_path):
    lines = same_on_ranks((2, 5), start, tmp_path, "--refill", "2", "--prompts-per-step", "3", "--minibatches", "2")
    assert max(x["refill_rounds"] for x in lines[1:]) > 0
