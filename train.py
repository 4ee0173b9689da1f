"""Train a language model to reason with critic-free reinforcement learning: one loop, one file per concept.

    python train.py                                              a small model, on a laptop, nothing to download
    python train.py --model Qwen/Qwen3-4B --data gsm8k --lr 1e-6 --max-new-tokens 512        a real one
    torchrun --nproc-per-node 8 train.py --model DIR ...         data-parallel: the same numbers on any world size
    python train.py --resume --out runs/NAME                     go on after a crash or Ctrl-C (on CPU bit for bit)

Each step: take prompts (data.py), draw a group of completions of each (rollout.py), score them (reward.py), turn scores
into advantages and a loss (grpo.py), take one or more optimizer steps (dist.py sums gradients over ranks).
All randomness is a function of (seed, step, prompt, sample): no generator state has to be saved or shared.
"""
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "1000")    # before torch: waiting threads soon sleep (LOG.md)
import torch
from tqdm import tqdm

import data
import dist
import grpo
import reward
import sft
from model import ModelConfig, Transformer
from rollout import Sampler, check_request

ALGOS = {"grpo": grpo}
BEGIN = time.perf_counter()


@dataclass
class Config:
    # what
    algo: str = "grpo"                  # the objective: grpo
    model: str = ""                     # checkpoint folder or hub id; empty: warm-start a small one on the built-in task
    data: str = "arithmetic"            # arithmetic, gsm8k, math, or a .jsonl file
    eval_data: str = ""                 # held-out problems; empty: the source's test split, or a part of the file
    out: str = ""                       # run folder; empty: runs/ALGO-DATA-seedS
    resume: bool = False                # go on from the last checkpoint in --out
    seed: int = 0
    # rollouts
    prompts_per_step: int = 32          # N, over all ranks
    group_size: int = 8                 # G completions a prompt
    max_new_tokens: int = 64            # a longer completion is cut and counted in truncated_frac
    max_prompt_tokens: int = 512        # problems with longer prompts are dropped, and counted
    temperature: float = 1.0            # of training rollouts and of the trained distribution
    rows_at_once: int = 256             # completions in the KV cache at once
    template: str = "auto"              # prompt: auto, chat, plain, reasoning (data.prompt_text)
    # rewards: 1 for a verified answer, plus
    format_reward: float = 0.0          # weight of the <reasoning>/<answer> form
    consistency_reward: float = 0.0     # weight of an answer that is the reasoning's last result
    # objective (grpo.py)
    advantage_scale: str = "std"        # std, none (Dr. GRPO), loo (RLOO), batch
    unbiased_std: bool = False          # std with G - 1, as TRL and verl
    clip_low: float = 0.2
    clip_high: float = 0.2              # 0.28: DAPO's clip-higher
    ratio_level: str = "token"          # token, sequence (GSPO: clip about 3e-4)
    dual_clip: float = 0.0              # 3.0: verl's bound for negative advantages; 0: none
    aggregation: str = "token"          # token (DAPO), sequence (DeepSeekMath), constant (Dr. GRPO)
    zero_variance: str = "drop"         # groups of equal rewards: drop, keep (in the normalizer)
    mask_truncated: bool = False        # leave cut completions out of the loss
    beta: float = 0.0                   # weight of the KL to the starting model; above 0 loads a frozen reference
    kl_kind: str = "k3"                 # k1, k2, k3, k3_is
    # optimisation
    steps: int = 60                     # rollouts
    epochs: int = 1                     # passes over a rollout
    minibatches: int = 1                # optimizer steps a pass
    lr: float = 1e-4                    # for the default small model; 1e-6 is usual for billions of parameters
    warmup_steps: int = 5               # linear
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    micro_batch_tokens: int = 8192      # padded tokens a forward pass holds; memory, not mathematics
    activation_checkpointing: bool = False   # less memory, a third more time
    # evaluation and output
    eval_every: int = 10                # steps; also before the first and after the last
    eval_problems: int = 200            # held-out problems
    eval_samples: int = 4               # completions each, for pass@1 at the training temperature
    save_every: int = 20                # steps between checkpoints
    # the built-in task
    levels: str = "4-6"                 # fewest-most steps of a story
    warm_start_steps: int = 1400        # supervised steps before the default run (sft.py)
    # machine
    device: str = ""                    # cpu, cuda, npu; empty: the accelerator that is here
    dtype: str = ""                     # float32, bfloat16; empty: float32 on cpu, else bfloat16 (master stays float32)
    threads: int = 0                    # CPU threads; 0: measured


