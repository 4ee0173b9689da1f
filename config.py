"""Settings: how one is written down, the flag that it becomes, and those that every run has.

A setting is a field of a dataclass that stands beside the concept which reads it. Type, default,
bounds and help are one line, and the line becomes a flag with dashes:

    clip_low: float = setting(0.2, least=0)     # how far a ratio may fall        ->  --clip-low 0.1

A run's settings are `Common`, below, joined with the `Settings` of its objective (grpo.py, gtpo.py,
offpolicy.py), so an objective has exactly the flags that mean something to it. A wrong setting is
one line that says what to give instead. So is a setting that would do nothing, because silence
would look like an effect.
"""
import argparse
import importlib.util
import inspect
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from functools import lru_cache
from pathlib import Path

# The objectives. Each is a module of this name, imported when it is asked for: a new one is a file
# and a word here. learner.py says what such a module holds.
ALGOS = ("grpo", "gtpo", "offpolicy", "dpo", "distill")

# The choices of settings that several programs have.
DEVICES = ("", "cpu", "cuda", "npu")
DTYPES = ("", "float32", "bfloat16")
TEMPLATES = ("auto", "chat", "plain", "reasoning", "r1-zero")
CURRICULA = ("uniform", "steps", "cosine", "gaussian", "adaptive")      # curriculum.py

# What a chat template is always given, and --chat-template-kwargs may not change.
TEMPLATE_OWN = ("messages", "conversation", "add_generation_prompt", "continue_final_message",
                "tools", "documents", "tokenize", "chat_template", "padding", "truncation",
                "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
                "tokenizer_kwargs", "sanitize_control_tokens")


# ---------------------------------------------------------------------------------------- a setting

def setting(default, least=None, most=None, above=None, choices=None, needs=(), on_resume=False,
            repeated=False):
    """A field of a settings dataclass, with what makes a value of it wrong.

    least, most: bounds that are allowed themselves. above: a bound that is not. choices: the only
    values. needs: pairs (condition of the whole config, what to give) without which the setting
    would do nothing. on_resume: it changes no result, so it may be changed when a run goes on.
    repeated: a list with commas, which may also be given in parts, each behind its own flag."""
    return field(default=default, metadata={
        "least": least, "most": most, "above": above, "choices": choices, "needs": needs,
        "on_resume": on_resume, "repeated": repeated})


def flag(name):
    """The command line's spelling of a field's name."""
    return "--" + name.replace("_", "-")


def check_settings(config):
    """Raise ValueError, one line, for a field that is not among its choices or within bounds."""
    for f in fields(config):
        value = getattr(config, f.name)
        given = f"{flag(f.name)} {value}"
        if not isinstance(value, (int, float) if f.type is float else f.type):
            raise ValueError(f"{given}: must be of type {f.type.__name__}")

        bound = {"least": None, "most": None, "above": None, "choices": None, **f.metadata}

        if bound["choices"] is not None and value not in bound["choices"]:
            raise ValueError(f"{given}: choose {', '.join(filter(None, bound['choices']))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{given}: must be a finite number")
        if bound["above"] is not None and not value > bound["above"]:
            raise ValueError(f"{given}: must be above {bound['above']}")

        if bound["most"] is not None and not value <= bound["most"]:
            raise ValueError(f"{given}: must be at most {bound['most']}")
        if bound["least"] is not None and not value >= bound["least"]:
            raise ValueError(f"{given}: must be at least {bound['least']}")


