"""What the measurements share: shapes of models, work for them, a stopwatch, and the rates of this machine."""
import time
from types import SimpleNamespace

import numpy as np
import torch

import dist
import grpo
from engine.decode import Linear
from learner import adamw
from model import ModelConfig, Transformer


def shape(kind, vocab, hidden, intermediate, layers, heads, kv_heads, **more):
    return dict(model_type=kind, architectures=[f"{kind.capitalize()}ForCausalLM"], vocab_size=vocab, hidden_size=hidden,
                intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                max_position_embeddings=32768, rope_theta=1e6, **{"tie_word_embeddings": True, **more})


SHAPES = {   # config.json of the published checkpoints, as far as it decides shapes; tiny and 40m are ours
    "tiny": shape("qwen3", 512, 96, 288, 4, 4, 2, head_dim=24),
    "40m": shape("qwen3", 8192, 512, 1536, 12, 8, 4, head_dim=64),
    "qwen2.5-0.5b": shape("qwen2", 151936, 896, 4864, 24, 14, 2),
    "qwen3-0.6b": shape("qwen3", 151936, 1024, 3072, 28, 16, 8, head_dim=128),
    "llama3.2-1b": shape("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64),
    "qwen2.5-3b": shape("qwen2", 151936, 2048, 11008, 36, 16, 2),
    "qwen3-4b": shape("qwen3", 151936, 2560, 9728, 36, 32, 8, head_dim=128),
    "qwen3-8b": shape("qwen3", 151936, 4096, 12288, 36, 32, 8, head_dim=128, tie_word_embeddings=False),
    "qwen3-14b": shape("qwen3", 151936, 5120, 17408, 40, 40, 8, head_dim=128, tie_word_embeddings=False),
}


def random_model(args, device, place=None):
    """Random weights of the shape: for inference in --dtype on the device; with place (dist.Sharding) for training."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(SHAPES[args.shape]))
    if place:
        place(model)
    model.to_empty(device=place.home if place else device)
    model.tie()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p = dist.local(p)
            p.fill_(0.0 if name.endswith("bias") else 1.0) if p.ndim == 1 else p.normal_(0, 0.02)
    return model if place else model.to(getattr(torch, args.dtype))


def workload(args, config):
    """Prompts, and the length of each completion: all --new-tokens, or ragged as GSM8K's (log-normal, mean a third)."""
    rng, B = np.random.default_rng(0), args.prompts * args.group_size
    sizes = rng.integers(args.prompt_tokens // 2, args.prompt_tokens + 1, args.prompts)
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in sizes]
    lengths = np.full(B, args.new_tokens)
    if args.lengths == "ragged":
        lengths = rng.lognormal(np.log(args.new_tokens / 3) - 0.125, 0.5, B).round().clip(1, args.new_tokens).astype(int)
        lengths[0] = args.new_tokens
    return prompts, lengths.tolist()


def random_rewards(args, device):
    return torch.rand(args.prompts, args.group_size, generator=torch.Generator().manual_seed(0)).to(device)


def timed(f, device):
    """(seconds, result) of f(), the device's work included."""
    def wait():
        if device.type != "cpu":
            torch.accelerator.synchronize()
    wait()
    begin = time.perf_counter()
    result = f()
    wait()
    return time.perf_counter() - begin, result


def product_rate(device, dtype):
    """FLOP/s of a large matrix product, measured here and now."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
    products = [lambda: a @ b]
    if device.type == "cpu":        # the sampler's blocked product is faster than the plain one: the roof is the better
        layer = torch.nn.Linear(n, n, bias=False, dtype=dtype)
        blocked = Linear([layer], n)
        products.append(lambda: blocked(a))
    with torch.inference_mode():
        return 2 * n ** 3 / min(timed(f, device)[0] for f in products for _ in range(5))


def bandwidth(device):
    """bytes/s of reading or copying memory, the better, measured here and now."""
    x = torch.empty(2 ** 30, device=device, dtype=torch.int8).fill_(1)       # many times any cache: of 64 MB much stays in one
    y = torch.empty_like(x)
    read = min(timed(lambda: x.view(torch.int64).sum(), device)[0] for _ in range(5))
    copy = min(timed(lambda: y.copy_(x), device)[0] for _ in range(5))
    return max(2 * x.numel() / copy, x.numel() / read)


def matrix_parameters(config):
    """Parameters that every token is multiplied with: all matrices, lm_head included, the embedding lookup not."""
    c = config
    attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size) + c.vocab_size * c.hidden_size


def summary(values):
    return {"mean": float(np.mean(values)), "min": float(np.min(values)), "max": float(np.max(values)),
            "rounds": [round(float(v), 4) for v in values]}


def make_run(model, config):
    """What update.update reads, as train.py builds it: float32 master weights, compute in dtype."""
    return SimpleNamespace(c=config, device=model.device, model=model, optimizer=adamw(model, config.lr), algo=grpo,
                           step=1, updates=0, bad_steps=0, say=print)


def forget(device):
    """What the other side has left in the allocator is free again for this one, and the peak starts anew."""
    if device.type != "cpu":
        backend = getattr(torch, device.type)
        backend.empty_cache()
        backend.reset_peak_memory_stats()