# ------------------------------------------------------------------------------------------------------ settings

def parse(argv=None):
    """Command line -> Config. With --resume the run's own config.json counts; only --steps may be given beside it."""
    given = dist.command_line(Config, __doc__, argv)
    if not given.get("resume"):
        return check(Config(**given))
    if not given.get("out"):
        raise ValueError("--resume needs --out, the run's folder")
    saved = Path(given["out"]) / "config.json"
    if not saved.exists():
        raise ValueError(f"--resume: {given['out']} holds no run (no config.json)")
    try:
        stored = asdict(check(Config(**json.loads(saved.read_text()))))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{saved} is not a run of this version: {error}") from None
    changed = [k for k, v in given.items() if k not in ("resume", "out", "steps") and stored.get(k) != v]
    if changed:
        raise ValueError(f"--resume continues the run as it was: --{changed[0].replace('_', '-')} was "
                         f"{stored.get(changed[0])}, not {given[changed[0]]}; start another --out to change it")
    return check(Config(**{**stored, **given}))


def check(c):
    """ValueError, one line, for settings that cannot work."""
    choices = {"algo": ALGOS, "advantage_scale": ("std", "none", "loo", "batch"), "ratio_level": ("token", "sequence"),
               "aggregation": ("token", "sequence", "constant"), "zero_variance": ("drop", "keep"),
               "kl_kind": ("k1", "k2", "k3", "k3_is")}
    least = {"group_size": 2, "max_new_tokens": 1, "prompts_per_step": 1, "steps": 1, "epochs": 1, "minibatches": 1,
             "micro_batch_tokens": 1, "eval_every": 1, "eval_problems": 1, "eval_samples": 1, "save_every": 1,
             "rows_at_once": 1, "max_prompt_tokens": 1, "warm_start_steps": 5, "beta": 0, "warmup_steps": 0,
             "dual_clip": 0, "clip_low": 0, "clip_high": 0, "weight_decay": 0}
    dist.check_settings(c, choices, least)
    for name in ("temperature", "lr", "grad_clip"):
        if not 0 < getattr(c, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: must be a number above 0")
    if c.minibatches > c.prompts_per_step:
        raise ValueError(f"--minibatches {c.minibatches}: at most --prompts-per-step {c.prompts_per_step} (groups stay whole)")
    if not c.model and c.data != "arithmetic":
        raise ValueError(f"--data {c.data} needs --model (a checkpoint folder or hub id); "
                         f"to make a small one: python sft.py --data {c.data} --out DIR")
    room = ModelConfig.max_position_embeddings
    if not c.model and c.max_prompt_tokens + c.max_new_tokens > room:       # found now, not after the warm start
        raise ValueError(f"--max-prompt-tokens {c.max_prompt_tokens} and --max-new-tokens {c.max_new_tokens} leave the "
                         f"context of {room} tokens of the built-in model")
    return c


def open_run(c):
    """The run's folder, not yet written to; ValueError when it holds another run."""
    c.out = c.out or f"runs/{c.algo}-{Path(c.data).stem}-seed{c.seed}"
    folder = Path(c.out)
    if not c.resume and folder.exists() and any(folder.iterdir()):
        hint = f"python train.py --resume --out {c.out}" if (folder / "config.json").exists() else "an empty one"
        raise ValueError(f"--out {c.out} is not empty: choose another folder, or go on with it: {hint}")
    c.threads = c.threads or dist.choose_threads()
    return folder


def agree_on_run(c):
    """Rank 0 looks at the folder; every rank gets the same settings, or the same error."""
    outcome = None
    if dist.rank() == 0:
        try:
            outcome = (open_run(c), asdict(c))
        except (ValueError, OSError) as error:
            outcome = (None, str(error))
    folder, settings = dist.broadcast_object(outcome)
    if folder is None:
        raise ValueError(settings)
    return Config(**settings), folder


def claim(c, folder):
    """Write config.json: from here on the folder is this run's. Only after the input has proved readable."""
    if dist.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".config.json").write_text(json.dumps({**asdict(c), "resume": False}, indent=2) + "\n")
        os.replace(folder / ".config.json", folder / "config.json")         # never half a file


# -------------------------------------------------------------------------------------------------------- set-up

