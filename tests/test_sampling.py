"""The specification of sampling.py: known tokens at known numbers, frequencies, and what is never drawn."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from engine.sampling import draw, invert_in_two, part_size, truncate

torch.set_num_threads(1)

BELOW_ONE = 1 - 2 ** -24        # the largest float32 below 1


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


# ------------------------------------------------------------------------------------ draw

def test_draw_inverts_the_cumulative_distribution():
    """p = .1 .2 .3 .4, cumulated .1 .3 .6 1: the first id whose sum exceeds u. A small vocabulary is one part, so that the
    first number, which chooses the part, changes nothing."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    u = torch.tensor([0.0, 0.05, 0.15, 0.29, 0.31, 0.59, 0.61, 0.99, BELOW_ONE])
    for first in (u, u.flip(0), torch.zeros(9), torch.full((9,), BELOW_ONE)):
        ids, logps = draw(p.log().expand(9, 4), torch.stack((first, u), 1), 1.0)
        assert ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
        torch.testing.assert_close(logps, p.log()[ids])


def test_draw_chooses_a_part_of_the_vocabulary_and_then_an_id_in_it():
    """64 ids are 8 parts of 8. Masses 1, 2, 1 and 4 at ids 3, 10, 11 and 60: parts 0, 1 and 7 have 1/8, 3/8 and 4/8,
    cumulated 1/8, 4/8 and 1; in part 1 id 10 has 2/3 and id 11 the rest. The other parts are never chosen."""
    logits = torch.full((64,), -math.inf)
    logits[[3, 10, 11, 60]] = torch.tensor([1.0, 2.0, 1.0, 4.0]).log()
    expected = {(0.0, 0.0): 3, (0.12, 0.99): 3, (0.13, 0.0): 10, (0.13, 0.66): 10, (0.49, 0.66): 10, (0.13, 0.67): 11,
                (0.49, BELOW_ONE): 11, (0.51, 0.0): 60, (0.51, 0.99): 60, (BELOW_ONE, BELOW_ONE): 60}
    ids, logps = draw(logits.expand(10, 64), torch.tensor(list(expected)), 1.0)
    assert ids.tolist() == list(expected.values())
    torch.testing.assert_close(logps, torch.tensor([{3: 1, 10: 2, 11: 1, 60: 4}[i] / 8 for i in ids.tolist()]).log())


def test_the_picture_of_two_uniforms(monkeypatch):
    """Parts of three ids with masses .3, .2 and .5: .6 falls into the last, and .7 of its .5 is .35 after .3 of id 6."""
    monkeypatch.setattr("engine.sampling.part_size", lambda vocab: 3)
    probs = torch.tensor([[0.1, 0.0, 0.2, 0.1, 0.1, 0.0, 0.3, 0.1, 0.1]])
    assert invert_in_two(probs, torch.tensor([[0.6, 0.7]])).tolist() == [7]


def test_part_sizes_by_hand():
    """Qwen's and Llama's vocabularies, small ones, and one that no power of two divides."""
    assert [part_size(v) for v in (151_936, 128_256, 512, 280, 64, 50, 4, 151_937)] == [128, 128, 32, 8, 8, 32, 32, 32]


@pytest.mark.parametrize("vocab, temperature, quantile", [
    (40, 1.0, 72.1), (50, 1.0, 85.4), (64, 1.0, 103.5), (64, 0.5, 103.5), (280, 1.0, 357.8)])
def test_frequencies_over_several_parts_are_those_of_the_softmax(vocab, temperature, quantile):
    """20,000 draws from parts of 8; 50 ids are 32 and 18. Chi-square against its 99.9 % quantile at vocab - 1."""
    generator, count = torch.Generator().manual_seed(1), 20_000
    logits, u = torch.randn(vocab, generator=generator) * temperature / 2, torch.rand(count, 2, generator=generator)
    ids, logps = draw(logits.expand(count, vocab), u, temperature)
    p = (logits / temperature).softmax(-1)
    assert p.min() * count > 5 and chi_square(ids.bincount(minlength=vocab), p) < quantile
    torch.testing.assert_close(logps, p.log()[ids], atol=1e-5, rtol=0)


