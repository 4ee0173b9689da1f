"""The model as the sampler runs it: one new token a row and step, over a cache of keys and values.

    InferenceModel(model)       the weights of a Transformer, ready to sample; lives for one rollout
    Cache                       keys and values: each prompt's once for its group, each row's own
    Groups                      which rows read which prompt
    PlainDecode, FlashDecode, AscendDecode      the attention of a step, by the kernels there are
    capture                     a step as a device graph (CUDA, and NPU behind the same name)

A row is a completion that is being drawn. Its new token attends to its prompt and to the tokens
that the row has drawn itself, its own:

    y = softmax(q [K_prompt, K_own]^T / sqrt(D)) [V_prompt, V_own]

All queries of a group read the prompt's keys together (Hydragen, arXiv 2402.05099). Plain PyTorch
takes one softmax over both (kernels.shared_attention). Devices' attention kernels compute the two
parts apart, which are then merged by their log-sum-exps, as in flash-decoding.

Left out: pages of keys, so a row has all the slots that it may need from the start. The formulas
and the calls of kernels are in kernels.py; rollout.py decides which rows there are.
"""
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from engine.kernels import (Sequences, attention, inverse_frequencies, length_mask, merge,
                            partial_attention, rms_norm, rope_tables, rotate, row_ends,
                            shared_attention, swiglu, use_flash)

PREFILL_TOKENS = 8192   # prompt tokens in the model at once; a longer prompt goes alone
CPU_BLOCK = 16          # slots of a block of a row's own keys on the CPU, at least
CPU_BLOCKS = 8          # blocks of a row on the CPU, at most
ONE_BLOCK = 16          # rows that have one block instead, at most: with so few, a call for each
                        # block takes longer than reading
SMALL = 2 ** 17         # elements of a weight below which oneDNN takes longer to be called than
                        # its blocks save


def ceil_div(n, size):
    """Returns n / size, rounded up to an integer."""
    return -(-n // size)


# ------------------------------------------------------------------------------------------ weights

def weight_of(linear):
    """Returns the (out, in) weight of a linear layer that the sampler shall read.

    A layer whose weight is made of several tensors, such as base + B A with LoRA, says by its
    method inference_weight() what they come to."""
    if hasattr(linear, "inference_weight"):
        return linear.inference_weight()
    return linear.weight


def stacked_adapters(projections):
    """Returns A, B and the scale of low-rank changes that stay beside the weights, or None.

    Of several projections A are below each other and B in a block diagonal, so that they are one
    product too; see lora.py."""
    parts = [p.adapter() for p in projections if hasattr(p, "adapter")]
    if not parts or None in parts:
        return None
    A = torch.cat([part[0] for part in parts])
    B = torch.block_diag(*[part[1] for part in parts])
    _, _, scale = parts[0]
    return A, B, scale


class Linear:
    """Several projections of one input as one product, y = x W^T + b, and a step after it.

    That step is "none", "silu", or "add" or "mul" with another tensor.

    On the CPU a large stack is stored in the blocks that oneDNN computes in: a plain weight is
    rearranged at every call, and takes up to twice as long at a few dozen rows. The step after it
    is computed on the way out. A small stack is a plain product, because a call of oneDNN takes 20
    to 40 microseconds more. On accelerators the weights stay where they are unless they are lent.

    rows: how many rows x will have, about. lent: the weights are whole only for as long as FSDP has
    gathered their module, so they have to be copied."""

    def __init__(self, projections, rows, lent=False):
        weights = [weight_of(p) for p in projections]
        self.adapter = stacked_adapters(projections)
        self.blocked = None
        self.bias = None
        if projections[0].bias is not None:
            self.bias = torch.cat([p.bias for p in projections])

        if weights[0].device.type != "cpu" and not lent:
            self.weight = stack_in_place(weights)
            return

        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0].detach()
        large = self.weight.numel() >= SMALL and self.adapter is None
        if self.weight.device.type == "cpu" and large and has_onednn(self.weight.dtype):
            whole = self.weight.contiguous()
            self.blocked = torch.ops.mkldnn._reorder_linear_weight(whole, max(rows, 64))
            self.weight = None
        elif lent and len(weights) == 1:
            self.weight = self.weight.clone()

    def __call__(self, x, then="none", other=None):
        """Returns then(x W^T + b) or then(x W^T + b, other), of x (rows, in) -> (rows, out)."""
        if self.blocked is not None and other is None:
            name = "swish" if then == "silu" else then
            return torch.ops.mkldnn._linear_pointwise(x, self.blocked, self.bias, name, [], "")
        if self.blocked is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(
                x, other, self.blocked, self.bias, then)

        y = F.linear(x, self.weight, self.bias)
        if self.adapter is not None:
            A, B, scale = self.adapter
            y = torch.addmm(y, F.linear(x, A) * scale, B.t())
        if then == "silu":
            return F.silu(y, inplace=True)
        if then == "add":
            return y.add_(other)
        if then == "mul":
            return y.mul_(other)
        return y


