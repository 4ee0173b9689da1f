"""GTPO, specified by examples: the worked example of the official code, conflict tokens, the gate, the loss, the run.

Expected numbers are worked by hand (shown) or come from `slow_conflicts`, the definition in plain Python.
"""
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gtpo
import train
import learner
from engine.checkpoint import Progress
from model import ModelConfig, Transformer
from rollout import Rollout, empty_rollout
from test_grpo import probed, rollout_of
from test_train import fast, log_of, same_on_ranks, start, stored       # start is a fixture
from config import Config

torch.set_num_threads(1)
LN2 = 0.6931471805599453
ROWS = [[1, 2, 3, 8, 9], [1, 2, 4, 5, 8, 9], [1, 5, 3, 6, 7, 8, 9], [1, 2, 6, 9]]       # one group: + - - +
SIGNS = torch.tensor([.5, -.5, -.5, .5])
LAMBDA = torch.tensor([[2., 2, 2, 2, 2, 0, 0], [0, 0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0], [2, 2, 1, 2, 0, 0, 0]])


def layout(rows, starts=None, width=1, filler=lambda: 0):
    """Lists of tokens -> tokens and mask (B, T): row i begins at column starts[i], the rest is filler."""
    starts = starts or [0] * len(rows)
    T = max(width, *(s + len(r) for s, r in zip(starts, rows)))
    tokens = [[filler() for _ in range(s)] + r + [filler() for _ in range(T - s - len(r))] for s, r in zip(starts, rows)]
    return torch.tensor(tokens), torch.tensor([[float(s <= t < s + len(r)) for t in range(T)] for s, r in zip(starts, rows)])


def on_mask(w, mask):
    """The weights of each row's own tokens, as lists."""
    return [row[m > 0].tolist() for row, m in zip(w, mask)]


def slow_conflicts(rows, A, G, amplify=2.0, cap=2.0):
    """The definition, token by token: the weights of each row, and the longer of its two runs (the code's n_conflict)."""
    lam, n_conflict = [], []
    for i, row in enumerate(rows):
        group, w, runs = range(i // G * G, i // G * G + G), [1.0] * len(row), []
        for way in (1, -1):
            n = 0
            while A[i] and n < len(row) and all(any(sign * A[j] > 0 and rows[j][::way][n:n + 1] == [row[::way][n]] for j in group)
                                                for sign in (1, -1)):
                w[n if way == 1 else -1 - n] *= amplify if A[i] > 0 else 0.0
                n += 1
            runs.append(n)
        lam, n_conflict = lam + [[min(x, cap or math.inf) for x in w]], n_conflict + [max(runs)]
    return lam, n_conflict


def random_groups(seed):
    """1-3 groups whose rows share openings and endings, some cut, some empty; advantages of either sign, or 0."""
    r = random.Random(seed)
    G, V, rows, advantages = r.randint(2, 6), r.randint(1, 4), [], []
    for _ in range(r.randint(1, 3)):
        opening, ending = ([r.randrange(V) for _ in range(r.randint(0, 3))] for _ in range(2))
        for _ in range(G):
            row = opening + [r.randrange(V) for _ in range(r.randint(0, 4))] + ending
            rows.append(row[:r.randint(0, len(row))] if r.random() < .2 else row)
        advantages += [0.0] * G if r.random() < .1 else [r.choice([-2.0, -.5, 0.0, .5, 2.0]) for _ in range(G)]
    return rows, torch.tensor(advantages), G, r


# -------------------------------------------------------------------------------------- the official worked example

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])     # of the mask, as in grpo.py
def test_the_worked_example(dtype):
    """Openings "1 2" in rows + - + and "1" in row 2; endings "8 9" in rows + - - and "9" in row 3. Contested is a position, not
    a shared prefix: row 0's "3" is, by that of row 2, whose own run ended before, so that it is not protected."""
    tokens, mask = layout(ROWS)
    torch.testing.assert_close(gtpo.conflict_weights(tokens, mask.to(dtype), SIGNS, 4), LAMBDA)
    from_start, from_end = gtpo.conflict_runs(tokens, mask.to(dtype), SIGNS, 4)
    assert from_start.tolist() == [3, 2, 1, 2] and from_end.tolist() == [2, 2, 2, 1]


