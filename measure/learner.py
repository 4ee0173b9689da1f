"""`bench.py train` and `bench.py logps`: seconds of a training step, and the memory of its log-probs."""
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
from learner import parts_of, update
from measure.common import (SHAPES, make_run, matrix_parameters, product_rate, random_model, random_rewards, summary,
                            timed, workload)
from model import ModelConfig, pack
from rollout import Sampler


def train(args, device):
    """A training step: seconds and share of the matrix product's rate, with prompts shared by their group and not."""
    if args.vs == "trl":
        from measure import trl
        return trl.compare(args, device)
    place = dist.Sharding(device, getattr(torch, args.dtype))
    model = random_model(args, device, place)
    model.activation_checkpointing = args.checkpointing
    shared = Config(group_size=args.group_size, lr=1e-6, micro_batch_tokens=args.micro_batch_tokens)
    settings = {"shared": shared, "alone": replace(shared, group_size=1)}       # a group of one shares nothing
    run = make_run(model, shared)
    prompts, lengths = workload(args, model.config)
    out = Sampler(model, [], len(lengths)).generate(prompts, args.group_size, lengths)
    rewards = random_rewards(args, device)
    batch, rows = grpo.prepare(out, rewards, shared), list(range(len(lengths)))
    same = {name: gradient_of(run, batch, rows, c) for name, c in settings.items()}     # also warms up
    flops = product_rate(device, model.dtype)
    seconds = {name: [] for name in settings}
    for _ in range(args.rounds):
        for name, c in settings.items():
            seconds[name].append(timed(lambda: update(run, batch, [rows], c), device)[0])
    through = {name: sum(packed_tokens(batch, part, c) for part, _ in parts_of(batch, rows, c)) for name, c in settings.items()}
    head = model.config.vocab_size * model.config.hidden_size
    arithmetic = 6 * ((matrix_parameters(model.config) - head) * through["shared"] + head * batch["mask"].sum().item())
    return {"parameters": sum(p.numel() for p in model.parameters()), "tokens": int(out.lengths.sum()),
            "padded_to_longest": len(rows) * int(out.lengths.max()), "through_model": through, "gflops": flops / 1e9,
            "loss_and_grad_norm": same, "seconds": {name: summary(s) for name, s in seconds.items()},
            "share_of_gemm_rate": summary([arithmetic / flops / s for s in seconds["shared"]]),
            "ratio": summary(np.array(seconds["alone"]) / np.array(seconds["shared"])),
            "peak_memory_mb": machine.peak_memory_mb(device)}


def gradient_of(run, batch, rows, config):
    """(loss, gradient norm) of an update that leaves the weights as they are."""
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    out = update(run, batch, [rows], config)
    for group in run.optimizer.param_groups:
        group["lr"] = config.lr
    return out["loss"], out["grad_norm"]


def packed_tokens(batch, rows, config):
    """How many tokens of these rows go through the model."""
    groups = [r // config.group_size for r in rows]
    return len(pack(batch["mask"][rows].bool(), groups)[0])


def logps(args, device):
    """Peak memory that the log-probs of --prompts x --new-tokens tokens add, forward and backward: ours and the naive way.

    On the CPU each runs in a process of its own, because a process's peak never falls."""
    if args.variant:
        return {args.variant: logps_peak(args, device)}
    out = {}
    for variant in ("ours", "naive"):
        command = [sys.executable, str(Path(__file__).parents[1] / "bench.py"), *sys.argv[1:], "--variant", variant]
        if "--json" in command:
            del command[command.index("--json"):command.index("--json") + 2]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        out |= json.loads(ran.stdout.splitlines()[-1])
    return {"mb": out, "ratio": out["naive"] / out["ours"]}


def logps_peak(args, device):
    c, dtype = ModelConfig.from_dict(SHAPES[args.shape]), getattr(torch, args.dtype)
    hidden = torch.randn(args.prompts * args.new_tokens, c.hidden_size, device=device).to(dtype).requires_grad_()
    weight = torch.full((c.vocab_size, c.hidden_size), 0.01, device=device, dtype=dtype).requires_grad_()
    weight.grad, hidden.grad = torch.ones_like(weight), torch.ones_like(hidden)        # as after a first micro-batch
    targets = torch.arange(len(hidden), device=device)
    before = machine.peak_memory_mb(device)
    if args.variant == "ours":
        with logps_file.gradients_in_place(weight):
            logps_file.chunked_logps(hidden, weight, targets, 1.0)[0].sum().backward()
    else:
        (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None]).sum().backward()
    return machine.peak_memory_mb(device) - before