def has_onednn(dtype):
    """Says whether this CPU build of PyTorch computes products of this type by oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def stack_in_place(weights):
    """Returns the matrices (n_i, D) as one (sum n_i, D) that shares their memory.

    They are moved side by side the first time; later calls find them there."""
    first = weights[0].data

    # the addresses that the matrices have if they lie side by side
    adjoined = [first.data_ptr()]
    for w in weights[:-1]:
        adjoined.append(adjoined[-1] + w.numel() * first.element_size())

    # neighbours by chance are two pieces of memory all the same: neither may reach into the other
    storages = {w.untyped_storage().data_ptr() for w in weights}
    if len(storages) > 1 or [w.data_ptr() for w in weights] != adjoined:
        with torch.inference_mode(False):       # else they would never receive a gradient again
            first = torch.cat([w.data for w in weights])
            for w, part in zip(weights, first.split([len(w) for w in weights])):
                w.data = part

    rows = sum(len(w) for w in weights)
    columns = first.shape[1]
    return torch.as_strided(first, (rows, columns), (columns, 1), first.storage_offset())


class SwiGLU:
    """The MLP of a block, down(silu(gate(x)) * up(x)), from three linear layers.

    On the CPU gate and up are apart: silu and the product with it are computed on the way out of
    them. Elsewhere they are one product, which a fused kernel follows. rows, lent: see Linear."""

    def __init__(self, gate_proj, up_proj, down_proj, rows, lent):
        if next(gate_proj.parameters()).device.type == "cpu":
            self.gate = Linear([gate_proj], rows, lent)
            self.up = Linear([up_proj], rows, lent)
        else:
            self.gate = Linear([gate_proj, up_proj], rows, lent)
            self.up = None
        self.down = Linear([down_proj], rows, lent)

    def __call__(self, x, residual):
        """Returns the MLP's output for x (tokens, hidden), added to the residual stream."""
        if self.up is None:
            hidden = swiglu(self.gate(x))
        else:
            hidden = self.up(x, "mul", self.gate(x, "silu"))
        return self.down(hidden, "add", residual)


class Layer:
    """The weights of one block: q, k and v in one product, and the form that its MLP has here."""

    def __init__(self, block, rows):
        attn = block.self_attn
        lent = isinstance(block, FSDPModule)
        self.attention_norm = copied_if_lent(block.input_layernorm.weight, lent)
        self.mlp_norm = copied_if_lent(block.post_attention_layernorm.weight, lent)
        self.qkv = Linear([attn.q_proj, attn.k_proj, attn.v_proj], rows, lent)
        self.o = Linear([attn.o_proj], rows, lent)
        self.mlp = block.mlp.for_inference(rows, lent)

        # one weight a head, so that q and k are normed together
        self.qk_norm = None
        if not isinstance(attn.q_norm, torch.nn.Identity):
            of_q = attn.q_norm.weight.expand(attn.heads, -1)
            of_k = attn.k_norm.weight.expand(attn.kv_heads, -1)
            self.qk_norm = torch.cat([of_q, of_k])      # (heads + kv_heads, D)


def copied_if_lent(weight, lent):
    """Returns a weight that outlives the sharding of its module; see Linear."""
    return weight.detach().clone() if lent else weight


# -------------------------------------------------------------------------------------------- cache

