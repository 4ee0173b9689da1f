"""Train a language model to reason with critic-free RL: one loop, one file a concept.

    python train.py                             a small model, on a laptop, nothing to download
    python train.py --algo gtpo                 another: grpo, gtpo, offpolicy, dpo, distill
    python train.py --model Qwen/Qwen3-4B --data gsm8k --max-new-tokens 512
                                                a real model
    torchrun --nproc-per-node 8 train.py --model DIR ...
                                                the same numbers on any number of devices
    python train.py --resume --out runs/NAME    go on after a crash or Ctrl-C (on CPU bit for bit)

Each step takes problems (data.py), draws a group of completions of each (rollout.py), rewards them
(reward.py), turns rewards into advantages and a loss (grpo.py, gtpo.py or offpolicy.py), and takes
one or more optimizer steps (learner.py). Begin with `train_step`, below, which is that sentence in
code.

All randomness is a function of (seed, step, prompt, sample): no generator state is saved or shared.
"""
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine import machine      # before torch: it tells OpenMP's threads how to wait
import torch
from tqdm import tqdm

import data
import dist
import heldout
import prompts
import refill
import report
import reward
import sft
from config import learning_rate, objective, parse, parse_template_kwargs
from engine.checkpoint import Progress, checkpoints, load_checkpoint, save_checkpoint, tensors_of
from folder import (agree_on_run, check_data, check_model, check_run, claim, cut_log, is_under_way,
                    release, remember, stopped_line)
from learner import Learner, adamw
from model import trainable
from policies import load_policies, needs_source, save_model
from rollout import Rollout, Sampler, check_request, draw_groups

BEGIN = time.perf_counter()


@dataclass
class Run:
    """A learner and what surrounds it."""
    learner: Learner
    sampler_of_pi: Sampler  # for evaluation
    sampler_of_mu: Sampler  # draws; the same object unless --sync-every is above 1
    stream: data.Stream     # of training problems
    held_out: list          # problems
    reward_functions: list  # [(name, weight, function (problems, groups) -> (N, G) numbers)]
    tokenizer: object
    folder: Path
    latest: dict = None     # the newest evaluation
    said: set = field(default_factory=set)      # kinds of warnings


# ---------------------------------------------------------------------------------------- one step

def train_step(run):
    """One rollout and its updates. Returns the step's line for the log."""
    c, learner, progress = run.learner.config, run.learner, run.learner.progress
    begin = time.perf_counter()
    progress.step += 1
    lr = learning_rate(c, progress.step)
    for group in learner.optimizer.param_groups:
        group["lr"] = lr

    # draw a group of completions of each problem, by the weights of this step or of an earlier one
    dist.phase(f"step {progress.step}: rollout")
    refresh_behaviour(run)
    with run.sampler_of_mu.loaded():            # every rank: the weights are gathered here, once
        drawn = [draw(run)]
        while len(drawn) <= c.refill and not refill.enough(drawn, c.prompts_per_step):
            drawn.append(draw(run, len(drawn)))

    line = report.rollout_metrics(learner, drawn, time.perf_counter() - begin, run.stream.kinds)
    rollout, rewards, more = refill.chosen(drawn, c)
    line.update(more)
    run.stream.feedback(line)       # a curriculum follows success
    if dist.rank() == 0 and (progress.step - 1) % (c.eval_every or c.save_every) == 0:
        one = drawn[0]
        report.write_samples(run.folder, progress.step, one.problems[:2], one.groups, one.scores)

    # learn from them
    dist.phase(f"step {progress.step}: training")
    middle = time.perf_counter()
    line.update(learner.learn(rollout, rewards), lr=lr)
    end = time.perf_counter()

    peak = {"peak_memory_mb": machine.peak_memory_mb(learner.device)}
    line.update(dist.all_reduce(peak, learner.device, "max"), train_time=end - middle,
                step_time=end - begin)
    return line


@dataclass
class Drawn:
    """This rank's n problems of a step, which may be none, and their completions."""
    problems: list
    rollout: Rollout
    groups: list                # n lists of G texts
    parts: dict                 # {reward function: (n, G) float64}, before its weight
    scores: torch.Tensor        # (n, G) float64, weighted sums
    rewards: torch.Tensor       # (n, G) the same in float32, on the device