def is_file(text):
    """Whether a text is the path of a file; a long mix of sources is none."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):       # a name that is too long, or holds a zero byte
        return False


def check_new_file(flag, file):
    """Raise ValueError, one line, unless `file` can be written anew: now, not after hours of work.

    An empty name means that nothing is to be written."""
    if file and Path(file).exists():
        raise ValueError(f"{flag} {file} already exists: choose another file, results are never "
                         "overwritten")
    if str(file).endswith(os.sep):
        raise ValueError(f"{flag} {file} is the name of a folder: give that of a file")
    if file and not os.access(Path(file).parent, os.W_OK):
        raise ValueError(f"{flag} {file}: its folder does not exist or cannot be written to")


def parse_levels(text):
    """Turn "4-6" into (4, 6), the easiest and the hardest level of built-in tasks; "" is None."""
    if not text:
        return None
    low, dash, high = text.partition("-")
    if not (dash and low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise ValueError(f"--levels {text}: give easiest-hardest, such as 4-6")
    return int(low), int(high)


def parse_template_kwargs(text):
    """Turn '{"enable_thinking": false}' into a dict, what the chat template may read; "" is none.

    Raises ValueError, one line, for what is no JSON object of names and scalars."""
    given = f"--chat-template-kwargs {text}"
    try:
        kwargs = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{given}: not valid JSON ({error}); "
                         """give such as '{"enable_thinking": false}'""") from None

    if not isinstance(kwargs, dict):
        raise ValueError(f"{given}: must be a JSON object, {{NAME: VALUE}}")
    for name, value in kwargs.items():
        number = isinstance(value, int) or isinstance(value, float) and math.isfinite(value)
        if not (number or value is None or isinstance(value, str)):
            raise ValueError(f"{given}: {name} must be true, false, null, a number or a text")
        if not name.isidentifier() or name in TEMPLATE_OWN:
            raise ValueError(f"{given}: {name} is no setting of a chat template")
    return kwargs


# -------------------------------------------------------------------- a dataclass as a command line

class Joined(argparse.Action):
    """A flag that is given several times: its values, with commas between."""

    def __call__(self, parser, namespace, value, option_string=None):
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, value if before is None else f"{before},{value}")


class Parser(argparse.ArgumentParser):
    """argparse, but an error is a ValueError of one line instead of a page of usage."""

    def error(self, message):
        raise ValueError(f"{message}; see --help")


def command_line(config_class, description, argv=None):
    """Return the flags given on the command line, {field: value}. Raises ValueError for a flag that
    is none of the class."""
    given, unknown = known_flags(config_class, description, argv)
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}; see --help")
    return given


def known_flags(config_class, description, argv=None):
    """Return ({field: value} of the flags given, the words that are no flag of the class)."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    comments, section_of = help_texts(config_class)
    titles = dict.fromkeys(section_of.values())
    groups = {title: parser.add_argument_group(title) for title in titles}

    for f in fields(config_class):
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        if f.metadata.get("repeated"):
            how["action"] = Joined
        text = f"{comments.get(f.name, '')} [{f.default}]".strip().replace("%", "%%")
        group = groups[section_of[f.name]]
        group.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **how)

    given, unknown = parser.parse_known_args(argv)
    return vars(given), unknown


def help_texts(config_class):
    """Return ({field: its comment}, {field: its section}), read from the source of the class.

    A comment behind a field is its help, and may go on below it. A comment at the margin opens a
    section."""
    comments, section_of, section, name = {}, {}, "settings", None
    for base in reversed(config_class.__mro__):
        for line in source(base).split("\n"):
            field_line = re.match(r"    (\w+): [^#]*(?:# (.*))?$", line)
            section_line = re.match(r"    # (.*)$", line)
            continued = re.match(r" {5,}# (.*)$", line)

            if field_line:
                name = field_line[1]
                comments[name], section_of[name] = field_line[2] or "", section
            elif section_line:
                section = section_line[1]
            elif continued and name:
                comments[name] = f"{comments[name]} {continued[1]}".strip()
            elif line.startswith("    def "):
                name = None         # comments inside of a method are no help
    return comments, section_of


def source(config_class):
    """The class's own source; nothing for a class that was put together by make_dataclass."""
    try:
        return inspect.getsource(config_class)
    except (OSError, TypeError):
        return ""


# ---------------------------------------------------------------------- settings that every run has