class Cache:
    """Keys and values of all layers: those of prompts, stored once, and each row's own.

    prompt_k, prompt_v (layers, prompts, Hkv, slots, D): the index of a prompt is its seat. A slot
    holds one token. prompt_lengths (prompts,): how many slots of a seat are filled.
    k, v (layers, blocks, rows, Hkv, slots, D): the keys and values of the tokens that a row has
    drawn, its own. Slot s of block b holds the row's token b x slots + s. On accelerators there is
    one block. On the CPU more than ONE_BLOCK rows have several, because it reads a few whole blocks
    two to three times as fast as the beginnings of many long rows.

    memory: k and v as they were made. The argument of this name is that of a cache that nobody
    reads any more; it is taken over if it fits."""

    def __init__(self, config, prompts, longest, rows, own_slots, device, dtype, memory=None):
        layers = config.num_hidden_layers
        heads = config.num_key_value_heads
        dim = config.head_dim
        blocks, self.block = own_blocks(own_slots, device, rows)
        self.kv_heads = heads
        self.flash = use_flash(device, dtype)
        slots_first = self.flash or device.type == "npu"        # the order that their kernels read

        def new(lead, slots):
            return zero_slots(lead, heads, slots, dim, slots_first, device, dtype)

        self.prompt_k = new((layers, prompts), prompt_slots(longest, device))
        self.prompt_v = new((layers, prompts), prompt_slots(longest, device))
        self.prompt_lengths = torch.ones(prompts, dtype=torch.int64, device=device)

        if memory and memory[0].shape == (layers, blocks, rows, heads, self.block, dim):
            self.memory = memory
        else:
            self.memory = (new((layers, blocks, rows), self.block),
                           new((layers, blocks, rows), self.block))
        self.k, self.v = self.memory

    def own(self, layer, rows, used):
        """Returns the own keys and values of the first rows, up to the slot `used` at least.

        They are a list of pairs (k, v), one a block, each (rows, Hkv, slots, D). A cache with one
        block gives its used slots only, one with several gives whole blocks."""
        k, v = self.k[layer], self.v[layer]
        if len(k) == 1:
            return [(k[0, :rows, :, :used], v[0, :rows, :, :used])]
        return [(k[b, :rows], v[b, :rows]) for b in range(ceil_div(used, self.block))]

    def write(self, layer, k, v, index):
        """Puts the new token's keys and values (rows, Hkv, D) into the rows' own slots.

        index: see write_index. Its parts are neighbours, since Ascend moves others to its CPU."""
        self.k[layer].transpose(-2, -3)[index] = k
        self.v[layer].transpose(-2, -3)[index] = v

    def write_index(self, slots, same_slot=None):
        """Returns (block, row, slot of the block), an index of one place a row, for `write`.

        slots (R,): the own slot of each row. same_slot: a number, if it is that slot in all."""
        if same_slot is not None:
            return same_slot // self.block, slice(len(slots)), same_slot % self.block

        rows = torch.arange(len(slots), device=slots.device)
        if self.k.shape[1] == 1:
            return 0, rows, slots
        return slots // self.block, rows, slots % self.block

    def move_rows(self, source, target, used):
        """Copies the first `used` own slots of rows `source` to rows `target` (index tensors)."""
        for x in (self.k, self.v):
            for b in range(ceil_div(used, self.block)):
                slots = min(self.block, used - b * self.block)
                x[:, b, target, :, :slots] = x[:, b, source, :, :slots]

    def join_blocks(self, rows, spare_bytes):
        """Copies the blocks of the first rows, which are few, into one, if there is room for it.

        There are no other rows from here on."""
        several = self.k.shape[1] > 1
        if several and 2 * self.k[:, :, :rows].nbytes <= spare_bytes:
            self.k = one_block(self.k[:, :, :rows])
            self.v = one_block(self.v[:, :, :rows])
            self.block = self.k.shape[4]

    def move_prompts(self, source, target):
        """Copies the prompts in the seats `source` to the seats `target` (index tensors)."""
        for x in (self.prompt_k, self.prompt_v):
            x[:, target] = x[:, source]
        self.prompt_lengths[target] = self.prompt_lengths[source]


