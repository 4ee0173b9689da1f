"""What each study runs: its starts, the flags of its runs, and what is looked at. study.py runs it.

    curricula    the five schedules of --curriculum, on the five levels of the yardstick
    unseen       GRPO on levels of which the start has seen no solution
    transfer     trained on each task alone and on the mix, evaluated on all
    leaderboard  GRPO, GTPO, off-policy, DPO; GRPO with an adaptive curriculum, and with refill
    group-size   G = 2 to 64 completions a prompt, with N G = 128 of them a step; and what probe.py
                 says of the model at the start, in the middle and at the end
    batch-size   N = 4 to 128 prompts a step, as many in all; learning rate as it is, or * sqrt(N)
    reuse        off-policy, K = 1 to 8 passes over as many fresh samples; its refinements at K = 4
    staleness    off-policy, weights that draw renewed every 1 to 64 steps
    lora         a pretrained model (--base) on arithmetic: LoRA of rank 1, 8 and 32, and full

A study of your own is a function of the settings (study.StudyConfig) that returns a Study, and a
line in STUDIES. The yardstick, on which most of them compare, is described in docs/tasks.md.
"""
import math
from dataclasses import dataclass, field

from config import CURRICULA, parse_levels


@dataclass
class Study:
    """What is run, and what of it is looked at."""
    starts: dict                    # {name: flags of sft.py}
    runs: dict                      # {name: flags of train.py}; START stands for a start's folder
    x: str = "step"                 # axis of the figure
    columns: list = field(default_factory=lambda: ["eval_pass@1"])      # of the log, at its end
    panels: list = field(default_factory=lambda: ["eval_pass@1"])       # keys that are drawn
    after: dict = field(default_factory=dict)   # {folder or file that appears: command that makes
                                                # it}, in this order; STUDY stands for the folder


LEVELS = "arithmetic:2-6"       # the yardstick: a start with two habits, which errs in its steps
YARDSTICK = ["--data", LEVELS, "--max-new-tokens", "128", "--prompts-per-step", "16",
             "--model", "START/weak"]
MIX = "arithmetic:2-4,boolean:2-6,family:2-4,truth:2-4,seating:3-4"


def weak_start(c):
    """A small model that tells the steps or guesses, and is often wrong at both."""
    return {"weak": ["--data", LEVELS, "--steps", 60 if c.quick else 330,
                     "--terse-steps", 10 if c.quick else 50, "--lr", 4e-3, "--muon-lr", 0.02,
                     "--problems", 400 if c.quick else 20000]}


def length(c, steps=100, problems=300):
    """Flags of a run's length and of its evaluations, on so many held-out problems."""
    if c.quick:
        return ["--steps", 3, "--eval-every", 3, "--eval-problems", 20, "--eval-samples", 1,
                "--prompts-per-step", 8, "--problems", 200]
    return ["--problems", 8000, "--steps", steps, "--eval-every", max(1, steps // 4),
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
    return Study(weak_start(c), runs, x="num_samples",
                 columns=["eval_pass@1", "frac_reward_zero_std"], after=after)


def batch_size(c):
    runs = {}
    for N in (4, 16) if c.quick else (4, 16, 64, 128):
        steps = 3 if c.quick else 1536 // N
        for name, lr in ((f"N{N}", 2e-4), (f"N{N}-scaled", 2e-4 * math.sqrt(N / 16))):
            if N == 16 and name != "N16":       # the same
                continue
            runs[name] = [*YARDSTICK, *length(c, steps),
                          "--prompts-per-step", N, "--lr", f"{lr:.3g}",
                          "--warmup-steps", max(1, 80 // N)]
    return Study(weak_start(c), runs, x="num_samples", columns=["eval_pass@1", "reward"])


def reuse(c):
    off = [*YARDSTICK, *length(c), "--algo", "offpolicy", "--replay-ratio"]
    runs = {f"K{K}": [*off, K] for K in ((1, 2) if c.quick else (1, 2, 4, 8))}
    K = 2 if c.quick else 4
    runs |= {f"K{K}-ess-lr": [*off, K, "--ess-lr"],
             f"K{K}-loglinear": [*off, K, "--prox", "loglinear"],
             f"K{K}-weighted-baseline": [*off, K, "--weighted-baseline"]}
    return Study(weak_start(c), runs, x="num_samples",
                 columns=["eval_pass@1", "ess", "kl_pi_mu", "seconds"],
                 panels=["eval_pass@1", "ess"])


def staleness(c):
    runs = {f"v{v}": [*YARDSTICK, *length(c), "--algo", "offpolicy", "--replay-ratio", 1,
                      "--sync-every", v] for v in ((1, 2) if c.quick else (1, 4, 16, 64))}
    return Study(weak_start(c), runs, x="num_samples",
                 columns=["eval_pass@1", "ess", "kl_pi_mu"], panels=["eval_pass@1", "ess"])


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
