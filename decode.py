"""The model as the sampler runs it: fused weights, keys and values in a preallocated cache, one token a row and step.

    InferenceModel(model)       the weights of a Transformer, ready to sample; lives for one rollout
    Cache                       a prompt's keys and values once for its whole group, and each row's own behind them
    capture                     a decode step as a device graph (CUDA, and NPU behind the same name)

A row's new token attends to its prompt and to what it has drawn itself. The two parts are computed apart and merged by
their log-sum-exps (as in flash-decoding and cascade attention): all queries of a group read the prompt's keys together,
and query heads that share a key head are folded into the query dimension, so neither is ever repeated.
"""
import torch
import torch.nn.functional as F

from kernels import (Sequences, attention, length_mask, merge, partial_attention, rms_norm, rope_tables, rotate, swiglu,
                     use_flash)
from model import inverse_frequencies

PREFILL_TOKENS = 8192       # padded prompt tokens that go through the model at once


# --------------------------------------------------------------------------------------------------------- weights

def linear(weights, biases, rows):
    """x -> x W^T + b for the weights stacked, as one product.

    On the CPU the stack is stored in the blocks that oneDNN computes in (up to twice as fast at a few dozen rows, because
    a plain weight is rearranged at every call); elsewhere it is used in place, see adjoin."""
    bias = None if biases[0] is None else torch.cat(list(biases))
    if weights[0].device.type != "cpu":
        weight = adjoin(weights)
        return lambda x: F.linear(x, weight, bias)
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0].detach()
    if not blocks(weight.dtype):
        return lambda x: F.linear(x, weight, bias)
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), max(rows, 64))
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")


def blocks(dtype):
    """Whether this CPU build of PyTorch computes products of this type by oneDNN."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def adjoin(weights):
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
    """The weights of one block, fused: q, k and v in one product, gate and up in another."""

    def __init__(self, block, rows):
        a, m = block.self_attn, block.mlp
        qkv, gate_up = (a.q_proj, a.k_proj, a.v_proj), (m.gate_proj, m.up_proj)
        self.qkv = linear([p.weight for p in qkv], [p.bias for p in qkv], rows)
        self.o = linear([a.o_proj.weight], [a.o_proj.bias], rows)
        self.gate_up = linear([p.weight for p in gate_up], [p.bias for p in gate_up], rows)
        self.down = linear([m.down_proj.weight], [m.down_proj.bias], rows)
        self.norm_1, self.norm_2 = block.input_layernorm.weight, block.post_attention_layernorm.weight
        self.qk_norm = None
        if not isinstance(a.q_norm, torch.nn.Identity):     # one weight a head, (heads, D): q and k normed together
            self.qk_norm = torch.cat([a.q_norm.weight.expand(a.heads, -1), a.k_norm.weight.expand(a.kv_heads, -1)])


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

class InferenceModel:
    """The weights of `model` as they are now, for prefill and decode. rows: how many a step will have, about."""

    def __init__(self, model, rows):
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.embedding, self.norm = model.model.embed_tokens.weight, model.model.norm.weight
        self.layers = [Layer(block, rows) for block in model.model.layers]
        self.lm_head = linear([model.lm_head.weight], [None], rows)
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
        x = x + w.o(attend(i, qk[:, :heads], qk[:, heads:], qkv[:, both:]))
        return x + w.down(swiglu(w.gate_up(rms_norm(x, w.norm_2, c.rms_norm_eps))))

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
        columns: nowhere). Only the first prompts and `used` own slots are looked at. same: the slot, as a number, where it is the
        same for all rows that matter. host: (prompt lengths, own lengths) as lists, for Ascend's kernel."""
        c, R, (prompts, columns) = self.config, len(tokens), grid
        heads, kv, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        share = heads // kv
        lengths, seen = cache.prompt_lengths[:prompts], own + 1
        masked = host is None and not cache.flash
        prompt_mask = length_mask(lengths, cache.prompt_k.shape[3]) if masked else None
        own_mask = length_mask(seen, used) if masked and same is None else None
        slots = used if masked else cache.k.shape[3]
        written = (slice(R), same) if same is not None else (torch.arange(R, device=tokens.device), own)

        def attend(i, q, k, v):
            for x, new in ((cache.k, k), (cache.v, v)):     # neighbouring indices: on Ascend others go to its CPU
                x[i].transpose(1, 2)[written] = new
            grid = q.new_zeros(prompts * columns + 1, heads, D).index_copy_(0, cells, q)[:-1]
            grid = grid.view(prompts, columns, kv, share, D).transpose(1, 2).reshape(prompts, kv, columns * share, D)
            out, lse = partial_attention(grid, cache.prompt_k[i, :prompts], cache.prompt_v[i, :prompts], lengths, prompt_mask,
                                         host and host[0], cache.flash)
            of_prompt = [x.reshape(prompts, kv, columns, share, -1).transpose(1, 2).reshape(prompts * columns, kv, share, -1)
                         .index_select(0, back) for x in (out, lse)]
            of_own = partial_attention(q.reshape(R, kv, share, D), cache.k[i, :R, :, :slots], cache.v[i, :R, :, :slots], seen,
                                       own_mask, host and host[1], cache.flash)
            return merge(of_prompt, of_own).reshape(R, heads * D)
        back = cells.clamp_max(prompts * columns - 1)
        return self._logits(self._forward(tokens, cache.prompt_lengths[places] + own, attend))


# ---------------------------------------------------------------------------------------------------------- graphs

def capture(step, device, pool=None):
    """step() recorded as a device graph: (a callable that replays it, the graph's memory pool). It is not run here.

    step must have run once already, touch only tensors that stay where they are, and ask the host for nothing."""
    backend = getattr(torch, device.type)
    graph = getattr(backend, device.type.upper() + "Graph")()        # torch.cuda.CUDAGraph, torch.npu.NPUGraph
    with backend.graph(graph, pool=pool):
        step()
    return graph.replay, graph.pool()
