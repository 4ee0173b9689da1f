"""One token from logits, by the row's own random numbers.

A token is drawn by inverting the cumulative distribution at two uniform numbers, one for the part of the vocabulary and
one inside it. Row (prompt i, sample j) owns its stream of uniforms, seeded by (seed, i, j), so that it draws the same in any
batch. (The usual trick, argmax of p / Exp(1), is as free of host syncs but needs V random numbers a token, not 2, and ties a
completion to its batch.) top_k and top_p are for evaluation: what they leave is a policy that no trainer log-prob equals.
"""
import numpy as np
import torch
import torch.nn.functional as F


def row_uniforms(seeds, G, count):
    """(N*G, count, 2) float32 uniforms in [0, 1): row (i, j) depends on seeds[i] and j alone."""
    rows = []
    for seed in seeds:
        numbers = np.atleast_1d(seed).tolist()
        for j in range(G):      # the count first: numpy takes (1, 2) and (1, 2, 0) for the same seed
            generator = np.random.default_rng([len(numbers), *numbers, j])
            rows.append(generator.random((count, 2), dtype=np.float32))
    return torch.from_numpy(np.stack(rows))


def draw(logits, u, temperature, top_k=0, top_p=1.0):
    """One token a row: logits (B, V), u (B, 2) uniforms -> ids (B,) int64 and their log-probabilities (B,) float32.

    The vocabulary is cut into parts of equal size; u[:, 0] chooses the part by the parts' masses, u[:, 1] the id in it: one
    pass over V, and no sum of V small numbers. Temperature 0 takes the largest logit, and its log-probability at 1."""
    if temperature not in (0, 1):
        logits = logits.float() / temperature
    if top_k > 0 or top_p < 1:
        logits = truncate(logits.float(), top_k, top_p)
    mass = logits.softmax(-1, dtype=torch.float32)
    B, V = mass.shape
    if temperature == 0:
        ids = logits.argmax(-1)         # not of mass, where the best two may be equal
    else:
        size = next((n for n in (128, 64, 32, 16, 8) if n * n <= 2 * V and V % n == 0), 32)
        parts = (F.pad(mass, (0, -V % size)) if V % size else mass).view(B, -1, size)
        part = first_above(parts.sum(-1).cumsum(-1), u[:, :1])
        ids = part * size + first_above(parts[torch.arange(B, device=mass.device), part].cumsum(-1), u[:, 1:])
    return ids, mass.gather(-1, ids[:, None])[:, 0].log()


def first_above(cumulative, u):
    """The first column at which cumulative (B, K), of non-negative numbers, exceeds u (B, 1) of its total -> (B,).

    "< total": so that rounding can never step past the last column that holds anything."""
    if cumulative.device.type != "cpu":
        cumulative = cumulative.cummax(-1).values       # a parallel sum need not be monotone in the last bit
    total = cumulative[:, -1:]
    return ((cumulative <= u * total) & (cumulative < total)).sum(-1)


def truncate(logits, top_k, top_p):
    """-inf for what nucleus (arXiv 1904.09751) and top-k sampling exclude; at least one id stays. Evaluation only."""
    ordered, order = logits.sort(-1, descending=True)
    if top_k > 0:
        ordered[:, top_k:] = float("-inf")          # first: top_p is a share of what top_k leaves
    probs = ordered.softmax(-1)
    out = (probs.cumsum(-1) - probs >= top_p) | ordered.isinf()
    out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), float("-inf"))
