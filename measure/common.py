"""Tools that the measurements share: models and work of given shapes, a stopwatch, rates.

All that they need of the learner and of its batch stands in one section here. The learner is
measured as train.py uses it, but without a run folder around it.
"""
import sys
import time
from dataclasses import replace

import numpy as np
import torch

import data
import dist
import grpo
import prompts
from config import Common
from engine.checkpoint import Progress
from engine.decode import Linear
from learner import Learner, adamw, micro_batches_of
from model import ModelConfig, Transformer, pack


# ------------------------------------------------------------------------------------------- models

def shape(kind, vocab, hidden, intermediate, layers, heads, kv_heads, **more):
    """Returns the config.json (a dict) of a model of this kind; `more` overrides the rest."""
    # the context and the base of the rotation decide no shape
    given = {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }
    return {**given, **more}


# config.json of the published checkpoints, as far as it decides shapes; tiny and 40m are ours
UNTIED = {"head_dim": 128, "tie_word_embeddings": False}
SHAPES = {      # kind, vocabulary, hidden, intermediate, layers, heads, heads of keys and values
    "tiny": shape("qwen3", 512, 96, 288, 4, 4, 2, head_dim=24),
    "40m": shape("qwen3", 8192, 512, 1536, 12, 8, 4, head_dim=64),
    "qwen2.5-0.5b": shape("qwen2", 151936, 896, 4864, 24, 14, 2),
    "qwen3-0.6b": shape("qwen3", 151936, 1024, 3072, 28, 16, 8, head_dim=128),
    "llama3.2-1b": shape("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64),
    "qwen2.5-3b": shape("qwen2", 151936, 2048, 11008, 36, 16, 2),
    "qwen3-4b": shape("qwen3", 151936, 2560, 9728, 36, 32, 8, head_dim=128),
    "qwen3-8b": shape("qwen3", 151936, 4096, 12288, 36, 32, 8, **UNTIED),
    "qwen3-14b": shape("qwen3", 151936, 5120, 17408, 40, 40, 8, **UNTIED),
}


def config_of(name):
    """Returns the ModelConfig of one of SHAPES."""
    return ModelConfig.from_dict(SHAPES[name])


def random_model(args, device, place=None, adapt=None):
    """Returns a Transformer of --shape with random weights.

    Without place it is for inference, in --dtype on the device. With place (a dist.Sharding) it is
    to be trained: its weights lie where training has them, in float32. adapt: a function that
    adds to the model, still empty, what is trained in the place of all weights (lora.attach)."""
    with torch.device("meta"):
        model = Transformer(config_of(args.shape))
    if adapt:
        adapt(model)
    if place:
        place(model)
    model.to_empty(device=place.home if place else device)
    model.tie()

    # as at the start of a pretraining: norms are 1, biases 0, matrices normal
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight = dist.local(weight)
            if name.endswith("bias"):
                weight.fill_(0.0)
            elif weight.ndim == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0, 0.02)

    return model if place else model.to(getattr(torch, args.dtype))


def model_of(args, device, place=None):
    """Returns the Transformer that --model names, or a random one of --shape.

    place is that of random_model. Raises ValueError or OSError for a folder without a checkpoint
    that can be read."""
    if not args.model:
        return random_model(args, device, place)
    if place:
        return Transformer.from_pretrained(args.model, place.home, shard=place)
    return Transformer.from_pretrained(args.model, device, getattr(torch, args.dtype))


def adapted(model, args):
    """Returns the model with adapters of --lora-rank, or as it is where that is 0."""
    if not args.lora_rank:
        return model
    import lora
    return lora.attach(model, args.lora_rank, Common.lora_alpha, dtype=getattr(torch, args.dtype))


def parameter_count(model):
    """Returns the number of all parameters; of a sharded model those of all ranks together."""
    return sum(weight.numel() for weight in model.parameters())


def matrix_parameters(config):
    """Returns how many parameters every token is multiplied with.

    These are all matrices, lm_head included; the lookup in the embedding is no product."""
    c = config
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads       # q and o, k and v
    attention = c.hidden_size * c.head_dim * heads
    mlp = 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * (attention + mlp) + c.vocab_size * c.hidden_size


# --------------------------------------------------------------------------------------------- work

def workload(args, config, given=None):
    """Returns prompts (lists of ids) and the length of each completion, prompt-major.

    The prompts are those given, or random ids. The lengths are all --new-tokens, or ragged as
    GSM8K's: log-normal with a mean of a third of --new-tokens, and the first is the longest."""
    rng = np.random.default_rng(0)
    ids = given or random_prompts(args, config, rng)

    count = args.prompts * args.group_size
    if args.lengths == "equal":
        return ids, [args.new_tokens] * count

    center = np.log(args.new_tokens / 3) - 0.125        # sigma^2 / 2 below: the mean is a third
    lengths = rng.lognormal(center, 0.5, count).round().clip(1, args.new_tokens).astype(int)
    lengths[0] = args.new_tokens
    return ids, lengths.tolist()