def zero_slots(lead, heads, slots, dim, slots_first, device, dtype):
    """Returns zeros of shape (*lead, heads, slots, dim).

    slots_first: in memory the heads of one slot lie side by side, (*lead, slots, heads, dim). Else
    the slots of one head do, which is the order of the shape."""
    if slots_first:
        zeros = torch.zeros(*lead, slots, heads, dim, device=device, dtype=dtype)
        return zeros.transpose(-2, -3)

    if device.type == "cpu":        # numpy's zeros take no memory before they are written
        in_bytes = np.zeros((*lead, heads, slots, dim * dtype.itemsize), np.uint8)
        return torch.from_numpy(in_bytes).view(dtype)
    return torch.zeros(*lead, heads, slots, dim, device=device, dtype=dtype)


def one_block(x):
    """(layers, blocks, rows, Hkv, slots, D) -> a copy (layers, 1, rows, Hkv, blocks x slots, D)."""
    joined = x.movedim(1, 3).flatten(3, 4)      # (layers, rows, Hkv, blocks x slots, D)
    return joined[:, None]


def own_blocks(slots, device, rows):
    """Returns (blocks, slots of each) for so many rows of so many own tokens."""
    if device.type != "cpu" or rows <= ONE_BLOCK:
        return 1, slots

    size = max(CPU_BLOCK, ceil_div(slots, CPU_BLOCKS))
    blocks = ceil_div(slots, size)
    return blocks, ceil_div(slots, blocks)


def prompt_slots(longest, device):
    """Returns the slots that a cache needs for prompts of up to `longest` tokens.

    On accelerators a multiple of 8, so that rows of scores are multiples of 16 bytes: products in
    half precision are slower on others."""
    if device.type == "cpu":
        return longest
    return 8 * ceil_div(longest, 8)


def bytes_per_token(config, dtype):
    """Returns the bytes that one token's keys and values take, all layers together."""
    numbers = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * numbers * dtype.itemsize


class Groups:
    """Which prompt each row reads, and the two index tensors between the order of rows and prompts.

    In the order of prompts the rows of a prompt stand side by side, in the columns of a grid that
    has a line for each seat. If rows 0 to 3 read the seats 1, none, 1 and 0, the grid is

        seat 0      row 3   empty
        seat 1      row 0   row 2

    Each key head has a grid of its own, so a cell is numbered by (seat, head, column).

    seat (R,): the seat of each row's prompt, an arbitrary one where the row reads none.
    by_prompt (prompts x Hkv x columns,): for each cell, row x Hkv + head; row 0 in an empty cell.
    by_row (R x Hkv,): for each row and head, the number of its cell; arbitrary if it reads none."""

    def __init__(self, seats, kv_heads, prompts=None, columns=None, device="cpu"):
        """Arranges rows by the seats of their prompts, None where it does not matter what is read.

        prompts, columns: the size of the grid, by default just what the rows need."""
        seat_of_row = [0 if seat is None else seat for seat in seats]
        self.prompts = prompts or max(seat_of_row, default=0) + 1

        # each row takes the next free column of its prompt
        rows_of_seat = [[] for _ in range(self.prompts)]
        column_of_row = [0] * len(seats)
        for row, seat in enumerate(seats):
            if seat is not None:
                column_of_row[row] = len(rows_of_seat[seat])
                rows_of_seat[seat].append(row)

        columns = columns or max(1, max(len(rows) for rows in rows_of_seat))
        grid = [rows + [0] * (columns - len(rows)) for rows in rows_of_seat]

        # by way of numpy, which reads lists five times as fast as PyTorch
        grid = np.array(grid, np.int64)                 # (prompts, columns)
        seat = np.array(seat_of_row, np.int64)          # (R,)
        column = np.array(column_of_row, np.int64)      # (R,)
        head = np.arange(kv_heads)
        by_prompt = grid[:, None] * kv_heads + head[:, None]        # (prompts, Hkv, columns)
        by_row = (seat[:, None] * kv_heads + head) * columns + column[:, None]      # (R, Hkv)
        self.seat = torch.from_numpy(seat).to(device)
        self.by_prompt = torch.from_numpy(by_prompt.reshape(-1)).to(device)
        self.by_row = torch.from_numpy(by_row.reshape(-1)).to(device)

    def copy_(self, other):
        """Takes over another arrangement at the same addresses, for the graphs that read them."""
        self.seat.copy_(other.seat)
        self.by_prompt.copy_(other.by_prompt)
        self.by_row.copy_(other.by_row)


