"""Accuracy of a checkpoint on a problem file: greedy, and with K samples a problem avg@k, pass@k and maj@k.

    avg@K    mean over all samples
    pass@k   1 - C(n-c, k) / C(n, k): chance that k of the n samples drawn, c of them right, hold a right one. Unbiased
             (Chen et al., 2107.03374); the plug-in 1 - (1 - c/n)^k is too low
    maj@k    chance that the most frequent answer of k samples is right (self-consistency, Wang et al., 2203.11171)

Each is a mean over problems, +- its standard error over problems. Answers are read strictly, as rewards are, and
leniently (the last number in the text, if no answer is marked): a gap between the two columns is a matter of format.

    python evaluate.py --model runs/NAME/model --data arithmetic --samples 8 --json eval.json

A problem's completions depend on --seed and its place in the file, not on what shares its batch (up to rounding, that
can decide between two nearly equal logits). Left out: several processes; few-shot prompts; several seeds in one run.
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
import prompts
import dist
import reward
from config import check_settings, command_line, parse_levels, refuse_torchrun
from model import Transformer
from report import standard_error
from rollout import Sampler

SUBSETS = 1000                          # maj@k looks at all k-subsets up to this number, else at so many random ones
ENDLESS = 1000                          # problems of the built-in task without --limit
KINDS = ("strict", "lenient")


@dataclass
class EvalConfig:
    model: str = ""                     # checkpoint folder or hub id
    data: str = "arithmetic"            # arithmetic, gsm8k, math (their test splits), or a .jsonl file
    json: str = ""                      # receives the result; empty: only the table on stdout
    samples: int = 8                    # K completions a problem, besides the greedy one
    temperature: float = 1.0            # of the samples
    top_p: float = 1.0                  # of the samples; below 1: nucleus sampling
    top_k: int = 0                      # of the samples; 0: the whole vocabulary
    max_new_tokens: int = 256           # a longer completion is cut and counted in truncated_frac
    max_prompt_tokens: int = 512        # problems with longer prompts are left out, and counted as dropped
    limit: int = 0                      # only the first problems of the file; 0: all (arithmetic: 1000)
    template: str = "auto"              # prompt: auto, chat, plain, reasoning (prompts.prompt_text)
    levels: str = "4-6"                 # fewest-most steps of an arithmetic story
    seed: int = 0                       # of the samples; the problems stay the same
    device: str = ""                    # cpu, cuda, npu; empty: the accelerator that is here
    dtype: str = ""                     # float32, bfloat16; empty: float32 on cpu, else bfloat16
    rows_at_once: int = 1024            # completions drawn at the same time, at most; memory may allow fewer
    threads: int = 0                    # CPU threads; 0: measured


# ------------------------------------------------------------------------------------------------------- metrics

def pass_at_k(n, c, k):
    """Chance that k of n samples, drawn without replacement, hold at least one of the c right ones.

    Args: counts, 0 <= c <= n and 1 <= k <= n. Returns: a float in [0, 1], 1 - C(n-c, k) / C(n, k) as the product
    1 - prod_{j=n-c+1..n} (1 - k/j), which does not overflow (Chen et al., 2107.03374). Raises: ValueError."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 if n - c < k else 1.0 - math.prod(1.0 - k / j for j in range(n - c + 1, n + 1))


def vote_labels(answers, equal=reward.equal):
    """Answers (n,), text or None -> labels (n,): the number of the answer's group, -1 for None.

    An answer joins the first group whose first member it equals; reward.equal is no strict equivalence (12% equals
    both 12 and 0.12, which differ), so the order of the samples can matter in such cases."""
    label, leaders = {None: -1}, []
    for answer in answers:
        if answer not in label:
            label[answer] = next((i for i, leader in enumerate(leaders) if equal(answer, leader)), len(leaders))
            if label[answer] == len(leaders):
                leaders.append(answer)
    return [label[answer] for answer in answers]


def majority_at_k(labels, right, k):
    """Chance that the most frequent answer of k of the n samples is right; without any answer 0.

    Args: labels (n,) integers, equal for equal answers, -1 (no answer) casts no vote; right (n,) 0 or 1; 1 <= k <= n.
    Tied answers share the credit. Returns: a float in [0, 1], the mean over all k-subsets of the samples, or over
    SUBSETS random ones (fixed seed) where there are more. Raises: ValueError."""
    labels, right = np.asarray(labels), np.asarray(right, float)
    if labels.shape != right.shape or not 1 <= k <= len(labels):
        raise ValueError(f"majority_at_k needs 1 <= k <= n and equal lengths, not k={k}, {labels.shape}, {right.shape}")
    votes_of = (labels[:, None] == np.unique(labels[labels >= 0])).astype(np.float32)   # (n, groups)
    if not votes_of.size:
        return 0.0
    credit = right @ votes_of / votes_of.sum(0)             # (groups,) 0 or 1, as far as equality is an equivalence
    votes = subsets(len(labels), k) @ votes_of              # (subsets, groups)
    top = (votes == votes.max(1, keepdims=True)) & (votes > 0)
    return float((top @ credit / np.maximum(top.sum(1), 1)).mean())


