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
    bar = progress.RolloutBar([20] * 8)
    schedule.time = 10
    bar.look(schedule)
    assert (bar.bar.n, bar.tokens) == (0, 30)
    schedule.release([True, False, True])
    schedule.time = 15
    bar.look(schedule)
    assert (bar.bar.n, bar.tokens) == (1, 40)
    bar.close()


def test_the_tokens_that_are_left_by_hand():
    """Nothing has finished: all go to the limit of 20. After 40 tokens with 4 finished, the mean is 10: 10, 10 and the 2 up to the limit."""
    bar = progress.RolloutBar([20] * 8)
    assert bar.tokens_left([5, 0], finished=0) == 15 + 20
    bar.tokens = 40
    assert bar.tokens_left([0, 6, 18], finished=4) == 10 + 10 + 2


def test_a_rollout_bar_moves_every_second_also_when_nothing_finishes(monkeypatch, capsys):
    """tqdm waits for as many completions as its last jump was, unless it is told not to. Ten looks, the second with a completion."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    schedule = Schedule([[1], [2]], 4, Room)
    schedule.admit()
    bar = progress.RolloutBar([100] * 8)
    for second in range(3, 13):
        now[0] = float(second)
        schedule.time = 2 * second
        if second == 4:
            schedule.release([True, False, True])
        bar.look(schedule)
    said = capsys.readouterr().err
    bar.close()
    lines = [line for line in said.split("\r") if "tokens=" in line]
    assert len(lines) == 10
    # 18 of 3 slots at 3 s; then two slots: 18 + 9 x 4. 7 completions go on for 54 each, at 4.5 a second
    assert "0/8 [00:03" in lines[0] and "tok_s=6, tokens=18]" in lines[0]
    assert "1/8 [00:12" in lines[-1] and "left=01:24, tok_s=4, tokens=54]" in lines[-1]


def test_a_rollout_is_the_same_with_a_bar_and_shows_what_it_does(monkeypatch, capsys):
    model = small_model()
    plain = Sampler(model, [], max_rows=4).generate(PROMPTS, 3, 12, seed=1)
    assert capsys.readouterr().err == ""                # a short one shows nothing
    monkeypatch.setattr(progress, "tqdm", functools.partial(progress.tqdm, mininterval=0))
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    shown = Sampler(model, [], max_rows=4).generate(PROMPTS, 3, 12, seed=1)
    assert torch.equal(plain.tokens, shown.tokens) and torch.equal(plain.logps, shown.logps)
    said = capsys.readouterr().err
    assert "drawing" in said and "/12" in said and "tok_s=" in said


def test_a_bar_over_micro_batches(monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    assert list(progress.bar([1, 2, 3], "training")) == [1, 2, 3] and "training" in capsys.readouterr().err