def test_temperature_divides_the_logits_of_drawn_and_recorded_alike():
    """Logits ln 1, ln 2 at temperature 1/2 are ln 1, ln 4: p = .2 .8 and not 1/3, 2/3."""
    ids, logps = draw(torch.tensor([[1.0, 2.0]] * 2).log(), torch.tensor([[0.5, 0.19], [0.5, 0.21]]), 0.5)
    assert ids.tolist() == [0, 1]
    torch.testing.assert_close(logps, torch.tensor([0.2, 0.8]).log())


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("vocab", [50, 4096, 151_937])
def test_bfloat16_logits_are_taken_as_they_are_and_computed_with_in_float32(vocab, temperature):
    """Divided by the temperature in bfloat16 they would be 2^-8 off, and so would a log-prob of -10 be by 0.04. A float32
    sum of 151,937 numbers is up to 4e-5 off on a processor with AVX2."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(20, vocab, generator=generator)).bfloat16()
    ids, logps = draw(logits, torch.rand(20, 2, generator=generator), temperature)
    exact = (logits.double() / (temperature or 1)).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(logps.double(), exact, atol=1e-4, rtol=0)
    assert logps.dtype == torch.float32 and (temperature or torch.equal(ids, logits.argmax(-1)))


def test_temperature_zero_takes_the_largest_logit():
    ids, logps = draw(torch.tensor([[1.0, 3.0, 2.0]]).log(), None, 0)
    assert ids.tolist() == [1] and logps.item() == pytest.approx(math.log(3 / 6))


EDGES = torch.tensor([0.0, 1e-8, 0.25, 0.5, 0.999999, BELOW_ONE, 1.0])      # 1.0: where a device rounds u up
EDGES = torch.cartesian_prod(EDGES, EDGES)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.just(-math.inf), st.floats(-40, 40)), min_size=1, max_size=40).filter(
    lambda logits: max(logits) > -math.inf),
       st.sampled_from([0, 8, 60]), st.sampled_from([0, 8, 60]),
       st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(0, 5), st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_an_id_of_probability_zero_is_never_drawn(logits, before, behind, temperature, top_k, top_p):
    """Neither at u = 0 (where leading zeros lie) nor just below 1 (where trailing zeros do), be they single ids or parts."""
    rows = torch.tensor([-math.inf] * before + logits + [-math.inf] * behind).expand(len(EDGES), -1)
    ids, logps = draw(rows, EDGES, temperature, top_k, top_p)
    assert logps.isfinite().all()
    kept = truncate(rows / (temperature or 1.0), top_k, top_p)
    assert (kept.softmax(-1).gather(-1, ids[:, None]) > 0).all()


def test_an_id_of_probability_zero_is_never_drawn_from_a_large_vocabulary():
    """150,000 ids, where the sum in float32 may end off 1; the first and last third are impossible."""
    logits = torch.randn(150_000, generator=torch.Generator().manual_seed(0))
    logits[:50_000], logits[100_000:] = -math.inf, -math.inf
    ids, logps = draw(logits.expand(len(EDGES), -1), EDGES, 1.0)
    assert ids[0] == 50_000 and ((ids >= 50_000) & (ids < 100_000)).all() and logps.isfinite().all()


# ------------------------------------------------------------------------------------ top-k and top-p

P = torch.tensor([0.15, 0.5, 0.05, 0.3])        # in order: id 1, 3, 0, 2, cumulated .5 .8 .95 1


@pytest.mark.parametrize("top_k, top_p, kept", [
    (0, 1.0, {0, 1, 2, 3}), (1, 1.0, {1}), (2, 1.0, {1, 3}), (9, 1.0, {0, 1, 2, 3}),
    (0, 0.4, {1}), (0, 0.6, {1, 3}), (0, 0.85, {0, 1, 3}), (0, 0.99, {0, 1, 2, 3}),     # the smallest set of mass top_p
    (0, 0.0, {1}), (3, 0.6, {1, 3}), (1, 0.9, {1}),
])
def test_truncation_by_hand(top_k, top_p, kept):
    left = truncate(P.log()[None], top_k, top_p)[0]
    assert set(left.isfinite().nonzero()[:, 0].tolist()) == kept
    torch.testing.assert_close(left[sorted(kept)], P.log()[sorted(kept)])


def test_nucleus_ends_where_its_mass_is_reached():
    """Four ids of exactly 1/4: two of them are 1/2, and a third is not needed."""
    assert truncate(torch.zeros(1, 4), 0, 0.5).isfinite().sum() == 2


def test_recorded_log_probs_are_those_of_the_truncated_distribution():
    """Ids 1 and 3 are left with .5 and .3 of .8: .625 and .375; id 1 comes first in the cumulated sum."""
    ids, logps = draw(P.log().expand(2, 4), torch.tensor([[0.5, 0.62], [0.5, 0.63]]), 1.0, top_k=2)
    assert ids.tolist() == [1, 3]
    torch.testing.assert_close(logps, torch.tensor([0.625, 0.375]).log())


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.8), (20, 0.8), (5, 0.7)])
def test_truncation_is_that_of_transformers(top_k, top_p):
    """With both, top_p counts the mass of what top_k has left (vLLM does the same): published settings mean that."""
    logits = 2 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    expected = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(truncate(logits, top_k, top_p).isfinite(), expected.isfinite())
