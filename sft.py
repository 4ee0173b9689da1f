"""Supervised warm start: cross-entropy on the completion tokens of worked solutions, before any RL.

    loss = - sum over completion tokens of log pi(token | what precedes it)
             / their number in the mean batch

RL can only strengthen what the model already does now and then, so a random model has to be shown
answers first. The default run shows it two habits (--terse-steps), all answers correct: most
solutions are cut down to their last line ("#### 12"), the rest is told step by step. Which habit
earns rewards is left for train.py to discover.

    python sft.py --data gsm8k_train.jsonl --out runs/warm      a new small model, its own tokenizer
    python sft.py --data FILE.jsonl --model START --out DIR     or an existing checkpoint
    python sft.py --data PAIRS.jsonl --preference sigmoid ...   DPO on pairs of a file (dpo.py)
    torchrun --nproc-per-node 4 sft.py ...                      the same on several devices

A run that was stopped goes on by the same command. --out then holds its checkpoints, and log.jsonl.

To the learner this is one more objective (`loss`, below), whose batches come from a file and not
from a rollout. Left out: packing several problems into one sequence, because no padding is computed
anyway.
"""
import json
import math
import os
import random
import shutil
import sys
import time
import zlib
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path

from engine import machine      # before torch: it tells OpenMP's threads how to wait
import torch
from tqdm import tqdm

import data
import dist
import prompts
import report
import tasks
import thoughts
from config import (DEVICES, DTYPES, TEMPLATES, WITH_LORA, Config, check_settings, command_line,
                    default_lr, flag, is_small, parse_levels, parse_template_kwargs, refuse_idle,
                    setting)
from dist import together
from engine.checkpoint import (Progress, checkpoints, load_checkpoint, save_checkpoint, tensors_of,
                               write_whole)
from engine.weights import read_json
from folder import cut_log, fingerprint_of_model, lock, release
from grpo import Batch
from learner import Learner, adamw
from model import ModelConfig, Transformer, trainable
from policies import load_policies, place_of, write_weights
from rollout import Rollout


PREFERENCES = ("", "sigmoid", "ipo", "hinge")       # dpo.KINDS
WITH_MODEL = (lambda c: c.model, "--model: a new small model is trained whole")
ALL_WEIGHTS = (lambda c: not c.lora_rank, "all weights: leave --lora-rank out")
TO_LEARN_FROM = (lambda c: c.model, "--model: a new random model has nothing to prefer")
SOLUTIONS = (lambda c: not c.preference, "solutions: leave --preference out")
WITH_TERSE = (lambda c: c.terse_steps, "--terse-steps")
A_NEW_MODEL = (lambda c: not c.model, "a new model: leave --model out")
WITH_EVAL = (lambda c: c.eval_data, "--eval-data")
WITH_PAIRS = (lambda c: c.preference, "--preference")
WITH_TEACHER = (lambda c: c.teacher, "--teacher")
OF_A_FILE = (lambda c: any(not tasks.known(part.source) and part.source not in data.HUB
                           for part in data.parts_of(c.data)),
             "a file in --data: other sources are tested on problems of their own")


