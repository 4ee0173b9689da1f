r"""Probe: how many completions a prompt? Ask the gradients of your own model on your own problems.

With B completions a step, should they be B/4 prompts of 4, or B/64 prompts of 64? More prompts show
more of the problems, larger groups know their mean better. For the gradient with a leave-one-out
baseline (docs/THEORY.md derives it) the expected squared error of one step is

    error(G) = (c1 G + c2 + c3 / (G - 1)) / B               least at  G* = 1 + sqrt(c3 / c1)

    c1   how much the prompts' own gradients differ: variance over prompts of grad p
    c2   the noise of a completion that stays even if the mean is known
    c3   the noise of the group's mean

All three follow from the scores s = grad log pi(completion) of some prompts with G completions
each. Pairs h_ij = (s_i - s_j)(r_i - r_j) / 2 have the mean grad p; products of two pairs that share
no, one or both of their completions have the means |grad p|^2, zeta_1 and zeta_2 above it, with
which 4 zeta_1 = c2 and 2 zeta_2 - 4 zeta_1 = c3. So no probability has to be known, and each
estimate is unbiased at any G of at least 4.

    python probe.py --model runs/NAME/model --data gsm8k --prompts 32 --group-size 16

Only inner products of scores count, so a score is kept as a sketch: random signs, then added up
into --sketch numbers, which leaves inner products right on average, and exact where the model is
that small. Of a run with LoRA give its adapter/ folder: then the gradients are the adapter's, as in
training. What the formula does not know: Adam, the clip, std-normalising, and that gradients of
several steps add up. Left out: several ranks. Needs rollout.py to draw, reward.py to grade,
theory.py for the curve.
"""
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine import machine      # before torch: it tells OpenMP's threads how to wait
import torch
from tqdm import tqdm

import evaluate
import reward
import theory
from config import (DEVICES, TEMPLATES, check_new_file, check_settings, command_line, setting)
from engine.checkpoint import write_whole
from model import trainable
from rollout import draw_groups

SIZES = (2, 4, 8, 16, 32, 64)           # of groups, in the table
PROMPTS_AT_ONCE = 8                     # in a rollout


@dataclass
class ProbeConfig:
    """The flags of the program, each with its default."""
    model: str = ""                             # checkpoint folder or hub id
    data: str = "arithmetic"                    # as in train.py: a task, a file or a mix
    levels: str = ""                            # of built-in tasks, easiest-hardest
    prompts: int = setting(32, least=3)         # N; the error of G* falls with their number
    group_size: int = setting(16, least=4)      # G of the probe; any G gives the same on average
    max_new_tokens: int = setting(256, least=1)
    temperature: float = setting(1.0, above=0)
    template: str = setting("auto", choices=TEMPLATES)  # of prompts, see prompts.py
    chat_template_kwargs: str = ""              # what the chat template shall read, as JSON
    sketch: int = setting(2 ** 18, least=2)     # numbers that a score is kept as
    json: str = ""                              # receives the numbers
    seed: int = setting(0, least=0)
    device: str = setting("", choices=DEVICES)  # cpu, cuda, npu; empty: the accelerator here
    threads: int = setting(0, least=0)          # CPU threads; 0: measured


# ---------------------------------------------------------------------------------- pure functions

def sketch(gradients, size, seed=0):
    """Returns one vector (size,) of a list of tensors, such that inner products stay.

    The tensors are laid end to end and cut into pieces of `size`. Each piece but the first is
    multiplied by random signs, and the pieces are added: a count sketch (Charikar, Chen and
    Farach-Colton, 2002). Exact where everything fits into one piece; else an inner product has the
    right mean, and an error of about |a| |b| / sqrt(size)."""
    flat = torch.cat([g.detach().flatten().float() for g in gradients])
    out = torch.zeros(size, device=flat.device)
    generator = torch.Generator(flat.device).manual_seed(seed)
    for start in range(0, len(flat), size):
        piece = flat[start:start + size]
        if start:
            signs = torch.empty(size, device=flat.device).bernoulli_(0.5, generator=generator)
            piece = piece * (2 * signs[:len(piece)] - 1)
        out[:len(piece)] += piece
    return out


