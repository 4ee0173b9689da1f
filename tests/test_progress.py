"""Bars inside of a step: what they count, and that they cost and end nothing."""

import functools

import torch

import progress
from engine.batching import Schedule
from rollout import Sampler
from test_decode import PROMPTS, small_model


class Room:
    slots, seats = 3, 4


def test_a_rollout_bar_counts_by_hand(monkeypatch):
    """Two prompts of 4 completions, 3 slots: 5 wait. A look after 10 steps: 30 tokens. Then one has finished: 4 + 2 run or wait."""
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    schedule = Schedule([[1], [2]], 4, Room)
    schedule.admit()
    bar = progress.RolloutBar(8)
    schedule.time = 10
    bar.look(schedule)
    assert (bar.bar.n, bar.tokens) == (0, 30)
    schedule.release([True, False, True])
    schedule.time = 15
    bar.look(schedule)
    assert (bar.bar.n, bar.tokens) == (1, 40)
    bar.close()


def test_a_rollout_is_the_same_with_a_bar_and_shows_what_it_does(monkeypatch, capsys):
    model = small_model()
    plain = Sampler(model, [], max_rows=4).generate(PROMPTS, 3, 12, seed=1)
    assert capsys.readouterr().err == ""                # a short one shows nothing
    monkeypatch.setattr(progress, "tqdm", functools.partial(progress.tqdm, mininterval=0, miniters=0))
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    shown = Sampler(model, [], max_rows=4).generate(PROMPTS, 3, 12, seed=1)
    assert torch.equal(plain.tokens, shown.tokens) and torch.equal(plain.logps, shown.logps)
    said = capsys.readouterr().err
    assert "drawing" in said and "/12" in said and "tok_s=" in said


def test_a_bar_over_micro_batches(monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    assert list(progress.bar([1, 2, 3], "training")) == [1, 2, 3] and "training" in capsys.readouterr().err
