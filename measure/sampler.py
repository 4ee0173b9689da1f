"""`bench.py rollout`: tokens/s of the sampler, beside the roofline and other libraries.

The roofline is the least time that this machine could take. Every product then runs at the rate of
a large one, and memory is read at its full bandwidth. Both rates are measured in each round,
because those of a shared machine change.

With --vs hf, vllm or llamacpp another library draws completions of the same lengths, from the same
weights and prompts, in turns with ours. transformers.generate does so in the same process, the
others in a process of their own (measure/worker.py), whose clock is read around the drawing alone.
Whether such a process has loaded the same model is seen in one prompt's likeliest continuation.
"""
import importlib
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack

import numpy as np
import torch

from engine import machine
from engine.decode import bytes_per_token
from measure.common import (bandwidth, forget, matrix_parameters, model_of, parameter_count,
                            product_rate, real_prompts, summary, timed, workload)
from measure.worker import Worker, command_of
from rollout import Sampler

WARM = 16       # tokens to warm up the other side: in the shapes of the whole, which it may compile
CHECK = 16      # tokens of the continuation that shows whether both sides have the same model
WORKERS = ("vllm", "llamacpp")      # values of --vs whose side is a process of its own


def rollout(args, device):
    """Returns tokens/s of each side, and the share of the roofline that the sampler reaches.

    Raises ValueError if the sampler has not drawn the lengths that it was given."""
    model = model_of(args, device)
    prompts, lengths = workload(args, model.config, real_prompts(args))
    sampler = Sampler(model, [], args.rows or len(lengths), graph=None if args.graph else False)

    with ExitStack() as stack:
        # {side: function of whether this round only warms up; it returns (seconds, what it drew)}
        sides = {"ours": lambda warm: timed(
            lambda: sampler.generate(prompts, args.group_size, lengths, seed=0), device)}
        more = {}
        if args.vs == "hf":
            generate = hf_generate(args, model, prompts, lengths)
            sides["hf"] = lambda warm: timed(lambda: generate(warm), device)
        if args.vs in WORKERS:
            worker = stack.enter_context(start_worker(args, model))
            more = load_worker(worker, stack, args, model, prompts, lengths)
            sides[args.vs] = lambda warm: worker_round(worker, warm, more)

        measured = rounds_of(sides, args, model, lengths, device)
    return {**result_of(args, model, prompts, lengths, **measured), **more}


def rounds_of(sides, args, model, lengths, device):
    """Returns what the rounds gave: seconds of each side, and rates and peaks of the machine."""
    seconds = {side: [] for side in sides}
    flops, bytes_s = [], []
    peak = {}
    for number in range(args.rounds + 1):           # the first warms up
        flops.append(product_rate(device, model.dtype))
        bytes_s.append(bandwidth(device))

        for side, draw in sides.items():
            forget(device)
            spent, out = draw(number == 0)
            print(f"round {number} {side}: {spent:.1f} s", file=sys.stderr)

            # of the device, with the weights of both sides; a CPU process's peak never falls,
            # so there it is not of one side
            peak[side if device.type != "cpu" else "process"] = machine.peak_memory_mb(device)

            if number > 0:
                seconds[side].append(spent)
            if number > 0 and side == "ours":
                deviation = trainer_deviation(model, out)
                if (out.lengths - out.prompt_lengths).tolist() != lengths:
                    raise ValueError("the sampler did not draw the lengths it was given: a bug")
    return {"seconds": seconds, "flops": max(flops), "bytes_s": max(bytes_s), "peak": peak,
            "deviation": deviation}


def result_of(args, model, prompts, lengths, seconds, flops, bytes_s, peak, deviation):
    """Returns the result of the command, made of what the rounds gave."""
    rates = {side: np.array([sum(lengths) / spent for spent in spents])
             for side, spents in seconds.items()}
    least = roofline_seconds(model.config, model.dtype, prompts, lengths, args.group_size,
                             flops=flops, bandwidth=bytes_s)

    result = {
        "parameters": parameter_count(model),
        "completions": len(lengths),
        "mean_length": float(np.mean(lengths)),
        "mean_prompt": float(np.mean([len(prompt) for prompt in prompts])),
        "gflops": flops / 1e9,
        "bandwidth_gb_s": bytes_s / 1e9,
        "tokens_per_s": {side: summary(values) for side, values in rates.items()},
        "share_of_roofline": summary([least / spent for spent in seconds["ours"]]),
        "peak_memory_mb": peak,
        "largest_logp_deviation_from_trainer": deviation,
    }
    if args.vs:
        result["ratio"] = summary(rates["ours"] / rates[args.vs])
    return result