def start(c, folder, device):
    """Everything the loop needs, as one namespace."""
    say = tqdm.write if dist.rank() == 0 else (lambda line: None)
    train, held_out = load_split(c, say)
    if not c.model:
        claim(c, folder)
    source = c.model or warm_start(c, folder, device)
    dtype = getattr(torch, c.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    model, tokenizer = Transformer.from_pretrained(source, device), data.load_tokenizer(source)
    train = data.tokenize_prompts(train, tokenizer, c.template, c.max_prompt_tokens, say)
    held_out = data.tokenize_prompts(held_out[:c.eval_problems], tokenizer, c.template, c.max_prompt_tokens, say)
    for p in (train, held_out):
        check_request([x["prompt"] for x in p], c.group_size, c.max_new_tokens, c.temperature, model.config)
    claim(c, folder)
    model.activation_checkpointing = c.activation_checkpointing
    master = dist.Master(model, dtype)
    reference = Transformer.from_pretrained(source, device, dtype) if c.beta > 0 else None
    optimizer = torch.optim.AdamW(master.params, lr=c.lr, betas=(0.9, 0.95), weight_decay=c.weight_decay,
                                  fused=device.type != "cpu")
    return SimpleNamespace(
        c=c, folder=folder, device=device, model=model, master=master, reference=reference, optimizer=optimizer,
        tokenizer=tokenizer, stream=data.Stream(train, c.seed), held_out=held_out, step=0, updates=0, num_tokens=0,
        bad_steps=0, seconds=0.0, first={}, latest=None, say=say, algo=ALGOS[c.algo],
        sampler=Sampler(model, data.stop_ids(model, tokenizer), c.rows_at_once))


def warm_start(c, folder, device):
    """The default run's starting point, cached in the run folder: a small model that has seen worked solutions."""
    final = folder / "warm_start"
    if dist.rank() == 0 and not final.exists():
        part = folder / ".warm_start"
        sft.warm_start(sft.SFTConfig(out=str(part), seed=c.seed, steps=c.warm_start_steps,
                                     terse_steps=c.warm_start_steps // 5, levels=c.levels, device=str(device)))
        os.replace(part, final)         # whole or absent: an interrupted warm start is never taken for a finished one
    dist.barrier()
    return str(final)


def load_split(c, say):
    """(training problems, held-out problems), never overlapping."""
    levels = dist.parse_levels(c.levels)
    train = data.load_problems(c.data, "train", c.seed, levels, report=say)
    if not (c.eval_data or c.data == "arithmetic" or c.data in data.HUB):
        return data.hold_out(train, c.eval_problems)
    held_out = data.load_problems(c.eval_data or c.data, "test", 0, levels, c.eval_problems, say)
    texts = {p["problem"] for p in held_out}
    kept = [p for p in train if p["problem"] not in texts]
    if len(kept) < len(train):
        say(f"data: left {len(train) - len(kept)} of {len(train)} training problems out: they are held out as well")
    if not kept:
        raise ValueError("every training problem is held out as well: give another --eval-data")
    return kept, held_out


# ------------------------------------------------------------------------------------------------------ one step

def roll(run, batch):
    """Completions of this rank's share of the prompts, their rewards (n, G) and which are right (n, G).

    (None, None, None) when the rank has no prompt."""
    c, mine = run.c, dist.split(len(batch))
    if not len(mine):
        return None, None, None
    rollout = run.sampler.generate([batch[i]["prompt"] for i in mine], c.group_size, c.max_new_tokens, c.temperature,
                                   seed=[(c.seed, run.step, i) for i in mine])
    texts = run.tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
    groups = [texts[k:k + c.group_size] for k in range(0, len(texts), c.group_size)]
    answers = [batch[i]["answer"] for i in mine]
    right = scores = reward.score(groups, answers)
    if c.format_reward or c.consistency_reward:
        scores = reward.score(groups, answers, c.format_reward, c.consistency_reward)
    if dist.rank() == 0 and (run.step - 1) % c.eval_every == 0:
        write_samples(run, [batch[i] for i in mine][:2], groups, scores)
    return rollout, torch.tensor(scores, device=run.device), torch.tensor(right, device=run.device)


def micro_batches(lengths, budget):
    """Row indices in parts: sorted by length, so that rows x longest stays within `budget` padded tokens (or one row)."""
    parts, order = [], sorted(range(len(lengths)), key=lambda i: lengths[i])
    for i in order:
        if parts and lengths[i] * (len(parts[-1]) + 1) <= budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def rows_of(batch, rows):
    """The given rows of every tensor of the batch, cut to their longest."""
    rows = torch.as_tensor(rows, dtype=torch.int64, device=batch["tokens"].device)
    T = int(batch["lengths"][rows].max())
    return {k: v[rows][:, :T] if v.ndim == 2 else v[rows] for k, v in batch.items()}


def add_reference(run, batch):
    """The reference model's log-probs of the drawn tokens, once a rollout."""
    batch["ref_logp"] = torch.zeros_like(batch["old_logp"])
    for rows in micro_batches(batch["lengths"].tolist(), run.c.micro_batch_tokens):
        part = rows_of(batch, rows)
        with torch.no_grad():
            logp, _ = run.reference.token_logps(part["tokens"], part["mask"], run.c.temperature)
        batch["ref_logp"][rows, :logp.shape[1]] = logp


def update(run, batch, rows):
    """One optimizer step on the given rows of this rank's batch; sums for the log, already reduced over ranks."""
    c, unit = run.c, "tokens" if run.c.aggregation == "token" else "rows"
    local = {"tokens": float(batch["mask"][rows].sum()) if rows else 0.0, "rows": float(len(rows))}
    normalizer = dist.all_reduce([local[unit]], run.device)[0]      # fixed before any backward, over all ranks
    total = dict.fromkeys(("loss", "tokens", "entropy", "kl", "clip_ratio"), 0.0)
    deviation = 0.0
    run.optimizer.zero_grad(set_to_none=True)
    lengths = batch["lengths"].tolist() if rows else []
    for part in micro_batches([lengths[r] for r in rows], c.micro_batch_tokens):
        micro = rows_of(batch, [rows[i] for i in part])
        logp, entropy = run.model.token_logps(micro["tokens"], micro["mask"], c.temperature)
        loss, sums = run.algo.loss(logp, entropy, micro, c, normalizer)
        loss.backward()
        deviation = max(deviation, sums.pop("ratio_max_dev").item())
        for name, value in {"loss": loss.detach(), **sums}.items():
            total[name] += value.item()
    keys = list(total)
    out = dict(zip(keys, dist.all_reduce([total[k] for k in keys], run.device)))
    out["ratio_max_dev"] = dist.all_reduce([deviation], run.device, "max")[0]
    dist.sum_gradients(run.master.params)
    out["grad_norm"] = descend(run, out["loss"]) if normalizer > 0 else 0.0     # no signal anywhere: no step
    return out


def descend(run, loss):
    """Clip and step; the gradient norm. A non-finite one is skipped and counted, five in a row end the run."""
    norm = torch.nn.utils.clip_grad_norm_(run.master.params, run.c.grad_clip).item()
    if math.isfinite(norm) and math.isfinite(loss):
        run.bad_steps = 0
        run.updates += 1
        run.optimizer.step()
        run.master.publish()
        return norm
    run.bad_steps += 1
    run.say(f"step {run.step}: loss {loss} and gradient norm {norm}: update skipped ({run.bad_steps} in a row)")
    if run.bad_steps >= 5:
        raise ValueError(f"five non-finite updates in a row at step {run.step}: lower --lr, or resume from a checkpoint")
    return norm


def train_step(run):
    """One rollout and its updates; the step's line for the log."""
    c, begin = run.c, time.perf_counter()
    run.step += 1
    lr = c.lr * min(1.0, run.step / (c.warmup_steps + 1))
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.sampler.version = run.updates
    rollout, rewards, right = roll(run, run.stream.next(c.prompts_per_step))
    line = {"step": run.step, **rollout_metrics(run, rollout, rewards, right, begin)}
    middle = time.perf_counter()
    batch, groups, active = None, [], []
    if rollout is not None:
        batch = run.algo.prepare(rollout, rewards, c)
        if run.reference is not None:
            add_reference(run, batch)
        groups = torch.arange(rewards.numel()).view(rewards.shape).tolist()
        active = batch["active"].tolist()
    updates, mine = [], dist.split(c.prompts_per_step)
    for _ in range(c.epochs):
        for k in range(c.minibatches):      # by the prompt's global number: the same minibatches on any world size
            rows = [r for i, g in zip(mine, groups) if i % c.minibatches == k for r in g if active[r]]
            updates.append(update(run, batch, rows))
    line.update(update_metrics(updates, line), lr=lr)
    end = time.perf_counter()
    peak = dist.all_reduce([dist.peak_memory_mb(run.device)], run.device, "max")[0]
    line.update(train_time=end - middle, step_time=end - begin, peak_memory_mb=peak)
    return line


def rollout_metrics(run, rollout, rewards, right, begin):
    """Means over all ranks of what was drawn."""
    n = [0.0] * 9
    if rollout is not None:
        lengths = (rollout.lengths - rollout.prompt_lengths).float()
        n = [rewards.numel(), rewards.sum(), rewards.std(1, correction=0).sum(), (~grpo.informative(rewards)).sum(),
             lengths.sum(), (~rollout.finished).sum(), rollout.lengths.sum(), -rollout.logps.sum(),
             right.any(1).sum()]
    n = dist.all_reduce([float(x) for x in n], run.device)
    seconds = time.perf_counter() - begin
    rows, groups = n[0], n[0] / run.c.group_size
    run.num_tokens += int(n[6])
    return {"reward": n[1] / rows, "reward_std": n[2] / groups, "frac_reward_zero_std": n[3] / groups,
            "completion_length": n[4] / rows, "truncated_frac": n[5] / rows, "num_tokens": run.num_tokens,
            "entropy": n[7] / n[4], "pass@G": n[8] / groups, "rollout_time": seconds,
            "rollout_tokens_per_s": n[4] / seconds}


def update_metrics(updates, line):
    """Means over the updates of a step. Without any trained token the entropy stays the sampler's estimate, -log mu."""
    tokens = sum(u["tokens"] for u in updates)
    out = {name: sum(u[name] for u in updates) / max(tokens, 1) for name in ("kl", "clip_ratio")}
    out["entropy"] = sum(u["entropy"] for u in updates) / tokens if tokens else line["entropy"]
    out.update(loss=sum(u["loss"] for u in updates) / len(updates), ratio_max_dev=updates[0]["ratio_max_dev"],
               grad_norm=sum(u["grad_norm"] for u in updates) / len(updates))
    return out


# ---------------------------------------------------------------------------------------- evaluation and output

def evaluate(run):
    """Held-out accuracy: greedy, and pass@1 of eval_samples draws at the training temperature; mean sampled length."""
    c, mine, counts = run.c, dist.split(len(run.held_out)), []
    for samples, temperature in ((1, 0.0), (c.eval_samples, c.temperature)):
        right = rows = length = 0
        if len(mine):
            problems = [run.held_out[i] for i in mine]
            rollout = run.sampler.generate([p["prompt"] for p in problems], samples, c.max_new_tokens, temperature,
                                           seed=[(0, i) for i in mine])
            texts = run.tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
            right = sum(reward.verify(t, problems[i // samples]["answer"]) for i, t in enumerate(texts))
            rows, length = len(texts), int((rollout.lengths - rollout.prompt_lengths).sum())
        counts += [right, rows, length]
    n = dist.all_reduce(counts, run.device)
    return {"eval_pass@1": n[3] / n[4], "eval_greedy": n[0] / n[1], "eval_length": n[5] / n[4]}


def write_samples(run, problems, groups, scores):
    """Some completions of this step, to be read by a person."""
    with open(run.folder / "samples.jsonl", "a", encoding="utf-8") as f:
        for problem, texts, rewards in zip(problems, groups, scores):
            for text, score in list(zip(texts, rewards))[:4]:
                f.write(json.dumps({"step": run.step, "problem": problem["problem"], "answer": problem["answer"],
                                    "completion": text, "reward": score}, ensure_ascii=False) + "\n")


def write_line(run, line):
    if dist.rank() == 0:
        with open(run.folder / "log.jsonl", "a") as f:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            f.write(json.dumps(finite) + "\n")             # NaN is not JSON


def draw_curve(folder):
    """curve.png from log.jsonl: accuracy, reward, completion length over steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in open(Path(folder) / "log.jsonl")]
    panels = (("accuracy", ("eval_pass@1", "eval_greedy")), ("training reward", ("reward",)),
              ("completion length (tokens)", ("completion_length", "eval_length")))
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.4))
    for axis, (title, keys) in zip(axes, panels):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            axis.plot(*zip(*points), marker="o" if key.startswith("eval") else None, markersize=3, label=key)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(Path(folder) / "curve.png", dpi=110)
    plt.close(figure)


def warn(run, line):
    """What a beginner should see at once, each in one line."""
    if run.step == 1:
        run.say(f"first rollout: {line['pass@G']:.0%} of the prompts have a right answer among {run.c.group_size} samples")
        if line["pass@G"] == 0:
            run.say("warning: pass@G is 0: with no right answer there is nothing to learn from; "
                    "use a better start (sft.py), easier problems or a larger --group-size")
    if line["truncated_frac"] == 1:
        run.say(f"warning: step {run.step}: every completion was cut at --max-new-tokens {run.c.max_new_tokens}")


# ------------------------------------------------------------------------------------------------------ the loop

CARRIED = ("updates", "num_tokens", "bad_steps", "first")        # what a checkpoint keeps besides weights and optimizer


def save(run):
    state = {"cursor": run.stream.cursor, "seconds": run.seconds + time.perf_counter() - BEGIN,
             **{name: getattr(run, name) for name in CARRIED}}
    dist.save_checkpoint(run.folder / "checkpoints", run.step, run.master, run.optimizer, state)


def restore(run):
    """Go back to the newest checkpoint, or to the start when there is none, and cut the logs to it."""
    found = dist.checkpoints(run.folder / "checkpoints")
    if found:
        state = dist.load_checkpoint(found[-1], run.master, run.optimizer)
        run.step, run.stream.cursor, run.seconds = state["step"], state["cursor"], state["seconds"]
        for name in CARRIED:
            setattr(run, name, state[name])
        run.say(f"resumed at step {run.step} from {found[-1]}")
    dist.barrier()
    if dist.rank() == 0:
        for file in (run.folder / "log.jsonl", run.folder / "samples.jsonl"):
            lines = list(open(file, encoding="utf-8")) if file.exists() else []
            whole = [x for x in lines if x.endswith("\n")]                         # a crash may cut the last line
            kept = [x for x in whole if found and json.loads(x)["step"] <= run.step]
            file.write_text("".join(kept), encoding="utf-8")


def loop(run, interrupted):
    """Steps until done; an interrupt ends the run after the step that it met. True when all steps were made."""
    c, line = run.c, {}
    if run.step == 0:
        run.first = evaluate(run)
        write_line(run, {"step": 0, **run.first})
    bar = tqdm(total=c.steps, initial=run.step, desc=c.algo, disable=dist.rank() > 0)
    while run.step < c.steps:
        line = train_step(run)
        warn(run, line)
        last = run.step == c.steps
        if last or run.step % c.eval_every == 0:
            run.latest = evaluate(run)
            line.update(run.latest)
        write_line(run, line)
        bar.update()
        bar.set_postfix(reward=f"{line['reward']:.2f}", len=f"{line['completion_length']:.0f}",
                        tok_s=f"{line['rollout_tokens_per_s']:.0f}")
        stop = dist.all_reduce([float(interrupted[0])], run.device, "max")[0] > 0
        if last or stop or run.step % c.save_every == 0:
            save(run)
        if dist.rank() == 0 and "eval_pass@1" in line:
            draw_curve(run.folder)
        if stop and not last:
            bar.close()
            return False
    bar.close()
    return True


def finish(run):
    """Write the model in HF format and the last line."""
    last = run.latest or evaluate(run)      # nothing evaluated yet: a resumed run that had no step left
    if dist.rank() == 0:
        run.model.save_pretrained(run.folder / "model")
        minutes, seconds = divmod(round(run.seconds + time.perf_counter() - BEGIN), 60)
        print(f"pass@1 {run.first['eval_pass@1']:.2f} -> {last['eval_pass@1']:.2f}, completion length "
              f"{run.first['eval_length']:.0f} -> {last['eval_length']:.0f}, {minutes} min {seconds} s, "
              f"model in {run.folder}/model")


def main(argv=None):
    interrupted = [0]

    def on_interrupt(number, _):
        interrupted[0] += 1
        impatient = number == signal.SIGINT and interrupted[0] > 1      # schedulers may well send SIGTERM twice
        if impatient or not looping:
            raise KeyboardInterrupt
        print("\ninterrupted: finishing this step, then saving (Ctrl-C again to stop at once)", file=sys.stderr)

    looping, c = [], None
    signal.signal(signal.SIGINT, on_interrupt)
    signal.signal(signal.SIGTERM, on_interrupt)         # what schedulers and torchrun send
    try:
        c = parse(argv)
        device = dist.setup(c.device)
        c, folder = agree_on_run(c)
        torch.set_num_threads(c.threads)
        run = start(c, folder, device)
        restore(run)
        looping.append(True)
        done = loop(run, interrupted)
        if done:
            finish(run)
    except KeyboardInterrupt:
        done = False
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        dist.close()
    if not done:
        claimed = c and c.out and (Path(c.out) / "config.json").exists()
        launcher = "torchrun ... train.py" if "WORLD_SIZE" in os.environ else "python train.py"
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped; go on with: {launcher} --resume --out {c.out}" if claimed else
                  "stopped before anything was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
