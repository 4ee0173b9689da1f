"""`bench.py train` and `bench.py logps`: seconds of a training step, and memory of its log-probs.

A training step goes through the same batch in two ways. "shared" packs each prompt once a group, as
train.py does it, and "alone" once a completion. Both give the same gradient, so their losses and
gradient norms stand beside each other in the result.
"""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import dist
import grpo
from config import Config
from engine import logps as logps_file
from engine import machine
from measure.common import (adapted, config_of, make_learner, matrix_parameters, model_of, one_step,
                            packed_tokens, parameter_count, product_rate, random_rewards,
                            real_prompts, summary, timed, trained_tokens, with_config, workload)
from rollout import Sampler


# ---------------------------------------------------------------------------------- a training step

def train(args, device):
    """Returns seconds of a step and its share of the rate of a matrix product, for both ways.

    With --vs trl a whole step is compared with TRL's instead (measure/trl.py). Raises ValueError
    where TRL, or what it needs, is not there."""
    if args.vs == "trl":
        try:
            from measure import trl
        except ImportError as error:
            raise ValueError(f"train --vs trl: this Python has no {error.name}: pip install trl"
                             ) from None
        return trl.compare(args, device)

    model = model_of(args, device, dist.Sharding(device, getattr(torch, args.dtype)))
    model = adapted(model, args)
    model.activation_checkpointing = args.checkpointing
    config = Config(group_size=args.group_size, lr=1e-6, micro_batch_tokens=args.micro_batch_tokens)
    shared = make_learner(model, config)
    alone = with_config(shared, replace(config, group_size=1))      # a group of one shares nothing
    learners = {"shared": shared, "alone": alone}

    prompts, lengths = workload(args, model.config, real_prompts(args))
    out = Sampler(model, [], len(lengths)).generate(prompts, args.group_size, lengths)
    batch = grpo.prepare(out, random_rewards(args, device), config)
    rows = list(range(len(lengths)))

    gradients = {way: gradient_of(learner, batch, rows)             # also warms up
                 for way, learner in learners.items()}
    flops = product_rate(device, model.dtype)
    seconds = {way: [] for way in learners}
    for _ in range(args.rounds):
        for way, learner in learners.items():
            spent, _ = timed(lambda: one_step(learner, batch, rows), device)
            seconds[way].append(spent)

    # FLOP: forward and backward are three products, of a multiplication and an addition for each
    # parameter, and two where it is frozen; lm_head sees only the tokens that are trained
    through = {way: packed_tokens(batch, rows, learner.config) for way, learner in learners.items()}
    head = model.config.vocab_size * model.config.hidden_size
    blocks = matrix_parameters(model.config) - head
    of_parameter = 4 if args.lora_rank else 6
    arithmetic = of_parameter * (blocks * through["shared"] + head * trained_tokens(batch))

    return {
        "parameters": parameter_count(model),
        "tokens": int(out.lengths.sum()),
        "padded_to_longest": len(rows) * int(out.lengths.max()),
        "through_model": through,
        "gflops": flops / 1e9,
        "loss_and_grad_norm": gradients,
        "seconds": {way: summary(values) for way, values in seconds.items()},
        "share_of_gemm_rate": summary([arithmetic / flops / spent for spent in seconds["shared"]]),
        "ratio": summary(np.array(seconds["alone"]) / np.array(seconds["shared"])),
        "peak_memory_mb": machine.peak_memory_mb(device),
    }


def gradient_of(learner, batch, rows):
    """Returns (loss, gradient norm) of a step that leaves the weights as they are."""
    groups = learner.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0

    out = one_step(learner, batch, rows)
    for group, rate in zip(groups, rates):
        group["lr"] = rate
    return out


# -------------------------------------------------------------------------- the log-probs of a step

def logps(args, device):
    """Returns the peak memory in MB that log-probs add, forward and backward: ours and naive.

    They are those of --prompts x --new-tokens tokens. Each side runs in a process of its own,
    because on the CPU the peak of a process never falls."""
    if args.variant:
        return {args.variant: logps_peak(args, device)}

    program = Path(__file__).parents[1] / "bench.py"
    given = [*sys.argv[1:], "--json", ""]       # the file is for this process to write
    peaks = {}
    for variant in ("ours", "naive"):
        command = [sys.executable, str(program), *given, "--variant", variant]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks |= json.loads(ran.stdout.splitlines()[-1])
    return {"mb": peaks, "ratio": peaks["naive"] / peaks["ours"]}


def logps_peak(args, device):
    """Returns the MB that the log-probs of random hidden states add to this process's peak."""
    c = config_of(args.shape)
    dtype = getattr(torch, args.dtype)
    tokens = args.prompts * args.new_tokens

    hidden = torch.randn(tokens, c.hidden_size, device=device).to(dtype)            # (M, hidden)
    weight = torch.full((c.vocab_size, c.hidden_size), 0.01, device=device, dtype=dtype)
    targets = torch.arange(tokens, device=device) % c.vocab_size                    # (M,)

    # gradients are there already, as after a first micro-batch
    for tensor in (weight, hidden):
        tensor.requires_grad_()
        tensor.grad = torch.ones_like(tensor)

    before = machine.peak_memory_mb(device)
    if args.variant == "ours":
        with logps_file.gradients_in_place(weight):
            target_logps, _ = logps_file.chunked_logps(hidden, weight, targets, 1.0)
            target_logps.sum().backward()
    else:
        # in one expression: a name for a (M, V) tensor would keep it through the backward
        (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None]).sum().backward()
    return machine.peak_memory_mb(device) - before