def roofline_seconds(config, dtype, prompts, lengths, group_size, flops, bandwidth):
    """Returns the least seconds of a rollout that has every completion in flight at once.

    flops is in FLOP/s and bandwidth in bytes/s. The prompts' pass is bounded by its arithmetic.
    Each later token position takes the longer of its arithmetic and of one reading of all weights,
    keys and values. The last block computes only keys and values for all but a prompt's last
    token."""
    layers = config.num_hidden_layers
    sizes = np.array([len(prompt) for prompt in prompts])           # (P,)
    lengths = np.array(lengths).reshape(-1, group_size)             # (P, G)

    # parameters that a token is multiplied with
    weights = matrix_parameters(config)
    head = config.vocab_size * config.hidden_size
    block = (weights - head) // layers
    keys_and_values = 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    # FLOP of attention for each query and key: two products of a multiplication and an addition
    attention = 4 * layers * config.num_attention_heads * config.head_dim

    # the prompts' pass, which also gives the first tokens; a query sees half the prompt on average
    products = ((layers - 1) * block + keys_and_values) * sizes.sum()
    products += (block - keys_and_values + head) * len(sizes)
    pairs = (layers - 1) * (sizes ** 2).sum() / 2 + sizes.sum()
    seconds = (2 * products + attention / layers * pairs) / flops

    # the other tokens, position by position; a prompt's keys are read once for its completions
    of_token = bytes_per_token(config, dtype)
    for position in range(1, lengths.max()):
        alive = (lengths > position).sum(1)                         # (P,)
        seen = (alive * (sizes + position)).sum()
        arithmetic = 2 * weights * alive.sum() + attention * seen
        cached = sizes[alive > 0].sum() + position * alive.sum()
        read = weights * dtype.itemsize + of_token * cached
        seconds += max(arithmetic / flops, read / bandwidth)
    return seconds


@torch.no_grad()
def trainer_deviation(model, out):
    """Returns the largest difference between the log-probs of the sampler and of the trainer.

    It is taken over the first four completions."""
    tokens = out.tokens[:4]                     # (4, T)
    mask = out.completion_mask()[:4]
    logps, _ = model.token_logps(tokens, mask)
    return (logps - out.logps[:4]).abs().max().item()


# ---------------------------------------------------------------------------------- another process

def start_worker(args, model):
    """Returns the Worker of --vs. Raises ValueError where that side could not be the same."""
    python = {"vllm": args.vllm_python, "llamacpp": args.llamacpp_python}[args.vs] or sys.executable
    python = os.path.abspath(shutil.which(python) or python)    # the worker runs in another folder
    module = f"measure.{args.vs}"
    if args.vs == "llamacpp" and model.dtype != torch.float32:
        raise ValueError("--vs llamacpp needs --dtype float32; its own is --gguf-dtype")
    environment = {}
    if args.vs == "vllm":
        environment = importlib.import_module(module).environment(python, torch.get_num_threads())
    return Worker(args.vs, command_of(module, python), environment)


def load_worker(worker, stack, args, model, prompts, lengths):
    """Give a worker its model and its work. Returns what it says of itself, for the result."""
    config = {name: value for name, value in vars(model.config).items() if name != "raw"}
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    model.save_pretrained(folder, model.dtype)

    # as if every completion had a prompt of its own, and a block that is not full
    tokens = sum(lengths) + sum((len(prompt) + 64) * args.group_size for prompt in prompts)
    first = worker.start({
        "model": folder,
        "config": config,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "prompts": prompts,
        "group_size": args.group_size,
        "lengths": lengths,
        "check_tokens": CHECK,
        "cache_bytes": tokens * bytes_per_token(model.config, model.dtype),
        "gguf": args.gguf,
        "half": args.gguf_dtype == "float16",
        "cache": args.llamacpp_cache,
        "flash": args.flash,
    })
    check = first.pop("check")
    return {args.vs: first, "same_model": same_model(model, prompts[0], **check)}


