"""Every setting of train.py with its default, what makes a combination of them wrong, and the command line of all programs.

`Config` is the only place of defaults; each field is a flag (`--group-size` for group_size). Wrong settings are one line
that says what to give instead, and so is a setting that would do nothing: silence would look like an effect.
"""
import argparse
import inspect
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import offpolicy
from model import ModelConfig


# --------------------------------------------------------------------------------- a dataclass as a command line

class Parser(argparse.ArgumentParser):
    """argparse, but an error is a ValueError of one line instead of a page of usage."""

    def error(self, message):
        raise ValueError(f"{message}; see --help")


def command_line(config_class, description, argv=None):
    """The flags given on the command line, {field: value}; every field of the dataclass is a flag with dashes."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    comments, group, group_of = {}, parser, {}          # comments become the help, sections its groups
    line = r"^    (?:(\w+): [^#\n]*(?:# (.*))?|# (.*))$"
    for name, comment, section in re.findall(line, inspect.getsource(config_class), re.M):
        group = parser.add_argument_group(section) if section else group
        comments[name], group_of[name] = comment, group
    for f in fields(config_class):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        help_text = f"{comments.get(f.name, '')} [{f.default}]".strip().replace("%", "%%")
        group_of[f.name].add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=help_text, **kind)
    return vars(parser.parse_args(argv))


SHARED_CHOICES = {"device": ("", "cpu", "cuda", "npu"), "dtype": ("", "float32", "bfloat16"),
                  "template": ("auto", "chat", "plain", "reasoning")}        # of fields that several programs have
SHARED_LEAST = {"seed": 0, "threads": 0}


def check_settings(config, choices, least):
    """ValueError, one line, when a field is not among its choices {field: values} or below its bound {field: number}.

    The fields that the programs share (above, and levels) are checked where the config has them."""
    flag = {f.name: "--" + f.name.replace("_", "-") for f in fields(config)}
    choices = {**choices, **{name: allowed for name, allowed in SHARED_CHOICES.items() if name in flag}}
    least = {**least, **{name: low for name, low in SHARED_LEAST.items() if name in flag}}
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{flag[name]} {getattr(config, name)}: choose {', '.join(filter(None, allowed))}")
    for name in flag:
        if isinstance(getattr(config, name), float) and not math.isfinite(getattr(config, name)):
            raise ValueError(f"{flag[name]} {getattr(config, name)}: must be a finite number")
    for name, low in least.items():
        if not getattr(config, name) >= low:
            raise ValueError(f"{flag[name]} {getattr(config, name)}: must be at least {low}")
    if "levels" in flag:
        parse_levels(config.levels)


def refuse_torchrun(program):
    """ValueError when a program of one process was started as one of several."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{program} is one process: start it with python, not torchrun")