@dataclass
class SFTConfig:
    data: str = "arithmetic"                # a built-in task, gsm8k, math, a .jsonl with
                                            # solutions, or a mix: truth:2-4@2,seating

    out: str = "runs/warm"                  # receives the checkpoint, in HF layout
    model: str = ""                         # checkpoint to start from;
                                            # empty: a new model of the shape below

    hidden_size: int = setting(96, least=1, needs=[A_NEW_MODEL])
    layers: int = setting(4, least=1, needs=[A_NEW_MODEL])
    heads: int = setting(4, least=1, needs=[A_NEW_MODEL])       # and half as many key-value heads
    vocab_size: int = setting(512, least=1, needs=[A_NEW_MODEL])    # of the new tokenizer, which
                                                    # learns from the data

    max_length: int = setting(512, least=1)         # longest prompt + completion in tokens;
                                                    # longer ones are dropped

    terse_steps: int = setting(0, least=0, needs=[SOLUTIONS])   # optimizer steps of a second stage
                                                    # that mixes terse answers in

    terse_share: float = setting(0.7, least=0, most=1, needs=[WITH_TERSE])  # of its solutions,
                                                    # cut to their last line

    problems: int = setting(20000, least=1)         # of a built-in task, or of a mix
    hold_out: int = setting(Config().eval_problems, least=0, needs=[OF_A_FILE, SOLUTIONS])
                                                    # problems that train.py with as many
                                                    # --eval-problems is tested on, left out here

    levels: str = ""                                # of built-in tasks, easiest-hardest;
                                                    # empty: the usual ones
    eval_data: str = ""                             # solutions, or pairs, that are not trained on:
                                                    # eval_loss in the log; empty: none

    eval_problems: int = setting(200, least=1, needs=[WITH_EVAL])   # of them, at most
    eval_every: int = setting(100, least=1, needs=[WITH_EVAL], on_resume=True)      # steps; also
                                                    # after the last
    steps: int = setting(1000, least=1)             # optimizer steps on full solutions
    batch_size: int = setting(16, least=1)          # completions, or pairs, an optimizer step, over
                                                    # all ranks
    lr: float = setting(0.0, least=0)               # peak; linear warm-up over a tenth, then cosine
                                                    # to a tenth. 0: 2e-3 for a small model, 1e-5
                                                    # above 10 million parameters; with LoRA ten
                                                    # times as much, of pairs a tenth

    muon_lr: float = setting(0.0, least=0, needs=[ALL_WEIGHTS])     # peak of Muon for the blocks'
                                                    # matrices; 0.02 is usual (muon.py), 0: AdamW

    weight_decay: float = setting(0.01, least=0)    # of AdamW
    micro_batch_tokens: int = setting(8192, least=1)    # of a forward pass; memory, not mathematics
    lora_rank: int = setting(0, least=0, needs=[WITH_MODEL])    # of the change of each linear
                                                    # layer; 0: all weights are trained

    lora_alpha: float = setting(32.0, above=0, needs=[WITH_LORA])   # the change counts alpha / rank
    template: str = setting("auto", choices=TEMPLATES)  # of prompts, see prompts.py
    chat_template_kwargs: str = ""                  # what the chat template shall read, as JSON
    # from pairs (dpo.py): which of two completions is the better one, in place of solutions
    preference: str = setting("", choices=PREFERENCES, needs=[TO_LEARN_FROM])   # sigmoid (DPO),
                                            # ipo, hinge: the loss on rows with a question,
                                            # "chosen" and "rejected"; empty: none

    beta: float = setting(0.0, least=0, needs=[WITH_PAIRS])     # the larger, the nearer the model
                                            # stays to what it began as; 0: 0.1

    sft_weight: float = setting(0.0, least=0, needs=[WITH_PAIRS])   # of the chosen completion's
                                            # cross-entropy a token
    # from a teacher (distill.py): the divergence to its distribution in place of cross-entropy
    teacher: str = setting("", needs=[SOLUTIONS])   # checkpoint with the same tokenizer;
                                            # empty: none

    divergence_beta: float = setting(0.0, least=0, most=1, needs=[WITH_TEACHER])    # 0: forward
                                            # KL, 1: reverse KL, between: of a mixture

    relations: float = setting(0.0, least=0, needs=[WITH_TEACHER])      # weight of the relations of
                                            # queries, keys and values

    relation_heads: int = setting(4, least=1, needs=[WITH_TEACHER])     # into which both are split
    features: float = setting(0.0, least=0, needs=[WITH_TEACHER])   # weight of the hidden states
    # machine
    seed: int = setting(0, least=0)
    device: str = setting("", choices=DEVICES)      # cpu, cuda, npu; empty: the accelerator here
    threads: int = setting(0, least=0, on_resume=True)      # CPU threads; 0: measured
    dtype: str = setting("", choices=DTYPES)        # of computation; empty: float32 on cpu, else
                                                    # bfloat16
    shard: int = setting(0, least=0, on_resume=True)    # ranks that hold one copy together; 0: all
    offload: bool = setting(False, on_resume=True)  # weights and optimizer state in host memory
    activation_checkpointing: bool = False          # less memory, a third more time
    save_every: int = setting(200, least=1, on_resume=True)     # optimizer steps between
                                                    # checkpoints

    # no flags: what the learner also reads, and here is always so
    group_size = 1
    temperature = 1.0
    aggregation = "token"
    grad_clip = 1.0
    graph = ""
    collective_timeout = 1800
    batch_tokens = 0.0      # completion tokens of the mean batch, which `train` counts

    def __post_init__(self):
        # ten times the rate of RL: each token here has a gradient of its own, always the same way
        usual = default_lr(self.model, self.lora_rank > 0)
        self.lr = self.lr or (usual if self.preference else 10 * usual)
        if self.preference:
            self.beta = self.beta or 0.1
            self.group_size = 2                 # rows of one prompt
            self.aggregation = "sequence"


