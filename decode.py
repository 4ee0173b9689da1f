"""The model as the sampler runs it: fused weights, keys and values in a preallocated cache, one token a row and step.

    InferenceModel(model)       the weights of a Transformer, ready to sample; lives for one rollout
    Cache                       a prompt's keys and values once for its whole group, and each row's own behind them
    capture                     a decode step as a device graph (CUDA, and NPU behind the same name)

A row's new token attends to its prompt and to what it has drawn itself. The two parts are computed apart (Hydragen, arXiv
2402.05099) and merged by their log-sum-exps, as in flash-decoding: all queries of a group read the prompt's keys together,
and query heads that share a key head (2305.13245) are folded into the query dimension, so neither is ever repeated.
"""
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from kernels import (Sequences, attention, length_mask, merge, partial_attention, rms_norm, rope_tables, rotate, swiglu,
                     use_flash)
from model import inverse_frequencies

PREFILL_TOKENS = 8192       # prompt tokens that go through the model at once; a longer prompt goes alone


# --------------------------------------------------------------------------------------------------------- weights

class Linear:
    """Several projections of one input as one product, y = x W^T + b, and what is done to y: "none", "silu", or "add" or
    "mul" with other.

    On the CPU the stack is stored in the blocks that oneDNN computes in (up to twice as fast at a few dozen rows, because
    a plain weight is rearranged at every call), and what follows is computed on the way out. On accelerators the weights stay
    where they are, unless they are only lent."""

    def __init__(self, projections, rows, lent=False):
        weights, bias = [p.weight for p in projections], None
        if projections[0].bias is not None:
            bias = torch.cat([p.bias for p in projections])
        self.bias, self.blocked = bias, None
        if weights[0].device.type != "cpu" and not lent:
            self.weight = stack_in_place(weights)
            return
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0].detach()
        if self.weight.device.type == "cpu" and has_onednn(self.weight.dtype):
            self.blocked = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), max(rows, 64))
            self.weight = None
        elif lent and len(weights) == 1:
            self.weight = self.weight.clone()

    def __call__(self, x, then="none", other=None):
        if self.blocked is not None and other is None:
            name = "swish" if then == "silu" else then
            return torch.ops.mkldnn._linear_pointwise(x, self.blocked, self.bias, name, [], "")
        if self.blocked is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.blocked, self.bias, then)
        y = F.linear(x, self.weight, self.bias)
        if then == "silu":
            return F.silu(y)
        if then == "add":
            return y + other
        return y * other if then == "mul" else y


def has_onednn(dtype):
    """Whether this CPU build of PyTorch computes products of this type by oneDNN."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def stack_in_place(weights):
    """The matrices (n_i, D) as one (sum n_i, D) that shares their memory: they are moved side by side the first time."""
    first, step = weights[0].data, weights[0].element_size()
    at = [first.data_ptr()]
    for w in weights[:-1]:
        at.append(at[-1] + w.numel() * step)
    together = len({w.untyped_storage().data_ptr() for w in weights}) == 1
    if not together or [w.data_ptr() for w in weights] != at:
        with torch.inference_mode(False):       # else they would never receive a gradient again
            first = torch.cat([w.data for w in weights])
            for w, part in zip(weights, first.split([len(w) for w in weights])):
                w.data = part
    size = sum(len(w) for w in weights), first.shape[1]
    return torch.as_strided(first, size, (first.shape[1], 1), first.storage_offset())


class Layer:
    """The weights of one block: q, k and v in one product; gate and up too, where a fused kernel follows."""

    def __init__(self, block, rows):
        a, m, lent = block.self_attn, block.mlp, isinstance(block, FSDPModule)
        self.norm_1, self.norm_2 = (keep(n.weight, lent) for n in (block.input_layernorm, block.post_attention_layernorm))
        self.qkv, self.o = Linear([a.q_proj, a.k_proj, a.v_proj], rows, lent), Linear([a.o_proj], rows, lent)
        if self.norm_1.device.type == "cpu":
            self.gate, self.up = Linear([m.gate_proj], rows, lent), Linear([m.up_proj], rows, lent)
        else:
            self.gate, self.up = Linear([m.gate_proj, m.up_proj], rows, lent), None
        self.down, self.qk_norm = Linear([m.down_proj], rows, lent), None
        if not isinstance(a.q_norm, torch.nn.Identity):     # one weight a head, (heads, D): q and k normed together
            self.qk_norm = torch.cat([a.q_norm.weight.expand(a.heads, -1), a.k_norm.weight.expand(a.kv_heads, -1)])

    def mlp(self, x, residual):
        hidden = swiglu(self.gate(x)) if self.up is None else self.up(x, "mul", self.gate(x, "silu"))
        return self.down(hidden, "add", residual)


# ----------------------------------------------------------------------------------------------------------- cache

class Cache:
    """Keys and values, (layers, rows, Hkv, slots, D) each: of prompts, stored once, and each row's own tokens.

    A row's own slot s holds its s-th drawn token. prompt_lengths (prompts,) says how much of a prompt is there."""

    def __init__(self, config, prompts, prompt_slots, rows, own_slots, device, dtype):
        self.flash = use_flash(device, dtype)
        by_slot = self.flash or device.type == "npu"        # in memory (rows, slots, Hkv, D): what their kernels read

        def new(rows, slots):
            shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)
            if by_slot:
                return torch.zeros([shape[i] for i in (0, 1, 3, 2, 4)], device=device, dtype=dtype).transpose(2, 3)
            if device.type == "cpu":        # numpy's zeros take no memory before they are written
                return torch.from_numpy(np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)).view(dtype)
            return torch.zeros(shape, device=device, dtype=dtype)
        self.prompt_k, self.prompt_v = new(prompts, prompt_slots), new(prompts, prompt_slots)
        self.k, self.v = new(rows, own_slots), new(rows, own_slots)
        self.prompt_lengths = torch.ones(prompts, dtype=torch.int64, device=device)

    def move_rows(self, source, target, used):
        """Own keys and values of rows `source` to rows `target` (index tensors), their first `used` slots."""
        for x in (self.k, self.v):
            x[:, target, :, :used] = x[:, source, :, :used]

    def move_prompts(self, source, target):
        for x in (self.prompt_k, self.prompt_v):
            x[:, target] = x[:, source]
        self.prompt_lengths[target] = self.prompt_lengths[source]