def worker_round(worker, warm, more):
    """Returns (seconds, None) of a round, and keeps what the worker says of it in `more`."""
    answer = worker.round(warm)
    seconds = answer.pop("seconds")
    more[worker.name]["last_round"] = answer
    return seconds, None


@torch.no_grad()
def same_model(model, prompt, tokens, logps):
    """Returns how far the other side's likeliest continuation of a prompt is ours.

    tokens and logps are theirs. The first token that differs may be as likely as ours but for
    rounding; the log-probs that both give to the same tokens must be equal."""
    greedy = Sampler(model, []).generate([prompt], 1, len(tokens), temperature=0.0)
    ours = greedy.completions()[0]
    equal = [a == b for a, b in zip(ours, tokens)]

    text = torch.tensor([prompt + tokens], device=model.device)             # (1, T)
    found, _ = model.token_logps(text)
    found = found[0, len(prompt):].tolist()
    difference = max(abs(a - b) for a, b in zip(found, logps))
    return {
        "tokens": len(tokens),
        "equal_until": equal.index(False) if False in equal else len(equal),
        "largest_logp_difference": difference,
    }


# ------------------------------------------------------------------------------------- transformers

def hf_generate(args, model, prompts, lengths):
    """Returns a function that draws with transformers, of whether the round only warms up.

    It has the same weights and the same prompts, left-padded as generate wants them. A row is done
    at its own length, and in a round that warms up after WARM tokens, with the same shapes."""
    from transformers import AutoModelForCausalLM, StoppingCriteria
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, model.dtype)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    theirs = theirs.to(model.device).eval()

    if args.hf == "continuous":
        few = [min(length, WARM) for length in lengths]
        return lambda warm: hf_continuous(theirs, prompts, few if warm else lengths,
                                          args.group_size)

    width = max(len(prompt) for prompt in prompts)
    ids, seen = [], []
    for prompt in prompts:
        padding = width - len(prompt)
        ids += [[0] * padding + prompt] * args.group_size
        seen += [[0] * padding + [1] * len(prompt)] * args.group_size
    ids = torch.tensor(ids, device=model.device)                            # (B, width)
    seen = torch.tensor(seen, device=model.device)                          # (B, width)
    ends = torch.tensor(lengths, device=model.device) + width               # (B,)

    class AtItsLength(StoppingCriteria):
        warm = False

        def __call__(self, input_ids, scores, **kwargs):
            end = ends.clamp_max(width + WARM) if self.warm else ends
            return input_ids.shape[1] >= end

    stop = AtItsLength()
    cache = {} if args.hf == "dynamic" else {"cache_implementation": "static"}

    @torch.inference_mode()
    def generate(warm):
        stop.warm = warm
        return theirs.generate(ids, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0,
                               top_p=1.0, pad_token_id=0, eos_token_id=None,
                               max_new_tokens=max(lengths), stopping_criteria=[stop], **cache)
    return generate


def hf_continuous(theirs, prompts, lengths, group_size):
    """Draws with the continuous batching of transformers; every request brings its own length.

    Raises ValueError if their manager has stopped before the last request was done."""
    from transformers import GenerationConfig
    settings = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                eos_token_id=-1, pad_token_id=0)
    manager = theirs.init_continuous_batching(generation_config=settings)
    manager.start()

    try:
        for row, length in enumerate(lengths):
            manager.add_request(prompts[row // group_size], max_new_tokens=length)

        done = 0
        while done < len(lengths):
            out = manager.get_result(timeout=1)
            if out is not None and out.is_finished():
                done += 1
            if not manager.is_running():
                raise ValueError("transformers' continuous batching stopped by itself: "
                                 "it may not run on this device")
    finally:
        manager.stop(block=True)