# ---------------------------------------------------------------------------- attention of a step

class PlainDecode:
    """The attention of one step in plain PyTorch: one softmax over the prompt's and the own keys.

    It is made once a step, which prepares what all layers read. own_lengths (R,): own tokens of
    each row, the new one included. used: own slots that are looked at, or their blocks."""

    def __init__(self, cache, groups, own_lengths, used):
        self.cache = cache
        self.rows = len(own_lengths)
        self.used = used
        self.prompts = groups.prompts
        self.by_prompt = groups.by_prompt
        self.by_row = groups.by_row[:self.rows * cache.kv_heads]

        own_slots = sum(k.shape[2] for k, _ in cache.own(0, self.rows, used))
        prompt_lengths = cache.prompt_lengths[groups.seat[:self.rows]]
        over_prompt = length_mask(prompt_lengths, cache.prompt_k.shape[3])
        over_own = length_mask(own_lengths, own_slots)
        self.mask = torch.cat((over_prompt, over_own), -1)      # (R, 1, prompt slots + own slots)

    def attend(self, layer, q):
        """Returns the attention of q (R, H, D) over the layer's keys, as (R, H x D)."""
        prompt_k = self.cache.prompt_k[layer, :self.prompts]
        prompt_v = self.cache.prompt_v[layer, :self.prompts]
        own = self.cache.own(layer, self.rows, self.used)
        y = shared_attention(q, prompt_k, prompt_v, own, self.mask, self.by_prompt, self.by_row)
        return y.reshape(self.rows, -1)


class KernelDecode:
    """The attention of one step by a device's kernel: over prompts and own keys apart, and merged.

    It is made once a step. over_prompts, over_own: further arguments of partial_attention for the
    two calls, which tell the kernel the lengths."""

    def __init__(self, cache, groups, rows, over_prompts, over_own):
        self.cache = cache
        self.rows = rows
        self.prompts = groups.prompts
        self.by_prompt = groups.by_prompt
        self.by_row = groups.by_row[:rows * cache.kv_heads]
        self.over_prompts = over_prompts
        self.over_own = over_own

    def attend(self, layer, q):
        """Returns the attention of q (R, H, D) over the layer's keys, as (R, H x D)."""
        cache, heads, dim = self.cache, self.cache.kv_heads, q.shape[-1]
        q = q.reshape(self.rows * heads, -1, dim)       # (R x Hkv, share, D)
        share = q.shape[1]

        # all queries of a prompt's rows in one sequence, and the outcome back in the order of rows
        queries = q.index_select(0, self.by_prompt)     # (prompts x Hkv x columns, share, D)
        prompt_part = partial_attention(
            queries.view(self.prompts, heads, -1, dim), cache.prompt_k[layer, :self.prompts],
            cache.prompt_v[layer, :self.prompts], **self.over_prompts)
        prompt_part = [self.in_row_order(x, share) for x in prompt_part]

        k, v = cache.own(layer, self.rows, cache.block)[0]
        queries = q.view(self.rows, heads, share, dim)
        own_part = partial_attention(queries, k, v, **self.over_own)
        return merge(prompt_part, own_part).reshape(self.rows, -1)

    def in_row_order(self, x, share):
        """(prompts, Hkv, columns x share, n) -> (R, Hkv, share, n)."""
        cells = x.reshape(-1, share, x.shape[-1])       # (prompts x Hkv x columns, share, n)
        rows = cells.index_select(0, self.by_row)
        return rows.view(self.rows, self.cache.kv_heads, share, -1)


