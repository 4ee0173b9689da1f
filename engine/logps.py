"""Log-probabilities and entropies of tokens without a (B, T, V) tensor.

    logp(t) = log softmax(h W^T / temperature)[t],    entropy = - sum_v p(v) log p(v)

The last hidden states meet the vocabulary a chunk of tokens at a time, and each chunk's logits are
computed again on the way back, so memory does not grow with B x T x V. The idea is that of Cut
Cross-Entropy (arXiv 2411.09009); its fused kernel and its filter of tiny gradients are left out.

With a vocabulary of 150,000 the gradients of embedding and lm_head are the largest tensors of a
training step. On request they are added in place, and a frozen weight gets none. Needs PyTorch
alone; model.py calls `chunked_logps` and `embed`, learner.py opens `gradients_in_place`.
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F

LOGIT_CHUNK = 2 ** 24      # elements of a chunk of logits on the CPU: 64 MB in float32
ON_ACCELERATORS = 4        # times as many there: each chunk reads all of W, three times


def logit_chunk(kind):
    """Returns how many elements a chunk of logits has on a device of this kind."""
    return LOGIT_CHUNK if kind == "cpu" else ON_ACCELERATORS * LOGIT_CHUNK


def chunked_logps(hidden, weight, targets, temperature):
    """Returns log-probabilities (W,) with gradient and entropies (W,) without, both float32.

    hidden (W, D), weight (V, D), targets (W,); logits = hidden weight^T / temperature."""
    return _ChunkedLogps.apply(hidden, weight, targets, temperature)


def embed(tokens, weight):
    """Look tokens (M,) up in weight (V, D), as F.embedding does. Returns (M, D).

    The gradient is added in place while `gradients_in_place` is open for this weight."""
    return _Embedding.apply(tokens, weight)


# ------------------------------------------------------------------------------ gradients in place

@contextmanager
def gradients_in_place(weight):
    """While open, embedding and lm_head add their gradients to weight.grad themselves.

    This saves a second and a third (V, D) tensor beside it. Autograd does not see these gradients:
    the weight's hooks do not run, and torch.autograd.grad does not work for it. A frozen weight
    (requires_grad False) needs no gradient, so it keeps the one that it has, or none."""
    if not weight.requires_grad:
        yield
        return

    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.add_in_place = True
    try:
        yield
    finally:
        weight.add_in_place = False


def adds_in_place(weight):
    """Returns whether `gradients_in_place` is open for this weight."""
    return getattr(weight, "add_in_place", False)


# ------------------------------------------------------------------------ a chunk of tokens a time

def chunks(hidden, weight):
    """Slices of the tokens of hidden (W, D) whose logits over weight (V, D) fit into a chunk."""
    size = max(1, logit_chunk(hidden.device.type) // len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


class HeadGradient:
    """Gradients of hidden (W, D) and of lm_head's weight (V, D), from those of a chunk's logits."""

    def __init__(self, hidden, weight, trains_weight):
        self.hidden, self.weight = hidden, weight
        self.d_hidden = torch.empty_like(hidden)

        # a frozen weight gets no buffer: it would be V x D numbers of float32
        self.in_place = trains_weight and adds_in_place(weight)
        self.d_weight = weight.grad if self.in_place else None
        if trains_weight and not self.in_place:
            self.d_weight = torch.zeros_like(weight, dtype=torch.float32)

    def add(self, chunk, d_logits):
        """Take the gradient of the chunk's logits, (chunk, V) or of fewer ids, the first ones."""
        d_logits = d_logits.to(self.weight.dtype)
        V = d_logits.shape[1]
        self.d_hidden[chunk] = d_logits @ self.weight[:V]

        if self.d_weight is None:
            return
        if d_logits.dtype == torch.float32:
            self.d_weight[:V].addmm_(d_logits.T, self.hidden[chunk])
        else:       # the sum over chunks is float32: a rounding in each chunk would add up
            self.d_weight[:V] += d_logits.T @ self.hidden[chunk]

    def result(self):
        """What autograd shall get: of a weight that is frozen, or added in place, None."""
        if self.in_place or self.d_weight is None:
            return self.d_hidden, None
        return self.d_hidden, self.d_weight.to(self.weight.dtype)


# ----------------------------------------------------------------------------- autograd functions

def _logits(hidden, weight, temperature):
    logits = (hidden @ weight.T).float()
    return logits if temperature == 1 else logits.div_(temperature)


class _ChunkedLogps(torch.autograd.Function):
    """Compute `chunked_logps` by chunks of tokens; backward computes each chunk's logits again.

    With p = softmax(logits), d logp / d logits = onehot(target) - p. One chunk of logits exists at
    a time, in float32."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logps)

        for chunk in chunks(hidden, weight):
            all_logps = _logits(hidden[chunk], weight, temperature).log_softmax(-1)    # (chunk, V)
            logps[chunk] = all_logps.gather(-1, targets[chunk, None])[:, 0]
            entropy[chunk] = -torch.einsum("tv,tv->t", all_logps.exp(), all_logps)

        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, d_logps, _):
        hidden, weight, targets = ctx.saved_tensors
        gradient = HeadGradient(hidden, weight, ctx.needs_input_grad[1])

        for chunk in chunks(hidden, weight):
            scale = d_logps[chunk, None] / ctx.temperature                             # (chunk, 1)
            d_logits = _logits(hidden[chunk], weight, ctx.temperature).softmax(-1)     # (chunk, V)
            d_logits = d_logits.mul_(-scale).scatter_add_(-1, targets[chunk, None], scale)
            gradient.add(chunk, d_logits)
        return *gradient.result(), None, None


class _Embedding(torch.autograd.Function):
    """Compute `embed`. Autograd does not call its backward for a frozen weight."""

    @staticmethod
    def forward(ctx, tokens, weight):
        ctx.save_for_backward(tokens, weight)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, d_output):
        tokens, weight = ctx.saved_tensors
        if adds_in_place(weight):
            weight.grad.index_add_(0, tokens, d_output)
            return None, None
        d_weight = torch.ops.aten.embedding_dense_backward(d_output, tokens, len(weight), -1, False)
        return None, d_weight
