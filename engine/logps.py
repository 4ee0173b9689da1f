"""Log-probabilities and entropies of tokens without a (B, T, V) tensor.

    logp(t) = log softmax(h W^T / temperature)[t],    entropy = - sum_v p(v) log p(v)

The last hidden states meet the vocabulary a chunk of tokens at a time, and each chunk's logits are computed again on the way
back: memory does not grow with B x T x V. (The idea is that of Cut Cross-Entropy, arXiv 2411.09009.) With a vocabulary of
150,000 the gradients of embedding and lm_head are the largest tensors of a training step: on request they are added in place.
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F

LOGIT_CHUNK = 2 ** 24      # elements of one chunk of logits on the CPU: 64 MB in float32, whatever the vocabulary
ON_ACCELERATORS = 4         # times as many there: each chunk reads all of W, three times


def chunked_logps(hidden, weight, targets, temperature):
    """hidden (W, D), weight (V, D), targets (W,) -> log-probabilities (W,) with gradient and entropies (W,) without, float32,
    of logits = hidden weight^T / temperature."""
    return _ChunkedLogps.apply(hidden, weight, targets, temperature)


def embed(tokens, weight):
    """F.embedding: tokens (M,) -> (M, D); its gradient is added in place where gradients_in_place says so."""
    return _Embedding.apply(tokens, weight)


@contextmanager
def gradients_in_place(weight):
    """While open, embedding and lm_head add their gradients to weight.grad themselves, which autograd then does not see:
    no second and third (V, D) tensor beside it, but no hooks of this weight either, and no torch.autograd.grad."""
    weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    weight.add_in_place = True
    try:
        yield
    finally:
        weight.add_in_place = False


def logit_chunk(kind):
    """Elements of one chunk of logits on a device of this kind."""
    return LOGIT_CHUNK if kind == "cpu" else ON_ACCELERATORS * LOGIT_CHUNK


def adds_in_place(weight):
    return getattr(weight, "add_in_place", False)


def _logits(hidden, weight, temperature):
    logits = (hidden @ weight.T).float()
    return logits if temperature == 1 else logits.div_(temperature)


class _ChunkedLogps(torch.autograd.Function):
    """log softmax(h W^T / temperature)[target] and the entropy, by chunks of tokens; backward computes each chunk again.

    With s = softmax, d logp / d logits = onehot(target) - s. One chunk of logits exists at a time, in float32."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.step = temperature, max(1, logit_chunk(hidden.device.type) // len(weight))
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logps)
        for i in range(0, len(hidden), ctx.step):
            part = slice(i, i + ctx.step)
            all_logps = _logits(hidden[part], weight, temperature).log_softmax(-1)
            logps[part] = all_logps.gather(-1, targets[part, None])[:, 0]
            entropy[part] = -torch.einsum("tv,tv->t", all_logps.exp(), all_logps)
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets = ctx.saved_tensors
        in_place = adds_in_place(weight)
        d_hidden, d_weight = torch.empty_like(hidden), weight.grad if in_place else torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, len(hidden), ctx.step):
            part = slice(i, i + ctx.step)
            g = grad[part, None] / ctx.temperature
            d = _logits(hidden[part], weight, ctx.temperature).softmax(-1).mul_(-g).scatter_add_(-1, targets[part, None], g)
            d = d.to(weight.dtype)
            d_hidden[part] = d @ weight
            if not ctx.needs_input_grad[1]:
                continue
            if d.dtype == torch.float32:
                d_weight.addmm_(d.T, hidden[part])
            else:       # the sum over chunks in float32: a rounding a chunk would add up
                d_weight += d.T @ hidden[part]
        return d_hidden, None if in_place else d_weight.to(weight.dtype), None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight):
        ctx.save_for_backward(tokens, weight)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, grad):
        tokens, weight = ctx.saved_tensors
        if not adds_in_place(weight):
            return None, torch.ops.aten.embedding_dense_backward(grad, tokens, len(weight), -1, False)
        weight.grad.index_add_(0, tokens, grad)
        return None, None
