"""`bench.py rollout`: tokens/s of the sampler, its share of the roofline, and transformers.generate in the same run."""
import sys
import tempfile

import numpy as np
import torch

from engine import machine
from engine.decode import bytes_per_token
from measure.common import (bandwidth, forget, matrix_parameters, product_rate, random_model, summary, timed,
                            workload)
from rollout import Sampler

WARM = 16       # tokens with which the other side warms up: its shapes, and so what it compiles, are those of the whole


def rollout(args, device):
    """Tokens/s of the sampler, its share of the roofline, and of transformers.generate in the same run."""
    model = random_model(args, device)
    config, (prompts, lengths) = model.config, workload(args, model.config)
    sampler = Sampler(model, [], args.rows or len(lengths), graph=None if args.graph else False)
    runs = {"ours": lambda warm: sampler.generate(prompts, args.group_size, lengths, seed=0)}
    if args.vs == "hf":
        runs["hf"] = hf_generate(args, model, prompts, lengths)
    rates, seconds_of_ours, peak, limits = {name: [] for name in runs}, [], {}, []
    for i in range(args.rounds + 1):        # the first warms up
        limits.append((product_rate(device, model.dtype), bandwidth(device)))
        for name, run in runs.items():
            forget(device)
            seconds, out = timed(lambda: run(i == 0), device)
            print(f"round {i} {name}: {seconds:.1f} s", file=sys.stderr)
            # of the device, the other side's weights included; on the CPU of the process, which never falls
            peak[name if device.type != "cpu" else "process"] = machine.peak_memory_mb(device)
            if i:
                rates[name].append(sum(lengths) / seconds)
            if i and name == "ours":
                seconds_of_ours.append(seconds)
                deviation = trainer_deviation(model, out)
                if (out.lengths - out.prompt_lengths).tolist() != lengths:
                    raise ValueError("the sampler did not draw the lengths it was given: a bug")
    flops, bytes_s = (max(column) for column in zip(*limits))
    least = roofline_seconds(config, model.dtype, prompts, lengths, args.group_size, flops, bytes_s)
    shares = [least / seconds for seconds in seconds_of_ours]
    result = {"parameters": sum(p.numel() for p in model.parameters()), "completions": len(lengths),
              "mean_length": float(np.mean(lengths)), "gflops": flops / 1e9, "bandwidth_gb_s": bytes_s / 1e9,
              "tokens_per_s": {name: summary(r) for name, r in rates.items()}, "share_of_roofline": summary(shares),
              "peak_memory_mb": peak, "largest_logp_deviation_from_trainer": deviation}
    if args.vs == "hf":
        result["ratio"] = summary(np.array(rates["ours"]) / np.array(rates["hf"]))
    return result


def roofline_seconds(config, dtype, prompts, lengths, group_size, flops, bandwidth):
    """The least time for the rollout with every completion in flight at once: for the prompts and then for each token
    position, the larger of arithmetic / flops and (weights, keys and values read once) / bandwidth. Of all but a prompt's last
    token the last block needs keys and values alone."""
    weights, of_token, layers = matrix_parameters(config), bytes_per_token(config, dtype), config.num_hidden_layers
    attention = 4 * layers * config.num_attention_heads * config.head_dim                      # FLOP a query and key
    sizes, lengths = np.array([len(p) for p in prompts]), np.array(lengths).reshape(-1, group_size)
    head = config.vocab_size * config.hidden_size
    block, keys = (weights - head) // layers, 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    products = ((layers - 1) * block + keys) * sizes.sum() + (block - keys + head) * len(sizes)
    seconds = (2 * products + attention / layers * ((layers - 1) * (sizes ** 2).sum() / 2 + sizes.sum())) / flops
    for t in range(1, lengths.max()):       # the first token comes from the prompts' own pass
        alive = (lengths > t).sum(1)
        arithmetic = 2 * weights * alive.sum() + attention * (alive * (sizes + t)).sum()
        read = weights * dtype.itemsize + of_token * (sizes[alive > 0].sum() + t * alive.sum())
        seconds += max(arithmetic / flops, read / bandwidth)
    return seconds


@torch.no_grad()
def trainer_deviation(model, out):
    """The largest difference between the sampler's log-probs and the training forward's, over four completions."""
    tokens, mask = out.tokens[:4], out.completion_mask()[:4]
    return (model.token_logps(tokens, mask)[0] - out.logps[:4]).abs().max().item()


def hf_generate(args, model, prompts, lengths):
    """transformers.generate with the same weights and prompts (left-padded, as it wants them); a row is done at its length, and
    to warm up after WARM tokens, with the same shapes: run(whether to warm up)."""
    from transformers import AutoModelForCausalLM, StoppingCriteria
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, model.dtype)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    if args.hf == "continuous":
        return lambda warm: hf_continuous(theirs, prompts, [min(n, WARM if warm else n) for n in lengths], args.group_size)
    width = max(len(p) for p in prompts)
    rows = [p for p in prompts for _ in range(args.group_size)]
    ids = torch.tensor([[0] * (width - len(p)) + p for p in rows], device=model.device)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows], device=model.device)
    ends = torch.tensor(lengths, device=model.device) + width

    class AtItsLength(StoppingCriteria):
        warm = False

        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] >= (ends.clamp_max(width + WARM) if self.warm else ends)
    stop = AtItsLength()

    cache = {} if args.hf == "dynamic" else {"cache_implementation": "static"}

    @torch.inference_mode()
    def run(warm):
        stop.warm = warm
        return theirs.generate(ids, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                               eos_token_id=None, max_new_tokens=max(lengths), stopping_criteria=[stop], **cache)
    return run


def hf_continuous(theirs, prompts, lengths, group_size):
    """Their continuous batching; every request brings its own length."""
    from transformers import GenerationConfig
    settings = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    manager = theirs.init_continuous_batching(generation_config=settings)
    manager.start()
    try:
        for i, length in enumerate(lengths):
            manager.add_request(prompts[i // group_size], max_new_tokens=length)
        done = 0
        while done < len(lengths):
            out = manager.get_result(timeout=1)
            done += out is not None and out.is_finished()
            if not manager.is_running():
                raise ValueError("transformers' continuous batching stopped by itself: it may not run on this device")
    finally:
        manager.stop(block=True)