def parse_levels(text):
    """"4-6" -> (4, 6), fewest and most steps of a story of the built-in task."""
    low, dash, high = text.partition("-")
    if not (dash and low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise ValueError(f"--levels {text}: give fewest-most steps, such as 4-6")
    return int(low), int(high)


# ---------------------------------------------------------------------------------------------------- of train.py


@dataclass
class Config:
    # what
    algo: str = "grpo"                  # the objective: grpo, gtpo, offpolicy
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
    rows_at_once: int = 1024            # completions drawn at the same time, at most; memory may allow fewer
    template: str = "auto"              # prompt: auto, chat, plain, reasoning (prompts.prompt_text)
    # rewards: 1 for a verified answer, plus
    format_reward: float = 0.0          # weight of the <reasoning>/<answer> form
    consistency_reward: float = 0.0     # weight of an answer that is the reasoning's last result
    # objective (grpo.py)
    advantage_scale: str = ""           # std, none (Dr. GRPO), loo (RLOO), batch; empty: std, with gtpo none
    unbiased_std: bool = False          # std with G - 1, as TRL and verl
    clip_low: float = 0.2
    clip_high: float = 0.2              # 0.28: DAPO's clip-higher
    ratio_level: str = "token"          # token, sequence (GSPO: clip about 3e-4)
    dual_clip: float = 0.0              # 3.0: verl's bound for negative advantages; 0: none
    aggregation: str = ""               # token (DAPO), sequence (DeepSeekMath; gtpo), constant (Dr. GRPO); empty: token
    zero_variance: str = "drop"         # groups of equal rewards: drop, keep (in the normalizer)
    mask_truncated: bool = False        # leave cut completions out of the loss
    beta: float = 0.0                   # weight of the KL to the starting model; above 0 loads a frozen reference
    kl_kind: str = "k3"                 # k1, k2, k3, k3_is
    # gtpo only (gtpo.py)
    gtpo_gamma: float = 0.005           # entropy penalty; the official code's 0.1 is for rewards of 0 to 20
    gtpo_amplify: float = 2.0           # weight of conflict tokens in positive rows
    gtpo_cap: float = 2.0               # largest weight of a token in both runs; 0: no bound
    gtpo_ratio: bool = True             # pi / mu for several updates a rollout; else 1
    gtpo_official: bool = False         # the official code instead of the published objective (also set --gtpo-gamma)
    # offpolicy only (offpolicy.py)
    sync_every: int = 1                 # v: steps between updates of the weights that draw completions
    replay_ratio: int = 2               # K: passes a rollout, one over fresh groups and K - 1 over the buffer
    correction: str = "decoupled"       # decoupled (ratio to prox, importance weights), bypass (ratio to mu)
    importance: str = "truncated"       # none, standard, clipped, truncated, masked, self_normalized, retrace, tempered
    importance_level: str = "sequence"  # token, sequence, geometric
    importance_cap: float = 2.0         # largest weight of clipped, truncated, masked
    importance_low: float = 0.0         # least weight of clipped (0: 1 / cap) and masked
    importance_normalize: str = ""      # batch, group: weights of mean 1
    trace: float = 1.0                  # of retrace and tempered
    trust_region: str = ""              # sequence, token, second_moment: leave out what has drifted
    trust_delta: float = 0.0            # sequence: nats a token, token: probability; 0: 0.2 (second_moment: 0.04)
    kl_limit: float = 0.0               # nats a token: above this KL(pi||mu) the reuse of a step ends; 0: never
    adaptive_clip: bool = False         # widen and narrow the clip to hold --kl-limit
    adaptive_replay: bool = False       # let ESS (below half) and --kl-limit choose K, up to --replay-ratio
    buffer_groups: int = 512            # capacity in groups
    buffer_mb: float = 0.0              # and in megabytes; 0: no bound
    max_staleness: int = 32             # optimizer updates after which a group leaves; 0: never
    max_reuse: int = 0                  # draws after which it leaves; 0: never
    min_ess: float = 0.0                # least share of effective sequences at its last replay, else it leaves
    priority: float = 0.0               # alpha: draw by (reward std x exp(-age / 16 updates))^alpha; usual 0.6, 0: uniform
    priority_beta: float = 0.4          # its bias correction at the start, rising to 1 at --steps
    # optimisation
    steps: int = 60                     # rollouts
    epochs: int = 1                     # passes over a batch: the rollout, with offpolicy also each batch from the buffer
    minibatches: int = 1                # optimizer steps a pass
    lr: float = 1e-4                    # for the default small model; 1e-6 is usual for billions of parameters
    warmup_steps: int = 5               # linear
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    micro_batch_tokens: int = 8192      # tokens of a forward pass, a group's prompt counted once; memory, not mathematics
    activation_checkpointing: bool = False   # less memory, a third more time
    # evaluation and output
    eval_every: int = 10                # steps; also before the first and after the last
    eval_problems: int = 200            # held-out problems
    eval_samples: int = 4               # completions each, for pass@1 at the training temperature
    save_every: int = 20                # steps between checkpoints
    keep_checkpoints: int = 2           # the newest ones stay
    variance_every: int = 0             # steps between estimates of the gradient's variance; 0: none
    # the built-in task
    levels: str = "4-6"                 # fewest-most steps of a story
    warm_start_steps: int = 1400        # supervised steps before the default run (sft.py)
    # machine
    kv_memory_mb: float = 0.0           # for keys and values while sampling, a process; 0: 80 % of what is free
    graph: str = ""                     # replay sampling steps as device graphs: on, off; empty: on with cuda (on with npu
                                        # gives up its attention kernel)
    device: str = ""                    # cpu, cuda, npu; empty: the accelerator that is here
    dtype: str = ""                     # float32, bfloat16; empty: float32 on cpu, else bfloat16 (master stays float32)
    threads: int = 0                    # CPU threads; 0: measured
    # several processes (torchrun)
    shard: int = 0                      # ranks that hold one copy of weights and optimizer together; 0: all
    offload: bool = False               # weights, gradients and optimizer state in the host's memory between uses
    collective_timeout: int = 1800      # seconds after which a collective that a rank has not joined ends the run
    watchdog: int = 300                 # seconds in one phase after which a rank names itself and the phase; 0: never

    def __post_init__(self):
        """The defaults that depend on other settings."""
        self.advantage_scale = self.advantage_scale or ("none" if self.algo == "gtpo" else "std")
        self.aggregation = self.aggregation or ("sequence" if self.algo == "gtpo" else "token")
        self.trust_delta = self.trust_delta or (0.04 if self.trust_region == "second_moment" else 0.2)


# ------------------------------------------------------------------------------------------------------ settings

NAMES = [f.name for f in fields(Config)]
GTPO_ONLY = tuple(NAMES[NAMES.index("gtpo_gamma"):NAMES.index("gtpo_official") + 1])
MACHINE = tuple(NAMES[NAMES.index("shard"):]) + ("keep_checkpoints",)
OFFPOLICY_ONLY = tuple(NAMES[NAMES.index("sync_every"):NAMES.index("priority_beta") + 1])


def parse(argv=None, description=""):
    """Command line -> Config. With --resume the run's own config.json counts; only --steps and what changes no result
    (MACHINE) may be given beside it."""
    given = command_line(Config, description, argv)
    if not given.get("resume"):
        c = check(Config(**given))
        refuse_idle(c, given)
        return c
    if not given.get("out"):
        raise ValueError("--resume needs --out, the run's folder")
    saved = Path(given["out"]) / "config.json"
    if not saved.exists():
        raise ValueError(f"--resume: {given['out']} holds no run (no config.json)")
    try:
        stored = asdict(check(Config(**json.loads(saved.read_text()))))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{saved} is not a run of this version: {error}") from None
    changed = [k for k, v in given.items() if k not in ("resume", "out", "steps", *MACHINE) and stored.get(k) != v]
    if changed:
        raise ValueError(f"--resume continues the run as it was: --{changed[0].replace('_', '-')} was "
                         f"{stored.get(changed[0])}, not {given[changed[0]]}; start another --out to change it")
    return check(Config(**{**stored, **given}))


CHOICES = {"algo": ("grpo", "gtpo", "offpolicy"), "advantage_scale": ("std", "none", "loo", "batch"),
           "ratio_level": ("token", "sequence"), "aggregation": ("token", "sequence", "constant"),
           "zero_variance": ("drop", "keep"), "graph": ("", "on", "off"), "kl_kind": ("k1", "k2", "k3", "k3_is"),
           "correction": ("bypass", "decoupled"), "importance": offpolicy.SCHEMES, "importance_level": offpolicy.LEVELS,
           "importance_normalize": ("", "batch", "group"), "trust_region": ("", "sequence", "token", "second_moment")}
LEAST = {**dict.fromkeys((
    "max_new_tokens", "prompts_per_step", "steps", "epochs", "minibatches", "micro_batch_tokens", "eval_every",
    "eval_problems", "eval_samples", "save_every", "keep_checkpoints", "collective_timeout", "rows_at_once", "max_prompt_tokens",
    "sync_every", "replay_ratio", "buffer_groups"), 1), "group_size": 2, "warm_start_steps": 5, **dict.fromkeys((
        "beta", "warmup_steps", "dual_clip", "clip_low", "clip_high", "weight_decay", "gtpo_gamma", "gtpo_amplify",
        "gtpo_cap", "importance_low", "trust_delta", "kl_limit", "buffer_mb", "max_staleness", "max_reuse", "min_ess",
        "priority", "priority_beta", "variance_every", "kv_memory_mb", "shard", "watchdog"), 0)}
UNUSED = {      # settings without a meaning for an algorithm: giving one is an error, not silence
    "grpo": GTPO_ONLY + OFFPOLICY_ONLY, "offpolicy": GTPO_ONLY, "gtpo": OFFPOLICY_ONLY + (
        "clip_low", "clip_high", "ratio_level", "dual_clip", "beta", "kl_kind")}
NEEDS = {       # settings that only mean something beside others: (condition, what to give)
    **dict.fromkeys(("importance", "importance_level", "importance_cap", "importance_low", "importance_normalize", "trace"),
        (lambda c: c.correction == "decoupled", "--correction decoupled: beside the ratio to mu it would count twice")),
    **dict.fromkeys(("buffer_groups", "buffer_mb", "max_staleness", "max_reuse", "min_ess", "priority", "adaptive_replay"), (
        lambda c: c.replay_ratio > 1, "--replay-ratio above 1")),
    "kl_limit": (lambda c: c.replay_ratio > 1 or c.adaptive_clip, "--replay-ratio above 1 or --adaptive-clip"),
    "trust_delta": (lambda c: c.trust_region, "--trust-region"), "kl_kind": (lambda c: c.beta > 0, "--beta above 0"),
    "priority_beta": (lambda c: c.priority, "--priority")}
SCHEMES_WITH = {        # of --importance
    "importance_cap": ("clipped", "truncated", "masked"), "importance_low": ("clipped", "masked"),
    **dict.fromkeys(("importance_level", "importance_normalize"), tuple(
        s for s in offpolicy.SCHEMES if s not in ("none", *offpolicy.TRACES))),
    "trace": offpolicy.TRACES}


def refuse_idle(c, given):
    """ValueError, one line, for a setting that was given, is not the neutral one, and would do nothing."""
    for name, value in given.items():
        flag, neutral = "--" + name.replace("_", "-"), 1 if name == "replay_ratio" else getattr(Config, name)
        if value == neutral:            # such as --beta 0 with gtpo
            continue
        if name in UNUSED[c.algo]:
            raise ValueError(f"{flag} has no effect with --algo {c.algo}: leave it out")
        if name in NEEDS and not NEEDS[name][0](c):
            raise ValueError(f"{flag} needs {NEEDS[name][1]}")
        if c.importance not in SCHEMES_WITH.get(name, offpolicy.SCHEMES):
            raise ValueError(f"{flag} needs --importance {' or '.join(SCHEMES_WITH[name])}")


def check(c):
    """ValueError, one line, for settings that cannot work."""
    check_settings(c, CHOICES, LEAST)
    for name in ("temperature", "lr", "grad_clip", "importance_cap"):
        if not 0 < getattr(c, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: must be a number above 0")
    if c.algo == "offpolicy":
        check_offpolicy(c)
    if c.algo == "gtpo":
        check_gtpo(c)
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


def check_gtpo(c):
    """Combinations that would be silently ignored, or biased."""
    if 0 < c.gtpo_cap < c.gtpo_amplify:
        raise ValueError(f"--gtpo-cap {c.gtpo_cap} would undo --gtpo-amplify {c.gtpo_amplify}: raise it, or 0 for no cap")
    for name in ("gtpo_amplify", "gtpo_cap", "gtpo_ratio", "aggregation", "advantage_scale"):
        default = {"aggregation": "sequence", "advantage_scale": "none"}.get(name, getattr(Config, name))
        if c.gtpo_official and getattr(c, name) != default:
            raise ValueError(f"--gtpo-official is the official code as it is: leave --{name.replace('_', '-')} out")
    if (c.gtpo_official or not c.gtpo_ratio) and c.epochs * c.minibatches > 1:
        raise ValueError("--gtpo-official and --no-gtpo-ratio take pi/mu for 1, which it is at a rollout's first update only: "
                         "leave --epochs and --minibatches at 1")


def check_offpolicy(c):
    """Bounds of the off-policy settings."""
    for name in ("min_ess", "trace", "priority_beta"):
        if not 0 <= getattr(c, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: must be between 0 and 1")
    least = c.importance_low or (1 / c.importance_cap if c.importance == "clipped" else 0)
    if c.importance in ("clipped", "masked") and least > c.importance_cap:
        raise ValueError(f"--importance-cap {c.importance_cap}: below the least weight, {least:g}")
    if c.replay_ratio > 1:
        oldest = c.epochs * c.minibatches * (1 + (c.sync_every - 1) * c.replay_ratio)      # updates, on entry
        if 0 < c.max_staleness < oldest:
            raise ValueError(f"--max-staleness {c.max_staleness}: fresh groups may be {oldest} updates old; raise it, or 0")
        if c.advantage_scale == "batch":
            raise ValueError("--advantage-scale batch: its std is that of one rollout, not of a batch from the buffer; "
                             "use another, or --replay-ratio 1")
    elif c.trust_region == "second_moment" and c.sync_every == 1:
        raise ValueError("--trust-region second_moment needs samples of older weights: --replay-ratio or --sync-every above 1")
    if c.adaptive_clip and not (c.kl_limit and c.clip_low):
        raise ValueError("--adaptive-clip holds the KL near --kl-limit: give one above 0, and --clip-low above 0")
