"""Accuracy of a checkpoint on problems: greedy, and with K samples each avg@k, pass@k and maj@k.

    avg@K    mean over all samples
    pass@k   1 - C(n-c, k) / C(n, k): chance that k of the n samples drawn, c of them right, hold a
             right one. Unbiased (Chen et al., 2107.03374); the plug-in 1 - (1 - c/n)^k is too low
    maj@k    chance that the most frequent answer of k samples is right (self-consistency, Wang et
             al., 2203.11171)

Each is a mean over problems, +- its standard error over problems. Answers are read strictly, as
rewards are, and leniently, which takes the last number in the text if no answer is marked. A gap
between the two columns is a matter of format. A built-in task with a checker of its own has one
verdict for both.

    python evaluate.py --model runs/NAME/model --data arithmetic --samples 8 --json eval.json

A problem's completions depend on --seed and its place in the file, not on what shares its batch
(up to rounding, which can decide between two nearly equal logits). Needs rollout.py to draw and
reward.py to grade. Left out: several processes, few-shot prompts, several seeds in one run.
"""
import functools
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine import machine      # before torch: it tells OpenMP's threads how to wait
import torch
from tqdm import tqdm

import data
import dist
import prompts
import reward
from config import (DEVICES, DTYPES, TEMPLATES, check_settings, command_line, parse_levels,
                    parse_template_kwargs, refuse_torchrun, setting)
from model import Transformer
from report import standard_error
from rollout import Sampler, draw_groups

SUBSETS = 1000      # maj@k looks at all k-subsets up to this number, else at so many random ones
ENDLESS = 1000      # problems of a built-in task without --limit
KINDS = ("strict", "lenient")


@dataclass
class EvalConfig:
    """The flags of the program, each with its default."""
    model: str = ""                     # checkpoint folder or hub id
    data: str = "arithmetic"            # a built-in task, gsm8k, math (the test split), or a .jsonl
    json: str = ""                      # receives the result; empty: only the table on stdout
    samples: int = setting(8, least=1)              # K completions a problem, and a greedy one
    temperature: float = setting(1.0, above=0, least=1e-4, most=1e4)    # of the samples;
                                                    # greedy is always there

    top_p: float = setting(1.0, above=0, most=1)    # of the samples; below 1: nucleus sampling
    top_k: int = setting(0, least=0)                # of the samples; 0: the whole vocabulary
    max_new_tokens: int = setting(256, least=1)     # a longer completion is cut and counted
    max_prompt_tokens: int = setting(512, least=1)  # problems with longer prompts are dropped
    limit: int = setting(0, least=0)                # only the first problems;
                                                    # 0: all (of a built-in task 1000)

    template: str = setting("auto", choices=TEMPLATES)  # of prompts: auto, chat, plain, reasoning
    chat_template_kwargs: str = ""                  # what the chat template shall read, as JSON;
                                                    # empty: what a run's model was trained with

    levels: str = "4-6"                             # fewest-most steps of a built-in task
    seed: int = setting(0, least=0)                 # of the samples; the problems stay the same
    device: str = setting("", choices=DEVICES)      # cpu, cuda, npu; empty: the accelerator here
    dtype: str = setting("", choices=DTYPES)        # float32, bfloat16;
                                                    # empty: float32 on cpu, else bfloat16

    rows_at_once: int = setting(1024, least=1)      # completions drawn together, at most;
                                                    # memory may allow fewer

    threads: int = setting(0, least=0)              # CPU threads; 0: measured


# ------------------------------------------------------------------------------------- metrics