# ------------------------------------------------------------------------------------ the corpus

def completion_text(problem, terse):
    """The text that the model shall write: the worked solution, or its last line alone."""
    solution = problem.get("solution") or f"#### {problem['answer']}"
    return solution.rstrip().rsplit("\n", 1)[-1] if terse else solution


def corpus(problems, tokenizer, config, terse_share=0.0):
    """Turn problems into [(prompt ids, completion ids with their end)], a share of them terse.

    Raises ValueError where no id ends a completion, or every solution is too long."""
    rng = random.Random(f"terse/{config.seed}")
    texts = [(completion_text(p, rng.random() < terse_share),) for p in problems]
    return encode(problems, texts, tokenizer, config)


def encode(problems, texts, tokenizer, config):
    """Returns [(prompt ids, completion ids with their end, ...)] of those that are short enough.

    texts holds a tuple for each problem: its completions, one or, of a pair, two. Raises ValueError
    where no id ends a completion, every one is too long, or one does not close a thought."""
    if not problems:
        return []
    asked = prompts.prompt_texts(problems, tokenizer, config.template)
    check_thoughts(asked, texts)
    questions = prompts.encode(asked, tokenizer, config.template)
    end = prompts.end_id(tokenizer, config.template)
    sides = [tokenizer(list(side), add_special_tokens=False)["input_ids"] for side in zip(*texts)]
    items = [(q, *(c + [end] for c in completions)) for q, *completions in zip(questions, *sides)]

    kept = [(q, *completions) for q, *completions in items
            if len(q) + max(map(len, completions)) <= config.max_length]
    if len(kept) < len(items) and dist.rank() == 0:
        tqdm.write(f"sft: dropped {len(items) - len(kept)} of {len(items)} examples "
                   f"longer than {config.max_length} tokens")
    if not kept:
        raise ValueError(f"every example is longer than --max-length {config.max_length} tokens")
    return kept


def check_thoughts(asked, texts):
    """Raise ValueError where a prompt opens a thought that its completion does not close.

    What a model then learns to write would be an unfinished thought, which has no answer."""
    for prompt, completions in zip(asked, texts):
        mark = thoughts.opened(prompt)
        if mark and not all(thoughts.after_thought(mark + text) for text in completions):
            raise ValueError(
                f"the chat template opens a thought ({mark}), which a solution does not close: put "
                "thought and closing mark into the solutions, or give --template plain, or what "
                "switches thoughts off (--chat-template-kwargs)")


def batches(examples, size, steps, seed):
    """Yield `steps` batches of `size` examples: all in random order, then again in another.

    They are not sorted by length. No padding reaches the model anyway, and terse and full solutions
    shall meet in every batch."""
    rng = random.Random(f"sft/{seed}")
    order = []
    for _ in range(steps):
        while len(order) < size:
            order += rng.sample(range(len(examples)), len(examples))
        batch, order = order[:size], order[size:]
        yield [examples[i] for i in batch]


def collate(examples, device):
    """Turn [(prompt, completion, ...)] into a Batch that trains the completions, a row each."""
    rows = [(p, c) for p, *completions in examples for c in completions]
    prompt_lengths = torch.tensor([len(p) for p, _ in rows], dtype=torch.int64)
    lengths = torch.tensor([len(p) + len(c) for p, c in rows], dtype=torch.int64)
    T = int(lengths.max()) if rows else 1
    tokens = torch.zeros(len(rows), T, dtype=torch.int64)
    for row, (p, c) in enumerate(rows):
        tokens[row, :len(p) + len(c)] = torch.tensor(p + c)

    mask = Rollout(tokens, prompt_lengths, lengths, None, None).completion_mask()
    return Batch(tokens=tokens.to(device), prompt_lengths=prompt_lengths.to(device),
                 lengths=lengths.to(device), mask=mask.to(device),
                 rewards=None, advantages=None, active=None, old_logp=None)