def random_prompts(args, config, rng):
    """Returns --prompts lists of random ids, of --prompt-tokens at most and of half as many at
    least."""
    sizes = rng.integers(args.prompt_tokens // 2, args.prompt_tokens + 1, args.prompts)
    return [rng.integers(0, config.vocab_size, size).tolist() for size in sizes]


def real_prompts(args, tokenizer=None):
    """Returns the ids of the first questions of --data, as train.py would ask them, or None.

    tokenizer: that of --model, if the caller has it. Raises ValueError where there are fewer
    questions than --prompts."""
    if not args.data:
        return None
    tokenizer = tokenizer or prompts.load_tokenizer(args.model)
    return prompts.encode_prompts(questions(args), tokenizer, "auto")


def questions(args):
    """Returns the first --prompts problems of --data."""
    def say(line):
        print(line, file=sys.stderr)

    problems = data.load_problems(args.data, "test", report=say)
    if len(problems) < args.prompts:
        raise ValueError(f"--data {args.data} has {len(problems)} problems, which are fewer than "
                         f"--prompts {args.prompts}")
    return problems[:args.prompts]


def random_rewards(args, device):
    """Returns rewards (prompts, group size) between 0 and 1, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(args.prompts, args.group_size, generator=generator).to(device)


# ------------------------------------------------------------------------ the learner and its batch

def make_learner(model, config):
    """Returns a GRPO learner of a model, as train.py builds it."""
    return Learner(config=config, objective=grpo, model=model, progress=Progress(step=1),
                   optimizer=adamw(model, config.lr))


def with_config(learner, config):
    """Returns a learner of the same model and optimizer under other settings."""
    return replace(learner, config=config)


def one_step(learner, batch, rows):
    """Makes one optimizer step on these rows of a batch. Returns its loss and gradient norm."""
    sums = learner.update(batch, rows)
    return sums["loss"], sums["grad_norm"]


def replaced(batch, **tensors):
    """Returns the batch with other tensors under the given names."""
    return replace(batch, **tensors)


def trained_tokens(batch):
    """Returns the number of completion tokens in the batch: those that the loss reads."""
    return batch.mask.sum().item()


def packed_tokens(batch, rows, config):
    """Returns how many tokens of these rows go through the model in an optimizer step.

    A group's prompt is packed once in each micro-batch that has completions of the group."""
    count = 0
    for part, _ in micro_batches_of(batch, rows, config):
        groups = [row // config.group_size for row in part]
        packed, *_ = pack(batch.mask[part].bool(), groups)
        count += len(packed)
    return count


def largest_over_ranks(value, device):
    """Returns the largest of a number that each rank has."""
    return dist.all_reduce({"value": value}, device, "max")["value"]


# ---------------------------------------------------------------------------------------- stopwatch

def timed(function, device):
    """Returns (seconds, result) of function(); what the device still works at is waited for."""
    wait_for(device)
    begin = time.perf_counter()
    result = function()
    wait_for(device)
    return time.perf_counter() - begin, result


def wait_for(device):
    """Waits until an accelerator has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def forget(device):
    """Frees what the other side has left in the allocator, and lets the peak start anew."""
    if device.type != "cpu":
        backend = getattr(torch, device.type)
        backend.empty_cache()
        backend.reset_peak_memory_stats()


def summary(values):
    """Returns mean, least and largest of the rounds' values, and these themselves, rounded."""
    return {
        "mean": float(np.mean(values)),
        "min": float(np.min(values)),
        "max": float(np.max(values)),
        "rounds": [round(float(value), 4) for value in values],
    }


# ------------------------------------------------------------------------------- rates of a machine

def product_rate(device, dtype):
    """Returns FLOP/s of a large matrix product, measured here and now: the best of five."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
    products = [lambda: a @ b]

    # on the CPU the sampler's blocked product is faster than the plain one: the roof is the better
    if device.type == "cpu":
        blocked = Linear([torch.nn.Linear(n, n, bias=False, dtype=dtype)], n)
        products.append(lambda: blocked(a))

    with torch.inference_mode():
        seconds = min(timed(product, device)[0] for product in products for _ in range(5))
    return 2 * n ** 3 / seconds


def bandwidth(device):
    """Returns bytes/s of reading or of copying memory, the faster, measured here and now."""
    # many times the size of any cache: of 64 MB much would stay in one
    x = torch.empty(2 ** 30, device=device, dtype=torch.int8).fill_(1)
    y = torch.empty_like(x)

    read_seconds = min(timed(lambda: x.view(torch.int64).sum(), device)[0] for _ in range(5))
    copy_seconds = min(timed(lambda: y.copy_(x), device)[0] for _ in range(5))
    return max(2 * x.numel() / copy_seconds, x.numel() / read_seconds)