def is_built_in_task(c):
    """Whether --data names a built-in task, alone or in a mix."""
    parts = importlib.import_module("data").parts_of(c.data)
    return any(importlib.import_module("tasks").known(part.source) for part in parts)


# conditions without which a setting would do nothing: (test of the config, what to give)
BUILT_IN_TASK = (is_built_in_task, "a built-in task as --data")
NO_MODEL = (lambda c: not c.model, "no --model: it is of the built-in model's start")
WITH_LORA = (lambda c: c.lora_rank, "--lora-rank")
WITH_FLOOR = (lambda c: c.curriculum in ("gaussian", "adaptive"),
              "--curriculum gaussian or adaptive")


@dataclass
class Common:
    # what
    algo: str = "grpo"                  # the objective: grpo, gtpo, offpolicy, dpo,
                                        # distill; --algo NAME --help shows its settings

    model: str = ""                     # checkpoint folder or hub id;
                                        # empty: warm-start a small one on the built-in task

    data: str = "arithmetic"            # a built-in task (tasks.py), gsm8k, math, a .jsonl file;
                                        # or a mix: truth:2-4@2,gsm8k (data.py)

    eval_data: str = ""                 # held-out problems;
                                        # empty: the source's test split, or a part of the file

    out: str = ""                       # run folder; empty: runs/ALGO-DATA-seedS
    resume: bool = False                # go on from the last checkpoint in --out
    config: str = ""                    # a run's config.json: its settings, where no flag says
                                        # otherwise

    seed: int = setting(0, least=0)
    # rollouts (rollout.py)
    prompts_per_step: int = setting(32, least=1)        # N, over all ranks
    group_size: int = setting(8, least=2)               # G completions a prompt
    max_new_tokens: int = setting(64, least=1)          # a longer completion is cut,
                                                        # and counted in truncated_frac

    refill: int = setting(0, least=0)   # further rounds, at most, until --prompts-per-step groups
                                        # are neither all right nor all wrong (refill.py)

    max_prompt_tokens: int = setting(512, least=1)      # problems with longer prompts are dropped
    temperature: float = setting(1.0, above=0, least=1e-4, most=1e4)    # of rollouts and training
    rows_at_once: int = setting(1024, least=1)          # completions drawn together, at most;
                                                        # memory may allow fewer

    template: str = setting("auto", choices=TEMPLATES)  # of prompts: auto, chat, plain,
                                                        # reasoning, r1-zero (prompts.py)
    chat_template_kwargs: str = ""      # what the chat template shall read, a JSON object:
                                        # {"enable_thinking": false} switches Qwen3's thinking off

    # rewards (reward.py): 1 for a verified answer, plus
    reward: str = setting("", repeated=True)    # NAME=WEIGHT,...: more functions of reward.REWARDS,
                                        # or FILE.py:FUNCTION in TRL's signature (user_reward.py);
                                        # also one a flag: --reward A --reward B

    overlong_buffer: int = setting(0, least=0)      # tokens before the limit in which a right
                                        # completion, or a cut one beside it, loses up to 1; 0: none

    format_reward: float = 0.0          # weight of the <reasoning>/<answer> form
    consistency_reward: float = 0.0     # weight of an answer that is the reasoning's last result
    # optimisation (learner.py)
    steps: int = setting(50, least=1)           # rollouts
    epochs: int = setting(1, least=1)           # times through a batch: the rollout,
                                                # with offpolicy also each batch from the buffer

    minibatches: int = setting(1, least=1)      # optimizer steps each time through
    lr: float = setting(0.0, least=0)           # 0: 2e-4 for the built-in model and others as
                                                # small, 1e-6 for weights above 40 MB and those
                                                # of the hub

    warmup_steps: int = setting(5, least=0)     # linear
    lr_end: float = setting(1.0, least=0, most=1)   # share of --lr that a straight line would reach
                                                    # after the last step, of --steps as it is now,
                                                    # also where --resume changed it; 1: it stays

    weight_decay: float = setting(0.0, least=0)
    grad_clip: float = setting(1.0, above=0)    # largest norm of the gradient
    micro_batch_tokens: int = setting(8192, least=1)    # of a forward pass, a group's prompt
                                                        # counted once; memory, not mathematics

    activation_checkpointing: bool = False      # less memory, a third more time
    # LoRA (lora.py)
    lora_rank: int = setting(0, least=0)        # of the change of each linear layer; 0: all weights
                                                # are trained. --lr is then 10 x as large by default

    lora_alpha: float = setting(32.0, above=0, needs=[WITH_LORA])
                                                # the change counts alpha / rank
    # evaluation and output
    eval_every: int = setting(10, least=0)      # steps; also before the first and after the last;
                                                # 0: never; evaluate.py can do it afterwards, on
                                                # problems that are not those of --data

    eval_problems: int = setting(200, least=1)  # held-out problems
    eval_samples: int = setting(4, least=1)     # completions each, at the training temperature
    save_every: int = setting(20, least=1)      # steps between checkpoints
    log_to: str = setting("", choices=("", "tensorboard"), on_resume=True)  # beside log.jsonl: its
                                                # numbers, in the run's folder tensorboard/

    keep_checkpoints: int = setting(2, least=1, on_resume=True)     # the newest ones stay
    variance_every: int = setting(0, least=0)   # steps between estimates of the gradient's
                                                # variance; 0: none

    # built-in tasks and curricula
    levels: str = setting("", needs=[BUILT_IN_TASK])        # easiest-hardest, such as 4-6;
                                                            # empty: the task's usual ones

    problems: int = setting(20000, least=1, needs=[BUILT_IN_TASK])  # to train on, made at the start

    curriculum: str = setting("", choices=("", *CURRICULA))     # which levels come when: see
                                                                # curriculum.py; empty: shuffled

    curriculum_floor: float = setting(0.0, least=0, most=1, needs=[WITH_FLOOR])     # least weight
                                                                # of a level; 0: the schedule's own

    warm_start_steps: int = setting(480, least=7, needs=[NO_MODEL])     # supervised steps before
                                                            # the default run
    # machine
    kv_memory_mb: float = setting(0.0, least=0)     # for keys and values while sampling, a process;
                                                    # 0: 80 % of what is free

    graph: str = setting("", choices=("", "on", "off"))     # sampling steps as device graphs;
                                                            # empty: on with cuda (on with npu they
                                                            # replace its attention kernel)

    device: str = setting("", choices=DEVICES)      # cpu, cuda, npu; empty: the accelerator here
    dtype: str = setting("", choices=DTYPES)        # of computation, master weights are float32;
                                                    # empty: float32 on cpu, else bfloat16

    threads: int = setting(0, least=0, on_resume=True)      # CPU threads; 0: measured
    # several processes (torchrun)
    shard: int = setting(0, least=0, on_resume=True)    # ranks that hold one copy of weights and
                                                        # optimizer together; 0: all

    offload: bool = setting(False, on_resume=True)      # weights, gradients and optimizer state in
                                                        # the host's memory between uses

    collective_timeout: int = setting(1800, least=1, on_resume=True)    # seconds until a collective
                                                        # that a rank has not joined ends the run

    watchdog: int = setting(300, least=0, on_resume=True)   # seconds in one phase after which a
                                                            # rank names itself; 0: never

    def __post_init__(self):
        self.lr = self.lr or default_lr(self.model, self.lora_rank > 0)


