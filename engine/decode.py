"""The model as the sampler runs it: fused weights, keys and values in a preallocated cache, one token a row and step.

    InferenceModel(model)       the weights of a Transformer, ready to sample; lives for one rollout
    Cache                       a prompt's keys and values once for its whole group, and each row's own behind them
    capture                     a decode step as a device graph (CUDA, and NPU behind the same name)

A row's new token attends to its prompt and to what it has drawn itself; all queries of a group read the prompt's keys together
(Hydragen, arXiv 2402.05099). Plain PyTorch takes one softmax over both (kernels.shared_attention); devices' attention kernels
compute the two parts apart, which are then merged by their log-sum-exps, as in flash-decoding.
"""
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from engine.kernels import (Sequences, attention, inverse_frequencies, length_mask, merge, partial_attention, rms_norm, rope_tables, rotate, row_ends,
                     shared_attention, swiglu, use_flash)

PREFILL_TOKENS = 8192       # prompt tokens that go through the model at once; a longer prompt goes alone
CPU_BLOCK, CPU_BLOCKS = 16, 8       # slots of a block of a row's own keys, at least; blocks of a row, at most
ONE_BLOCK = 16      # rows that have one block instead, at most: with so few, a call for each block takes longer than reading
SMALL = 2 ** 17     # elements of a weight below which oneDNN takes longer to be called than its blocks save


# --------------------------------------------------------------------------------------------------------- weights