PAIR = [[1, 2, 9], [1, 2, 9]]
SMALL = {       # what it shows: one group's rows, advantages, lambda
    "the product in both runs, at most 2": (PAIR, [1, -1], [[2, 2, 2], [0, 0, 0]], {}),
    "the whole product without a cap": (PAIR, [1, -1], [[4, 4, 4], [0, 0, 0]], {"cap": None}),
    "the product of another amplification": (PAIR, [1, -1], [[2.25] * 3, [0, 0, 0]], {"amplify": 1.5, "cap": None}),
    "without the 3 of row 2, that of row 0 keeps 1": (
        [*ROWS[:2], [1, 5, 4], ROWS[3]], SIGNS,
        [[2, 2, 1, 2, 2, 0], [0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0], [2, 2, 1, 2, 0, 0]], {}),
    "a cut row has no protected ending and takes none from the others": (
        [ROWS[0], [1, 2, 4, 5, 6], *ROWS[2:]], SIGNS, [LAMBDA[0].tolist(), [0, 0, 1, 1, 1, 0, 0], *LAMBDA[2:].tolist()], {}),
    "0 stops and pads: the shared stop counts, the padding does not": ([[5, 0], [6, 7, 0]], [1, -1], [[1, 2, 0], [1, 1, 0]], {}),
    "0 first is an ordinary token": ([[0, 5], [0, 6], []], [1, -1, -1], [[2, 1], [0, 1], [0, 0]], {}),
    "padding of shorter rows contests no 0": ([[4, 0, 5], [4, 6], [4]], [1, 1, -1], [[2, 1, 1], [2, 1, 0], [0, 0, 0]], {}),
    "advantage 0 takes no part": ([[1, 2], [1, 2], [1, 3]], [1, 0, -1], [[2, 1], [1, 1], [0, 1]], {}),
    "only positive rows": (PAIR, [1, 2], [[1] * 3] * 2, {}), "only negative rows": (PAIR, [-1, -1], [[1] * 3] * 2, {}),
    "only advantage 0": (PAIR, [0, 0], [[1] * 3] * 2, {})}


@pytest.mark.parametrize("name", SMALL)
def test_conflicts_of_small_groups(name):
    rows, advantages, expected, options = SMALL[name]
    lam = gtpo.conflict_weights(*layout(rows), torch.as_tensor(advantages).float(), len(rows), **options)
    assert lam.tolist() == torch.as_tensor(expected).tolist()


def test_the_published_objective_and_the_official_loss():
    """Logits s_i sin(i + 2t + 3v). H = .4257 .2473 2.1005 .3251, so row 2 drops out: A' = A - H / 10 = .457430, -.524728, 0,
    .467486. Row means of -A' lambda: -.914860 (all 2), +.174909 (1 on two of six), 0, -.818100 (7/4).
    Published: their sum -1.558051 over 4. Official: each over its n_conflict 3 2 2 2: -.304953 + .087455 - .409050."""
    i, t, v = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (4, 7, 10)), indexing="ij")
    logits = (torch.tensor([40., 40, 1, 40])[:, None, None] * (i + 2 * t + 3 * v).sin()).log_softmax(-1)
    tokens, mask = layout(ROWS)
    logp, entropy = logits.gather(2, tokens[..., None])[..., 0], torch.special.entr(logits.exp()).sum(-1)
    H = torch.tensor([.425698, .247284, 2.100538, .325141], dtype=torch.float64)
    torch.testing.assert_close(gtpo.mean_entropy(entropy, mask), H, atol=1e-6, rtol=0)
    for expected, choices in ((-.3895128, {}), (-.6265489, {"official": True}), (-1.558051, {"sum_over_group": True}),
                              (-.6265489 / 4, {"divide_by_conflict": True})):
        loss = gtpo.gtpo_loss(logp, None, SIGNS, mask, entropy, tokens, 4, initial_entropy=.3, gamma=.1, **choices)
        assert loss.item() == pytest.approx(expected, abs=5e-7)