def bytes_per_token(config, dtype):
    """Of keys and values, all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


# ----------------------------------------------------------------------------------------------------------- model

@contextmanager
def gathered(module):
    """While open, the module's own weights are whole and in the compute dtype (FSDP2 brings them from all ranks)."""
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        if isinstance(module, FSDPModule):
            module.reshard()


def keep(weight, lent):
    return weight.detach().clone() if lent else weight


class InferenceModel:
    """The weights of `model` as they are now, for prefill and decode. rows: how many a step will have, about.

    Weights that are sharded over ranks are gathered here, block by block and once for all that is sampled with them: every
    rank has to take part. They are copied then, and on the CPU always: as much memory again for the time of a rollout. On
    accelerators whole weights are only moved side by side."""

    @torch.no_grad()
    def __init__(self, model, rows):
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.layers, lent = [], isinstance(model, FSDPModule)
        with gathered(model):       # what no block holds, and first: it is the largest and exists several times meanwhile
            self.embedding, self.norm = (keep(m.weight, lent) for m in (model.model.embed_tokens, model.model.norm))
            self.lm_head = Linear([model.lm_head], rows, lent)
        if lent and model.config.tie_word_embeddings and self.device.type != "cpu":
            self.lm_head.weight = self.embedding        # one copy of the two
        for block in model.model.layers:
            with gathered(block):
                self.layers.append(Layer(block, rows))
        self.frequencies = inverse_frequencies(self.config, self.device)

    def _layer(self, i, x, rope, attend):
        """x (tokens, hidden) -> the same after block i; attend(i, q, k, v) -> (tokens, heads x D)."""
        c, w = self.config, self.layers[i]
        heads, both = c.num_attention_heads, c.num_attention_heads + c.num_key_value_heads
        qkv = w.qkv(rms_norm(x, w.norm_1, c.rms_norm_eps)).view(len(x), both + c.num_key_value_heads, c.head_dim)
        qk = qkv[:, :both]
        if w.qk_norm is not None:
            qk = rms_norm(qk, w.qk_norm, c.rms_norm_eps)
        qk = rotate(qk, *rope)
        x = w.o(attend(i, qk[:, :heads], qk[:, heads:], qkv[:, both:]), "add", x)
        return w.mlp(rms_norm(x, w.norm_2, c.rms_norm_eps), x)

    def _forward(self, tokens, positions, attend):
        """tokens, positions (M,) -> hidden states (M, hidden) before the last norm."""
        rope = rope_tables(positions, self.frequencies, self.dtype)
        x = F.embedding(tokens, self.embedding)
        for i in range(len(self.layers)):
            x = self._layer(i, x, rope, attend)
        return x

    def _logits(self, x):
        return self.lm_head(rms_norm(x, self.norm, self.config.rms_norm_eps))

    def prefill(self, prompts, cache, places):
        """Keys and values of prompts (lists of ids) into `places` (a list) of the cache; logits (n, V) after each."""
        logits, i = [], 0
        while i < len(prompts):
            j, size = i, 0
            while j < len(prompts) and (j == i or size + len(prompts[j]) <= PREFILL_TOKENS):
                j, size = j + 1, size + len(prompts[j])
            logits.append(self._prefill(prompts[i:j], cache, places[i:j]))
            i = j
        return torch.cat(logits)

    def _prefill(self, prompts, cache, places):
        lengths = [len(p) for p in prompts]
        def on_device(x): return torch.tensor(x, device=self.device)
        tokens = on_device([t for p in prompts for t in p])
        positions = on_device([i for n in lengths for i in range(n)])
        places, lengths_ = on_device(places), on_device(lengths)
        cache.prompt_lengths[places] = lengths_
        of_token = places.repeat_interleave(lengths_)
        sequences = Sequences(lengths, device=self.device)

        def attend(i, q, k, v):
            for x, new in ((cache.prompt_k, k), (cache.prompt_v, v)):
                x[i].transpose(1, 2)[of_token, positions] = new
            return attention(q, k, v, sequences).reshape(len(tokens), -1)
        return self._logits(self._forward(tokens, positions, attend)[lengths_.cumsum(0) - 1])

    def decode(self, tokens, places, own, cells, grid, cache, used, same=None, host=None):
        """One token a row: written to the row's own slot, then the logits (R, V) of the next.

        tokens (R,); places (R,): which prompt of the cache; own (R,): tokens that the row has drawn before this one, so its
        slot. cells (R,): the row's place in a grid = (prompts, columns) that brings the rows of a prompt together (prompts x
        columns: nowhere). Only the first prompts and `used` own slots are looked at. same: the slot, as a number, where all
        rows that matter write the same. host: (prompt lengths, own lengths) as lists, for Ascend's kernel."""
        c, R, (prompts, columns) = self.config, len(tokens), grid
        kv, D = c.num_key_value_heads, c.head_dim
        share = c.num_attention_heads // kv
        lengths, seen = cache.prompt_lengths[:prompts], own + 1
        masked = host is None and not cache.flash
        prompt_mask = length_mask(lengths, cache.prompt_k.shape[3]) if masked else None
        own_mask = length_mask(seen, used) if masked and same is None else None
        slots = used if masked else cache.k.shape[3]
        rows = torch.arange(R, device=tokens.device)
        written = (slice(R), same) if same is not None else (rows, own)
        together, back = self._grid(rows, cells, prompts, columns)

        def attend(i, q, k, v):
            for x, new in ((cache.k, k), (cache.v, v)):     # neighbouring indices: on Ascend others go to its CPU
                x[i].transpose(1, 2)[written] = new
            q = q.reshape(R * kv, share, D)
            of_prompt = partial_attention(q.index_select(0, together).view(prompts, kv, columns * share, D),
                                          cache.prompt_k[i, :prompts], cache.prompt_v[i, :prompts], lengths, prompt_mask,
                                          host and host[0], cache.flash)
            of_own = partial_attention(q.view(R, kv, share, D), cache.k[i, :R, :, :slots], cache.v[i, :R, :, :slots], seen,
                                       own_mask, host and host[1], cache.flash)
            of_prompt = [x.reshape(prompts * kv * columns, share, -1).index_select(0, back).view(R, kv, share, -1)
                         for x in of_prompt]
            return merge(of_prompt, of_own).reshape(R, kv * share * D)
        return self._logits(self._forward(tokens, cache.prompt_lengths[places] + own, attend))

    def _grid(self, rows, cells, prompts, columns):
        """Indices that bring (row, key head) into the order (prompt, key head, column), and back; an empty cell reads row 0."""
        heads = torch.arange(self.config.num_key_value_heads, device=rows.device)
        who = rows.new_zeros(prompts * columns + 1).index_copy_(0, cells, rows)[:-1].view(prompts, 1, columns)
        cells = cells.clamp_max(prompts * columns - 1)[:, None]
        back = (cells // columns * len(heads) + heads) * columns + cells % columns
        return (who * len(heads) + heads[:, None]).flatten(), back.flatten()


# ---------------------------------------------------------------------------------------------------------- graphs

def capture(step, device, pool=None):
    """step() recorded as a device graph: (a callable that replays it, the graph's memory pool). It is not run here.

    step must have run once already, touch only tensors that stay where they are, and ask the host for nothing."""
    backend = getattr(torch, device.type)
    graph = getattr(backend, device.type.upper() + "Graph")()        # torch.cuda.CUDAGraph, torch.npu.NPUGraph
    with backend.graph(graph, pool=pool):
        step()
    return graph.replay, graph.pool()