def pass_at_k(n, c, k):
    """Chance that k of n samples, drawn without replacement, hold at least one of the c right ones.

    Counts must satisfy 0 <= c <= n and 1 <= k <= n. Returns 1 - C(n-c, k) / C(n, k), computed as
    the product 1 - prod_{j=n-c+1..n} (1 - k/j), which does not overflow (Chen et al., 2107.03374).
    Raises ValueError for other counts."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    if n - c < k:       # too few wrong ones to fill k places
        return 1.0
    return 1.0 - math.prod(1.0 - k / j for j in range(n - c + 1, n + 1))


def vote_labels(answers, equal=reward.equal):
    """Number the answers (n,), text or None, by equality. Returns labels (n,), -1 for None.

    An answer joins the first group whose first member it equals. reward.equal is no strict
    equivalence (12% equals both 12 and 0.12, which differ), so the order of the samples can matter
    in such cases."""
    label_of = {None: -1}
    leaders = []            # the first member of each group

    for answer in answers:
        if answer in label_of:
            continue
        matches = (i for i, leader in enumerate(leaders) if equal(answer, leader))
        label_of[answer] = next(matches, len(leaders))
        if label_of[answer] == len(leaders):
            leaders.append(answer)
    return [label_of[answer] for answer in answers]


def majority_at_k(labels, right, k):
    """Chance that the most frequent answer of k of the n samples is right; without any answer 0.

    labels (n,) are integers, equal for equal answers; -1 is no answer and casts no vote. right (n,)
    is 0 or 1, and 1 <= k <= n. Tied answers share the credit. Returns a float in [0, 1], the mean
    over all k-subsets of the samples, or over SUBSETS random ones (fixed seed) where there are
    more. Raises ValueError for other counts or lengths."""
    labels = np.asarray(labels)
    right = np.asarray(right, float)
    if labels.shape != right.shape or not 1 <= k <= len(labels):
        raise ValueError("majority_at_k needs 1 <= k <= n and equal lengths, "
                         f"not k={k}, {labels.shape}, {right.shape}")

    groups = np.unique(labels[labels >= 0])
    member = (labels[:, None] == groups).astype(np.float32)         # (n, groups)
    if not member.size:
        return 0.0

    # 0 or 1, as far as equality is an equivalence
    credit = right @ member / member.sum(0)                         # (groups,)
    votes = subsets(len(labels), k) @ member                        # (subsets, groups)
    winner = (votes == votes.max(1, keepdims=True)) & (votes > 0)   # (subsets, groups)
    winners = np.maximum(winner.sum(1), 1)                          # (subsets,)
    return float((winner @ credit / winners).mean())


@functools.lru_cache(maxsize=None)
def subsets(n, k):
    """Returns k-subsets of n samples as rows of 0/1 float32 (subsets, n).

    They are all of them, or SUBSETS random ones where there are more."""
    if math.comb(n, k) > SUBSETS:
        order = np.random.default_rng(0).random((SUBSETS, n)).argsort(1)    # a permutation a row
        return (order < k).astype(np.float32)

    members = np.array(list(itertools.combinations(range(n), k)))           # (subsets, k)
    return (members[:, :, None] == np.arange(n)).any(1).astype(np.float32)


def metrics(greedy, sampled, kind):
    """Metrics of N problems for one of KINDS, by the names of the file's docstring.

    greedy and sampled hold the grades of each problem's completions (`grade`). Returns a dict
    {name: {"mean", "se"}}, where se is None for a single problem."""
    n = len(sampled[0][kind]["right"])
    counts = [sum(grades[kind]["right"]) for grades in sampled]     # right samples of each problem
    powers = [2 ** i for i in range(n.bit_length())]
    ks = sorted({n, *powers})                                       # 1, 2, 4, ... and n itself

    values = {}         # name -> one number a problem
    values["greedy"] = [sum(grades[kind]["right"]) for grades in greedy]
    values[f"avg@{n}"] = [count / n for count in counts]
    for k in ks:
        values[f"pass@{k}"] = [pass_at_k(n, count, k) for count in counts]
    for k in ks[1:]:    # maj@1 is the mean
        values[f"maj@{k}"] = [
            majority_at_k(grades[kind]["labels"], grades[kind]["right"], k) for grades in sampled]

    return {name: {"mean": sum(each) / len(each), "se": standard_error(each)}
            for name, each in values.items()}


# ------------------------------------------------------------------------------------ settings

def parse(argv=None):
    """Returns the command line as an EvalConfig. Raises ValueError, in one line, for wrong ones."""
    return check(EvalConfig(**command_line(EvalConfig, __doc__, argv)))


def check(config):
    """Returns the config if it can work, before anything is loaded, let alone generated.

    Raises ValueError, in one line, otherwise."""
    check_settings(config)
    parse_levels(config.levels)
    parse_template_kwargs(config.chat_template_kwargs)
    if not config.model:
        raise ValueError("give --model, a checkpoint folder or hub id")
    refuse_torchrun("evaluate.py")

    # now, not after hours of sampling
    if config.json and Path(config.json).exists():
        raise ValueError(f"--json {config.json} already exists: choose another file, "
                         "results are never overwritten")
    if config.json and not os.access(Path(config.json).parent, os.W_OK):
        raise ValueError(f"--json {config.json}: its folder does not exist or cannot be written to")
    return config


def start(config):
    """Load model, tokenizer and problems, and fill in the settings that were left to the machine.

    Returns the sampler, the tokenizer, the problems with prompts in the file's order, and how many
    were dropped for their length."""
    device = dist.setup(config.device)
    config.device = str(device)
    if not config.dtype:
        config.dtype = "float32" if device.type == "cpu" else "bfloat16"

    levels = parse_levels(config.levels)
    count = config.limit or ENDLESS
    problems = data.load_problems(config.data, "test", 0, levels, count, warn)
    if config.limit:
        problems = problems[:config.limit]
    # a problem's seed follows from its place in the file, also when others are dropped
    problems = [{**problem, "index": i} for i, problem in enumerate(problems)]

    model = Transformer.from_pretrained(config.model, device, getattr(torch, config.dtype))
    prompts.follow_run(config)
    options = parse_template_kwargs(config.chat_template_kwargs)
    tokenizer = prompts.load_tokenizer(config.model, options)
    prompts.report_template(tokenizer, config.template, warn)
    kept = prompts.tokenize_prompts(
        problems, tokenizer, config.template, config.max_prompt_tokens, warn)

    config.threads = config.threads or machine.choose_threads()
    torch.set_num_threads(config.threads)
    sampler = Sampler(model, prompts.stop_ids(model, tokenizer), config.rows_at_once)
    return sampler, tokenizer, kept, len(problems) - len(kept)


def warn(line):
    """Print a line on stderr, above the bar; stdout holds the table alone."""
    tqdm.write(line, file=sys.stderr)


# --------------------------------------------------------------------------------- completions

def complete(config, sampler, tokenizer, problems, samples, temperature, bar):
    """Draw and grade `samples` completions of every problem, while the bar shows how far it is.

    Returns the grades of each problem (`grade`) in the file's order, and a dict of statistics over
    all completions: completion_length, truncated_frac and tokens_per_s."""
    grades = [None] * len(problems)
    drawn = {"completions": 0, "right": 0, "cut": 0, "tokens": 0}
    begin = time.perf_counter()

    # the longest prompts come first, so that memory peaks at once
    order = sorted(range(len(problems)), key=lambda i: -len(problems[i]["prompt"]))
    # a batch is larger than what is in the cache at once: its completions take turns there
    size = max(1, 4 * config.rows_at_once // samples)

    for first in range(0, len(order), size):
        batch = order[first:first + size]
        chosen = [problems[i] for i in batch]
        seeds = [(config.seed, problem["index"]) for problem in chosen]
        rollout, groups = draw_groups(
            sampler, tokenizer, chosen, samples, config.max_new_tokens, temperature, seeds,
            top_k=config.top_k, top_p=config.top_p)

        for i, texts in zip(batch, groups):
            grades[i] = grade(texts, problems[i]["answer"], problems[i].get("check"))
            drawn["right"] += sum(grades[i]["strict"]["right"])
        drawn["completions"] += len(rollout.lengths)
        drawn["cut"] += int((~rollout.finished).sum())
        drawn["tokens"] += int((rollout.lengths - rollout.prompt_lengths).sum())

        tokens_per_s = drawn["tokens"] / (time.perf_counter() - begin)
        accuracy = drawn["right"] / drawn["completions"]
        bar.set_postfix(accuracy=f"{accuracy:.3f}", tok_s=f"{tokens_per_s:.0f}", refresh=False)
        bar.update(len(rollout.lengths))

    if drawn["cut"] == drawn["completions"]:
        warn(f"warning: every completion was cut at --max-new-tokens {config.max_new_tokens}")
    statistics = {"completion_length": drawn["tokens"] / drawn["completions"],
                  "truncated_frac": drawn["cut"] / drawn["completions"],
                  "tokens_per_s": tokens_per_s}
    return grades, statistics


def grade(texts, gold, check=None):
    """Grade the completions of one problem, strictly and leniently.

    gold is the answer as text. check, a function of a completion, decides in its stead where the
    problem's task has one. Returns {"strict" | "lenient": {"right": [bool], "labels": [int]}}. For
    the vote equal labels are equal answers, and -1 is no answer."""
    checked = None
    if check is not None:
        checked = [bool(check(text)) for text in texts]

    # samples repeat each other, and so do the two kinds
    equal = functools.lru_cache(maxsize=None)(reward.equal)

    grades = {}
    for kind in KINDS:
        answers = [reward.extract_answer(text, lenient=kind == "lenient") for text in texts]
        right = checked
        if right is None:       # what reward.verify does
            right = [answer is not None and equal(answer, gold) for answer in answers]
        grades[kind] = {"right": right, "labels": vote_labels(answers, equal)}
    return grades


def evaluate(config):
    """Run the whole evaluation. Returns the dict that --json receives."""
    sampler, tokenizer, problems, dropped = start(config)

    total = len(problems) * (1 + config.samples)
    with tqdm(total=total, unit=" completions") as bar, sampler.loaded():
        bar.set_description("greedy")
        greedy, greedy_statistics = complete(config, sampler, tokenizer, problems, 1, 0.0, bar)
        bar.set_description(f"{config.samples} samples")
        sampled, sampled_statistics = complete(
            config, sampler, tokenizer, problems, config.samples, config.temperature, bar)

    rows = []
    for problem, one, many in zip(problems, greedy, sampled):
        rows.append({
            "id": problem["id"], "greedy_correct": one["strict"]["right"][0],
            "n": config.samples, "c": sum(many["strict"]["right"]),
            "greedy_correct_lenient": one["lenient"]["right"][0],
            "c_lenient": sum(many["lenient"]["right"])})

    return {"config": asdict(config), "num_problems": len(problems), "num_dropped": dropped,
            "strict": metrics(greedy, sampled, "strict"),
            "lenient": metrics(greedy, sampled, "lenient"),
            "greedy": greedy_statistics, "sampled": sampled_statistics, "problems": rows}


# -------------------------------------------------------------------------------------- output

def table(result):
    """Returns the result as plain text: the metrics with their errors, then the statistics."""
    config = result["config"]
    dropped = ""
    if result["num_dropped"]:
        dropped = f" ({result['num_dropped']} more dropped: prompt too long)"
    lines = [f"{config['model']} on {config['data']}: {result['num_problems']} problems{dropped}, "
             f"{config['samples']} samples, temperature {config['temperature']:g}, "
             f"top-p {config['top_p']:g}, top-k {config['top_k']}, seed {config['seed']}"]

    lines.append(f"{'':12}{'strict':>18}{'lenient':>20}")
    for name in result["strict"]:
        cells = []
        for kind in KINDS:
            mean = result[kind][name]["mean"]
            error = result[kind][name]["se"]
            shown = "     -" if error is None else f"{error:.4f}"
            cells.append(f"{mean:9.4f} ± {shown}")
        lines.append(f"{name:12}" + "  ".join(cells))

    lines.append(f"{'':12}{'greedy':>18}{'sampled':>20}")
    for name, digits in (("completion_length", 1), ("truncated_frac", 4), ("tokens_per_s", 0)):
        greedy = result["greedy"][name]
        sampled = result["sampled"][name]
        lines.append(f"{name:18}{greedy:12.{digits}f}{sampled:20.{digits}f}")
    return "\n".join(lines)


def show(result):
    """Print the table. One that fails is a warning if the numbers are in a file."""
    try:
        print(table(result))
    except Exception as error:
        if not result["config"]["json"]:
            raise
        warn(f"warning: the table was not printed ({dist.first_line(error)})")


def main(argv=None):
    with machine.program(lambda: "interrupted: no result written"):
        config = parse(argv)
        result = evaluate(config)
        if config.json:
            # "x" never overwrites, also when the file appeared in the meantime
            with open(config.json, "x", encoding="utf-8") as file:
                file.write(json.dumps(result, indent=1) + "\n")
        show(result)


if __name__ == "__main__":
    main()
