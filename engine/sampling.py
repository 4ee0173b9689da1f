"""One token from logits, by the row's own random numbers.

A token is drawn by inverting the cumulative distribution at two uniform numbers: one chooses a part
of the vocabulary and one the token in that part. Row (prompt i, sample j) has its own stream of
uniforms, seeded by (seed, i, j), so that it draws the same tokens in any batch.

The usual trick, argmax of p / Exp(1), waits for the device as little. But it needs V random numbers
a token, not 2, and ties a completion to its batch.

top_k and top_p are for evaluation: what they leave is a policy that no trainer log-prob equals.
rollout.py draws by this file, which needs nothing else of the project.
"""
import numpy as np
import torch
import torch.nn.functional as F


def row_uniforms(seeds, group_size, count):
    """Returns float32 uniforms in [0, 1), (N x group_size, count, 2), for `count` tokens a row.

    Row (i, j) depends on seeds[i] and j alone. A seed is an integer or a tuple of integers."""
    rows = []
    for seed in seeds:
        numbers = np.atleast_1d(seed).tolist()
        for j in range(group_size):
            # the count of numbers first: numpy takes (1, 2) and (1, 2, 0) for the same seed
            generator = np.random.default_rng([len(numbers), *numbers, j])
            rows.append(generator.random((count, 2), dtype=np.float32))
    return torch.from_numpy(np.stack(rows))


def draw(logits, uniforms, temperature, top_k=0, top_p=1.0):
    """Draws one token a row from logits (B, V) by uniforms (B, 2).

    Returns ids (B,) int64 and their log-probabilities (B,) float32, both of logits / temperature.
    Temperature 0 takes the largest logit, and its log-probability at temperature 1."""
    if temperature not in (0, 1):
        logits = logits.float() / temperature
    if top_k > 0 or top_p < 1:
        logits = truncate(logits.float(), top_k, top_p)

    probs = logits.softmax(-1, dtype=torch.float32)
    if temperature == 0:
        ids = logits.argmax(-1)         # not of probs, where the best two may be equal
    else:
        ids = invert_in_two(probs, uniforms)
    return ids, probs.gather(-1, ids[:, None])[:, 0].log()


def invert_in_two(probs, uniforms):
    """Inverts the cumulative distribution of probs (B, V) at uniforms (B, 2) -> ids (B,).

    The ids are cut into parts of equal size. The first number chooses the part by the parts'
    masses, and the second the id by the masses in that part:

        probs       .1  .0  .2 | .1  .1  .0 | .3  .1  .1
        parts           .3     |     .2     |     .5          cumulative .3 .5 1.0
        first number .6                       ^^^^^^^^^^      1.0 is the first sum above .6
        in it                                 .3  .1  .1      cumulative .3 .4 .5
        second number .7                          ^^          .4 is the first sum above .7 x .5

    So V is read once, and no sum has V small numbers."""
    B, V = probs.shape
    size = part_size(V)
    if V % size:
        probs = F.pad(probs, (0, -V % size))
    parts = probs.view(B, -1, size)                 # (B, number of parts, size)

    part = first_above(parts.sum(-1).cumsum(-1), uniforms[:, :1])       # (B,)
    chosen = parts[torch.arange(B, device=probs.device), part]          # (B, size)
    return part * size + first_above(chosen.cumsum(-1), uniforms[:, 1:])


def part_size(vocab):
    """Returns how many ids a part of the vocabulary has.

    The best are about as many ids in a part as there are parts: the largest power of two from 8 to
    128 that divides the vocabulary and is at most sqrt(2 vocab). Where there is none it is 32, and
    the last part is filled up."""
    for size in (128, 64, 32, 16, 8):
        if size * size <= 2 * vocab and vocab % size == 0:
            return size
    return 32


def first_above(cumulative, u):
    """Returns the first column (B,) where cumulative (B, K) exceeds u (B, 1) of its total.

    cumulative holds the running sums of numbers that are not negative. Only columns below the total
    are passed over, so that rounding never steps past the last one that holds anything."""
    if cumulative.device.type != "cpu":     # a parallel sum need not be monotone in the last bit
        cumulative = cumulative.cummax(-1).values
    total = cumulative[:, -1:]
    passed = (cumulative <= u * total) & (cumulative < total)       # (B, K)
    return passed.sum(-1)


def truncate(logits, top_k, top_p):
    """Returns logits (B, V) with -inf at the ids that top-k and nucleus sampling exclude.

    At least one id stays. Nucleus sampling is arXiv 1904.09751. For evaluation only."""
    ordered, order = logits.sort(-1, descending=True)
    if top_k > 0:       # first, because top_p is a share of what top_k leaves
        ordered[:, top_k:] = float("-inf")

    # an id is out if those before it have the mass top_p already
    probs = ordered.softmax(-1)
    out = (probs.cumsum(-1) - probs >= top_p) | ordered.isinf()
    out[:, 0] = False
    out_by_id = torch.zeros_like(out).scatter(-1, order, out)
    return logits.masked_fill(out_by_id, float("-inf"))