# ---------------------------------------------------------------------------------- conflict tokens, for any input

@pytest.mark.parametrize("amplify, cap", [(2.0, 2.0), (2.0, None), (1.5, None)])
def test_four_hundred_random_batches_equal_the_definition(amplify, cap):
    """Ragged rows after prompts of any length, junk off the mask; up to three groups a batch, each its own."""
    seen = {}
    for seed in range(400):
        rows, A, G, r = random_groups(seed)
        tokens, mask = layout(rows, [r.randint(0, 3) for _ in rows], filler=lambda: r.randrange(4))
        lam, n_conflict = slow_conflicts(rows, A.tolist(), G, amplify, cap)
        w = gtpo.conflict_weights(tokens, mask, A, G, amplify, cap)
        assert on_mask(w, mask) == lam and (w[mask == 0] == 0).all(), seed
        assert torch.maximum(*gtpo.conflict_runs(tokens, mask, A, G)).tolist() == n_conflict, seed
        for x in sum(lam, []):
            seen[x] = seen.get(x, 0) + 1
    assert set(seen) == {0.0, 1.0, amplify} | ({amplify ** 2} if cap is None else set()) and min(seen.values()) > 100


@given(seed=st.integers(0, 10 ** 6))
@settings(max_examples=40, deadline=None)
def test_prompts_padding_row_order_and_the_size_of_the_advantage_change_nothing(seed):
    rows, A, G, r = random_groups(seed)
    tokens, mask = layout(rows)
    expected = on_mask(gtpo.conflict_weights(tokens, mask, A, G), mask)
    for starts, width, filler in ((None, 17, lambda: 0), ([r.randint(0, 5) for _ in rows], 30, lambda: r.randrange(4))):
        wide, wide_mask = layout(rows, starts, width, filler)
        assert on_mask(gtpo.conflict_weights(wide, wide_mask, A, G), wide_mask) == expected
    groups = [r.sample(range(i, i + G), G) for i in range(0, len(rows), G)]
    order = sum(r.sample(groups, len(groups)), [])
    assert on_mask(gtpo.conflict_weights(tokens[order], mask[order], A[order], G), mask[order]) == [expected[i] for i in order]
    for s in (slice(i, i + G) for i in range(0, len(rows), G)):                         # each group alone
        assert on_mask(gtpo.conflict_weights(tokens[s], mask[s], A[s], G), mask[s]) == expected[s]
    sizes = torch.tensor([r.uniform(.01, 100) for _ in rows])
    assert on_mask(gtpo.conflict_weights(tokens, mask, A * sizes, G), mask) == expected


# ------------------------------------------------------------------------------------------------ the gate, the loss

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_gate_closes_above_ln_2_only_for_a_policy_that_began_below(dtype, as_tensor):
    H = torch.tensor([.1, LN2, .7, 2.], dtype=dtype)
    for initial, kept in ((.2, [1, 1, 0, 0]), (LN2, [1, 1, 0, 0]), (.7, [1, 1, 1, 1])):
        gate = gtpo.entropy_gate(H, torch.full((4,), initial, dtype=dtype) if as_tensor else initial)
        assert gate.tolist() == kept and gate.dtype == dtype
    assert gtpo.entropy_gate(H, 0.0, threshold=1.5).tolist() == [1, 1, 1, 0]


def test_why_ln_2_below_it_some_token_has_more_than_half():
    """p_max >= exp(-H), equal for the uniform: two equal tokens sit on the threshold. Above it 5/8 may still be there."""
    for p, kept in (([.5, .5], 1), ([1 / 3] * 3, 0), ([.9, .05, .05], 1), ([.625, .125, .125, .125], 0), ([.51, .49], 1)):
        H = -sum(x * math.log(x) for x in p)
        assert max(p) >= math.exp(-H) - 1e-12 and gtpo.entropy_gate(torch.tensor([H]), 0.0).tolist() == [kept]
        assert not kept or max(p) >= .5


