"""A decoder-only transformer that reads and writes Hugging Face checkpoints.

One class covers Qwen2/2.5 (bias on q, k, v), Qwen3 (RMSNorm on q and k, free head_dim) and Llama 3.x
(rope scaling "llama3"): the families differ in four switches of `ModelConfig`. Parameters carry the names
of the checkpoint ("model.layers.0.self_attn.q_proj.weight"), so loading is a copy and saving is its reverse.

    x = embed(tokens);  per layer:  x += attention(norm(x));  x += mlp(norm(x));  logits = lm_head(norm(x))
    RoPE (arXiv 2104.09864), grouped-query attention (2305.13245), SwiGLU (2002.05202), RMSNorm (1910.07467)

Tokens are packed: no padding goes through the model, and completions of one prompt share its tokens (`pack`). `token_logps`
is what training reads, never with a (B, T, V) tensor (logps.py). The sampler runs the same weights through decode.py; the
formulas, and each device's kernels for them, are in kernels.py, and the files of a checkpoint in weights.py. Left out:
dropout, sliding windows, mixtures of experts.
"""
import json
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
from engine.weights import CARRIED, find_checkpoint, open_shard, own_rows, read_json, weight_files, whole, write_shards

SUPPORTED = ("qwen2", "qwen3", "llama")