def default_lr(model, lora=False):
    """The learning rate that follows from --model: what moves a small model ruins a large one."""
    if is_small(model):
        return 2e-3 if lora else 2e-4
    return 1e-5 if lora else 1e-6


def learning_rate(config, step):
    """The learning rate of a step, counted from 1.

    It rises over warmup_steps, is config.lr in the next step, and goes from there on a straight
    line that would reach lr_end x config.lr one step after the last. So with lr_end 0 the last step
    still learns, as with transformers' "linear", TRL's default."""
    warm = min(1.0, step / (config.warmup_steps + 1))
    gone = (step - 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * warm * (1 - (1 - config.lr_end) * max(0.0, gone))


def is_small(model):
    """Whether --model has less than 10 million parameters, as the built-in one, which "" is."""
    weights = [file.stat().st_size for file in Path(model).glob("*.safetensors")] if model else []
    return not model or 0 < sum(weights) < 4 * 10 ** 7      # bytes


def objective(algo):
    """The module of an objective, by its name in ALGOS. Raises ValueError for another name."""
    if algo not in ALGOS:
        raise ValueError(f"--algo {algo}: choose {', '.join(ALGOS)}")
    return importlib.import_module(algo)


@lru_cache
def config_class(algo):
    """The settings of a run with this objective: Common, joined with the objective's own."""
    return make_dataclass("Config", [], bases=(objective(algo).Settings, Common))


def Config(algo="grpo", **settings):
    """The settings of a run; those that are not given have their defaults.

    Not checked: `check` does that."""
    objective(algo)             # another name is refused, before it is looked up in a cache
    return config_class(algo)(algo=algo, **settings)


# --------------------------------------------------------------------- the command line of train.py

def parse(argv=None, description=""):
    """The command line as a config.

    With --resume the run's own config.json counts; only --steps and settings that change no result
    may be given beside it. Raises ValueError, one line, for settings that cannot work or would do
    nothing."""
    first = argparse.Namespace(algo=None, out="", config="", resume=False, help=False)
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--algo")
    early.add_argument("--out")
    early.add_argument("--config")
    early.add_argument("--resume", action=argparse.BooleanOptionalAction)
    early.add_argument("--help", "-h", action="store_true")
    early.parse_known_args(argv, first)         # which flags there are depends on these
    if first.help:
        return flags_of(first.algo if first.algo in ALGOS else "grpo", description, argv)

    if first.resume:
        stored = stored_config(first.out)
        if first.algo not in (None, stored.algo):
            resumed(stored, {"algo": first.algo})       # raises
        return resumed(stored, flags_of(stored.algo, description, argv))
    other = settings_of(first.config) if first.config else {}
    algo = first.algo or other.get("algo", "grpo")
    given = flags_of(algo, description, argv)
    known = {f.name for f in fields(config_class(algo))}
    taken = {name: value for name, value in chosen(other).items() if name in known}
    return refuse_idle(check(Config(**{**taken, **given, "algo": algo})), given)


# of a run, where it is and on what: not for another run
NOT_TAKEN = ("out", "resume", "config", "device", "threads")


def settings_of(file):
    """The settings in a config.json, for another run, perhaps with another objective.

    Raises ValueError, one line, where it is none, or of another version."""
    try:
        stored = settings_in(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {file}: {error}") from None
    return {name: value for name, value in stored.items() if name not in NOT_TAKEN}


def chosen(settings):
    """Those of a run's settings, {name: value}, that do not follow from the others.

    What an objective, or another setting, has filled in must not bind a run of other settings."""
    found = {}
    for name in set(settings) - {"algo"}:
        rest = {other: value for other, value in settings.items() if other != name}
        if getattr(Config(**rest), name) != settings[name]:
            found[name] = settings[name]
    return found


def settings_in(file):
    """What a config.json holds: {name: value}, settings of its objective in this version.

    Raises ValueError, one line, for anything else."""
    stored = json.loads(Path(file).read_text())
    if not isinstance(stored, dict):
        raise ValueError("no settings")

    types = {f.name: f.type for f in fields(config_class(str(stored.get("algo", "grpo"))))}
    for name, value in stored.items():
        if name not in types:
            raise ValueError(f"{name} is no setting of this version")
        if type(value) is not types[name] and (type(value), types[name]) != (int, float):
            raise ValueError(f"{name} must be {types[name].__name__}, not {value!r}")
    return stored


def flags_of(algo, description, argv):
    """The flags given, {field: value}.

    Raises ValueError, which says whose a flag is when another objective has it."""
    given, unknown = known_flags(config_class(algo), description, argv)
    names = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    for name in names:
        owners = [other for other in ALGOS if name in flags(other)]
        if owners:
            raise ValueError(f"{name} has no effect with --algo {algo}: "
                             f"it is a setting of {' and '.join(owners)}")
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}; see --help")
    return given


def flags(algo):
    """All flags that a run with this objective has."""
    names = set()
    for f in fields(config_class(algo)):
        names.add(flag(f.name))
        if f.type is bool:
            names.add("--no-" + flag(f.name)[2:])
    return names


def stored_config(out):
    """The settings in a run's folder.

    Raises ValueError when there is none, or it is not of this version."""
    if not out:
        raise ValueError("--resume needs --out, the run's folder")
    file = Path(out) / "config.json"
    if not file.exists():
        raise ValueError(f"--resume: {out} holds no run (no config.json)")
    try:
        return check(Config(**settings_in(file)))
    except ValueError as error:
        raise ValueError(f"{file} is not a run of this version: {error}") from None


def free_on_resume(c):
    """The names of the settings that may change when a run goes on."""
    return {"resume", "out", "steps"} | {f.name for f in fields(c) if f.metadata.get("on_resume")}


def resumed(stored, given):
    """The stored settings of a run with those changes that a run which goes on allows.

    The command that began the run is no change: its paths are absolute in the stored settings, and
    what it left to the program is filled in there."""
    asked = Config(**{**asdict(stored), **given, "algo": stored.algo})
    now = {**asdict(asked), **importlib.import_module("folder").absolute(asked),
           "algo": given.get("algo", stored.algo)}
    free = free_on_resume(stored)
    for name, value in given.items():
        was = getattr(stored, name)
        if name not in free and was != now[name]:
            raise ValueError(f"--resume continues the run as it was: {flag(name)} was {was}, "
                             f"not {value}; start another --out to change it")
    changes = {name: value for name, value in given.items() if name in free}
    return check(Config(**{**asdict(stored), **changes}))


def refuse_idle(c, given):
    """Return the config.

    Raises ValueError for a setting that was given, is not its default, and would do nothing."""
    for f in fields(c):
        if f.name in given and given[f.name] != f.default:
            for condition, what in f.metadata.get("needs", ()):
                if not condition(c):
                    raise ValueError(f"{flag(f.name)} needs {what}")
    return c


def check(c):
    """Return the config. Raises ValueError, one line, for settings that cannot work."""
    check_settings(c)
    parse_levels(c.levels)
    parse_template_kwargs(c.chat_template_kwargs)
    if c.minibatches > c.prompts_per_step:
        raise ValueError(f"--minibatches {c.minibatches}: at most --prompts-per-step "
                         f"{c.prompts_per_step} (groups stay whole)")

    if c.log_to and importlib.util.find_spec(c.log_to) is None:
        raise ValueError(f"--log-to {c.log_to}: pip install {c.log_to}")
    if c.variance_every > c.steps:
        raise ValueError(f"--variance-every {c.variance_every}: above --steps {c.steps}, so there "
                         "would be no estimate")
    by_success = "--refill" if c.refill else "--curriculum adaptive"
    follows = c.refill or c.curriculum == "adaptive"
    if follows and not importlib.import_module("reward").correct_counts(c.reward):
        raise ValueError(f"{by_success} follows correctness, which --reward correct=0 leaves out")
    if c.overlong_buffer > c.max_new_tokens:
        raise ValueError(f"--overlong-buffer {c.overlong_buffer}: at most --max-new-tokens "
                         f"{c.max_new_tokens}")
    if hasattr(c, "check"):
        c.check()           # of the objective's own settings
    return c