@pytest.mark.parametrize("H, initial, ratio, official, expected", [
    (.4, .2, [[1, 1], [1, 1]], False, [[-.24, -.12], [0, .135]]),           # A - H / 10 = .48, -.54; times lambda; / 4
    (.4, .2, [[3, 1], [1, .5]], False, [[-.72, -.12], [0, .0675]]),         # times pi / mu, without a clip
    (.4, .2, [[3, 1], [1, .5]], True, [[-.48, -.24], [0, .27]]),            # no ratio; sum over 2 rows; n_conflict 1 and 1
    (.9, .2, [[1, 1], [1, 1]], False, [[-.24, -.12], [0, 0]]),              # dropped, but row 0 stays amplified
    (.9, .8, [[1, 1], [1, 1]], False, [[-.24, -.12], [0, .1475]]),          # kept, as the start was above ln 2: A' = -.59
    (.9, .8, [[1, 1], [1, 1]], True, [[-.48, -.24], [0, 0]])])              # always on
def test_the_gradient_by_hand(H, initial, ratio, official, expected):
    """1 2 + and 1 3 -, lambda 2 1 and 0 1, A = +-.5, gamma .1; H is .2 in row 0: REINFORCE with these weights."""
    tokens, mask = layout([[1, 2], [1, 3]])
    logp, entropy = torch.zeros(2, 2, requires_grad=True), torch.tensor([[.2, .2], [H, H]], requires_grad=True)
    gtpo.gtpo_loss(logp, -torch.tensor(ratio).log(), torch.tensor([.5, -.5]), mask, entropy, tokens, 2, initial, .1,
                   official=official).backward()
    torch.testing.assert_close(logp.grad, torch.tensor(expected))
    assert entropy.grad is None                                             # a weight, not something to minimise


