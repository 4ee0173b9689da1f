"""What each study runs: its starts, the flags of its runs, and what is looked at. study.py runs it.

    curricula    the five schedules of --curriculum, on the five levels of the yardstick
    unseen       GRPO on levels of which the start has seen no solution
    transfer     trained on each task alone and on the mix, evaluated on all
    leaderboard  GRPO, GTPO, off-policy, DPO; GRPO with an adaptive curriculum, and with refill
    group-size   G = 2 to 64 completions a prompt, with N G = 128 of them a step; and what probe.py
                 says of the model at the start, in the middle and at the end
    batch-size   N = 4 to 128 prompts a step, as many in all; learning rate as it is, or * sqrt(N);
                 the gradient's noise; also with GTPO and off-policy
    reuse        off-policy, K = 1 to 8 passes over as many fresh samples, half of the yardstick's;
                 beside K = 1 with higher learning rates, or epochs; its refinements at K = 4
    staleness    off-policy, weights that draw renewed every 1 to 64 steps
    lora         a pretrained model (--base) on arithmetic: LoRA of rank 1, 8 and 32, and full

A study of your own is a function of the settings (study.StudyConfig) that returns a Study, and a
line in STUDIES. The yardstick, on which most of them compare, is described in docs/tasks.md.
"""
import math
from dataclasses import dataclass, field
from statistics import mean, pstdev

import report
from config import CURRICULA, parse_levels


@dataclass
class Study:
    """What is run, and what of it is looked at."""
    starts: dict                    # {name: flags of sft.py}
    runs: dict                      # {name: flags of train.py}; START stands for a start's folder
    x: str = "step"                 # axis of the figure
    columns: list = field(default_factory=lambda: ["eval_pass@1"])      # of the log, at its end, or
                                                                        # names of MEASURES
    panels: list = field(default_factory=lambda: ["eval_pass@1"])       # keys that are drawn
    against: tuple = ()             # two columns: (what theory says, what was measured), drawn too
    ends: tuple = ()                # (a number that runs differ in, {line: {number: run}}): the
                                    # first column at the end of these, drawn over the number
    after: dict = field(default_factory=dict)   # {folder or file that appears: command that makes
                                                # it}, in this order; STUDY stands for the folder


LEVELS = "arithmetic:2-6"       # the yardstick: a start with two habits, which errs in its steps
YARDSTICK = ["--data", LEVELS, "--max-new-tokens", "128", "--prompts-per-step", "16",
             "--model", "START/weak"]
MIX = "arithmetic:2-4,boolean:2-6,family:2-4,truth:2-4,seating:3-4"


# ----------------------------------------------------------------------- what is computed of a log

def known(lines, *keys):
    """The lines of a log in which all these keys have a number (nan stands there as null)."""
    return [line for line in lines
            if all(line.get(key) is not None and math.isfinite(line[key]) for key in keys)]


def values_of(lines, key):
    """The numbers of a key in the lines of a log."""
    return [line[key] for line in known(lines, key)]


def noise_scale(lines):
    """Prompts a step at which the gradient's noise is as large as the gradient itself.

    N tr Cov(g) / |G|^2 of the N prompts of a step, with |G|^2 = E|g|^2 - tr Cov(g) (McCandlish et
    al., arXiv 1812.06162, B_simple); needs --variance-every. nan where the noise hides G."""
    estimates = known(lines, "grad_variance", "grad_norm")
    if not estimates:
        return math.nan
    noise = mean(line["grad_variance"] for line in estimates)
    signal = mean(line["grad_norm"] ** 2 for line in estimates) - noise
    prompts = estimates[0]["num_samples"] / estimates[0]["step"] / GROUP
    return prompts * noise / signal if signal > 0 else math.nan