def pair_products(products, rewards):
    """The mean product of two pairs of completions that share none, one or both: three numbers.

    products (G, G): inner products of the scores of one prompt's completions; rewards (G,), G at
    least 4. They are unbiased for |grad p|^2, |grad p|^2 + zeta_1 and |grad p|^2 + zeta_2."""
    G = len(rewards)
    first, second = np.triu_indices(G, 1)                           # the M = G (G - 1) / 2 pairs
    D = np.zeros((len(first), G))
    D[np.arange(len(first)), first] = 1
    D[np.arange(len(first)), second] = -1
    h = D * (D @ rewards)[:, None] / 2                              # (M, G): each pair in scores
    of_pairs = h @ products @ h.T                                   # (M, M)
    shared = abs(D) @ abs(D).T                                      # 0, 1 or 2 completions
    return [of_pairs[shared == count].mean() for count in (0, 1, 2)]


def constants(by_prompt, products):
    """c1, c2 and c3 from the `pair_products` (N, 3) of N prompts and the inner products (N, N) of
    their mean gradients, each the leave-one-out estimate of a prompt's grad p.

    c1 is the mean of |grad p|^2 less the square of the mean gradient, which is taken over pairs of
    different prompts."""
    none, one, both = np.mean(by_prompt, 0)
    N = len(products)
    mean_square = (products.sum() - products.trace()) / (N * (N - 1))
    c2 = 4 * (one - none)
    c3 = 2 * (both - none) - c2
    return none - float(mean_square), c2, c3


def best_size(c1, c3):
    """G* = 1 + sqrt(c3 / c1), or inf where no difference between prompts is seen."""
    if c1 <= 0 or c3 <= 0:
        return math.inf
    return theory.best_group_size(c1, c3)


def jackknife(by_prompt, products):
    """Standard error of log(G* - 1) over prompts, or inf where some set of N - 1 knows no G*.

    products (N, N): inner products of the prompts' mean gradients. Of the logarithm, because G* is
    a ratio of noisy numbers and its error is not symmetric."""
    N = len(by_prompt)
    values = []
    for left_out in range(N):
        rest = np.delete(np.arange(N), left_out)
        c1, _, c3 = constants(by_prompt[rest], products[np.ix_(rest, rest)])
        values.append(math.log(best_size(c1, c3) - 1))
    if not all(map(math.isfinite, values)):
        return math.inf
    return math.sqrt((N - 1) * np.var(values))


# --------------------------------------------------------------------------------------- the model

def scores_of(model, rollout, rows, size, temperature):
    """Sketches (rows, size) of grad log pi of whole completions, one backward each."""
    mask, vectors = rollout.completion_mask(), []
    parameters = trainable(model)
    for row in rows:
        length = int(rollout.lengths[row])
        tokens, on = rollout.tokens[row:row + 1, :length], mask[row:row + 1, :length]
        logp, _ = model.token_logps(tokens, on, temperature, [0])
        gradients = torch.autograd.grad((logp * on).sum(), parameters)
        vectors.append(sketch(gradients, size))
    return torch.stack(vectors)


def of_prompt(scores, rewards):
    """The `pair_products` and the mean gradient (k,) of a prompt: scores (G, k), rewards (G,)."""
    centred = torch.tensor(rewards - rewards.mean(), dtype=scores.dtype, device=scores.device)
    gradient = centred @ scores / (len(rewards) - 1)
    products = (scores @ scores.T).double().cpu().numpy()
    return pair_products(products, rewards), gradient.cpu()