class FlashDecode(KernelDecode):
    """Attention by PyTorch's variable-length flash attention, with lengths on the device."""

    def __init__(self, cache, groups, own_lengths, heads):
        rows, prompts, device = len(own_lengths), groups.prompts, own_lengths.device
        share = heads // cache.kv_heads
        columns = len(groups.by_prompt) // (prompts * cache.kv_heads)
        prompt_ends = row_ends(prompts, share * columns, cache.prompt_k.shape[3], device)
        over_prompts = dict(lengths=cache.prompt_lengths[:prompts].int(), ends=prompt_ends)
        own_ends = row_ends(rows, share, cache.block, device)
        over_own = dict(lengths=own_lengths.int(), ends=own_ends)
        super().__init__(cache, groups, rows, over_prompts, over_own)


class AscendDecode(KernelDecode):
    """Attention by Ascend's kernel, which takes the lengths from the host, as two lists."""

    def __init__(self, cache, groups, own_lengths, host_prompt_lengths, host_own_lengths):
        prompt_lengths = cache.prompt_lengths[:groups.prompts]
        over_prompts = dict(lengths=prompt_lengths, ends=None, host_lengths=host_prompt_lengths)
        over_own = dict(lengths=own_lengths, ends=None, host_lengths=host_own_lengths)
        super().__init__(cache, groups, len(own_lengths), over_prompts, over_own)


# -------------------------------------------------------------------------------------------- model

@contextmanager
def gathered(module):
    """Keeps the module's own weights whole and in the compute dtype while it is open.

    FSDP2 gathers them from all ranks. They are lent for this time only, and have to be copied."""
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        if isinstance(module, FSDPModule):
            module.reshard()


