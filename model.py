"""The language model: a decoder-only transformer that reads and writes Hugging Face checkpoints.

    x = embed(tokens)
    for every layer:
        x = x + attention(norm(x))      grouped queries (arXiv 2305.13245) with RoPE (2104.09864)
        x = x + mlp(norm(x))            SwiGLU (2002.05202)
    logits = lm_head(norm(x))           every norm is an RMSNorm (1910.07467)

One class covers Qwen2/2.5 (bias on q, k, v), Qwen3 (RMSNorm on q and k, free head_dim) and Llama
3.x (rope scaling "llama3"). The families differ in four switches of `ModelConfig`. Parameters carry
the names of the checkpoint ("model.layers.0.self_attn.q_proj.weight"), so loading is a copy and
saving is its reverse.

Tokens are packed: no padding goes through the model, and completions of one prompt share its tokens
(`pack`). Training reads `Transformer.token_logps`, which never makes a (B, T, V) tensor. The
sampler runs the same weights through engine/decode.py. Left out are dropout, sliding windows and
mixtures of experts.

Needs engine/: kernels (the formulas), logps, weights (files), decode (an MLP's form to sample);
and families.py (config.json).
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from engine.decode import SwiGLU
from engine.kernels import Sequences, attention, inverse_frequencies, rms_norm, rope_tables, rotate
from engine.logps import chunked_logps, embed
from engine.weights import (find_checkpoint, read_companions, read_json, read_weights, whole,
                            write_json, write_shards)
from families import check_depth, check_shapes, has_other_head, new_config, read_config


@dataclass
class ModelConfig:
    """Fields of config.json that change the computation. `raw` keeps the whole file for saving."""
    model_type: str = "qwen3"
    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None     # only {"rope_type": "llama3", ...}
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    qkv_bias: bool = False               # Qwen2 always; the others by attention_bias
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = True                 # Qwen3
    eos_token_id: int | list | None = None
    raw: dict | None = None

    @classmethod
    def from_dict(cls, raw):
        """Returns the ModelConfig of a config.json, which is given as a dict.

        Raises ValueError with one line for anything that this file does not compute."""
        return cls(**read_config(raw), raw=dict(raw))

    def to_dict(self):
        """Returns the config.json to write, as a dict: the file that was read, or a new one."""
        return new_config(vars(self)) if self.raw is None else dict(self.raw)


# ------------------------------------------------------------------------------------ the modules

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.num_attention_heads
        self.kv_heads = c.num_key_value_heads
        self.head_dim = c.head_dim

        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rope, sequences):
        """Mix packed tokens x (M, hidden_size) with those that they see. Returns the same shape."""
        M = len(x)
        q = self.q_norm(self.q_proj(x).view(M, self.heads, self.head_dim))         # (M, H, D)
        k = self.k_norm(self.k_proj(x).view(M, self.kv_heads, self.head_dim))      # (M, Hkv, D)
        v = self.v_proj(x).view(M, self.kv_heads, self.head_dim)                   # (M, Hkv, D)

        q = rotate(q, *rope)
        k = rotate(k, *rope)
        mixed = attention(q, k, v, sequences)                                      # (M, H, D)
        return self.o_proj(mixed.reshape(M, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        # kernels.swiglu takes gate and up side by side, which would be a copy here
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def for_inference(self, rows, lent):
        """The form that the sampler runs."""
        return SwiGLU(self.gate_proj, self.up_proj, self.down_proj, rows, lent)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.activation_checkpointing = False

    def forward(self, x, rope, sequences):
        """Send packed tokens x (M, hidden_size) through the layer. Returns the same shape.

        With activation_checkpointing nothing inside is kept for backward, which computes it again:
        less memory for a third more time."""
        # in here and not around the block, so that it is inside of what FSDP2 gathers and gives up
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, rope, sequences, use_reentrant=False)
        return self.compute(x, rope, sequences)

    def compute(self, x, rope, sequences):
        x = x + self.self_attn(self.input_layernorm(x), rope, sequences)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below lm_head, a module of its own only because checkpoints call it "model"."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(nn.Module):
    """The language model with its head.

    `Transformer(ModelConfig(...)).init_weights(seed)` is new and random, and
    `Transformer.from_pretrained(folder)` reads a checkpoint."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        self.computes_on = None     # (device, dtype) of computation, if the weights lie elsewhere
        self.files = {}             # tokenizer and generation files that travel with the weights

    def tie(self):
        """Make the embedding also lm_head's weight, if the configuration says so.

        This has to be called again after to_empty, which parts the two."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self, seed=0):
        """Draw new normal weights of standard deviation initializer_range. Returns the model.

        Residual outputs are divided by sqrt(2 layers), as in GPT-2. Biases are 0, norms 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 1:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
                continue

            sd = self.config.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                sd /= math.sqrt(2 * self.config.num_hidden_layers)
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * sd)
        return self

    @property
    def device(self):
        return self.computes_on[0] if self.computes_on else self.lm_head.weight.device

    @property
    def dtype(self):
        return self.computes_on[1] if self.computes_on else self.lm_head.weight.dtype

    @property
    def activation_checkpointing(self):
        return self.model.layers[0].activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on):
        for block in self.model.layers:
            block.activation_checkpointing = on

    # -------------------------------------------------------------------------------- computation

    def hidden_states(self, tokens, positions, sequences):
        """Returns the (M, hidden_size) outputs of the last norm for packed tokens (M,).

        positions (M,) count within each text, and `sequences` says which tokens see each other."""
        frequencies = inverse_frequencies(self.config, tokens.device)
        rope = rope_tables(positions, frequencies, self.dtype)
        x = embed(tokens, self.model.embed_tokens.weight)       # (M, hidden_size)
        for block in self.model.layers:
            x = block(x, rope, sequences)
        return self.model.norm(x)

    def forward(self, tokens):
        """Returns the logits (B, T, V) of tokens (B, T).

        This is for inspection and tests: nothing here trains or samples through it."""
        B, T = tokens.shape
        positions = torch.arange(T, device=tokens.device).repeat(B)
        sequences = Sequences([T] * B, device=tokens.device)
        hidden = self.hidden_states(tokens.flatten(), positions, sequences)
        return self.lm_head(hidden).view(B, T, -1)

    def token_logps(self, tokens, mask=None, temperature=1.0, prompts=None, head=chunked_logps):
        """Returns log-probabilities of given tokens, and entropies of what they were drawn from.

        tokens: (B, T) int64, right-padded.
        mask: (B, T), 1 where a token is wanted; None wants all. Position 0 has nothing before it
            and is never wanted.
        prompts: B keys. Rows of equal keys have the same tokens before their first wanted one;
            these go through the model once. With None nothing is shared.
        head: what makes two numbers of each wanted token from the states that predict it.

        Both results are (B, T) float32, of logits / temperature, and 0 off the mask; logps has a
        gradient and entropy has none. No padding and no token behind the last wanted one reaches
        the model. Only wanted positions reach the vocabulary, logit_chunk logits at a time, and
        backward computes each chunk again: memory does not grow with B x T x V."""
        wanted = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        wanted = torch.cat((torch.zeros_like(wanted[:, :1]), wanted[:, 1:]), 1)
        zeros = torch.zeros(tokens.shape, device=tokens.device)
        source, positions, sequences, predictors = pack(wanted, prompts or range(len(tokens)))

        # A rank that wants nothing still gives a zero gradient for every weight, because the
        # other ranks wait for it.
        if not len(source):
            one = tokens.new_zeros(1)
            hidden = self.hidden_states(one, one, Sequences([1], device=tokens.device))
            unwanted, _ = head(hidden[:0], self.lm_head.weight, one[:0], temperature)
            return zeros + 0.0 * unwanted.sum(), zeros

        hidden = self.hidden_states(tokens.flatten()[source], positions, sequences)     # (M, D)
        hidden = hidden.index_select(0, predictors)                                     # (W, D)
        places = wanted.nonzero(as_tuple=True)      # rows (W,) and columns (W,)
        found_logps, found_entropy = head(
            hidden, self.lm_head.weight, tokens[places], temperature)
        return zeros.index_put(places, found_logps), zeros.index_put(places, found_entropy)

    # -------------------------------------------------------------------------------- checkpoints

    @classmethod
    def from_pretrained(cls, path_or_id, device="cpu", dtype=torch.float32, shard=None,
                        weights=True, adapt=None):
        """Read a checkpoint folder in HF layout, or a hub id where the hub can be reached.

        Weights are built on the meta device and filled one by one, so at most one tensor exists
        twice. shard (a dist.Sharding) is called on the empty model: each rank then reads only its
        rows of every tensor, and no rank ever holds the whole. weights=False leaves them to be
        filled by the caller; adapt adds parameters to the empty model. Raises ValueError or
        FileNotFoundError, one line, for what is missing, extra, misshapen or unsupported."""
        folder = find_checkpoint(path_or_id, ModelConfig.from_dict)
        config = ModelConfig.from_dict(read_json(folder / "config.json"))
        if weights and config.tie_word_embeddings and has_other_head(folder):
            config = ModelConfig.from_dict({**config.raw, "tie_word_embeddings": False})

        # what the files say is compared before anything of that size is built
        if weights:
            check_depth(folder, config.num_hidden_layers)
        with torch.device("meta"):
            model = cls(config).to(dtype)
        if weights:
            check_shapes(folder, dict(model.named_parameters()), config.model_type)
        stored = {name for name, _ in model.named_parameters()}
        if adapt:
            adapt(model)
        if shard:
            shard(model)
        model.to_empty(device=device)
        model.tie()

        if weights:
            read_weights(folder, {n: p for n, p in model.named_parameters() if n in stored})
        model.files = read_companions(folder)
        return model

    def save_pretrained(self, path, dtype=None, write=True, tensors=None):
        """Write a folder that transformers, vLLM and from_pretrained read.

        It holds config, weights, tokenizer and generation config; files above SHARD_BYTES are
        split. dtype is that of the written weights, by default what the model computes in. Of a
        model that is sharded over ranks every rank must call this, all but one with write=False:
        tensors are gathered one by one. tensors: what to write instead of the parameters, by name
        (lora.merged_tensors)."""
        tensors = tensors or dict(self.named_parameters())
        if not write:
            for tensor in tensors.values():
                whole(tensor)
            return

        path, dtype = Path(path), dtype or self.dtype
        self.save_description(path, dtype)
        for old in path.glob("model*.safetensors*"):
            old.unlink()
        write_shards(path, tensors, dtype)

    def save_description(self, path, dtype=None):
        """Write all of a checkpoint folder but the weights."""
        dtype = dtype or self.dtype
        path.mkdir(parents=True, exist_ok=True)
        config = {**self.config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")}
        config.pop("dtype", None)       # newer name of the same: it would contradict
        write_json(path / "config.json", config)

        for name, content in self.files.items():
            (path / name).write_bytes(content)
        if "generation_config.json" not in self.files:
            generation = {"eos_token_id": self.config.eos_token_id}
            write_json(path / "generation_config.json", generation)


def trainable(model):
    """Returns the list of the model's parameters that require a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


# -------------------------------------------------------------------------------------- packing

class Packing:
    """The tokens that go through the model, in sequences, and the packed tokens that each one sees.

    A row brings two sequences (see kernels.Sequences): its prompt, unless a row before it has
    brought the same, and its own tokens, which see that prompt as well. So prompt P with
    completions a b c and d e is packed as "P a b d", where a, b and d see P; c and e predict
    nothing that is wanted. All of it is numpy on the host, once a micro-batch."""

    def __init__(self, prompts, first, last, T):
        self.prompts = prompts      # a key for each row
        self.first = first          # column of each row's first wanted token
        self.last = last            # column of its last one
        self.T = T                  # columns in all

        self.packed = 0             # number of tokens so far
        self.source = []            # of each sequence: its tokens, as indices into flattened (B, T)
        self.seen = []              # of each sequence: the packed tokens that it sees
        self.prompt_tokens = {}     # of each prompt (key, length): its packed tokens
        self.last_of_prompt = np.zeros(len(first), np.int64)    # of each row: a packed token
        self.first_of_own = np.zeros(len(first), np.int64)

    def add_prompt(self, row):
        """Pack what stands before the row's first wanted token, unless it is packed already."""
        key = self.prompts[row], self.first[row]
        if key not in self.prompt_tokens:
            nothing = np.arange(0)
            self.prompt_tokens[key] = self._add(row, 0, self.first[row], nothing)
        self.last_of_prompt[row] = self.prompt_tokens[key][-1]

    def add_own(self, row):
        """Pack the row's tokens from its first wanted one up to, but not including, its last one.

        The last one predicts nothing that is wanted, so there may be none to pack."""
        self.first_of_own[row] = self.packed
        if self.last[row] > self.first[row]:
            prompt = self.prompt_tokens[self.prompts[row], self.first[row]]
            self._add(row, self.first[row], self.last[row], prompt)

    def _add(self, row, start, stop, before):
        """Pack columns start to stop of a row as a sequence that sees `before` and itself.

        Returns its packed tokens."""
        new = np.arange(self.packed, self.packed + stop - start)
        self.packed += len(new)
        self.source.append(row * self.T + np.arange(start, stop))
        self.seen.append(np.concatenate([before, new]))
        return new


def pack(wanted, prompts):
    """Returns the M tokens that a forward pass needs for the log-probs of the W wanted ones.

    wanted (B, T) is bool and never true in column 0; prompts are B keys, see token_logps.
    The results are source (M,), indices into the flattened (B, T) tokens, their positions (M,) and
    their Sequences. The last is predictors (W,): the packed token that predicts each wanted one,
    in row-major order."""
    T = wanted.shape[1]
    device = wanted.device
    first = wanted.int().argmax(1)                          # (B,)
    last = T - 1 - wanted.flip(1).int().argmax(1)           # (B,)
    some = wanted.any(1).long()                             # (B,) 0 where a row wants nothing
    first_columns, last_columns, wants = torch.stack((first, last, some)).tolist()    # one wait

    packing = Packing(prompts, first_columns, last_columns, T)
    for row in np.flatnonzero(wants).tolist():
        packing.add_prompt(row)
        packing.add_own(row)

    def on_device(pieces):
        nothing = np.empty(0, np.int64)     # there may be no sequence at all
        return torch.from_numpy(np.concatenate([nothing, *pieces])).to(device)

    source = on_device(packing.source)
    queries = [len(piece) for piece in packing.source]
    keys = [len(piece) for piece in packing.seen]
    sequences = Sequences(queries, keys, on_device(packing.seen), device)

    # The last token of a prompt predicts the first wanted one of a row, and behind that each
    # token predicts the next.
    last_of_prompt = torch.from_numpy(packing.last_of_prompt).to(device)
    first_of_own = torch.from_numpy(packing.first_of_own).to(device)
    rows, columns = wanted.nonzero(as_tuple=True)
    behind = columns - first[rows]                          # (W,)
    own = first_of_own[rows] + behind - 1
    predictors = torch.where(behind == 0, last_of_prompt[rows], own)
    return source, source % T, sequences, predictors
