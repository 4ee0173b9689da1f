"""Distillation: a student learns from a teacher's whole distribution, on texts of its own.

    python train.py --algo distill --model STUDENT --teacher TEACHER --data gsm8k

On-policy (GKD, arXiv 2306.13649): the student draws completions, and at each of their tokens is
pulled toward what the teacher would have written there. No reward is needed; it is only logged. The
loss of a token is a divergence of the two distributions over the vocabulary, S and T:

    beta = 1        KL(S || T), reverse: the student drops what the teacher would not say
    beta = 0        KL(T || S), forward: the student covers all that the teacher says
    between         beta KL(T || M) + (1 - beta) KL(S || M),  M = beta T + (1 - beta) S

beta is --divergence-beta. As TRL defines it, the loss jumps at both ends: just above 0 it is about
beta KL(T || S), just below 1 about (1 - beta) KL(S || T).

`--divergence token` is the cheap form: only the drawn token is looked at, and log T - log S is its
advantage in a policy gradient. In expectation it is the reverse KL's gradient, with more noise.

Off-policy: `python sft.py --teacher TEACHER --data ...` uses the same divergence on the tokens of a
corpus, such as the teacher's own right answers (rejection.py). Two losses on attention relations
and hidden states may be added there, in one process:

    --relations w   KL of attention relations, softmax(Q Q^T / sqrt d) and the same of K and V, of
                    the last layer's projections, before norms and rotation (MiniLMv2, arXiv
                    2012.15828): heads are split anew, so widths and
                    numbers of heads may differ
    --features w    mean squared error of hidden states behind a learned projection, layer m of the
                    student to layer m L_T / L_S of the teacher (TinyBERT, arXiv 1909.10351)

Teacher and student need the same tokenizer, nothing else. Logits of both exist for one chunk of
tokens at a time, forward and backward, so memory does not grow with B x T x V. Left out: teachers
with another tokenizer; the top-k form, which is unstable with the reverse KL (verl issue 5041).
"""
from dataclasses import dataclass
from pathlib import Path

import torch

import dist
import grpo
import prompts
from config import setting
from engine.kernels import Sequences
from engine.logps import HeadGradient, chunks
from model import Transformer


# --------------------------------------------------------------------------------- pure functions

def divergence(student_logits, teacher_logits, beta=1.0):
    """The generalised Jensen-Shannon divergence of two distributions: (M,), as TRL defines it.

    student_logits, teacher_logits (M, V). beta: 0 forward KL(T || S), 1 reverse KL(S || T), between
    them by the mixture. Raises ValueError for a beta out of 0 to 1."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be 0 to 1, not {beta}")
    S = student_logits.log_softmax(-1)                          # (M, V)
    T = teacher_logits.log_softmax(-1)

    if beta == 0:
        return kl(T, S)
    if beta == 1:
        return kl(S, T)
    weights = torch.tensor([beta, 1 - beta], dtype=S.dtype, device=S.device).log()
    mixture = torch.logaddexp(T + weights[0], S + weights[1])
    return beta * kl(T, mixture) + (1 - beta) * kl(S, mixture)


def kl(P, Q):
    """KL(P || Q) of log-probabilities (M, V): (M,). What P holds impossible counts nothing."""
    p = P.exp()
    return torch.where(p > 0, p * (P - Q), 0.0).sum(-1)


def relation_loss(student, teacher, mask, heads):
    """KL(teacher's relation || student's) of queries, keys or values (MiniLMv2): a scalar.

    student (B, H, T, D) and teacher (B, H', T, D') are one of Q, K and V of a layer. All heads of a
    model together are split anew into `heads`, so only H D and H' D' must be multiples of it. A
    relation is softmax(X X^T / sqrt d) over the positions up to each one (causal). mask (B, T) says
    which positions count; the mean is over them and over heads."""
    return relation_kl(student, teacher, mask, heads).sum() / mask.sum().clamp(min=1)


def relation_kl(student, teacher, mask, heads):
    """The same of each position, a mean over heads: (B, T), 0 off the mask."""
    of_student = relation(student, mask, heads)                 # (B, heads, T, T) log-probs
    of_teacher = relation(teacher, mask, heads)
    return kl(of_teacher, of_student).mean(1) * mask


def relation(x, mask, heads):
    """log softmax of the products of all positions of x (B, H, T, D): (B, heads, T, T)."""
    B, H, T, D = x.shape
    if H * D % heads:
        raise ValueError(f"{H} heads of {D} numbers cannot be split anew into {heads}")
    width = H * D // heads
    x = x.transpose(1, 2).reshape(B, T, heads, width).transpose(1, 2)       # (B, heads, T, width)
    products = x @ x.transpose(-1, -2) / width ** 0.5

    earlier = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    seen = earlier & (mask[:, None, None] > 0)                  # keys that count
    seen = seen | torch.eye(T, dtype=torch.bool, device=x.device)       # no row without any
    return products.masked_fill(~seen, -1e30).log_softmax(-1)


def layer_of_teacher(layer, student_layers, teacher_layers):
    """The teacher's layer for a layer of the student, both from 1: m L_T / L_S, rounded."""
    return max(1, round(layer * teacher_layers / student_layers))