@pytest.mark.parametrize("options", [{}, {"gtpo_ratio": False}, {"gtpo_cap": 0.0}, {"gtpo_official": True}])
def test_the_loss_of_random_batches_equals_the_definition(options):
    """As one call, and as train.py makes it; off the mask may be anything."""
    official, config = "gtpo_official" in options, Config(algo="gtpo", gtpo_gamma=.1, **options)
    cap = 2.0 if config.gtpo_cap and not official else None
    for seed in range(60):
        rows, _, G, r = random_groups(seed)
        rows, starts = [row or [0] for row in rows], [r.randint(0, 3) for _ in rows]
        rewards = torch.tensor([r.choice([0.0, 1.0, 1.5]) for _ in rows]).view(-1, G)
        A = (rewards - rewards.sum(1, keepdim=True) / G).flatten()
        tokens, mask = layout(rows, starts)
        x = torch.rand(3, *tokens.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        logp, old, entropy = torch.where(mask == 0, math.nan, x)
        lam, n_conflict = slow_conflicts(rows, A.tolist(), G, 2.0, cap)
        total = 0.0
        for i, m in enumerate(mask > 0):
            H = entropy[i, m].mean().item()
            ratio = (logp - old)[i, m].exp() if config.gtpo_ratio and not official else torch.ones(len(lam[i]))
            shaped = (A[i].item() - .1 * H) * (H <= (.7 if official else LN2))
            value = -shaped * sum(a * b for a, b in zip(ratio.tolist(), lam[i])) / len(lam[i])
            total += value * G / max(n_conflict[i], 1) if official else value
        one = gtpo.gtpo_loss(logp, old if config.gtpo_ratio else None, A, mask, entropy, tokens, G, .3, .1,
                             **{"official": True} if official else {"cap": cap})
        starts = torch.tensor(starts)
        rollout = Rollout(tokens, starts, starts + mask.sum(1).long(), old, starts >= 0)
        batch = replace(gtpo.prepare(rollout, rewards, config), initial_entropy=torch.full_like(A, .3))
        two, _ = gtpo.loss(logp, entropy, batch, config, len(rows))
        assert [one.item(), two.item()] == pytest.approx([total / len(rows)] * 2, abs=1e-6), seed


# ------------------------------------------------------------------------------- prepare and loss, as train.py calls

REWARDS = torch.tensor([[1., 0., 0., 1.], [1., 1., 1., 1.], [0., 1., 0., 0.]])


def worked_rollout():
    """The worked example after a prompt of two tokens; row 2 was cut."""
    tokens, _ = layout([[7, 7] + row for row in ROWS])
    lengths = torch.tensor([len(row) + 2 for row in ROWS])
    return Rollout(tokens, torch.full((4,), 2), lengths, torch.zeros(4, 9), torch.tensor([True, True, False, True]))


@pytest.mark.parametrize("mask_truncated, protected, tokens", [(False, 4 + 3, 22), (True, 4, 15)])
def test_cut_rows_left_out_still_make_conflicts_and_the_log_counts_by_hand(mask_truncated, protected, tokens):
    """lambda 0: four tokens of row 1, three of row 2. lambda 2: five of row 0 (its "3" thanks to the cut row 2), three of
    row 3. H is .1, but 1 in row 1, which the gate drops."""
    config = Config(algo="gtpo", mask_truncated=mask_truncated)
    batch = replace(gtpo.prepare(worked_rollout(), REWARDS[:1], config), initial_entropy=torch.full((4,), .2))
    expected = LAMBDA * torch.tensor([1, 1, not mask_truncated, 1])[:, None]
    torch.testing.assert_close(batch.conflict, torch.cat([torch.zeros(4, 2), expected], 1))
    assert batch.advantages.tolist() == [.5, -.5, -.5, .5]                           # r - mean by default
    _, sums = gtpo.loss(torch.zeros(4, 9), batch.mask * torch.tensor([[.1], [1.], [.1], [.1]]), batch, config, 4)
    assert (sums["conflict_protected_frac"], sums["conflict_amplified_frac"], sums["tokens"]) == (protected, 5 + 3, tokens)
    assert (sums["gate_dropped_frac"], sums["rows"]) == (1, 3 if mask_truncated else 4)
    assert gtpo.METRICS["gate_dropped_frac"] == "rows" and gtpo.METRICS["conflict_protected_frac"] == "tokens"


def batch_gradient(rollout, rewards, budget=10 ** 6, log_ratio=0.0, **options):
    """The gradient by logp as learner.update makes it, micro-batches of `budget` tokens over one normaliser; the batch."""
    config = Config(algo="gtpo", gtpo_gamma=.1, group_size=4, micro_batch_tokens=budget, **options)
    batch = replace(gtpo.prepare(rollout, rewards, config), initial_entropy=torch.full((rewards.numel(),), .2))
    logp = (rollout.logps + log_ratio).requires_grad_()
    entropy = torch.rand(logp.shape, generator=torch.Generator().manual_seed(9)) * batch.mask
    batch = probed(batch, logp=logp, entropy=entropy)
    rows = batch.active.nonzero()[:, 0].tolist()
    count = batch.mask[rows].sum() if config.aggregation == "token" else len(rows)
    parts = list(learner.micro_batches_of(batch, rows, config))
    assert sorted(r for part, _ in parts for r in part) == rows and (budget >= 1000 or len(parts) > 1)
    for _, micro in parts:
        gtpo.loss(micro.logp, micro.entropy, micro, config, count)[0].backward()
    return logp.grad, batch


@pytest.mark.parametrize("options", [{}, {"gtpo_official": True}, {"aggregation": "token"}, {"zero_variance": "keep"},
                                     {"mask_truncated": True, "gtpo_cap": 0.0}])
def test_micro_batches_add_up_to_the_whole(options):
    whole, _ = batch_gradient(rollout_of(5), REWARDS, log_ratio=.3, **options)
    assert whole.abs().sum() > 0
    for budget in (1, 13, 18):
        torch.testing.assert_close(batch_gradient(rollout_of(5), REWARDS, budget, .3, **options)[0], whole)


def test_a_group_of_equal_rewards_is_pushed_down_with_keep_and_left_alone_with_drop():
    """A = 0 leaves -gamma H: the gradient of each token is +gamma H / |o| / 12 rows, so a step lowers its probability."""
    kept, batch = batch_gradient(rollout_of(5), REWARDS, zero_variance="keep")
    mask, n = batch.mask[4:8], batch.mask[4:8].sum(1)
    H = (batch.entropy[4:8] * mask).sum(1) / n
    torch.testing.assert_close(kept[4:8], (.1 * H * (H <= LN2) / n / 12)[:, None] * mask)
    assert (kept[4:8] > 0).any()
    dropped, _ = batch_gradient(rollout_of(5), REWARDS)
    assert (dropped[4:8] == 0).all() and (dropped[:4] != 0).any()


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_the_initial_entropy_is_measured_once_over_completions_that_count(mask_truncated):
    """Entropy is a tenth of the token: row means .1 (1) and .4 (2 4 6), so .25. A cut row left out is no row of entropy 0."""
    tokens, lengths = torch.tensor([[9, 1, 0, 0], [9, 2, 4, 6]] * 2), torch.tensor([2, 4] * 2)
    finished = torch.tensor([True, True, not mask_truncated, not mask_truncated])
    model = SimpleNamespace(device=torch.device("cpu"), token_logps=lambda tokens, mask, temperature, prompts: (
        mask * 0.0, tokens / 10 * mask))
    config = Config(algo="gtpo", mask_truncated=mask_truncated, group_size=2)
    one = learner.Learner(config, gtpo, model, None, Progress(), state=gtpo.State(config))
    for later in (0, 3):                                                                # a later rollout is not measured
        rollout = Rollout(tokens + later, torch.ones(4, dtype=torch.int64), lengths, torch.zeros(4, 4), finished)
        batch = one.batch(rollout, torch.tensor([[1., 0.], [1., 0.]]))
        torch.testing.assert_close(batch.initial_entropy, torch.full((4,), .25))


@pytest.mark.parametrize("scale", ["none", "std", "batch", "loo"])
@pytest.mark.parametrize("rewards", [[0., .4, .5, .7], [0., .7, 1., 1.1], [.1, .4, .4, .7], [100., 100.4, 100.5, 100.7],
                                     [1., 1.0004, 1.0005, 1.0007]])
def test_a_reward_at_the_mean_of_its_group_has_no_sign(rewards, scale):
    """In float32 it is a rounding error above or below: such a row is neither amplified nor protected, nor makes conflicts."""
    at_mean = [abs(r - sum(rewards) / 4) < 1e-5 for r in rewards]
    tokens = torch.tensor([[7, 1, 2]] * 4)
    twos = torch.full((4,), 1)
    rollout = Rollout(tokens, twos, 3 * twos, torch.zeros(4, 3), twos > 0)
    batch = gtpo.prepare(rollout, torch.tensor([rewards]), Config(algo="gtpo", group_size=4, advantage_scale=scale))
    expected = [[0., *[1. if middle else 2. if r > sum(rewards) / 4 else 0.] * 2] for r, middle in zip(rewards, at_mean)]
    assert any(at_mean) and (batch.advantages[at_mean] != 0).all() and batch.conflict.tolist() == expected


def test_a_rank_without_prompts_prepares_an_empty_batch():
    batch = gtpo.prepare(empty_rollout("cpu"), torch.zeros(0, 4), Config(algo="gtpo"))
    assert len(batch.conflict) == len(batch.scale) == len(batch.advantages) == 0


def test_one_forward_gives_log_probs_with_and_entropies_without_gradient(monkeypatch):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1)).init_weights()
    passes, real, config = [], model.hidden_states, Config(algo="gtpo")
    monkeypatch.setattr(model, "hidden_states", lambda *a: passes.append(1) or real(*a))
    batch = replace(gtpo.prepare(worked_rollout(), REWARDS[:1], config), initial_entropy=torch.full((4,), 3.))
    logp, entropy = model.token_logps(batch.tokens, batch.mask)
    assert logp.requires_grad and not entropy.requires_grad
    gtpo.loss(logp, entropy, replace(batch, old_logp=logp.detach()), config, 4)[0].backward()
    assert len(passes) == 1 and any(p.grad.abs().sum() > 0 for p in model.parameters())