def reward_swing(lines):
    """Standard deviation of the batch's mean reward over the last fifth of the steps."""
    rewards = values_of(lines, "reward")
    return pstdev(rewards[-max(2, len(rewards) // 5):])


def fall(lines):
    """How far the accuracy ends below the best of the run's evaluations."""
    accuracy = values_of(lines, "eval_pass@1")
    return max(accuracy) - accuracy[-1]


def samples_to(level):
    """A measure: the completions after which the held-out accuracy first reaches a level."""
    def measure(lines):
        reached = report.first_reach(report.curve(lines, "num_samples", "eval_pass@1"), level)
        return math.nan if reached is None else reached
    return measure


def ess_of_kl(lines):
    """exp(-2 KL), what theory says of `ess` for small drift (docs/THEORY.md, 24).

    ess is of whole completions, kl_pi_mu a mean over tokens: hence the length."""
    return mean(math.exp(-2 * line["kl_pi_mu"] * line["completion_length"])
                for line in known(lines, "kl_pi_mu", "completion_length"))


def cost_ratio(lines):
    """Seconds of drawing for one of training, over all updates of the step."""
    return sum(values_of(lines, "rollout_time")) / sum(values_of(lines, "train_time"))


GROUP = 8           # completions a prompt, where a study does not say
MEASURES = {"noise scale": noise_scale, "reward swing": reward_swing, "fall": fall,
            "samples to 0.6": samples_to(0.6), "samples to 0.7": samples_to(0.7),
            "mean ess": lambda lines: mean(values_of(lines, "ess") or [math.nan]),
            "exp(-2 KL)": ess_of_kl, "draw / train": cost_ratio}


# ------------------------------------------------------------------------------------- the studies

def weak_start(c):
    """A small model that tells the steps or guesses, and is often wrong at both."""
    return {"weak": ["--data", LEVELS, "--steps", 60 if c.quick else 330,
                     "--terse-steps", 10 if c.quick else 50, "--lr", 4e-3, "--muon-lr", 0.02,
                     "--problems", 400 if c.quick else 20000]}


def length(c, steps=100, problems=300, evaluations=4):
    """Flags of a run's length and of its evaluations, on so many held-out problems."""
    if c.quick:
        return ["--steps", 3, "--eval-every", 3, "--eval-problems", 20, "--eval-samples", 1,
                "--prompts-per-step", 8, "--problems", 200]
    return ["--problems", 8000, "--steps", steps, "--eval-every",
            max(1, steps // evaluations),
            "--eval-problems", problems, "--eval-samples", 1]


def by_level(data, key="eval_pass@1"):
    """The keys of the log for each level of one task, such as arithmetic:2-6."""
    task, _, levels = data.partition(":")
    easiest, hardest = parse_levels(levels)
    return [f"{key}/{task}:{level}" for level in range(easiest, hardest + 1)]


def curricula(c):
    runs = {name: [*YARDSTICK, *length(c), "--curriculum", name] for name in CURRICULA}
    columns = ["eval_pass@1", *by_level(LEVELS)]
    return Study(weak_start(c), runs, columns=columns,
                 panels=[*columns, *by_level(LEVELS, "share")])


def unseen(c):
    start = {"family": ["--data", "family:2-3", "--steps", 60 if c.quick else 2500, "--lr", 4e-3,
                        "--muon-lr", 0.02, "--problems", 400 if c.quick else 40000,
                        "--hidden-size", 64 if c.quick else 128]}
    levels = "family:2-6"
    runs = {"grpo": ["--model", "START/family", "--data", levels, "--lr", "5e-4",
                     "--max-new-tokens", 128, *length(c, problems=600)]}
    columns = ["eval_pass@1", *by_level(levels)]
    return Study(start, runs, columns=columns, panels=columns)


def transfer(c):
    start = {"mix": ["--data", MIX, "--steps", 60 if c.quick else 1200,
                     "--terse-steps", 10 if c.quick else 120,
                     "--problems", 400 if c.quick else 20000,
                     "--lr", 4e-3, "--muon-lr", 0.02, "--hidden-size", 64 if c.quick else 160,
                     "--vocab-size", 768]}
    tasks = [part.partition(":")[0] for part in MIX.split(",")]
    trained = {**dict(zip(tasks, MIX.split(","))), "mix": MIX}
    runs = {name: ["--model", "START/mix", "--data", data, "--eval-data", MIX,
                   "--max-new-tokens", "128", *length(c, 60, problems=600)]
            for name, data in trained.items()}
    of_tasks = [f"eval_pass@1/{task}" for task in tasks]
    return Study(start, runs, columns=["eval_pass@1", *of_tasks], panels=of_tasks)


def group_size(c):
    runs = {}
    for G in (2, 8) if c.quick else (2, 4, 8, 16, 32, 64):
        runs[f"G{G}"] = [*YARDSTICK, *length(c), "--group-size", G,
                         "--prompts-per-step", 128 // G]

    # what the gradients say: of the start, and of models on the way of GRPO with G = 8
    after = {}
    models = {"start": "START/weak"}
    for name, steps in (("middle", 50), ("end", 100)):
        models[name] = f"STUDY/{name}/model"
        after[models[name]] = ["train.py", *YARDSTICK, *length(c, steps), "--out", f"STUDY/{name}"]
    for name, model in models.items():
        after[f"STUDY/probe-{name}.json"] = [
            "probe.py", "--model", model, "--data", LEVELS, "--max-new-tokens", 128,
            "--prompts", 8 if c.quick else 128, "--group-size", 4 if c.quick else 16,
            "--json", f"STUDY/probe-{name}.json"]
    ends = {"GRPO": {int(name[1:]): name for name in runs}}
    return Study(weak_start(c), runs, x="num_samples",
                 columns=["eval_pass@1", "frac_reward_zero_std"], after=after,
                 ends=("completions a prompt (G), 128 a step", ends))


def batch_size(c):
    kinds = {"": "lr 2e-4", "-scaled": "lr * sqrt(N / 16)", "-gtpo": "GTPO",
             "-offpolicy": "off-policy"}
    runs, ends = {}, {line: {} for line in kinds.values()}
    for N in (16, 4) if c.quick else (16, 4, 64, 128):
        steps = 3 if c.quick else 1536 // N
        settings = {"": []}
        if N != 16:
            settings["-scaled"] = ["--lr", f"{2e-4 * math.sqrt(N / 16):.3g}"]
        if N != 64:                     # the others at the ends and in the middle
            settings |= {f"-{algo}": ["--algo", algo] for algo in ("gtpo", "offpolicy")}

        for kind, flags in settings.items():
            name = f"N{N}{kind}"
            runs[name] = [*YARDSTICK, *length(c, steps), "--prompts-per-step", N,
                          "--warmup-steps", max(1, 80 // N),
                          "--variance-every", max(1, steps // 50), *flags]
            ends[kinds[kind]][N] = name
    ends[kinds["-scaled"]][16] = "N16"          # there the two rates are one

    return Study(weak_start(c), runs, x="num_samples",
                 columns=["eval_pass@1", "fall", "reward swing", "noise scale", "seconds"],
                 ends=("prompts a step (N), 1536 in all", ends))


def reuse(c):
    off = [*YARDSTICK, *length(c, 50, evaluations=10), "--algo", "offpolicy", "--replay-ratio"]
    runs = {f"K{K}": [*off, K] for K in ((1, 2) if c.quick else (1, 2, 4, 8))}
    # as much movement a sample without a buffer: is it that?
    runs |= {"K1-lr-4e-4": [*off, 1, "--lr", "4e-4"], "K1-lr-8e-4": [*off, 1, "--lr", "8e-4"],
             "K1-4-epochs": [*off, 1, "--epochs", 4]}
    K = 2 if c.quick else 4
    runs |= {f"K{K}-ess-lr": [*off, K, "--ess-lr"],
             f"K{K}-loglinear": [*off, K, "--prox", "loglinear"],
             f"K{K}-weighted-baseline": [*off, K, "--weighted-baseline"]}
    return Study(weak_start(c), runs, x="num_samples",
                 columns=["eval_pass@1", "samples to 0.6", "samples to 0.7", "mean ess",
                          "exp(-2 KL)", "draw / train", "seconds"],
                 panels=["eval_pass@1", "ess"], against=("exp(-2 KL)", "mean ess"))


def staleness(c):
    runs = {f"v{v}": [*YARDSTICK, *length(c, evaluations=10), "--algo", "offpolicy",
                      "--replay-ratio", 1,
                      "--sync-every", v] for v in ((1, 2) if c.quick else (1, 4, 16, 64))}
    return Study(weak_start(c), runs, x="num_samples",
                 columns=["eval_pass@1", "samples to 0.6", "samples to 0.7", "mean ess",
                          "exp(-2 KL)", "fall"], panels=["eval_pass@1", "ess"],
                 against=("exp(-2 KL)", "mean ess"))


def leaderboard(c):
    more = {"grpo": [], "gtpo": ["--algo", "gtpo"], "offpolicy": ["--algo", "offpolicy"],
            "dpo": ["--algo", "dpo", "--sft-weight", 1],
            "grpo-adaptive": ["--curriculum", "adaptive"], "grpo-refill": ["--refill", 2]}
    runs = {name: [*YARDSTICK, *length(c), *flags] for name, flags in more.items()}
    return Study(weak_start(c), runs, columns=["eval_pass@1", "num_samples", "seconds"])


def lora(c):
    start = {"base": ["--model", c.base, "--data", "arithmetic:2-4", "--template", "plain",
                      "--lr", "1e-4", "--steps", 3 if c.quick else 60, "--terse-steps", 12,
                      "--problems", 400 if c.quick else 4000]}
    flags = ["--model", "START/base", "--data", "arithmetic:4-5", "--template", "plain",
             *length(c, 12, problems=100), "--eval-every", 12,
             "--prompts-per-step", 8, "--warmup-steps", 2, "--max-new-tokens", 64,
             "--micro-batch-tokens", 2048]
    runs = {"full": [*flags, "--lr", "2e-5"]}
    runs |= {f"rank{rank}": [*flags, "--lora-rank", rank, "--lr", "3e-4"] for rank in (1, 8, 32)}
    of_levels = by_level("arithmetic:4-5")
    return Study(start, runs, columns=["eval_pass@1", "eval_greedy", *of_levels, "seconds"],
                 panels=["eval_pass@1", "eval_greedy", *of_levels])


STUDIES = {"curricula": curricula, "unseen": unseen, "transfer": transfer,
           "leaderboard": leaderboard, "group-size": group_size, "batch-size": batch_size,
           "reuse": reuse, "staleness": staleness, "lora": lora}
