"""Train a language model to reason with critic-free reinforcement learning: one loop, one file per concept.

    python train.py                                              a small model, on a laptop, nothing to download
    python train.py --algo gtpo                                  another objective: grpo, gtpo, offpolicy
    python train.py --model Qwen/Qwen3-4B --data gsm8k --lr 1e-6 --max-new-tokens 512        a real model
    torchrun --nproc-per-node 8 train.py --model DIR ...         data-parallel: the same numbers on any world size
    python train.py --resume --out runs/NAME                     go on after a crash or Ctrl-C (on CPU bit for bit)

Each step: take prompts (data.py), draw a group of completions of each (rollout.py), score them (reward.py), turn scores
into advantages and a loss (grpo.py, gtpo.py or offpolicy.py), take one or more optimizer steps (update.py).
All randomness is a function of (seed, step, prompt, sample): no generator state has to be saved or shared.
"""
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

from engine import machine      # before torch: it tells OpenMP's threads how to wait
import torch
from tqdm import tqdm

import data
import prompts
import dist
import grpo
import gtpo
import offpolicy
import report
import reward
import sft
from engine.checkpoint import agree_on_run, checkpoints, claim, load_checkpoint, release, save_checkpoint, write_whole
from config import Config, parse, parse_levels
from model import Transformer
from rollout import Sampler, check_request, empty_rollout
from learner import adamw, learn

ALGOS = {"grpo": grpo, "gtpo": gtpo, "offpolicy": offpolicy}
BEGIN = time.perf_counter()


# -------------------------------------------------------------------------------------------------------- set-up