# --------------------------------------------------------------- the divergence, chunk by chunk

class _ChunkedDivergence(torch.autograd.Function):
    """Divergence, log-prob and entropy of tokens, of which the first has a gradient: (W,) each.

    Logits of both models exist for one chunk of tokens at a time, and backward computes them
    again, as in engine/logps.py."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, beta, teacher_hidden, teacher_weight):
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight)
        ctx.settings = temperature, beta
        found = torch.empty(3, len(hidden), dtype=torch.float32, device=hidden.device)
        for chunk in chunks(hidden, weight):
            student, teacher = chunk_logits(chunk, temperature, hidden, weight, teacher_hidden,
                                            teacher_weight)
            logp = student.log_softmax(-1)
            found[0, chunk] = divergence(student, teacher, beta)
            found[1, chunk] = logp.gather(-1, targets[chunk, None])[:, 0]
            found[2, chunk] = -(logp.exp() * logp).sum(-1)

        of_tokens, logps, entropy = found
        ctx.mark_non_differentiable(logps, entropy)
        return of_tokens, logps, entropy

    @staticmethod
    def backward(ctx, d_divergence, *_):
        hidden, weight, teacher_hidden, teacher_weight = ctx.saved_tensors
        temperature, beta = ctx.settings
        gradient = HeadGradient(hidden, weight, ctx.needs_input_grad[1])

        for chunk in chunks(hidden, weight):
            student, teacher = chunk_logits(chunk, temperature, hidden, weight, teacher_hidden,
                                            teacher_weight)
            with torch.enable_grad():
                student.requires_grad_()
                value = divergence(student, teacher, beta)
            d_logits, = torch.autograd.grad(value, student, d_divergence[chunk])
            gradient.add(chunk, d_logits / temperature)
        return *gradient.result(), None, None, None, None, None


def chunk_logits(chunk, temperature, hidden, weight, teacher_hidden, teacher_weight):
    """Logits of student and teacher over the ids that both have: two (chunk, V) in float32.

    A larger model of a family may have more rows that stand for no token."""
    V = min(len(weight), len(teacher_weight))
    student = (hidden[chunk] @ weight[:V].T).float() / temperature
    teacher = (teacher_hidden[chunk] @ teacher_weight[:V].T).float() / temperature
    return student, teacher


def divergence_and_entropy(model, teacher, micro, groups, temperature, beta):
    """Divergence and entropy of a micro-batch's tokens: two (B, T); log pi goes into the batch."""
    caught = []

    def catch(hidden, weight, targets, temperature):
        caught.append((hidden, weight))
        nothing = hidden.new_zeros(len(targets), dtype=torch.float32)
        return nothing, nothing

    with torch.no_grad():
        teacher.token_logps(micro.tokens, micro.mask, temperature, groups, catch)

    def head(hidden, weight, targets, temperature):
        of_tokens, logps, entropy = _ChunkedDivergence.apply(
            hidden, weight, targets, temperature, beta, *caught[0])
        micro.now_logp = torch.zeros_like(micro.mask)
        micro.now_logp[micro.mask.bool()] = logps
        return of_tokens, entropy
    return model.token_logps(micro.tokens, micro.mask, temperature, groups, head)


# ---------------------------------------------------------------------------------------- settings