# ------------------------------------------------------------------------------------ the training

METRICS = {}


def loss(logp, entropy, batch, config, normalizer):
    """Cross-entropy of some rows, as learner.py wants it: a scalar, and sums for the log.

    It is divided by the mean batch's tokens, not by this batch's: the tokens of a
    batch of many terse answers would otherwise weigh more."""
    total = -(logp * batch.mask).sum() / config.batch_tokens
    tokens, rows = batch.mask.sum(), (batch.mask.sum(1) > 0).sum()
    none = torch.zeros((), device=logp.device)
    return total, {"tokens": tokens, "rows": rows, "ratio_max_dev": none}


def share_of_peak(step, steps):
    """The learning rate's share of its peak: up over a tenth of the steps, down by a cosine.

    It ends at a tenth of the peak."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def make_optimizer(model, config):
    """AdamW of all weights; with muon_lr, Muon takes the blocks' matrices over."""
    if not config.muon_lr:
        return adamw(model, config.lr, config.weight_decay)

    from muon import Muon, Together
    matrices = [p for p in trainable(model.model.layers) if p.ndim == 2]
    taken = set(map(id, matrices))
    others = [p for p in trainable(model) if id(p) not in taken]
    return Together(adamw(model, config.lr, config.weight_decay, others),
                    Muon(matrices, config.muon_lr))


def held_out(learner, batch):
    """Cross-entropy of examples that are not trained on, {"eval_loss": nats a token}."""
    logp = learner.score(batch, list(range(len(batch.mask))))[0]
    sums = dist.all_reduce({"loss": -(logp * batch.mask).sum(), "tokens": batch.mask.sum()},
                           learner.device)
    return {"eval_loss": sums["loss"] / sums["tokens"]}


