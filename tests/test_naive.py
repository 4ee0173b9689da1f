"""Whole steps of the trainer against the naive one (naive.py), in configurations drawn at random.

Both compute in float64 here, so that two correct programs agree to many digits after any number of
updates: where the gradient of a weight is nearly zero, Adam would make a whole step of float32's
rounding. The program asks for float32 by name, so in this file that name means float64."""
import copy
import random
from functools import lru_cache
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import config
import learner
import naive
import train
from config import Config
from engine import kernels
from engine.checkpoint import Progress
from model import ModelConfig, Transformer
from rollout import Sampler

torch.set_num_threads(1)
FLOAT32 = torch.float32
STOPS = [0, 1, 2]           # of 16 tokens
TURNS = ("grpo", "offpolicy", "gtpo", "offpolicy")
FAMILIES = {
    "qwen3": {},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "llama": {"qk_norm": False, "tie_word_embeddings": False},
}


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Let the program compute in float64 wherever it asks for float32."""
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(np, "float32", np.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(FLOAT32)
    for cached in vars(kernels).values():       # no constant of these runs reaches another test
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


@lru_cache
def tiny(family):
    """A tiny model, and what transformers reads of its checkpoint."""
    sizes = ModelConfig(model_type=family, vocab_size=16, hidden_size=16, intermediate_size=16,
                        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                        head_dim=8, initializer_range=0.4, max_position_embeddings=32,
                        **FAMILIES[family])
    model = Transformer(sizes).init_weights()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


# ----------------------------------------------------------------------------- a configuration

def drawn_config(seed):
    """The settings of a run, drawn at random, for the objectives in turn."""
    r = random.Random(seed)
    algo = TURNS[seed % 4]
    chosen = {
        "steps": r.choice([2, 2, 3]), "prompts_per_step": r.choice([2, 3]),
        "group_size": r.choice([2, 3, 3]), "max_new_tokens": r.choice([2, 4, 6]),
        "temperature": r.choice([0.6, 1.0, 1.5]), "lr": r.choice([3e-3, 3e-2]),
        "warmup_steps": r.choice([0, 2]), "lr_end": r.choice([1.0, 0.0]),
        "weight_decay": r.choice([0.0, 0.1]), "grad_clip": r.choice([0.05, 1.0, 100.0]),
        "micro_batch_tokens": r.choice([1, 15, 8192]),
        "epochs": r.choice([1, 1, 2]), "minibatches": r.choice([1, 1, 2]),
        "advantage_scale": r.choice(["std", "none", "loo", "batch"]),
        "aggregation": r.choice(["token", "sequence", "constant"]),
        "zero_variance": r.choice(["drop", "keep"]),
        "mask_truncated": r.choice([False, False, True])}

    if algo == "gtpo":
        chosen |= {"gtpo_gamma": r.choice([0.005, 0.2]), "gtpo_amplify": r.choice([1.5, 2.0]),
                   "gtpo_cap": r.choice([0.0, 2.0])}
        if chosen["epochs"] * chosen["minibatches"] == 1:
            chosen["gtpo_ratio"] = r.choice([True, False])
    else:
        chosen |= {"clip_low": r.choice([0.1, 0.2]), "clip_high": r.choice([0.2, 0.3]),
                   "ratio_level": r.choice(["token", "sequence"]),
                   "dual_clip": r.choice([0.0, 1.5]), "beta": r.choice([0.0, 0.3])}

    if algo == "offpolicy":
        chosen |= {"sync_every": r.choice([1, 2, 3]),
                   "replay_ratio": r.choice([1, 2, 3]),
                   "correction": r.choice(["decoupled", "decoupled", "bypass"]),
                   "importance": r.choice(["none", "standard", "truncated"]),
                   "importance_level": r.choice(["token", "sequence", "geometric"]),
                   "importance_cap": r.choice([1.1, 2.0]), "max_reuse": r.choice([0, 1, 2]),
                   "buffer_groups": r.choice([3, 512]), "max_staleness": r.choice([0, 32]),
                   "priority": r.choice([0.0, 0.6])}
        if chosen["replay_ratio"] > 1 and chosen["advantage_scale"] == "batch":
            chosen["advantage_scale"] = "std"
    updates = chosen["epochs"] * chosen["minibatches"] * chosen.get("replay_ratio", 1)
    if updates > 2:
        chosen["steps"] = 2             # enough, and fast
    return config.check(Config(algo=algo, **chosen))


# ------------------------------------------------------------------ a run of ours, and its record

class Recorder(learner.Learner):
    """A learner that keeps what a naive one needs, and what both are compared by."""

    def learn(self, rollout, rewards):
        self.rollouts.append((rollout, rewards))
        self.draws.append([])
        return super().learn(rollout, rewards)

    def descend(self, loss):
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        self.found.append((loss, gradients))
        return super().descend(loss)

    def record_draws(self, buffer):
        sample = buffer.sample

        def recorded(*args):
            groups, weights = sample(*args)
            self.draws[-1].append([g.tokens[:g.prompt_length].tolist() for g in groups])
            return groups, weights
        buffer.sample = recorded


class Tokenizer:
    """Writes ids as numbers."""

    def batch_decode(self, completions, skip_special_tokens):
        return [" ".join(map(str, ids)) for ids in completions]


class Prompts:
    """A stream of problems, each another one, with prompts of two to four tokens."""
    kinds = {}

    def __init__(self):
        self.count = 0

    def feedback(self, line):
        pass

    def next(self, n, progress):
        problems = []
        for _ in range(n):
            self.count += 1
            prompt = [3 + self.count // 13, 3 + self.count % 13, *[5] * (self.count % 3)]
            problems.append({"problem": "", "answer": "", "prompt": prompt})
        return problems


def parity(problems, groups):
    return [[float(sum(map(int, text.split())) % 2) for text in texts] for texts in groups]


def brevity(problems, groups):
    return [[1 / 2 ** len(text.split()) for text in texts] for texts in groups]


def our_run(c, start, folder):
    """A run of train.train_step without a command line. Returns its learner."""
    model, reference, lagging = (copy.deepcopy(start) for _ in range(3))
    objective = config.objective(c.algo)
    optimizer = learner.adamw(model, c.lr, c.weight_decay)
    for state in optimizer.state.values():
        state["step"] = state["step"].to(FLOAT32)       # torch counts in float32 itself

    ours = Recorder(config=c, objective=objective, model=model, optimizer=optimizer,
                    progress=Progress(), reference=reference if getattr(c, "beta", 0) else None,
                    state=objective.State(c) if hasattr(objective, "State") else None)
    ours.rollouts, ours.draws, ours.found = [], [], []
    if c.algo == "offpolicy":
        ours.record_draws(ours.state.buffer)

    sampler = behaviour = Sampler(model, STOPS)
    if getattr(c, "sync_every", 1) > 1:
        ours.behaviour = lagging.requires_grad_(False)
        behaviour = Sampler(lagging, STOPS)
    rewards = [("correct", 1.0, parity), ("brevity", 0.25, brevity)]
    run = train.Run(learner=ours, sampler_of_pi=sampler, sampler_of_mu=behaviour, stream=Prompts(),
                    held_out=[], reward_functions=rewards, tokenizer=Tokenizer(), folder=folder)
    for _ in range(c.steps):
        train.train_step(run)
    return ours


def groups_of(rollout, rewards):
    """The recorded groups, as naive.py reads them."""
    groups, row = [], 0
    for of_group in rewards.tolist():
        rows = []
        for reward in of_group:
            start, end = rollout.prompt_lengths[row], rollout.lengths[row]
            tokens = rollout.tokens[row, :end].tolist()
            finished = bool(rollout.finished[row])
            rows.append(naive.Row(tokens[:start], tokens[start:], finished, reward))
            row += 1
        groups.append(naive.Group(rows))
    return groups


def near(a, b, tolerance=1e-5):
    """Whether two tensors are equal relative to the larger norm, or both nothing but rounding."""
    return (a - b).norm() <= tolerance * max(a.norm(), b.norm(), 1e-6)


def compare(seed, folder):
    """Hold a run of ours to the naive one: losses, gradients, final weights. Returns its updates.

    mu's log-probs are recorded nowhere: the naive trainer evaluates the policy that drew."""
    c = drawn_config(seed)
    start, of_transformers = tiny(list(FAMILIES)[seed // 4 % 3])
    ours = our_run(c, start, folder)
    expected = naive.Trainer(of_transformers, c)
    for (rollout, rewards), draws in zip(ours.rollouts, ours.draws, strict=True):
        expected.step(groups_of(rollout, rewards), draws)

    passes = getattr(c, "replay_ratio", 1) - 1          # fewer only where the buffer was empty
    assert all(len(draws) == passes or draws == [[]] for draws in ours.draws), c
    assert len(ours.found) == len(expected.found) == expected.updates == ours.progress.updates, c
    for i, (mine, theirs) in enumerate(zip(ours.found, expected.found)):
        assert mine[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-9), (i, c)
        assert mine[1].keys() == theirs[1].keys()
        for name in mine[1]:
            assert near(mine[1][name], theirs[1][name]), (i, name, c)
    for name, p in ours.model.named_parameters():
        assert near(p.detach(), expected.parameters[name].detach()), (name, c)
    return len(ours.found)


@pytest.mark.parametrize("seed", range(30))
def test_a_run_is_that_of_the_naive_trainer(seed, tmp_path):
    assert compare(seed, tmp_path) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30, 150))
def test_more_runs_are_those_of_the_naive_trainer(seed, tmp_path):
    compare(seed, tmp_path)
