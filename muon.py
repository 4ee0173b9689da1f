"""Muon: steps along the momentum made orthogonal (Keller Jordan,
kellerjordan.github.io/posts/muon).

    m <- 0.95 m + 0.05 g                            momentum of a matrix's gradient
    W <- W - lr sqrt(max(1, rows / columns)) O(0.95 m + 0.05 g)     O(X) = U V^T for X = U S V^T

A gradient has few large singular values, so a step along it, or Adam's, moves a matrix in few
directions. O sets all singular values to about 1: every direction moves equally far, those of small
gradients too. It is for the matrices of the blocks; embeddings, lm_head and norms stay with AdamW.

Here it makes the warm start of the default run three times shorter (sft.py --muon-lr). RL does not
use it. torch.optim.Muon takes the matrices one by one, in bfloat16, and ten times as long on a CPU.
Left out: weight decay.
"""
import torch

from engine.weights import own_rows, whole

COEFFICIENTS = 3.4445, -4.775, 2.0315       # of an odd polynomial of degree 5, Jordan's choice
ITERATIONS = 5
MOMENTUM = 0.95


def orthogonal(x):
    """(N, rows, columns) -> the same singular vectors, with all singular values near 1.

    An odd polynomial of a matrix acts on its singular values alone. Applied five times, this one
    brings them between about 0.7 and 1.2, without a decomposition (Newton-Schulz)."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT          # the smaller square is the cheaper one

    a, b, c = COEFFICIENTS
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (c * square @ square + b * square) @ x
    return x


class Muon(torch.optim.Optimizer):
    """The optimizer for a list of matrices; those of one shape are computed together, in float32.

    Of weights that are sharded over ranks the gradients are gathered, and every rank computes the
    whole step: that is for small models."""

    def __init__(self, matrices, lr):
        alike = {}
        for w in matrices:
            alike.setdefault(w.shape, []).append(w)
        super().__init__([{"params": group} for group in alike.values()], {"lr": lr})
        for group in self.param_groups:         # one momentum for the weights of a shape
            w = group["params"][0]
            self.state[w] = {"momentum": torch.zeros(
                len(group["params"]), *w.shape, dtype=w.dtype, device=w.device)}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            gradient = torch.stack([whole(w.grad) for w in weights])            # (N, rows, columns)
            momentum = self.state[weights[0]]["momentum"]
            momentum.lerp_(gradient, 1 - MOMENTUM)
            updates = orthogonal(gradient.lerp(momentum, MOMENTUM))

            _, rows, columns = gradient.shape
            length = group["lr"] * max(1, rows / columns) ** 0.5
            for w, update in zip(weights, updates):
                mine, which = own_rows(w)
                mine.add_(update[which], alpha=-length)


class Together:
    """Several optimizers, each of its own weights, as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self):
        return {p: kept for optimizer in self.optimizers for p, kept in optimizer.state.items()}

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)