def start(c, folder, device):
    """Everything the loop needs, as one namespace."""
    say = tqdm.write if dist.rank() == 0 else (lambda line: None)
    if c.graph == "on" and device.type == "cpu":
        raise ValueError("--graph on: device graphs need an accelerator; leave it out on the CPU")
    train, held_out = load_split(c, say)
    if not c.model:
        claim(c, folder)
    source = c.model or warm_start(c, folder, device)
    dtype = getattr(torch, c.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    place = dist.Sharding(device, dtype, c.shard, c.offload, c.collective_timeout)
    model, tokenizer = Transformer.from_pretrained(source, place.home, shard=place), prompts.load_tokenizer(source)
    train = prompts.tokenize_prompts(train, tokenizer, c.template, c.max_prompt_tokens, say)
    held_out = prompts.tokenize_prompts(held_out[:c.eval_problems], tokenizer, c.template, c.max_prompt_tokens, say)
    for p in (train, held_out):
        check_request([x["prompt"] for x in p], c.group_size, c.max_new_tokens, c.temperature, model.config)
    claim(c, folder)
    model.activation_checkpointing = c.activation_checkpointing
    def frozen(): return Transformer.from_pretrained(source, place.home, dtype, place).requires_grad_(False)
    reference = frozen() if c.beta > 0 else None
    optimizer = adamw(model, c.lr, c.weight_decay)
    room = c.rows_at_once, int(c.kv_memory_mb * 2 ** 20), {"on": True, "off": False}.get(c.graph)
    sampler = behaviour = Sampler(model, prompts.stop_ids(model, tokenizer), *room)
    if c.sync_every > 1:        # a second copy of the weights, which lags behind
        behaviour = Sampler(frozen(), sampler.eos_ids.tolist(), *room)
    buffer = offpolicy.ReplayBuffer(c.buffer_groups, c.buffer_mb, c.max_staleness, c.max_reuse, c.min_ess, c.priority,
                                    seed=c.seed)
    return SimpleNamespace(
        c=c, folder=folder, device=device, model=model, reference=reference, optimizer=optimizer,
        tokenizer=tokenizer, stream=data.Stream(train, c.seed), held_out=held_out, sampler=sampler, behaviour=behaviour,
        buffer=buffer, algo=ALGOS[c.algo], say=say, latest=None, seconds=0.0, first={}, step=0, updates=0, num_tokens=0,
        bad_steps=0, replay_ratio=float(c.replay_ratio), clip=c.clip_low,
        initial_entropy=None)


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
    levels = parse_levels(c.levels)
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

def synchronise(run):
    """Bring the weights that draw completions up to date: every step, or every --sync-every steps."""
    if (run.step - 1) % run.c.sync_every == 0:
        if run.behaviour is not run.sampler:
            with torch.no_grad():
                for old, new in zip(run.behaviour.model.parameters(), run.model.parameters()):
                    old.copy_(new)
        run.behaviour.version = run.updates


def roll(run, problems):
    """Completions of this rank's share of the problems, their rewards (n, G) and which are right (n, G); n may be 0."""
    c, mine = run.c, [problems[i] for i in dist.split(len(problems))]
    with run.behaviour.loaded():        # every rank: the weights are gathered here, once
        if not mine:
            return empty_rollout(run.device), *torch.zeros(2, 0, c.group_size, device=run.device)
        rollout = run.behaviour.generate([p["prompt"] for p in mine], c.group_size, c.max_new_tokens, c.temperature,
                                         seed=[(c.seed, run.step, i) for i in dist.split(len(problems))])
    texts = run.tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
    groups = [texts[k:k + c.group_size] for k in range(0, len(texts), c.group_size)]
    answers = [p["answer"] for p in mine]
    right = scores = reward.score(groups, answers)
    if c.format_reward or c.consistency_reward:
        scores = reward.score(groups, answers, c.format_reward, c.consistency_reward)
    if dist.rank() == 0 and (run.step - 1) % c.eval_every == 0:
        report.write_samples(run.folder, run.step, mine[:2], groups, scores)
    return rollout, torch.tensor(scores, device=run.device), torch.tensor(right, device=run.device)


def train_step(run):
    """One rollout and its updates; the step's line for the log."""
    c, begin = run.c, time.perf_counter()
    run.step += 1
    lr = c.lr * min(1.0, run.step / (c.warmup_steps + 1))
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    synchronise(run)
    dist.phase(f"step {run.step}: rollout")
    rollout, rewards, right = roll(run, run.stream.next(c.prompts_per_step))
    line = {"step": run.step, **rollout_metrics(run, rollout, rewards, right, begin)}
    middle = time.perf_counter()
    dist.phase(f"step {run.step}: training")
    line.update(learn(run, rollout, rewards, line["entropy"]), lr=lr)
    end = time.perf_counter()
    peak = dist.all_reduce([machine.peak_memory_mb(run.device)], run.device, "max")[0]
    line.update(train_time=end - middle, step_time=end - begin, peak_memory_mb=peak)
    return line


def rollout_metrics(run, rollout, rewards, right, begin):
    """Means over all ranks of what was drawn."""
    lengths = (rollout.lengths - rollout.prompt_lengths).float()
    n = [rewards.numel(), rewards.sum(), rewards.std(1, correction=0).sum(), (~grpo.informative(rewards)).sum(),
         lengths.sum(), (~rollout.finished).sum(), rollout.lengths.sum(), -rollout.logps.sum(), right.any(1).sum()]
    n = dist.all_reduce([float(x) for x in n], run.device)
    seconds = time.perf_counter() - begin
    rows, groups = n[0], n[0] / run.c.group_size
    run.num_tokens += int(n[6])
    return {"reward": n[1] / rows, "reward_std": n[2] / groups, "frac_reward_zero_std": n[3] / groups,
            "completion_length": n[4] / rows, "truncated_frac": n[5] / rows, "num_tokens": run.num_tokens,
            "num_samples": run.step * run.c.prompts_per_step * run.c.group_size, "entropy": n[7] / n[4],
            "pass@G": n[8] / groups, "rollout_time": seconds, "rollout_tokens_per_s": n[4] / seconds}


# ---------------------------------------------------------------------------------------------------- evaluation

def evaluate(run):
    """Held-out accuracy: greedy, and pass@1 of eval_samples draws at the training temperature; mean sampled length."""
    c, counts = run.c, []
    dist.phase("evaluation")
    with run.sampler.loaded():
        for samples, temperature in ((1, 0.0), (c.eval_samples, c.temperature)):
            counts += evaluated(run, samples, temperature)
    n = dist.all_reduce(counts, run.device)
    return {"eval_pass@1": n[3] / n[4], "eval_greedy": n[0] / n[1], "eval_length": n[5] / n[4]}


def evaluated(run, samples, temperature):
    """[right completions, completions, tokens] of this rank's share of the held-out problems."""
    mine = dist.split(len(run.held_out))
    if not len(mine):
        return [0, 0, 0]
    problems = [run.held_out[i] for i in mine]
    rollout = run.sampler.generate([p["prompt"] for p in problems], samples, run.c.max_new_tokens, temperature,
                                   seed=[(0, i) for i in mine])
    texts = run.tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
    right = sum(reward.verify(t, problems[i // samples]["answer"]) for i, t in enumerate(texts))
    return [right, len(texts), int((rollout.lengths - rollout.prompt_lengths).sum())]


# ------------------------------------------------------------------------------------------------------ the loop

# what a checkpoint keeps besides weights, optimizer and, off-policy, the buffer and the weights that draw
CARRIED = ("updates", "num_tokens", "bad_steps", "first", "replay_ratio", "clip", "initial_entropy")


def tensors(run):
    """What a checkpoint holds that may be sharded: {name: tensor} of weights, Adam's state and the weights that draw."""
    models = {"model": run.model} | ({"behaviour": run.behaviour.model} if run.behaviour is not run.sampler else {})
    out = {f"{kind}.{name}": p for kind, model in models.items() for name, p in model.named_parameters()}
    for name, p in run.model.named_parameters():
        out |= {f"{key}.{name}": value for key, value in run.optimizer.state[p].items()}
    return {name: tensor.detach() for name, tensor in out.items()}


def save(run):
    dist.phase(f"step {run.step}: checkpoint")
    state = {"cursor": run.stream.cursor, "seconds": run.seconds + time.perf_counter() - BEGIN,
             **{name: getattr(run, name) for name in CARRIED}}
    extra = {}
    if run.c.algo == "offpolicy":
        extra = {"buffer": run.buffer.state_dict(), "behaviour_version": run.behaviour.version}
    save_checkpoint(run.folder / "checkpoints", run.step, tensors(run), state, extra, run.c.keep_checkpoints)


def restore(run):
    """Go back to the newest checkpoint, or to the start when there is none, and cut the logs to it."""
    dist.phase("resume")
    found = dist.broadcast_object(checkpoints(run.folder / "checkpoints"))
    if found:
        state, extra = load_checkpoint(found[-1], tensors(run))
        run.step, run.stream.cursor, run.seconds = state["step"], state["cursor"], state["seconds"]
        for name in CARRIED:
            setattr(run, name, state[name])
        if extra:
            run.buffer.load_state_dict(extra["buffer"])
            run.behaviour.version = extra["behaviour_version"]
        run.say(f"resumed at step {run.step} from {found[-1]}")
    dist.barrier()
    if dist.rank() == 0:
        for file in (run.folder / "log.jsonl", run.folder / "samples.jsonl"):
            lines = list(open(file, encoding="utf-8")) if file.exists() else []
            whole = [x for x in lines if x.endswith("\n")]                         # a crash may cut the last line
            kept = [x for x in whole if found and json.loads(x)["step"] <= run.step]
            if whole and not found:         # from the beginning again: what was there stays to be read
                os.replace(file, file.with_name(file.name + ".old"))
            write_whole(file, "".join(kept))


def loop(run, interrupted):
    """Steps until done; an interrupt ends the run after the step that it met. True when all steps were made."""
    c, line = run.c, {}
    if run.step == 0:
        run.first = evaluate(run)
        report.write_line(run.folder, {"step": 0, **run.first})
    with tqdm(total=c.steps, initial=run.step, desc=c.algo, disable=dist.rank() > 0) as bar:
        while run.step < c.steps:
            line = train_step(run)
            for warning in report.warnings_of(line, c):
                run.say(warning)
            last = run.step == c.steps
            if last or run.step % c.eval_every == 0:
                run.latest = evaluate(run)
                line.update(run.latest)
            report.write_line(run.folder, line)
            bar.update()
            bar.set_postfix(reward=f"{line['reward']:.2f}", len=f"{line['completion_length']:.0f}",
                            tok_s=f"{line['rollout_tokens_per_s']:.0f}")
            stop = dist.all_reduce([float(interrupted[0])], run.device, "max")[0] > 0
            if last or stop or run.step % c.save_every == 0:
                save(run)
            if dist.rank() == 0 and "eval_pass@1" in line:
                report.draw_curve(run.folder)
            if stop and not last:
                return False
    return True


def finish(run):
    """Write the model in HF format and the last line."""
    last = run.latest or evaluate(run)      # nothing evaluated yet: a resumed run that had no step left
    dist.phase("writing the model")
    run.model.save_pretrained(run.folder / "model", write=dist.rank() == 0)
    if dist.rank() == 0:
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
    try:
        c = parse(argv, __doc__)
        dist.watch(c.watchdog)
        device = dist.setup(c.device, c.collective_timeout)
        c, folder = agree_on_run(c)
        torch.set_num_threads(c.threads)
        run = start(c, folder, device)
        restore(run)
        looping.append(True)
        signal.signal(signal.SIGTERM, on_interrupt)     # what schedulers and torchrun send; before, there is nothing to save
        done = loop(run, interrupted)
        looping.clear()
        if done:
            finish(run)
    except KeyboardInterrupt:
        done = False
    except (ValueError, OSError) as error:
        dist.fail(error)
    except Exception as error:
        if dist.world() == 1:
            raise
        lost = dist.lost_contact(error)
        if not lost:        # of this rank, and before it ends: its others would wait for it
            traceback.print_exc()
        dist.fail(lost or f"rank {dist.rank()}: {dist.first_line(error)}")
    finally:
        run = None
        dist.close()
        release()
    if not done:
        claimed = c and c.out and (Path(c.out) / "config.json").exists()
        launcher = "torchrun ... train.py" if "WORLD_SIZE" in os.environ else "python train.py"
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped; go on with: {launcher} --resume --out {c.out}" if claimed else
                  "stopped before anything was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