def draw(run, number=0):
    """Draw completions of the next problems, and reward them. number: of the round in the step."""
    c, step = run.learner.config, run.learner.progress.step
    problems = run.stream.next(c.prompts_per_step, (step - 1) / c.steps)
    mine = dist.split(len(problems))
    problems = [problems[i] for i in mine]
    seeds = [(c.seed, step, number * c.prompts_per_step + i) for i in mine]
    rollout, groups = draw_groups(run.sampler_of_mu, run.tokenizer, problems, c.group_size,
                                  c.max_new_tokens, c.temperature, seeds)

    parts = dist.each(
        lambda: reward.parts(run.reward_functions, problems, groups, c.group_size, rollout))
    scores = reward.total(run.reward_functions, parts)           # (n, G) float64
    if c.overlong_buffer:
        parts["overlong"] = reward.overlong_of(rollout, parts["correct"], c)
        scores = scores + parts["overlong"]
    rewards = scores.float().to(run.learner.device)
    return Drawn(problems, rollout, groups, parts, scores, rewards)


def refresh_behaviour(run):
    """Every --sync-every steps, bring mu up to date: copy pi, where mu is a model of its own."""
    progress, c = run.learner.progress, run.learner.config
    if (progress.step - 1) % getattr(c, "sync_every", 1) > 0:
        return
    if run.learner.behaviour is not None:
        with torch.no_grad():
            mine = trainable(run.learner.model)
            for old, new in zip(run.learner.behaviour.parameters(), mine, strict=True):
                old.copy_(new)
    run.sampler_of_mu.version = progress.behaviour_version = progress.updates
    progress.behaviour_step = progress.step


# ---------------------------------------------------------------------------------------- the loop

def loop(run, interrupt):
    """Make steps until all are done, or until the one in which an interrupt came.

    Returns whether all are done."""
    learner, c = run.learner, run.learner.config
    bar = tqdm(total=c.steps, initial=learner.progress.step, disable=dist.rank() > 0)
    with bar:
        if learner.progress.step == 0 and c.eval_every:
            bar.set_description("first evaluation")
            learner.progress.first = heldout.evaluate_run(run)
            report.write_line(run.folder, {"step": 0, **learner.progress.first}, c.log_to)

        while learner.progress.step < c.steps:
            bar.set_description(c.algo)
            before = replace(learner.progress, stream=run.stream.state)
            try:
                line = train_step(run)
            except dist.Agreed:     # an error that every rank raises: of a reward function, say
                # before an update the model is still that of the step before: save that
                if before.step and learner.progress.updates == before.updates:
                    learner.progress, run.stream.state = before, before.stream
                    save(run)
                raise
            for warning in report.new_warnings(line, c, learner.model.dtype, run.said):
                learner.say(warning)

            last = line["step"] == c.steps
            evaluates = last or c.eval_every and line["step"] % c.eval_every == 0
            if evaluates:
                bar.set_description("evaluation")
                run.latest = heldout.evaluate_run(run)
                line.update(run.latest)
            report.write_line(run.folder, line, c.log_to)
            bar.update()
            bar.set_postfix(reward=f"{line['reward']:.2f}", len=f"{line['completion_length']:.0f}",
                            cut=f"{line['truncated_frac']:.0%}",
                            tok_s=f"{line['rollout_tokens_per_s']:.0f}")

            asked = {"stop": interrupt.asked}           # of any rank: they stop after the same step
            stop = dist.all_reduce(asked, learner.device, "max")["stop"] > 0
            if last or stop or line["step"] % c.save_every == 0:
                save(run)
            if evaluates and dist.rank() == 0:
                report.draw_curve(run.folder)
            if stop and not last:
                return False
    return True


def finish(run):
    """Write the model in HF format and the last line."""
    progress = run.learner.progress
    last = run.latest or heldout.evaluate_run(run)      # a resumed run without a step left has none
    dist.phase("writing the model")
    c = run.learner.config
    save_model(c, run.learner.model, run.folder, c.model or run.folder / "warm_start")

    if dist.rank() == 0:
        seconds = progress.seconds + time.perf_counter() - BEGIN
        print(f"{report.outcome(progress.first, last, seconds)}, model in {run.folder}/model")


# ------------------------------------------------------------------------------------- checkpoints

def tensors(run):
    return tensors_of(run.learner.model, run.learner.optimizer, run.learner.behaviour)


def save(run):
    """Write a checkpoint of this step: into a hidden folder, which is renamed when it is whole.

    A kill in the middle leaves the checkpoint before it."""
    learner, progress = run.learner, run.learner.progress
    dist.phase(f"step {progress.step}: checkpoint")
    seconds = progress.seconds + time.perf_counter() - BEGIN
    now = replace(progress, stream=run.stream.state, seconds=seconds)
    extra = learner.state.state_dict() if learner.state else {}
    save_checkpoint(run.folder / "checkpoints", now, tensors(run), extra,
                    learner.config.keep_checkpoints)


