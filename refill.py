"""Refill: draw again until a step has enough groups that can teach (DAPO's dynamic sampling).

    python train.py --refill 3 ...      at most 3 further rounds of --prompts-per-step problems

A group of all right or all wrong completions has no gradient (arXiv 2503.14476, section 3.2). Late
in training most groups are such, and the batch that is left is small and its gradient noisy. So
further rounds are drawn until --prompts-per-step groups are informative. If no round is left before
that, groups that are not fill the batch up, the first drawn first. Informative is judged by
*correctness* alone: a shaped reward differs in nearly every group, and would let wrong answers
compete in form.

What it costs is in the log: num_samples and num_tokens count all that was drawn, refill_rounds the
further rounds, refill_dropped the share of groups that was thrown away. Groups are chosen in the
order of their problems, so any number of ranks trains on the same ones.
"""
from dataclasses import fields, replace

import torch

import dist
import grpo
from rollout import empty_rollout


def enough(drawn, wanted):
    """Whether the rounds hold as many informative groups as wanted, over all ranks."""
    here = sum(int(grpo.informative(d.parts["correct"]).sum()) for d in drawn)
    device = drawn[0].rollout.tokens.device
    return dist.all_reduce({"informative": here}, device)["informative"] >= wanted


def chosen(drawn, c):
    """Choose --prompts-per-step groups from all rounds of a step; without --refill there is one.

    drawn: this rank's part of each round. Returns (Rollout, rewards (n, G)) of this rank's share of
    the groups, and numbers for the log."""
    if not c.refill:
        return drawn[0].rollout, drawn[0].rewards, {}
    # (round, rank, group of that rank's part), in the order of the problems
    flags = dist.gather_objects([grpo.informative(d.parts["correct"]).tolist() for d in drawn])
    useful, others = [], []
    for number in range(len(drawn)):
        for rank, of_rank in enumerate(flags):
            for i, informative in enumerate(of_rank[number]):
                (useful if informative else others).append((number, rank, i))
    places = (useful + others)[:c.prompts_per_step]

    # each rank brings what it drew of them, and takes what falls to it
    mine = {}
    for place in places:
        number, rank, i = place
        if rank == dist.rank():
            mine[place] = group_of(drawn[number], i)
    everyones = {}
    for part in dist.gather_objects(mine):
        everyones |= part
    taken = [everyones[places[i]] for i in dist.split(len(places))]

    total = len(useful) + len(others)
    line = {"refill_rounds": len(drawn) - 1, "refill_dropped": 1 - len(places) / total}
    return *joined(taken, drawn[0]), line


def group_of(drawn, i):
    """(rollout, rewards (1, G)) of group i alone, on the host."""
    G = drawn.rewards.shape[1]
    rows = slice(i * G, (i + 1) * G)
    tensors = {f.name: getattr(drawn.rollout, f.name)[rows].cpu() for f in fields(drawn.rollout)
               if f.name != "version"}
    return replace(drawn.rollout, **tensors), drawn.rewards[i:i + 1].cpu()


def joined(groups, like):
    """(Rollout, rewards (n, G)) of several groups, on the device of `like`."""
    device = like.rollout.tokens.device
    if not groups:
        return empty_rollout(device, like.rollout.version), like.rewards[:0]

    rollouts = [rollout for rollout, _ in groups]
    T = max(int(rollout.lengths.max()) for rollout in rollouts)
    tensors = {}
    for f in fields(like.rollout):
        if f.name == "version":
            continue
        parts = [getattr(rollout, f.name) for rollout in rollouts]
        if parts[0].ndim == 2:
            parts = [torch.nn.functional.pad(part[:, :T], (0, max(0, T - part.shape[1])))
                     for part in parts]
        tensors[f.name] = torch.cat(parts).to(device)
    rewards = torch.cat([rewards for _, rewards in groups]).to(device)
    return replace(like.rollout, **tensors), rewards