class Linear:
    """Several projections of one input as one product, y = x W^T + b, and what is done to y: "none", "silu", or "add" or
    "mul" with other.

    On the CPU a large stack is stored in the blocks that oneDNN computes in (up to twice as fast at a few dozen rows, because
    a plain weight is rearranged at every call), and what follows is computed on the way out. A small one is a plain product:
    a call of oneDNN takes 20 to 40 microseconds more. On accelerators the weights stay where they are, unless they are only lent."""

    def __init__(self, projections, rows, lent=False):
        weights, bias = [p.weight for p in projections], None
        if projections[0].bias is not None:
            bias = torch.cat([p.bias for p in projections])
        self.bias, self.blocked = bias, None
        if weights[0].device.type != "cpu" and not lent:
            self.weight = stack_in_place(weights)
            return
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0].detach()
        if self.weight.device.type == "cpu" and self.weight.numel() >= SMALL and has_onednn(self.weight.dtype):
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
            return F.silu(y, inplace=True)
        if then == "add":
            return y.add_(other)
        return y.mul_(other) if then == "mul" else y


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
    """Keys and values of all layers: of prompts, stored once, and each row's own tokens.

    prompt_k, prompt_v (layers, prompts, Hkv, slots, D); prompt_lengths (prompts,): how much of a prompt is there. k, v (layers,
    blocks, rows, Hkv, slots, D): slot s of block b holds a row's drawn token b x slots + s. On accelerators there is one block;
    on the CPU more than ONE_BLOCK rows have several: it reads a few whole blocks two to three times as fast as the beginnings of
    many long rows.
    memory: k and v as they were made; given: those of a cache that nobody reads any more, taken over where they fit."""

    def __init__(self, config, prompts, longest, rows, own_slots, device, dtype, memory=None):
        self.flash = use_flash(device, dtype)
        by_slot = self.flash or device.type == "npu"        # in memory (rows, slots, Hkv, D): what their kernels read
        blocks, self.block = own_blocks(own_slots, device, rows)

        def new(*rows, slots):
            shape = (config.num_hidden_layers, *rows, config.num_key_value_heads, slots, config.head_dim)
            if by_slot:
                return torch.zeros((*shape[:-3], *shape[-2:-4:-1], shape[-1]), device=device, dtype=dtype).transpose(-2, -3)
            if device.type == "cpu":        # numpy's zeros take no memory before they are written
                return torch.from_numpy(np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)).view(dtype)
            return torch.zeros(shape, device=device, dtype=dtype)
        self.prompt_k, self.prompt_v = (new(prompts, slots=prompt_slots(longest, device)) for _ in range(2))
        shape = (config.num_hidden_layers, blocks, rows, config.num_key_value_heads, self.block, config.head_dim)
        self.k, self.v = self.memory = memory if memory and memory[0].shape == shape else tuple(
            new(blocks, rows, slots=self.block) for _ in range(2))
        self.prompt_lengths = torch.ones(prompts, dtype=torch.int64, device=device)

    def own(self, layer, rows, used):
        """Of the first rows, [(k, v), ...] (rows, Hkv, slots, D) each: whole blocks until `used` slots are among them."""
        k, v = self.k[layer], self.v[layer]
        if len(k) == 1:
            return [(k[0, :rows, :, :used], v[0, :rows, :, :used])]
        return [(k[b, :rows], v[b, :rows]) for b in range(-(-used // self.block))]

    def write(self, layer, k, v, at):
        """The new token's keys and values (rows, Hkv, D) of all rows into their own slots. at: see slots_of."""
        for x, new in ((self.k[layer], k), (self.v[layer], v)):     # neighbouring indices: on Ascend others go to its CPU
            x.transpose(-2, -3)[at] = new

    def slots_of(self, own, same=None):
        """The index at which rows write, whose slots are own (R,), or all the slot `same`, a number."""
        if same is not None:
            return same // self.block, slice(len(own)), same % self.block
        rows = torch.arange(len(own), device=own.device)
        return (0, rows, own) if self.k.shape[1] == 1 else (own // self.block, rows, own % self.block)

    def move_rows(self, source, target, used):
        """Own keys and values of rows `source` to rows `target` (index tensors), their first `used` slots."""
        for x in (self.k, self.v):
            for b in range(-(-used // self.block)):
                slots = min(self.block, used - b * self.block)
                x[:, b, target, :, :slots] = x[:, b, source, :, :slots]

    def join_blocks(self, rows, spare_bytes):
        """The blocks of the first `rows`, few, end to end in a copy, if there is room; there are no other rows from here on."""
        if self.k.shape[1] > 1 and 2 * self.k[:, :, :rows].nbytes <= spare_bytes:
            self.k, self.v = (x[:, :, :rows].movedim(1, 3).flatten(3, 4)[:, None] for x in (self.k, self.v))
            self.block = self.k.shape[4]

    def move_prompts(self, source, target):
        for x in (self.prompt_k, self.prompt_v):
            x[:, target] = x[:, source]
        self.prompt_lengths[target] = self.prompt_lengths[source]


def own_blocks(slots, device, rows):
    """(blocks, slots of each) for so many rows of so many own tokens."""
    if device.type != "cpu" or rows <= ONE_BLOCK:
        return 1, slots
    size = max(CPU_BLOCK, -(-slots // CPU_BLOCKS))
    blocks = -(-slots // size)
    return blocks, -(-slots // blocks)


def prompt_slots(longest, device):
    """Of a cache for prompts of at most so many tokens. Rows of 16 bytes: products in half precision are slower on others."""
    return longest if device.type == "cpu" else -(-longest // 8) * 8


class Groups:
    """Which prompt of the cache each row reads, and a grid (prompts, columns) that brings the rows of a prompt together.

    place (R,): the prompt. together (prompts x Hkv x columns,): which row x Hkv + key head stands in the grid's cell (prompt,
    key head, column), row 0 where no row does. back (R x Hkv,): the cell of each row's key head, some cell where there is none."""

    def __init__(self, places, kv_heads, prompts=None, columns=None, device="cpu"):
        """places: of each row its prompt, or None: what it reads does not matter. prompts, columns: at least as many."""
        place = np.array([-1 if p is None else p for p in places], np.int64)
        order = np.argsort(place, kind="stable")
        order = order[place[order] >= 0]
        begins = np.searchsorted(place[order], place[order])        # where its prompt's rows begin: the column is what lies between
        column = np.zeros_like(place)
        column[order] = np.arange(len(order)) - begins
        self.prompts = prompts or max(place.max(initial=-1) + 1, 1)
        columns, heads = columns or column.max(initial=0) + 1, np.arange(kv_heads)
        grid = np.zeros((self.prompts, columns), np.int64)
        grid[place[order], column[order]] = order
        together = grid[:, None] * kv_heads + heads[:, None]
        back = (place.clip(0)[:, None] * kv_heads + heads) * columns + column[:, None]
        self.place, self.together, self.back = (torch.from_numpy(np.ascontiguousarray(x).reshape(-1)).to(device)
                                                for x in (place.clip(0), together, back))

    def copy_(self, other):
        """The same arrangement at the same addresses, for graphs that read them."""
        for name in ("place", "together", "back"):
            getattr(self, name).copy_(getattr(other, name))


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
    rank has to take part. They are copied then, and on the CPU nearly always: as much memory again for the time of a rollout.
    On accelerators whole weights are only moved side by side. Not to be updated while this is read."""

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

    def _layer(self, i, x, rope, attend, wanted=None):
        """x (tokens, hidden) -> the same after block i; attend(i, q, k, v) -> (tokens, heads x D). wanted: the tokens, as an
        index, of which more than keys and values is asked; None: all."""
        c, w = self.config, self.layers[i]
        heads, both = c.num_attention_heads, c.num_attention_heads + c.num_key_value_heads
        qkv = w.qkv(rms_norm(x, w.norm_1, c.rms_norm_eps)).view(len(x), both + c.num_key_value_heads, c.head_dim)
        qk = qkv[:, :both]
        if w.qk_norm is not None:
            qk = rms_norm(qk, w.qk_norm, c.rms_norm_eps)
        qk = rotate(qk, *rope)
        q, x = (qk[:, :heads], x) if wanted is None else (qk[wanted, :heads], x[wanted])
        x = w.o(attend(i, q, qk[:, heads:], qkv[:, both:]), "add", x)
        return w.mlp(rms_norm(x, w.norm_2, c.rms_norm_eps), x)

    def _forward(self, tokens, positions, attend, wanted=None):
        """tokens, positions (M,) -> hidden states (M or wanted, hidden) before the last norm."""
        rope = rope_tables(positions, self.frequencies, self.dtype)
        x = F.embedding(tokens, self.embedding)
        for i in range(len(self.layers)):
            x = self._layer(i, x, rope, attend, wanted if i == len(self.layers) - 1 else None)
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
        of_token = places.repeat_interleave(lengths_, output_size=len(tokens))      # given, the device is not waited for
        every, last = Sequences(lengths, device=self.device), Sequences([1] * len(lengths), lengths, device=self.device)

        def attend(i, q, k, v):
            for x, new in ((cache.prompt_k, k), (cache.prompt_v, v)):
                x[i].transpose(1, 2)[of_token, positions] = new
            return attention(q, k, v, every if len(q) == len(k) else last).reshape(len(q), -1)
        return self._logits(self._forward(tokens, positions, attend, lengths_.cumsum(0) - 1))

    def decode(self, tokens, own, groups, cache, used, same=None, host=None):
        """One token a row: written to the row's own slot, then the logits (R, V) of the next.

        tokens (R,); own (R,): tokens that the row has drawn before this one, so its slot. groups: the prompts they read. Only
        the first groups.prompts prompts and `used` own slots are looked at, or the blocks that hold them. same: the slot, as a
        number, where all rows that matter write the same. host: (prompt lengths, own lengths) as lists, for Ascend's kernel."""
        R, P, kv, longest = len(tokens), groups.prompts, self.config.num_key_value_heads, cache.prompt_k.shape[3]
        place, back = groups.place[:R], groups.back[:R * kv]
        lengths, seen, at = cache.prompt_lengths[:P], own + 1, cache.slots_of(own, same)
        mask = known = None
        if host is not None:
            known = (lengths, None, host[0]), (seen, None, host[1])
        elif cache.flash:
            share = self.config.num_attention_heads // kv
            ends = row_ends(P, share * len(groups.together) // (P * kv), longest, self.device)
            known = (lengths.int(), ends), (seen.int(), row_ends(R, share, cache.block, self.device))
        else:
            slots = sum(k.shape[2] for k, _ in cache.own(0, R, used))
            mask = torch.cat((length_mask(cache.prompt_lengths[place], longest), length_mask(seen, slots)), -1)

        def attend(i, q, k, v):
            cache.write(i, k, v, at)
            prompt = cache.prompt_k[i, :P], cache.prompt_v[i, :P]
            if known is None:
                return shared_attention(q, *prompt, cache.own(i, R, used), mask, groups.together, back).reshape(R, -1)
            return self._by_kernels(q, prompt, cache.own(i, R, cache.block)[0], known, groups.together, back)
        return self._logits(self._forward(tokens, cache.prompt_lengths[place] + own, attend))

    def _by_kernels(self, q, prompt, own, known, together, back):
        """Attention over the prompts' keys and over each row's own, apart, and merged. known: of both, see partial_attention."""
        (R, _, D), (P, kv, *_) = q.shape, prompt[0].shape
        q = q.reshape(R * kv, -1, D)
        grid, q, share = q.index_select(0, together).view(P, kv, -1, D), q.view(R, kv, -1, D), q.shape[1]
        of_prompt = [x.reshape(-1, share, x.shape[-1]).index_select(0, back).view(R, kv, share, -1)
                     for x in partial_attention(grid, *prompt, *known[0])]
        return merge(of_prompt, partial_attention(q, *own, *known[1])).reshape(R, -1)


# ---------------------------------------------------------------------------------------------------------- graphs

def capture(step, device, pool=None):
    """step() recorded as a device graph: (a callable that replays it, the graph's memory pool). It is not run here.

    step must have run once already, touch only tensors that stay where they are, and ask the host for nothing."""
    backend = getattr(torch, device.type)
    graph, stream = getattr(backend, device.type.upper() + "Graph")(), backend.current_stream()     # CUDAGraph, NPUGraph
    try:
        with backend.graph(graph, pool=pool):
            step()
    except RuntimeError:
        backend.set_stream(stream)      # a capture that fails while it ends leaves its own stream behind
        raise
    return graph.replay, graph.pool()