def restore(run):
    """Go back to the newest checkpoint, if there is one, and cut the logs to it.

    A new run has none: agree_on_run has refused a folder that is not empty."""
    dist.phase("resume")
    learner = run.learner
    found = dist.broadcast_object(checkpoints(run.folder / "checkpoints"))
    if found:
        learner.progress, extra = load_checkpoint(found[-1], tensors(run))
        check_run(learner.progress, learner.config, run.folder, learner.say)
        run.stream.state = learner.progress.stream
        run.sampler_of_mu.version = learner.progress.behaviour_version
        if learner.state:
            learner.state.load_state_dict(extra)
        learner.say(f"resumed at step {learner.progress.step} from {found[-1]}")

    dist.barrier()
    if dist.rank() == 0:
        for name in ("log.jsonl", "samples.jsonl"):
            cut_log(run.folder / name, learner.progress.step if found else None)


# ------------------------------------------------------------------------------------------ set-up

def start(c, folder, device):
    """Everything that the loop needs. The folder is claimed when the input has proved readable."""
    say = tqdm.write if dist.rank() == 0 else (lambda line: None)
    if not c.model:
        sft.check_default_start(c)
    functions = reward.weighted(c.reward, format=c.format_reward, consistency=c.consistency_reward)

    train, held_out = data.load_split(c, say)
    fingerprints = check_data(c, folder, train, held_out)
    if not c.model:
        claim(c, folder)            # before the warm start, which takes a while
    goes_on = is_under_way(folder)          # then a checkpoint brings the weights
    source = c.model or sft.default_start(c, folder, device)
    begins_at = folder / "start" if goes_on else source
    check_model(c, folder, source, needed=needs_source(c) or not goes_on, say=say)

    policies = load_policies(c, device, source, begins_at)
    model = policies.pi
    tokenizer = prompts.load_tokenizer(begins_at, parse_template_kwargs(c.chat_template_kwargs))
    prompts.report_template(tokenizer, c.template, say)

    # the problems as token ids; a request that cannot be served is found now
    train = prompts.tokenize_prompts(train, tokenizer, c.template, c.max_prompt_tokens, say)
    held_out = prompts.tokenize_prompts(held_out[:c.eval_problems], tokenizer, c.template,
                                        c.max_prompt_tokens, say)
    for problems in (train, held_out):
        check_request([p["prompt"] for p in problems], c.group_size, c.max_new_tokens,
                      c.temperature, model.config)
    module = objective(c.algo)
    state = module.State(c) if hasattr(module, "State") else None
    claim(c, folder)
    started_with = remember(c, folder, model, source, fingerprints)

    learner = Learner(
        config=c, objective=module, model=model, progress=Progress(run=started_with), say=say,
        reference=policies.reference, behaviour=policies.behaviour,
        optimizer=adamw(model, c.lr, c.weight_decay),
        state=state)

    # the samplers: with --sync-every above 1 older weights draw
    room = {"max_rows": c.rows_at_once, "kv_bytes": int(c.kv_memory_mb * 2 ** 20),
            "graph": {"on": True, "off": False}.get(c.graph)}
    of_pi = of_mu = Sampler(model, prompts.stop_ids(model, tokenizer), **room)
    prompts.name_end(model, prompts.end_id(tokenizer, c.template))      # for what is written
    if policies.behaviour is not None:
        of_mu = policies.sampler_of_mu(of_pi.eos_ids.tolist(), **room)

    return Run(learner=learner, sampler_of_pi=of_pi, sampler_of_mu=of_mu,
               stream=data.stream_of(c, train), held_out=held_out, reward_functions=functions,
               tokenizer=tokenizer, folder=folder)


# ------------------------------------------------------------------------------------- the program

def train(c, folder, device):
    """Set up, make all steps, write the model. Returns False when an interrupt came before."""
    run = start(c, folder, device)
    restore(run)
    with machine.Interrupt() as interrupt:
        done = loop(run, interrupt)
    if done:
        finish(run)
    return done


def main(argv=None):
    c = None
    with machine.program(lambda: stopped_line(c)):
        try:
            c = parse(argv, __doc__)
            dist.watch(c.watchdog)
            device = dist.setup(c.device, c.collective_timeout)
            c, folder = agree_on_run(c)
            torch.set_num_threads(c.threads)
            if not train(c, folder, device):
                raise KeyboardInterrupt
        finally:
            release()       # the lock of the run folder


if __name__ == "__main__":
    main()
