"""REINFORCE with the group's mean as baseline: an objective in one file, as learner.py's contract asks.

    loss = - (r - mean(r)) log pi       per token, over all trained tokens

test_extend.py trains with it. Nothing of the project knows of it but the word in config.ALGOS."""
from dataclasses import dataclass

import torch

import grpo
from config import setting


@dataclass
class Settings:
    # REINFORCE
    baseline: str = setting("mean", choices=("mean", "none"))   # of a group's rewards


METRICS = {"entropy": "tokens", "kept": "rows"}


def prepare(rollout, rewards, config):
    advantages = rewards - (rewards.mean(1, keepdim=True) if config.baseline == "mean" else 0.0)
    return grpo.Batch(
        tokens=rollout.tokens, prompt_lengths=rollout.prompt_lengths, lengths=rollout.lengths,
        mask=rollout.completion_mask(), rewards=rewards.flatten(), advantages=advantages.flatten(),
        active=torch.ones(rewards.numel(), dtype=torch.bool), old_logp=rollout.logps)


def loss(logp, entropy, batch, config, normalizer):
    per_token = -batch.advantages[:, None] * logp * batch.mask
    sums = grpo.common_sums(logp, entropy, batch.sampler_logp, batch.mask)
    return per_token.sum() / normalizer, {**sums, "kept": sums["rows"]}