@functools.lru_cache(maxsize=None)
def subsets(n, k):
    """k-subsets of n samples as rows of 0/1 float32 (subsets, n): all of them, or SUBSETS random ones."""
    if math.comb(n, k) > SUBSETS:
        order = np.random.default_rng(0).random((SUBSETS, n)).argsort(1)    # a random permutation a row
        return (order < k).astype(np.float32)
    rows = np.array(list(itertools.combinations(range(n), k)))
    return (rows[:, :, None] == np.arange(n)).any(1).astype(np.float32)


def metrics(greedy, sampled, kind):
    """Graded completions of N problems -> {name: {"mean", "se"}} for one of KINDS; names as in the file's docstring."""
    n = len(sampled[0][kind]["right"])
    counts = [sum(s[kind]["right"]) for s in sampled]
    ks = sorted({n, *(2 ** i for i in range(n.bit_length()))})            # 1, 2, 4, ... and n itself
    values = {"greedy": [sum(g[kind]["right"]) for g in greedy], f"avg@{n}": [c / n for c in counts]}
    values |= {f"pass@{k}": [pass_at_k(n, c, k) for c in counts] for k in ks}
    values |= {f"maj@{k}": [majority_at_k(s[kind]["labels"], s[kind]["right"], k) for s in sampled] for k in ks[1:]}
    return {name: {"mean": sum(v) / len(v), "se": standard_error(v)} for name, v in values.items()}


# ------------------------------------------------------------------------------------------------------ settings

def parse(argv=None):
    """Command line -> EvalConfig."""
    return check(EvalConfig(**command_line(EvalConfig, __doc__, argv)))


def check(c):
    """ValueError, one line, for settings that cannot work: before anything is loaded, let alone generated."""
    least = {"samples": 1, "max_new_tokens": 1, "max_prompt_tokens": 1, "rows_at_once": 1, "limit": 0, "top_k": 0}
    check_settings(c, {}, least)
    if not 0 < c.temperature < math.inf:
        raise ValueError(f"--temperature {c.temperature}: must be above 0 (the greedy accuracy is always reported)")
    if not 0 < c.top_p <= 1:
        raise ValueError(f"--top-p {c.top_p}: must be above 0 and at most 1")
    if not c.model:
        raise ValueError("give --model, a checkpoint folder or hub id")
    refuse_torchrun("evaluate.py")
    if c.json and Path(c.json).exists():
        raise ValueError(f"--json {c.json} already exists: choose another file, results are never overwritten")
    if c.json and not os.access(Path(c.json).parent, os.W_OK):      # now, not after hours of sampling
        raise ValueError(f"--json {c.json}: its folder does not exist or cannot be written to")
    return c


def start(c):
    """(sampler, tokenizer, problems with prompts in the file's order, number of dropped ones); completes c."""
    device = dist.setup(c.device)
    c.device, c.dtype = str(device), c.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    levels = parse_levels(c.levels)
    problems = data.load_problems(c.data, "test", 0, levels, c.limit or ENDLESS, warn)
    problems = [{**p, "index": i} for i, p in enumerate(problems[:c.limit or None])]
    model = Transformer.from_pretrained(c.model, device, getattr(torch, c.dtype))
    tokenizer = prompts.load_tokenizer(c.model)
    kept = prompts.tokenize_prompts(problems, tokenizer, c.template, c.max_prompt_tokens, warn)
    c.threads = c.threads or machine.choose_threads()
    torch.set_num_threads(c.threads)
    return Sampler(model, prompts.stop_ids(model, tokenizer), c.rows_at_once), tokenizer, kept, len(problems) - len(kept)


