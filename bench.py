"""Measurements, each one command that writes its JSON: time and memory on this machine, never a test.

    python bench.py memory --shape qwen2.5-0.5b --json FILE     one whole GRPO step on a random checkpoint of real shape

The checkpoint is written sharded in HF layout first, so loading, sampling, training and saving are what a real one gets.
Rewards are drawn at random: random weights answer nothing, and a step without a gradient would measure nothing.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "1000")    # before torch: waiting threads soon sleep (LOG.md)
import torch

import dist
import grpo
import model as model_module
from model import ModelConfig, Transformer
from rollout import Sampler
from train import Config
from update import update

SHAPES = {   # config.json of the published checkpoints, as far as it decides shapes
    "tiny": dict(model_type="qwen3", vocab_size=512, hidden_size=96, intermediate_size=288, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=24, tie_word_embeddings=True),
    "qwen2.5-0.5b": dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864,
                         num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
                         rope_theta=1e6, max_position_embeddings=32768),
    "qwen3-0.6b": dict(model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072,
                       num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                       tie_word_embeddings=True, rope_theta=1e6, max_position_embeddings=40960),
}


class Phases:
    """Seconds and the process's peak memory after each named phase."""

    def __init__(self, device):
        self.device, self.rows, self.begin = device, [], time.perf_counter()

    def done(self, name, **more):
        row = {"phase": name, "seconds": round(time.perf_counter() - self.begin, 2),
               "peak_memory_mb": round(dist.peak_memory_mb(self.device)), **more}
        self.rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()))
        self.begin = time.perf_counter()


def memory(args):
    """Write, load, sample, train one step, save; returns what was measured."""
    device = dist.setup(args.device)
    torch.set_num_threads(args.threads or dist.choose_threads())
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in", Path(folder) / "out"
        model_module.SHARD_BYTES = 3 * 10 ** 8          # several shards, as a large checkpoint has
        Transformer(ModelConfig.from_dict(SHAPES[args.shape])).init_weights().save_pretrained(source, torch.bfloat16)
        shards = len(list(source.glob("*.safetensors")))
        phases = Phases(device)
        phases.done("start", shards=shards)
        model = Transformer.from_pretrained(source, device)
        model.activation_checkpointing = True
        master = dist.Master(model, dtype)
        parameters = sum(p.numel() for p in master.params)
        phases.done("load", parameters=parameters)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, model.config.vocab_size, (args.prompts, args.prompt_tokens), generator=generator).tolist()
        rollout = Sampler(model, []).generate(prompts, args.group_size, args.new_tokens)
        phases.done("rollout", tokens=int((rollout.lengths - rollout.prompt_lengths).sum()))
        rewards = torch.rand(args.prompts, args.group_size, generator=generator).to(device)
        train_one_step(model, master, rollout, rewards)
        phases.done("train", tokens=int(rollout.lengths.sum()))
        model.save_pretrained(target)
        phases.done("save", shards=len(list(target.glob("*.safetensors"))))
    print(f"weights, gradients and Adam state in float32: {parameters * 16 / 2 ** 20:.0f} MB")
    return {"parameters": parameters, "state_mb": parameters * 16 / 2 ** 20, "phases": phases.rows}


def train_one_step(model, master, rollout, rewards):
    """update.update, as the loop calls it."""
    config = Config()
    optimizer = torch.optim.AdamW(master.params, lr=1e-6, fused=model.device.type != "cpu")
    run = SimpleNamespace(c=config, device=model.device, model=model, master=master, optimizer=optimizer, algo=grpo,
                          step=1, updates=0, bad_steps=0, say=print)
    update(run, grpo.prepare(rollout, rewards, config), [list(range(rewards.numel()))], config)


def main():
    parser = dist.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("what", choices=["memory"])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", default="")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", default="")
    try:
        args = parser.parse_args()
        if args.json and Path(args.json).exists():
            raise ValueError(f"--json {args.json} already exists: choose another file, results are never overwritten")
        result = {"command": "python bench.py " + " ".join(sys.argv[1:]), "torch": torch.__version__, **memory(args)}
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