@dataclass
class Settings:
    # objective: a teacher's distribution (distill.py)
    teacher: str = ""                   # checkpoint folder or hub id, with the student's tokenizer
    divergence: str = setting("full", choices=("full", "token"))    # over the whole vocabulary, or
                                        # of the drawn token alone (cheaper, noisier)

    divergence_beta: float = setting(1.0, least=0, most=1)  # 1: reverse KL, 0: forward KL,
                                        # between: of a mixture

    # no flags: what the learner reads of every objective
    aggregation = "token"

    def check(self):
        """Raise ValueError for a run that has nobody to learn from."""
        if not self.teacher:
            raise ValueError("--algo distill needs --teacher (a checkpoint folder or hub id)")
        if not self.model:
            raise ValueError("--algo distill needs --model, the student; make a small one: "
                             "python sft.py --out DIR")
        if self.refill:
            raise ValueError("--refill throws groups away that are all right or all wrong, and "
                             "distillation learns from these too: leave it out")
        if self.divergence == "token" and self.divergence_beta != 1:
            raise ValueError("--divergence token is the reverse KL: leave --divergence-beta out")
        if self.divergence == "token" and self.epochs > 1:
            raise ValueError("--divergence token has no clip, so each batch is used once: leave "
                             "--epochs out")


# ------------------------------------------------------------------- the calls of the training loop

METRICS = {"entropy": "tokens", "kl": "tokens", "clip_ratio": "tokens", "divergence": "tokens"}


@dataclass
class Batch(grpo.Batch):
    """The batch of a rollout, and the teacher."""
    now_logp: torch.Tensor | None = None    # (B, T) log pi of a micro-batch, from its forward pass
    teacher = None                          # a model: no field, so that no row of it is taken

    def rows(self, indices):
        part = super().rows(indices)
        part.teacher = self.teacher
        return part


class State:
    """The teacher. It is no part of a checkpoint: a run that goes on loads it anew."""

    def __init__(self, config):
        start = Path(config.out) / "start"      # of a run that goes on
        tokenizer = prompts.load_tokenizer(start if start.is_dir() else config.model)
        same_tokens(tokenizer, config.teacher)
        self.teacher = None

    def load(self, learner):
        """Load the teacher as a frozen reference is loaded. Every rank enters."""
        c = learner.config
        place = dist.Sharding(learner.device, learner.model.dtype, c.shard, c.offload,
                              c.collective_timeout)
        teacher = Transformer.from_pretrained(c.teacher, place.home, learner.model.dtype, place)
        self.teacher = teacher.requires_grad_(False)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def same_tokens(tokenizer, teacher):
    """Raise ValueError where the teacher (a folder) has another tokenizer than the student."""
    if prompts.load_tokenizer(teacher).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher {teacher}: its tokenizer is not that of the student; "
                         "distillation compares the probabilities of the same tokens")


def prepare(rollout, rewards, config):
    """Turn a rollout into a batch: every completion teaches, right or wrong."""
    mask = rollout.completion_mask()
    return Batch(tokens=rollout.tokens, prompt_lengths=rollout.prompt_lengths,
                 lengths=rollout.lengths, mask=mask, rewards=rewards.flatten(),
                 advantages=rewards.flatten(),          # nothing here reads them
                 active=mask.sum(1) > 0, old_logp=rollout.logps)


def complete(learner, batch):
    """Add the teacher, or with --divergence token only what it says of the drawn tokens."""
    if learner.state.teacher is None:
        learner.state.load(learner)
    batch.teacher = learner.state.teacher
    if learner.config.divergence == "token":
        batch.ref_logp = learner.score(batch, model=batch.teacher)[0]