def warn(line):
    """On stderr, above the bar: stdout holds the table alone."""
    tqdm.write(line, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- completions

def complete(c, sampler, tokenizer, problems, samples, temperature, bar):
    """`samples` completions of every problem, graded: (one dict a problem in the file's order, their statistics)."""
    graded, begin = [None] * len(problems), time.perf_counter()
    lengths, cut, right, rows = 0, 0, 0, 0
    order = sorted(range(len(problems)), key=lambda i: -len(problems[i]["prompt"]))     # so that memory peaks at once
    size = max(1, 4 * c.rows_at_once // samples)        # more than are in the cache at once: they take turns there
    for part in (order[k:k + size] for k in range(0, len(order), size)):
        rollout = sampler.generate([problems[i]["prompt"] for i in part], samples, c.max_new_tokens, temperature,
                                   seed=[(c.seed, problems[i]["index"]) for i in part], top_k=c.top_k, top_p=c.top_p)
        texts = tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
        for i, k in zip(part, range(0, len(texts), samples)):
            graded[i] = grade(texts[k:k + samples], problems[i]["answer"])
            right += sum(graded[i]["strict"]["right"])
        lengths += int((rollout.lengths - rollout.prompt_lengths).sum())
        cut, rows = cut + int((~rollout.finished).sum()), rows + len(texts)
        rate = lengths / (time.perf_counter() - begin)
        bar.set_postfix(accuracy=f"{right / rows:.3f}", tok_s=f"{rate:.0f}", refresh=False)
        bar.update(len(texts))
    if cut == rows:
        warn(f"warning: every completion was cut at --max-new-tokens {c.max_new_tokens}")
    return graded, {"completion_length": lengths / rows, "truncated_frac": cut / rows, "tokens_per_s": rate}


def grade(texts, gold):
    """Completions of one problem -> {"strict" | "lenient": {"right": [bool], "labels": [int, for the vote]}}."""
    equal = functools.lru_cache(maxsize=None)(reward.equal)     # samples repeat each other, and so do the two kinds
    out = {}
    for kind in KINDS:
        answers = [reward.extract_answer(text, lenient=kind == "lenient") for text in texts]
        right = [a is not None and equal(a, gold) for a in answers]             # what reward.verify does
        out[kind] = {"right": right, "labels": vote_labels(answers, equal)}
    return out


def evaluate(c):
    """The whole evaluation -> the dict that --json receives."""
    sampler, tokenizer, problems, dropped = start(c)
    with tqdm(total=len(problems) * (1 + c.samples), unit=" completions") as bar, sampler.loaded():
        bar.set_description("greedy")
        greedy, greedy_statistics = complete(c, sampler, tokenizer, problems, 1, 0.0, bar)
        bar.set_description(f"{c.samples} samples")
        sampled, sampled_statistics = complete(c, sampler, tokenizer, problems, c.samples, c.temperature, bar)
    rows = [{"id": p["id"], "greedy_correct": g["strict"]["right"][0], "n": c.samples, "c": sum(s["strict"]["right"]),
             "greedy_correct_lenient": g["lenient"]["right"][0], "c_lenient": sum(s["lenient"]["right"])}
            for p, g, s in zip(problems, greedy, sampled)]
    return {"config": asdict(c), "num_problems": len(problems), "num_dropped": dropped,
            **{kind: metrics(greedy, sampled, kind) for kind in KINDS},
            "greedy": greedy_statistics, "sampled": sampled_statistics, "problems": rows}


# --------------------------------------------------------------------------------------------------------- output

def table(result):
    """The result as lines of plain text."""
    c = result["config"]
    dropped = f" ({result['num_dropped']} more dropped: prompt too long)" if result["num_dropped"] else ""
    lines = [f"{c['model']} on {c['data']}: {result['num_problems']} problems{dropped}, {c['samples']} samples, "
             f"temperature {c['temperature']:g}, top-p {c['top_p']:g}, top-k {c['top_k']}, seed {c['seed']}",
             f"{'':12}{'strict':>18}{'lenient':>20}"]
    for name in result["strict"]:
        cells = [result[kind][name] for kind in KINDS]
        errors = ["     -" if cell["se"] is None else f"{cell['se']:.4f}" for cell in cells]
        lines.append(f"{name:12}" + "  ".join(f"{x['mean']:9.4f} ± {e}" for x, e in zip(cells, errors)))
    lines.append(f"{'':12}{'greedy':>18}{'sampled':>20}")
    for name, digits in (("completion_length", 1), ("truncated_frac", 4), ("tokens_per_s", 0)):
        lines.append(f"{name:18}{result['greedy'][name]:12.{digits}f}{result['sampled'][name]:20.{digits}f}")
    return "\n".join(lines)


def main(argv=None):
    try:
        c = parse(argv)
        result = evaluate(c)
        print(table(result))
        if c.json:
            with open(c.json, "x", encoding="utf-8") as file:       # "x": also when it appeared in the meantime
                file.write(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: no result written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