class InferenceModel:
    """The weights of `model` as they are now, for prefill and decode.

    rows: about how many rows a step will have.

    Weights that are sharded over ranks are gathered here, block by block and once for all that is
    sampled with them: every rank has to take part. They are copied then, and on the CPU nearly
    always, which takes as much memory again for the time of a rollout. On accelerators whole
    weights are only moved side by side. They must not be updated while this is read."""

    @torch.no_grad()
    def __init__(self, model, rows):
        self.config = model.config
        self.device = model.device
        self.dtype = model.dtype
        lent = isinstance(model, FSDPModule)

        # first what no block holds: it is the largest, and exists several times meanwhile
        with gathered(model):
            self.embedding = copied_if_lent(model.model.embed_tokens.weight, lent)
            self.norm = copied_if_lent(model.model.norm.weight, lent)
            self.lm_head = Linear([model.lm_head], rows, lent)
        if lent and model.config.tie_word_embeddings and self.device.type != "cpu":
            self.lm_head.weight = self.embedding        # one copy of the two

        self.layers = []
        for block in model.model.layers:
            with gathered(block):
                self.layers.append(Layer(block, rows))
        self.frequencies = inverse_frequencies(self.config, self.device)

    def _layer(self, i, x, rope, attend, wanted=None):
        """Returns x (tokens, hidden) after block i.

        attend(i, q, k, v) -> (tokens, heads x D). wanted: an index of the tokens of which more than
        keys and values is asked; None: all."""
        c = self.config
        layer = self.layers[i]
        heads = c.num_attention_heads
        q_and_k = heads + c.num_key_value_heads

        normed = rms_norm(x, layer.attention_norm, c.rms_norm_eps)
        qkv = layer.qkv(normed).view(len(x), q_and_k + c.num_key_value_heads, c.head_dim)
        qk = qkv[:, :q_and_k]       # (tokens, heads + kv_heads, D)
        v = qkv[:, q_and_k:]
        if layer.qk_norm is not None:
            qk = rms_norm(qk, layer.qk_norm, c.rms_norm_eps)
        qk = rotate(qk, *rope)

        if wanted is None:
            q = qk[:, :heads]
        else:
            q = qk[wanted, :heads]
            x = x[wanted]
        x = layer.o(attend(i, q, qk[:, heads:], v), "add", x)
        return layer.mlp(rms_norm(x, layer.mlp_norm, c.rms_norm_eps), x)

    def _forward(self, tokens, positions, attend, wanted=None):
        """Returns the hidden states before the last norm of tokens (M,) at positions (M,).

        They are (M, hidden), or of the wanted tokens only."""
        rope = rope_tables(positions, self.frequencies, self.dtype)
        x = F.embedding(tokens, self.embedding)
        last = len(self.layers) - 1
        for i in range(last):
            x = self._layer(i, x, rope, attend)
        return self._layer(last, x, rope, attend, wanted)

    def _logits(self, x):
        return self.lm_head(rms_norm(x, self.norm, self.config.rms_norm_eps))

    def prefill(self, prompts, cache, seats):
        """Computes keys and values of prompts (lists of ids) into their seats of the cache.

        Returns the logits (n, V) of each prompt's next token. seats: a list of n numbers."""
        logits = []
        start = 0
        while start < len(prompts):
            # as many prompts as PREFILL_TOKENS hold, one at least
            end = start + 1
            tokens = len(prompts[start])
            while end < len(prompts) and tokens + len(prompts[end]) <= PREFILL_TOKENS:
                tokens += len(prompts[end])
                end += 1

            logits.append(self._prefill(prompts[start:end], cache, seats[start:end]))
            start = end
        return torch.cat(logits)

    def _prefill(self, prompts, cache, seats):
        sizes = [len(p) for p in prompts]
        tokens = self._tensor([token for prompt in prompts for token in prompt])        # (M,)
        positions = self._tensor([i for size in sizes for i in range(size)])
        seats = self._tensor(seats)
        lengths = self._tensor(sizes)
        cache.prompt_lengths[seats] = lengths

        # with its size given, the device is not waited for
        seat_of_token = seats.repeat_interleave(lengths, output_size=len(tokens))
        all_tokens = Sequences(sizes, device=self.device)
        last_tokens = Sequences([1] * len(sizes), sizes, device=self.device)

        def attend(layer, q, k, v):
            cache.prompt_k[layer].transpose(1, 2)[seat_of_token, positions] = k
            cache.prompt_v[layer].transpose(1, 2)[seat_of_token, positions] = v
            # the last layer asks for the last token of each prompt only
            sequences = all_tokens if len(q) == len(k) else last_tokens
            return attention(q, k, v, sequences).reshape(len(q), -1)

        return self._logits(self._forward(tokens, positions, attend, lengths.cumsum(0) - 1))

    def decode(self, tokens, drawn, groups, cache, used, same_slot=None, host_lengths=None):
        """Takes one token a row into the cache, and returns the logits (R, V) of the next one.

        tokens (R,). drawn (R,): tokens that the row has drawn before this one, so its own slot.
        groups: the prompts that the rows read. Only the first groups.prompts seats and `used` own
        slots are looked at, or the blocks that hold them. same_slot: the slot, as a number, where
        all rows that matter write the same. host_lengths: for Ascend's kernel, (prompt lengths, own
        lengths with the new token) as lists; None: it is not used."""
        own_lengths = drawn + 1
        index = cache.write_index(drawn, same_slot)
        if host_lengths is not None:
            step = AscendDecode(cache, groups, own_lengths, *host_lengths)
        elif cache.flash:
            step = FlashDecode(cache, groups, own_lengths, self.config.num_attention_heads)
        else:
            step = PlainDecode(cache, groups, own_lengths, used)

        def attend(layer, q, k, v):
            cache.write(layer, k, v, index)
            return step.attend(layer, q)

        positions = cache.prompt_lengths[groups.seat[:len(tokens)]] + drawn
        return self._logits(self._forward(tokens, positions, attend))

    def _tensor(self, values):
        return torch.tensor(values, device=self.device)


# ------------------------------------------------------------------------------------------- graphs

def capture(step, device, pool=None):
    """Records step() as a device graph, without running it.

    Returns a callable that replays it, and the graph's memory pool. step must have run once
    already, touch only tensors that stay where they are, and ask the host for nothing."""
    backend = getattr(torch, device.type)
    graph = getattr(backend, device.type.upper() + "Graph")()       # CUDAGraph, NPUGraph
    stream = backend.current_stream()
    try:
        with backend.graph(graph, pool=pool):
            step()
    except RuntimeError:
        # a capture that fails as it ends leaves its own stream behind
        backend.set_stream(stream)
        raise
    return graph.replay, graph.pool()