@dataclass
class ModelConfig:
    """The fields of config.json that change the computation. `raw` keeps the whole file for saving."""
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
        """config.json (either layout: rope_theta + rope_scaling, or rope_parameters) -> ModelConfig.

        ValueError with one line for anything this file does not compute."""
        kind = raw.get("model_type")
        if kind not in SUPPORTED:
            raise ValueError(f"model_type {kind!r} is not supported; supported: {', '.join(SUPPORTED)}")
        missing = [k for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                               "num_attention_heads") if k not in raw]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        rope = {"rope_theta": 10000.0, **(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
        rope["rope_theta"] = raw.get("rope_theta", rope["rope_theta"])
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        heads, bias = raw["num_attention_heads"], bool(raw.get("attention_bias", False))
        wrong = {
            f"rope type {rope_type!r}": rope_type not in ("default", "llama3"),
            f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
            "sliding-window attention": bool(raw.get("use_sliding_window"))
            or any(t != "full_attention" for t in raw.get("layer_types") or ()),
            "partial rotary embedding": rope.get("partial_rotary_factor", 1.0) != 1.0,
        }
        if rope_type == "llama3":
            wrong |= {f"llama3 rope without {k}": k not in rope for k in
                      ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        for what, bad in wrong.items():
            if bad:
                raise ValueError(f"{kind} with {what} is not supported")
        return cls(
            model_type=kind, vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"], num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads, num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6), rope_theta=float(rope["rope_theta"]),
            rope_scaling=rope if rope_type == "llama3" else None,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            initializer_range=raw.get("initializer_range", 0.02),
            qkv_bias=kind == "qwen2" or bias, o_bias=kind != "qwen2" and bias,
            mlp_bias=kind == "llama" and bool(raw.get("mlp_bias", False)), qk_norm=kind == "qwen3",
            eos_token_id=raw.get("eos_token_id"), raw=dict(raw))

    def to_dict(self):
        """The config.json to write: the file that was read, or one that transformers of any recent version reads."""
        if self.raw is not None:
            return dict(self.raw)
        arch = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
        same = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
                "max_position_embeddings", "initializer_range", "eos_token_id", "mlp_bias")
        out = {name: getattr(self, name) for name in same}
        rope = self.rope_scaling or {"rope_type": "default"}
        return {**out, "architectures": [arch[self.model_type]], "hidden_act": "silu",
                "attention_bias": self.qkv_bias and self.model_type != "qwen2", "use_sliding_window": False,
                "rope_scaling": self.rope_scaling, "rope_parameters": {**rope, "rope_theta": self.rope_theta}}


# ------------------------------------------------------------------------------------------------------ the modules

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rope, sequences):
        """x (M, hidden_size), packed tokens -> the same."""
        q = self.q_norm(self.q_proj(x).view(len(x), self.heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(len(x), self.kv_heads, self.head_dim))
        v = self.v_proj(x).view(len(x), self.kv_heads, self.head_dim)
        return self.o_proj(attention(rotate(q, *rope), rotate(k, *rope), v, sequences).reshape(len(x), -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))      # swiglu without a copy of its two halves

    def for_inference(self, rows, lent):
        """The form that the sampler runs."""
        return SwiGLU(self.gate_proj, self.up_proj, self.down_proj, rows, lent)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.activation_checkpointing = False   # True: compute again in backward, memory for a third more time

    def forward(self, x, rope, sequences):
        """x (M, hidden_size), packed tokens -> the same."""
        if self.activation_checkpointing and torch.is_grad_enabled():       # inside of what FSDP2 gathers and gives up
            return checkpoint(self.compute, x, rope, sequences, use_reentrant=False)
        return self.compute(x, rope, sequences)

    def compute(self, x, rope, sequences):
        x = x + self.self_attn(self.input_layernorm(x), rope, sequences)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below lm_head; a module of its own only because checkpoints call it "model."."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(nn.Module):
    """The language model. `Transformer(ModelConfig(...))` is new and random; `from_pretrained` reads a checkpoint."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        self.computes_on = None                 # (device, dtype) of computation, where the weights themselves may be elsewhere
        self.files = {}                         # tokenizer and generation files that travel with the weights

    def tie(self):
        """lm_head is the embedding, where the configuration says so; again after to_empty, which parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

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

    def init_weights(self, seed=0):
        """Normal weights of sd initializer_range (residual outputs divided by sqrt(2 layers), as GPT-2), zero biases."""
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

    # ------------------------------------------------------------------------------------------ computation

    def hidden_states(self, tokens, positions, sequences):
        """Packed tokens (M,) at positions (M,) that see each other as `sequences` says -> (M, hidden_size) after the last norm."""
        rope = rope_tables(positions, inverse_frequencies(self.config, tokens.device), self.dtype)
        x = embed(tokens, self.model.embed_tokens.weight)
        for block in self.model.layers:
            x = block(x, rope, sequences)
        return self.model.norm(x)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V). For inspection and tests: nothing here trains or samples through it."""
        B, T = tokens.shape
        positions = torch.arange(T, device=tokens.device).repeat(B)
        hidden = self.hidden_states(tokens.flatten(), positions, Sequences([T] * B, device=tokens.device))
        return self.lm_head(hidden).view(B, T, -1)

    def token_logps(self, tokens, mask=None, temperature=1.0, prompts=None):
        """Log-probabilities of given tokens, and the entropies of the distributions they were drawn from.

        tokens (B, T) int64 right-padded; mask (B, T), 1 where a token is wanted; None wants all. Position 0 has nothing
        before it and is never wanted. prompts: B keys; rows of equal keys begin with the same tokens up to their first
        wanted one, which then go through the model once. None: nothing is shared.
        Returns logps (B, T) float32 with gradient and entropy (B, T) float32 without, both of logits / temperature
        and 0 off the mask. No padding and no token behind the last wanted one reaches the model. Only wanted positions
        reach the vocabulary, logit_chunk logits at a time, and each chunk is recomputed in backward: memory does not grow
        with B x T x V."""
        wanted = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        wanted = torch.cat((torch.zeros_like(wanted[:, :1]), wanted[:, 1:]), 1)
        logps, entropy = torch.zeros(2, *tokens.shape, device=tokens.device).unbind()
        source, positions, sequences, before = pack(wanted, prompts or range(len(tokens)))
        if not len(source):     # still a zero gradient for every weight: other ranks wait for it
            one = tokens.new_zeros(1)
            hidden = self.hidden_states(one, one, Sequences([1], device=tokens.device))
            return logps + 0.0 * chunked_logps(hidden, self.lm_head.weight, one, temperature)[0].sum(), entropy
        hidden = self.hidden_states(tokens.flatten()[source], positions, sequences)
        rows, columns = wanted.nonzero(as_tuple=True)
        found = chunked_logps(hidden.index_select(0, before), self.lm_head.weight, tokens[rows, columns], temperature)
        return tuple(x.index_put((rows, columns), y) for x, y in zip((logps, entropy), found))

    # ------------------------------------------------------------------------------------------ checkpoints

    @classmethod
    def from_pretrained(cls, path_or_id, device="cpu", dtype=torch.float32, shard=None):
        """Read a checkpoint folder (or a hub id, where the hub can be reached) in HF layout.

        Weights are built on the meta device and filled tensor by tensor, so at most one tensor exists twice. shard: called on
        the empty model (dist.Sharding); each rank then reads only its rows of every tensor, and no rank ever holds the whole.
        ValueError or FileNotFoundError, one line, for what is missing, extra, misshapen or unsupported."""
        folder = find_checkpoint(path_or_id)
        config = ModelConfig.from_dict(read_json(folder / "config.json"))
        with torch.device("meta"):
            model = cls(config).to(dtype)
        if shard:
            shard(model)
        model.to_empty(device=device)
        model.tie()
        model._fill(folder)
        model.files = {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).exists()}
        return model

    @torch.no_grad()
    def _fill(self, folder):
        wanted = dict(self.named_parameters())
        seen = set()
        for file in weight_files(folder):
            with open_shard(file) as shard:
                for name in shard.keys():
                    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in wanted):
                        continue                # computed here; a tied head is the embedding
                    if name not in wanted:
                        raise ValueError(f"{file}: unexpected tensor {name} for a {self.config.model_type} model")
                    stored, p = shard.get_slice(name), wanted[name]
                    if tuple(stored.get_shape()) != tuple(p.shape):
                        raise ValueError(f"{file}: {name} has shape {tuple(stored.get_shape())}, "
                                         f"config.json says {tuple(p.shape)}")
                    part, rows = own_rows(p)
                    if part.numel():
                        part.copy_(stored[rows])
                    seen.add(name)
        missing = sorted(set(wanted) - seen)
        if missing:
            raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")

    def save_pretrained(self, path, dtype=None, write=True):
        """Write a folder that transformers, vLLM and from_pretrained read: config, weights, tokenizer, generation config.

        dtype: of the written weights, what the model computes in by default. Files above SHARD_BYTES are split. Of a model
        that is sharded over ranks every rank must call this, all but one with write=False: tensors are gathered one by one."""
        path, dtype = Path(path), dtype or self.dtype
        if not write:
            for p in self.parameters():
                whole(p)
            return
        path.mkdir(parents=True, exist_ok=True)
        config = {**self.config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")}
        config.pop("dtype", None)
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name, content in self.files.items():
            (path / name).write_bytes(content)
        if "generation_config.json" not in self.files:
            eos = self.config.eos_token_id
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}, indent=2) + "\n")
        for old in path.glob("model*.safetensors*"):
            old.unlink()
        write_shards(path, dict(self.named_parameters()), dtype)


def pack(wanted, prompts):
    """The tokens that a forward pass needs for the log-probs of the wanted ones (B, T) bool, column 0 never.

    prompts: B keys, see token_logps. Returns source (M,), indices into the flattened (B, T) tokens; their positions (M,);
    their Sequences; and before (W,), for each wanted token in row-major order the packed token that predicts it."""
    B, T = wanted.shape
    first = wanted.int().argmax(1)
    last = T - 1 - wanted.flip(1).int().argmax(1)
    first, last, some = torch.stack((first, last, wanted.any(1).long())).tolist()
    source, queries, keys, index, place, M = [], [], [], [], {}, 0
    start = np.zeros((B, 2), np.int64)      # of a row: packed place of its prompt's last token, of its own first
    for b in (b for b in range(B) if some[b]):
        key = (prompts[b], first[b])
        if key not in place:
            place[key] = np.arange(M, M + first[b])
            source.append(b * T + np.arange(first[b]))
            index.append(place[key])
            queries.append(first[b])
            keys.append(first[b])
            M += first[b]
        own = last[b] - first[b]            # the last wanted token predicts nothing that is wanted
        start[b] = place[key][-1], M
        if own:
            source.append(b * T + np.arange(first[b], last[b]))
            index += [place[key], np.arange(M, M + own)]
            queries.append(own)
            keys.append(first[b] + own)
            M += own
    device = wanted.device
    source, index = (torch.from_numpy(np.concatenate([np.empty(0, np.int64), *x])).to(device) for x in (source, index))
    start, first = torch.from_numpy(start).to(device), torch.tensor(first, device=device)
    rows, columns = wanted.nonzero(as_tuple=True)
    behind = columns - first[rows]          # 0: the prompt's last token predicts it
    before = torch.where(behind == 0, start[rows, 0], start[rows, 1] + behind - 1)
    return source, source % T, Sequences(queries, keys, index, device), before