def train(model, examples, config, progress=True, objective=None, keeper=None, unseen=()):
    """Minimise the loss in place. Every rank enters, each with its share of every batch.

    objective: another one than this module's, cross-entropy; it may have an update(learner, batch,
    rows) and a held_out(learner, batch) of its own. keeper: of the checkpoints and the log, if
    there are to be any. unseen: held-out examples. Returns the mean loss of the last tenth of the
    steps."""
    tokens = sum(len(c) for _, *completions in examples for c in completions)
    config.batch_tokens = config.batch_size * tokens / len(examples)
    objective = objective or sys.modules[__name__]
    optimizer = make_optimizer(model, config)
    peaks = [(group, group["lr"]) for group in optimizer.param_groups]
    learner = Learner(config=config, objective=objective, model=model, optimizer=optimizer,
                      progress=Progress(), reference=getattr(objective, "reference", None))
    update = getattr(objective, "update", Learner.update)
    measure = getattr(objective, "held_out", held_out)

    losses = keeper.restore(learner) if keeper else []
    made = len(losses)
    todo = islice(batches(examples, config.batch_size, config.steps, config.seed), made, None)
    bar = tqdm(todo, total=config.steps, initial=made, disable=not progress or dist.rank() > 0,
               desc="sft" if keeper else "warm start")
    shown = {}
    for step, chosen in enumerate(bar, made):
        for group, peak in peaks:
            group["lr"] = peak * share_of_peak(step, config.steps)

        batch = collate([chosen[i] for i in dist.split(len(chosen))], model.device)
        sums = update(learner, batch, list(range(len(batch.mask))))
        learner.progress.step += 1
        losses.append(sums["loss"])
        shown["loss"] = f"{losses[-1]:.3f}"
        if unseen and (learner.progress.step % config.eval_every == 0 or step + 1 == config.steps):
            mine = [unseen[i] for i in dist.split(len(unseen))]
            sums |= measure(learner, collate(mine, model.device))
            shown["eval_loss"] = f"{sums['eval_loss']:.3f}"
        bar.set_postfix(shown)
        if keeper:
            keeper.after_step(learner, sums, losses)

    last = losses[-max(1, config.steps // 10):]
    return sum(last) / len(last)


class Keeper:
    """The checkpoints and the log of a run, in the folder where its model will be.

    Steps are counted over both stages. So the newest checkpoint says which stage was under way."""

    FILES = ("sft.json", "log.jsonl", "log.jsonl.old", "checkpoints")       # before the model

    def __init__(self, config, model, examples, interrupt):
        """Raises ValueError where the folder holds a run of other settings, examples or model."""
        self.folder, self.every, self.interrupt = Path(config.out), config.save_every, interrupt
        self.steps = config.steps + config.terse_steps
        self.begin = time.perf_counter()
        self.progress = Progress()
        self.before = 0         # steps of the stages before
        together(lambda: self.claim(config, model, examples))

    def claim(self, config, model, examples):
        """Write what the run is started with, or compare it with what is written there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock(self.folder)
        self.check_free(self.folder)        # again: a moment ago another run may have ended here

        free = {"out"} | {f.name for f in fields(config) if f.metadata.get("on_resume")}
        mine = {flag(name): value for name, value in asdict(config).items() if name not in free}
        mine["--dtype"] = str(model.dtype).removeprefix("torch.")
        mine["examples"] = checksum_of(examples)
        for name, folder in (("weights of --model", config.model),
                             ("weights of --teacher", config.teacher)):
            mine[name] = fingerprint_of_model(folder) if folder else ""

        file = self.folder / "sft.json"
        if checkpoints(self.folder / "checkpoints"):
            for name, was in read_json(file).items():
                if mine.get(name) != was:
                    raise ValueError(f"--out {self.folder} holds a run that began with {name} "
                                     f"{was!r}, not {mine.get(name)!r}: choose another folder")
        write_whole(file, json.dumps(mine, indent=1) + "\n")

    @classmethod
    def check_free(cls, folder):
        """Raise ValueError where a folder holds anything else than a run of sft.py under way.

        Of one that has no checkpoint, or whose model is whole, nothing is written over."""
        names = {x.name for x in folder.glob("*") if not x.name.startswith(".")}
        no_model_yet = names <= set(cls.FILES) or checkpoints(folder / "checkpoints")
        if names and not (no_model_yet and "sft.json" in names):
            raise ValueError(f"--out {folder} is not empty: choose another folder")

    def restore(self, learner):
        """Go on where this stage was stopped. Returns the losses of its steps so far."""
        first, last = self.before, self.before + learner.config.steps
        self.before = last
        found = dist.broadcast_object(checkpoints(self.folder / "checkpoints"))
        reached = int(found[-1].name.removeprefix("step-")) if found else 0
        if reached > last:
            return [math.nan] * (last - first)  # a later stage was under way, and loads its weights

        losses = []
        if reached > first:
            tensors = tensors_of(learner.model, learner.optimizer)
            self.progress, extra = load_checkpoint(found[-1], tensors)
            losses = extra["losses"]
            if dist.rank() == 0:
                tqdm.write(f"sft: goes on at step {reached}, from {found[-1]}")

        learner.progress = self.progress
        if dist.rank() == 0:
            cut_log(self.folder / "log.jsonl", self.progress.step or None)
        return losses

    def after_step(self, learner, sums, losses):
        """Write the step's line, and at times a checkpoint: also when the user asked to stop."""
        progress = learner.progress
        progress.num_tokens += int(sums["tokens"])
        seconds = progress.seconds + time.perf_counter() - self.begin
        more = {name: sums[name] / max(sums[unit], 1)
                for name, unit in learner.objective.METRICS.items()}
        more |= {name: value for name, value in sums.items()
                 if "/" in name or name.startswith("eval_")}        # of pairs, and held-out
        report.write_line(self.folder, {
            "step": progress.step, "loss": sums["loss"], "grad_norm": sums["grad_norm"],
            "lr": learner.optimizer.param_groups[0]["lr"], "seconds": seconds,
            "trained_tokens": progress.num_tokens, **more})

        asked = dist.all_reduce({"stop": self.interrupt.asked}, learner.device, "max")
        stop = asked["stop"] > 0
        if stop or progress.step % self.every == 0 or progress.step == self.steps:
            tensors = tensors_of(learner.model, learner.optimizer)
            save_checkpoint(self.folder / "checkpoints", replace(progress, seconds=seconds),
                            tensors, {"losses": losses}, keep=1)
        if stop:
            raise KeyboardInterrupt

    def remove(self):
        """Remove the checkpoints, when the model is written: all at once, as far as others see."""
        def rename_and_remove():
            gone = self.folder / ".checkpoints"
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(self.folder / "checkpoints", gone)
            shutil.rmtree(gone, ignore_errors=True)
        together(rename_and_remove)


def checksum_of(examples):
    """A checksum of [(prompt ids, completion ids, ...)], in their order."""
    crc = 0
    for example in examples:
        crc = zlib.crc32(repr(example).encode(), crc)
    return f"{crc:08x}, {len(examples)} of them"


def build(problems, config):
    """A new tokenizer, trained on problems and solutions, and a new random model."""
    texts = []
    for problem in problems:
        texts += [problem["problem"] + "\n", completion_text(problem, False)]
    tokenizer = prompts.train_tokenizer(texts, config.vocab_size)

    shape = ModelConfig(
        vocab_size=len(tokenizer), hidden_size=config.hidden_size,
        num_hidden_layers=config.layers, intermediate_size=3 * config.hidden_size,
        num_attention_heads=config.heads, num_key_value_heads=max(1, config.heads // 2),
        head_dim=config.hidden_size // config.heads, eos_token_id=tokenizer.eos_token_id)
    return Transformer(shape).init_weights(config.seed), tokenizer


def warm_start(config, progress=True, interrupt=None):
    """Do the whole thing: data, model, training, checkpoint in config.out. Every rank enters.

    interrupt (machine.Interrupt): with one the run has a log, and checkpoints on the way. Returns
    (model, tokenizer)."""
    device = torch.device(config.device or "cpu")
    options = parse_template_kwargs(config.chat_template_kwargs)
    say = tqdm.write if dist.rank() == 0 else (lambda line: None)
    of_pairs = bool(config.preference)
    problems = data.load_problems(config.data, "train", config.seed, parse_levels(config.levels),
                                  config.problems, say, fill=True, answered=not of_pairs,
                                  spare=0 if of_pairs else config.hold_out)
    unseen = []
    if config.eval_data:
        unseen = data.load_held_out(config, say, whole=False, answered=not of_pairs)
        problems = data.without(problems, unseen, say)

    if config.model:
        policies = load_policies(config, device, config.model, config.model)
        model = policies.pi
        tokenizer = prompts.load_tokenizer(config.model, options)
        prompts.report_template(tokenizer, config.template, say)
    else:
        model, tokenizer = build(problems, config)
        model = place_of(config, device)(model.to(device))
        model.activation_checkpointing = config.activation_checkpointing
        if options:
            raise ValueError("--chat-template-kwargs needs --model, a checkpoint with a template")

    if of_pairs:
        import dpo
        objective = dpo.FilePairs(policies.reference)
        shown, unseen = (encode(rows, list(map(dpo.texts_of, rows)), tokenizer, config)
                         for rows in (problems, unseen))
    else:
        objective = from_teacher(model, tokenizer, config) if config.teacher else None
        shown, unseen = (corpus(rows, tokenizer, config) for rows in (problems, unseen))
    keeper = Keeper(config, model, shown, interrupt) if interrupt else None
    last_loss = train(model, shown, config, progress, objective, keeper, unseen)
    if config.teacher:
        objective.remove(model)
    if config.terse_steps:
        # without Muon: terse answers cannot be learned, and it would step as far along their noise
        second = replace(config, steps=config.terse_steps, lr=config.lr / 8, muon_lr=0.0)
        mixed = corpus(problems, tokenizer, config, config.terse_share)
        last_loss = train(model, mixed, second, progress, keeper=keeper, unseen=unseen)

    prompts.name_end(model, prompts.end_id(tokenizer, config.template))
    write_weights(config, model, config.out, Path(config.out) / "adapter", config.model)
    if dist.rank() == 0:
        prompts.save_tokenizer(tokenizer, config.out)
        tqdm.write(f"sft: loss {last_loss:.3f}{'' if of_pairs else ' nats a token'} after "
                   f"{config.steps + config.terse_steps} steps, model in {config.out}")
    dist.barrier()
    if keeper:
        keeper.remove()
    return model, tokenizer


def from_teacher(model, tokenizer, config):
    """The objective of --teacher. Raises ValueError where its tokenizer is another one."""
    import distill
    distill.same_tokens(tokenizer, config.teacher)
    place = place_of(config, model.device)
    teacher = Transformer.from_pretrained(config.teacher, place.home, place.dtype, place)
    return distill.CorpusDistillation(model, teacher, config)


def check_default_start(c):
    """Raise ValueError for settings of a run that the built-in model cannot serve."""
    if not all(tasks.known(part.source) for part in data.parts_of(c.data)):
        raise ValueError(f"--data {c.data} needs --model (a checkpoint folder or hub id); "
                         f"to make a small one: python sft.py --data {c.data} --out DIR")

    room, asked = ModelConfig.max_position_embeddings, c.max_prompt_tokens + c.max_new_tokens
    if asked > room:
        raise ValueError(f"--max-prompt-tokens {c.max_prompt_tokens} and --max-new-tokens "
                         f"{c.max_new_tokens} leave the context of {room} tokens of the built-in "
                         "model")


def default_start(c, folder, device):
    """Make the default run's starting point: a small model that has seen worked solutions.

    It lies in the run folder, and a copy beside it, under a name with a checksum of its settings,
    so that other runs of the same seed find it there. Every rank enters. Returns its folder."""
    own = folder / "warm_start"
    if dist.broadcast_object((own / "config.json").exists()):
        return str(own)

    settings = SFTConfig(
        data=c.data, levels=c.levels, seed=c.seed, steps=c.warm_start_steps,
        terse_steps=c.warm_start_steps // 7,
        problems=c.warm_start_steps * SFTConfig.batch_size,         # each is seen once
        lr=4e-3, muon_lr=0.02, out="", device="", dtype="float32")
    checksum = zlib.crc32(repr(settings).encode())
    shared = folder.resolve().parent / f"warm-start-seed{c.seed}-{checksum:08x}"

    if not dist.broadcast_object((shared / "config.json").exists()):
        part = folder / ".warm_start"
        warm_start(replace(settings, out=str(part), device=str(device)))
        together(lambda: os.replace(part, own))     # whole or absent: never taken for a whole one
        together(lambda: share(own, shared))
    else:
        together(lambda: copy_whole(shared, own))
    return str(own)


def share(own, shared):
    """Leave a copy for other runs, where that can be done; this run does not need it."""
    try:
        copy_whole(own, shared)
    except OSError as error:
        tqdm.write(f"warning: {shared}: {error}", file=sys.stderr)


def copy_whole(source, target):
    """Copy a folder such that there is never half of it, unless another run has been faster."""
    part = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        shutil.copytree(source, part)
        if not target.exists():
            os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ------------------------------------------------------------------------------------ the program

def parse(argv=None):
    """The command line as a config. Raises ValueError, one line, for settings that cannot work."""
    given = command_line(SFTConfig, __doc__, argv)
    config = SFTConfig(**given)
    check_settings(config)
    refuse_idle(config, given)
    parse_levels(config.levels)
    parse_template_kwargs(config.chat_template_kwargs)

    if config.hidden_size % (2 * config.heads):
        raise ValueError(f"--hidden-size {config.hidden_size} must be a multiple of "
                         f"2 x --heads {config.heads}")
    Keeper.check_free(Path(config.out))
    return config


def main(argv=None):
    with machine.program(lambda: "interrupted: the same command goes on"):
        config = parse(argv)
        config.device = str(dist.setup(config.device))
        threads = config.threads or machine.choose_threads(not is_small(config.model))
        torch.set_num_threads(threads)
        with machine.Interrupt() as interrupt:
            try:
                warm_start(config, interrupt=interrupt)
            finally:
                release()       # the lock of the folder


if __name__ == "__main__":
    main()