def forward(model, micro, rows, config):
    """What `loss` reads of a micro-batch: divergences, or log-probs, and entropies, (rows, T)."""
    groups = [row // config.group_size for row in rows]
    if config.divergence == "token":
        return model.token_logps(micro.tokens, micro.mask, config.temperature, groups)
    return divergence_and_entropy(model, micro.teacher, micro, groups, config.temperature,
                                  config.divergence_beta)


def loss(values, entropy, batch, config, normalizer):
    """The objective on some rows of the batch: a scalar, and sums over tokens for the log.

    values (B, T): what `forward` gave first."""
    mask = batch.mask
    if config.divergence == "token":
        logp = values
        gap = grpo.masked_log_ratio(logp.detach(), batch.ref_logp, mask)        # log S - log T
        ratio = grpo.masked_log_ratio(logp, batch.old_logp, mask).exp()
        per_token = ratio * gap             # the advantage is -gap
        shown = gap
    else:
        logp, per_token, shown = batch.now_logp, values, values.detach()

    nothing = mask.new_zeros(())
    sums = {**grpo.common_sums(logp, entropy, batch.sampler_logp, mask),
            "kl": nothing, "clip_ratio": nothing, "divergence": (shown * mask).sum()}
    return grpo.aggregate(per_token, mask, "token", normalizer), sums


# ---------------------------------------------------------------- a corpus, and what goes on inside

class CorpusDistillation:
    """The objective of sft.py --teacher: the divergence on a corpus, and the two inner terms.

    It has the calls of an objective (learner.py). With --features the student gets a projection of
    its hidden states; `remove` takes it away before the model is written."""
    METRICS = {"divergence": "tokens"}

    def __init__(self, model, teacher, config):
        self.teacher = teacher.requires_grad_(False)
        self.config = config
        self.inside = config.features > 0 or config.relations > 0
        if self.inside and (dist.world() > 1 or model.dtype != torch.float32):
            raise ValueError("--features and --relations run in one process and in float32: leave "
                             "torchrun out, and give --dtype float32")
        if config.features > 0:
            model.projection = projection(model, teacher, config.seed)

    def remove(self, model):
        if hasattr(model, "projection"):
            del model.projection

    def forward(self, model, micro, rows, config):
        micro.old_logp = micro.mask         # anything but None, which learner.py would fill in
        micro.inner = 0.0
        if self.inside and rows:
            micro.inner = self.inner(model, micro)
        return divergence_and_entropy(model, self.teacher, micro, list(rows), 1.0,
                                      config.divergence_beta)

    def inner(self, model, micro):
        """The terms on hidden states and attention relations of these rows: a scalar.

        A row counts as its mean over positions times its trained tokens. Rows are summed, as the
        divergence is over tokens, so micro-batches add up."""
        with torch.no_grad():
            theirs = look_inside(self.teacher, micro.tokens)
        ours = look_inside(model, micro.tokens)
        valid = positions_of(micro)
        each = torch.zeros_like(valid)                          # (B, T)

        c = self.config
        if c.relations > 0:
            for name in ("q", "k", "v"):
                gap = relation_kl(ours[name], theirs[name], valid, c.relation_heads)
                each = each + c.relations * gap
        if c.features > 0:
            layers = len(ours["hidden"])
            for m in range(1, layers + 1):
                g = layer_of_teacher(m, layers, len(theirs["hidden"]))
                gap = model.projection(ours["hidden"][m - 1]) - theirs["hidden"][g - 1]
                each = each + c.features / layers * gap.square().mean(-1) * valid

        of_row = each.sum(1) / valid.sum(1)
        return (of_row * micro.mask.sum(1)).sum()

    def loss(self, values, entropy, batch, config, normalizer):
        """As sft.loss: the sum over tokens, divided by the mean batch's tokens."""
        total = ((values * batch.mask).sum() + batch.inner) / config.batch_tokens
        nothing = batch.mask.new_zeros(())
        return total, {"tokens": batch.mask.sum(), "rows": (batch.mask.sum(1) > 0).sum(),
                       "divergence": (values.detach() * batch.mask).sum(),
                       "ratio_max_dev": nothing, "ratio_mean_dev": nothing}


def projection(student, teacher, seed):
    """A linear map of the student's hidden states to the teacher's width, drawn from the seed."""
    width = student.config.hidden_size
    layer = torch.nn.Linear(width, teacher.config.hidden_size, bias=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.uniform_(-width ** -0.5, width ** -0.5, generator=generator)
    return layer.to(student.device)


def positions_of(batch):
    """(B, T) of 0/1: positions that hold a token, of the prompt or of the completion."""
    columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return (columns < batch.lengths[:, None]).float()


def look_inside(model, tokens):
    """Hidden states behind each block, and the last block's q, k and v, of padded tokens (B, T).

    Returns {"hidden": [(B, T, D) a layer], "q" | "k" | "v": (B, heads, T, head size)}."""
    B, T = tokens.shape
    found = {"hidden": []}
    watched = []
    for block in model.model.layers:
        watched.append(block.register_forward_hook(
            lambda module, args, out: found["hidden"].append(out.view(B, T, -1))))

    attention = model.model.layers[-1].self_attn
    for name in ("q", "k", "v"):
        def keep(module, args, out, name=name):
            heads = attention.heads if name == "q" else attention.kv_heads
            found[name] = out.view(B, T, heads, -1).transpose(1, 2)
        watched.append(getattr(attention, f"{name}_proj").register_forward_hook(keep))

    try:
        positions = torch.arange(T, device=tokens.device).repeat(B)
        model.hidden_states(tokens.flatten(), positions, Sequences([T] * B, device=tokens.device))
    finally:
        for hook in watched:
            hook.remove()
    return found