def probe(config):
    """Draw, grade and differentiate. Returns the numbers that --json receives."""
    sampler, tokenizer, problems, _ = evaluate.start(evaluate.EvalConfig(
        model=config.model, data=config.data, levels=config.levels, train_seed=config.seed,
        template=config.template, chat_template_kwargs=config.chat_template_kwargs,
        device=config.device, dtype="float32", threads=config.threads))
    # not the first ones: files are often sorted by subject
    count = min(config.prompts, len(problems))
    problems = random.Random(config.seed).sample(problems, count)
    G, by_prompt, gradients, success = config.group_size, [], [], []

    with tqdm(total=len(problems), unit=" prompts", desc="probe") as bar:
        for begin in range(0, len(problems), PROMPTS_AT_ONCE):
            batch = problems[begin:begin + PROMPTS_AT_ONCE]
            seeds = [(config.seed, problem["index"]) for problem in batch]
            rollout, groups = draw_groups(sampler, tokenizer, batch, G, config.max_new_tokens,
                                          config.temperature, seeds)
            for i, r in enumerate(np.array(reward.correct(batch, groups), float)):
                products, gradient = np.zeros(3), torch.zeros(config.sketch)
                if r.min() != r.max():          # of equal rewards all of it is 0
                    scores = scores_of(sampler.model, rollout, range(i * G, (i + 1) * G),
                                       config.sketch, config.temperature)
                    products, gradient = of_prompt(scores, r)

                success.append(r.mean())
                by_prompt.append(products)
                gradients.append(gradient)
                bar.update()

    by_prompt, gradients = np.array(by_prompt), torch.stack(gradients).double().numpy()
    products = gradients @ gradients.T
    c1, c2, c3 = constants(by_prompt, products)
    best, error = best_size(c1, c3), jackknife(by_prompt, products)
    between = None
    if math.isfinite(best) and math.isfinite(error):
        between = [1 + (best - 1) * math.exp(sign * error) for sign in (-1, 1)]
    return {"config": asdict(config), "success": float(np.mean(success)),
            "informative": float(np.mean(by_prompt.any(1))), "c1": c1, "c2": c2, "c3": c3,
            "best_group_size": best if math.isfinite(best) else None, "between": between}


def table(result):
    """The result as text: G*, and what other sizes cost."""
    c1, c2, c3, best = (result[name] for name in ("c1", "c2", "c3", "best_group_size"))
    lines = [f"success {result['success']:.3f}, prompts with a signal {result['informative']:.2f}",
             f"c1 {c1:.4g} (prompts differ), c2 {c2:.4g} (completions), c3 {c3:.4g} (baseline)"]
    if not result["informative"]:
        return "\n".join([lines[0], "no prompt has right and wrong answers: give other problems"])
    if best is None:
        return "\n".join([*lines, "no difference between the prompts' gradients is seen in the "
                                  "noise: give more --prompts"])

    error = "cannot be told: more --prompts"
    if result["between"]:
        error = "{:.1f} to {:.1f}".format(*result["between"])
    lines += [f"G* = {best:.1f}, one standard error: {error}",
              "group size    squared error of a step at as many completions, the best is 1"]
    least = theory.gradient_mse(best, 1, c1, c2, c3)
    for G in SIZES:
        lines.append(f"{G:10}    {theory.gradient_mse(G, 1, c1, c2, c3) / least:.3f}")
    return "\n".join(lines)


def parse(argv=None):
    """Returns the checked command line. Raises ValueError, in one line, for wrong settings."""
    config = ProbeConfig(**command_line(ProbeConfig, __doc__, argv))
    check_settings(config)
    if not config.model:
        raise ValueError("give --model, a checkpoint folder or hub id")
    check_new_file("--json", config.json)
    return config


def main(argv=None):
    with machine.program(lambda: "interrupted: nothing was written"):
        config = parse(argv)
        result = probe(config)
        print(table(result))
        if config.json:
            write_whole(Path(config.json), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