# --------------------------------------------------------------------------------------------------- the command line

def run_gtpo(start, out, *extra):
    train.main(["--model", str(start), "--out", str(out), *fast(start), "--algo", "gtpo", *extra])
    return log_of(out)


def checkpoint(out, step):
    """Tensors of a checkpoint, and the objective's state."""
    extra = out / "checkpoints" / f"step-{step:06d}" / "extra.pt"
    return stored(out, step), torch.load(extra, weights_only=True)


def test_a_run_resumes_bit_for_bit_and_logs_what_was_promised(start, tmp_path):
    """4 steps against 2 and 2, with four updates a rollout; the entropy measured at step 1 stays."""
    lines = run_gtpo(start, tmp_path / "whole", "--epochs", "2", "--minibatches", "2")
    run_gtpo(start, tmp_path / "two", "--epochs", "2", "--minibatches", "2", "--steps", "2")
    train.main(["--resume", "--out", str(tmp_path / "two"), "--steps", "4"])
    assert log_of(tmp_path / "two") == lines
    for name in ("conflict_protected_frac", "conflict_amplified_frac", "gate_dropped_frac"):
        assert all(0 <= x[name] <= 1 for x in lines[1:]) and (name[0] == "g" or any(x[name] > 0 for x in lines[1:]))
    (a, whole), (b, two) = (checkpoint(tmp_path / name, 4) for name in ("whole", "two"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    first = checkpoint(tmp_path / "two", 2)[1]["initial_entropy"]
    assert whole["initial_entropy"] == two["initial_entropy"] == first and 0 < first < math.log(280)
    assert any(not torch.equal(p, a["model." + n]) for n, p in Transformer.from_pretrained(start).named_parameters())


def test_the_official_objective_is_a_flag_and_another_objective(start, tmp_path):
    """Same first rollout, so the same conflicts; another loss and other weights."""
    a, b = (run_gtpo(start, tmp_path / str(i), "--gtpo-gamma", ".1", "--steps", "2", *extra)[1]
            for i, extra in enumerate([[], ["--gtpo-official"]]))
    assert all(a[k] == b[k] for k in ("reward", "conflict_protected_frac", "conflict_amplified_frac"))
    assert abs(a["loss"] - b["loss"]) > 1e-3
    a, b = (checkpoint(tmp_path / str(i), 2)[0] for i in (0, 1))
    assert any(not torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("args, flag", [
    ("--algo gtpo --beta 0.1", "--beta"), ("--algo gtpo --clip-high .3", "--clip-high"), ("--gtpo-official", "--gtpo-official"),
    ("--algo grpo --gtpo-gamma 1", "--gtpo-gamma"), ("--algo gtpo --gtpo-cap -1", "--gtpo-cap")])
def test_settings_of_another_algorithm_are_one_line_that_names_the_flag(args, flag, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train.main([*args.split(), "--model", str(tmp_path / "none"), "--out", str(tmp_path / "run")])
    assert flag in str(stop.value) and "\n" not in str(stop.value) and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("prompts", ["7", "1"])
def test_two_ranks_give_the_run_of_one_process_also_where_one_has_no_prompt(start, tmp_path, prompts):
    lines = same_on_ranks([2], start, tmp_path, "--algo", "gtpo", "--prompts-per-step", prompts, "--group-size", "6", "--steps", "3")
    assert len(lines) == 4 and any(x["grad_norm"] > 0 for x in lines[1:])
