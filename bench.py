"""Measurements, each one command that writes its JSON: time and memory on this machine, never a test.

    python bench.py rollout --shape 40m --vs hf        tokens/s beside transformers.generate on the same weights and lengths
    python bench.py train --shape tiny                  a training step; prompts once a group beside once a completion
    python bench.py train --shape tiny --vs trl         a whole GRPO step beside TRL's (pip install trl, in any environment)
    python bench.py memory --shape qwen2.5-0.5b         a whole GRPO step on a random checkpoint of real shape, and its prediction
    python bench.py memory --predict                    bytes a chip for 0.5B to 14B on 1, 8 and 20 chips (also under torchrun)
    torchrun --nproc-per-node 4 bench.py comm           bytes and seconds of each collective of a step; --predict: on 20 x 910B
    python bench.py logps --shape qwen2.5-0.5b          peak memory of the log-probs alone, beside the naive ones
    python bench.py reward --data FOLDER --vs math-verify   the verifier on labelled completions and hostile inputs (bench_reward.py)

Every comparison alternates between the two in one process and reports the ratio of each round. Weights are random and
rewards drawn at random: random weights answer nothing, and a step without a gradient would measure nothing.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "3000")    # before torch: waiting threads soon sleep (LOG.md)
import numpy as np
import torch

import bench_reward
import dist
import grpo
import logps as logps_module
import model as model_module
from config import Config, Parser
from decode import Linear, bytes_per_token
from model import ModelConfig, Transformer
from rollout import Sampler
from update import adamw, parts_of, update


WARM = 16       # tokens with which the other side warms up: its shapes, and so what it compiles, are those of the whole


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


# ------------------------------------------------------------------------------------------------- what all share

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


def summary(values):
    return {"mean": float(np.mean(values)), "min": float(np.min(values)), "max": float(np.max(values)),
            "rounds": [round(float(v), 4) for v in values]}


# ------------------------------------------------------------------------------------------------------- rollout

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
            peak[name if device.type != "cpu" else "process"] = dist.peak_memory_mb(device)
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


def forget(device):
    """What the other side has left in the allocator is free again for this one, and the peak starts anew."""
    if device.type != "cpu":
        backend = getattr(torch, device.type)
        backend.empty_cache()
        backend.reset_peak_memory_stats()


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


# --------------------------------------------------------------------------------------------------------- train

def make_run(model, config):
    """What update.update reads, as train.py builds it: float32 master weights, compute in dtype."""
    return SimpleNamespace(c=config, device=model.device, model=model, optimizer=adamw(model, config.lr), algo=grpo,
                           step=1, updates=0, bad_steps=0, say=print)


def train(args, device):
    """A training step: seconds and share of the matrix product's rate, with prompts shared by their group and not."""
    if args.vs == "trl":
        import bench_trl
        return bench_trl.compare(args, device)
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
            "peak_memory_mb": dist.peak_memory_mb(device)}


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
    return len(model_module.pack(batch["mask"][rows].bool(), groups)[0])


# ---------------------------------------------------------------------------------------------- memory of one part

def logps(args, device):
    """Peak memory that the log-probs of --prompts x --new-tokens tokens add, forward and backward: ours and the naive way.

    On the CPU each runs in a process of its own, because a process's peak never falls."""
    if args.variant:
        return {args.variant: logps_peak(args, device)}
    out = {}
    for variant in ("ours", "naive"):
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
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
    before = dist.peak_memory_mb(device)
    if args.variant == "ours":
        with logps_module.gradients_in_place(weight):
            logps_module.chunked_logps(hidden, weight, targets, 1.0)[0].sum().backward()
    else:
        (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None]).sum().backward()
    return dist.peak_memory_mb(device) - before


# ---------------------------------------------------------------------------------------------------------- main

def memory(args, device):
    import bench_scale
    return bench_scale.predicted_memory(args) if args.predict else bench_scale.memory(args, device)


def comm(args, device):
    import bench_scale
    return bench_scale.predicted_comm(args) if args.predict else bench_scale.comm(args, device)


WHAT = {"rollout": rollout, "train": train, "memory": memory, "comm": comm, "logps": logps, "reward": bench_reward.reward}


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="longest prompt (rollout, train: from half of it)")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--lengths", choices=["ragged", "equal"], default="ragged")
    parser.add_argument("--rows", type=int, default=0, help="completions in the cache at once; 0: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vs", choices=["", "hf", "trl", "math-verify"], default="")
    parser.add_argument("--data", default="", help="reward: a folder of labelled *.jsonl")
    parser.add_argument("--hf", choices=["dynamic", "static", "continuous"], default="dynamic", help="their cache")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="decode without device graphs")
    parser.add_argument("--micro-batch-tokens", type=int, default=Config.micro_batch_tokens)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="of activations; memory: by default")
    parser.add_argument("--no-files", dest="files", action="store_false", help="memory: random weights, nothing is written")
    parser.add_argument("--steps", type=int, default=2, help="memory: GRPO steps")
    parser.add_argument("--predict", action="store_true", help="memory, comm: the model's figures, nothing is run")
    parser.add_argument("--shard", type=int, default=0, help="memory, comm under torchrun: as of train.py")
    parser.add_argument("--variant", choices=["", "ours", "naive"], default="", help="logps: one of the two only")
    parser.add_argument("--device", default="")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", default="")
    try:
        args = parser.parse_args()
        if args.checkpointing is None:
            args.checkpointing = args.what == "memory"
        if args.vs not in ("", {"rollout": "hf", "train": "trl", "reward": "math-verify"}.get(args.what)):
            raise ValueError(f"--vs {args.vs} has no meaning for {args.what}: rollout --vs hf, train --vs trl, reward --vs math-verify")
        if args.json and Path(args.json).exists():
            raise ValueError(f"--json {args.json} already exists: choose another file, results are never overwritten")
        device = dist.setup(args.device)
        if args.predict and args.what not in ("memory", "comm"):
            raise ValueError(f"--predict has no meaning for {args.what}: memory --predict, comm --predict")
        torch.set_num_threads(args.threads or dist.choose_threads())
        where = f"{device.type}, {torch.get_num_threads()} threads" if device.type != "cuda" else torch.cuda.get_device_name()
        result = WHAT[args.what](args, device)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    ranks, first = dist.world(), dist.rank() == 0
    dist.close()
    if not first:
        return
    if not args.variant:
        launcher = "python" if ranks == 1 else f"torchrun --nproc-per-node {ranks}"
        command = f"{launcher} bench.py " + " ".join(sys.argv[1:])
        result = {"command": command, "ranks": ranks, "torch": torch.__version__, "device": where, **result}
    print(json.dumps(result, indent=None if args.variant else 1))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
