"""Pipelines: several programs in a row, from a base model to one that reasons, in one command.

    python pipeline.py r1 --out runs/r1
    python pipeline.py r1 --out runs/r1 --resume        goes on after a crash, in any stage
    python pipeline.py dpo-self-training --quick --out runs/look        about two minutes

A pipeline is a list of stages, and a stage is the command line of a program with a folder of its
own. A stage that is whole is skipped. One that was killed goes on from its checkpoint if it has
one, so the end is the same. After each stage that makes a model, evaluate.py measures it on
held-out puzzles. Below --gate nothing can be learned from it, so the pipeline stops and says so. At
the end stand a table and a figure: accuracy after each stage.

    r1                      base, cold start (SFT), GRPO, the RL model's right answers as a corpus,
                            SFT of the *base* on them, GRPO again (arXiv 2501.12948)
    dpo-self-training       SFT, then three rounds of: DPO, right answers of the DPO model, SFT of
                            the base on solutions and answers (arXiv 2407.18248)
    progressive             GRPO in three stages of longer and harder puzzles (DeepScaleR), then a
                            wider model that learns from the result, and GRPO of that
    curriculum-grpo         SFT on easy levels, GRPO with --curriculum adaptive
    multitask-dpo           SFT and DPO on a mix of tasks
    distill-grpo            a wide teacher by SFT and GRPO, a narrow student that learns from it
                            (--algo distill), GRPO of the student
    principles-curriculum   GRPO with a reward for principles that are programs (judge.py), adaptive

--without STAGE leaves one out; what comes behind takes what the stage before it made. In r1 removed
GRPO steps go to the other GRPO stage, so that the number of rollouts stays; elsewhere there are
fewer. With --model and puzzles every base is that checkpoint, so nothing is wider, and the learning
rates are still those of the small model.

r1 and dpo-self-training also run on real problems, at the programs' own rates:

    python pipeline.py r1 --model Qwen/Qwen2.5-1.5B --data gsm8k --ranks 8 --max-new-tokens 512 \
        --sft-steps 200 --grpo-steps 100 --train-flags="--prompts-per-step 64" --out runs/r1-gsm8k

The base is then the checkpoint as it is, and every SFT of r1 begins there. Runs sft.py, train.py,
rejection.py and evaluate.py as subprocesses.
"""
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import report
from config import DEVICES, check_settings, command_line, is_file, parse, setting
from data import HUB, from_jsonl, load_problems
from engine.checkpoint import checkpoints, checksum, write_whole
from engine.machine import program
from folder import absolute, fingerprint_of_model, in_use, lock

HERE = Path(__file__).resolve().parent


@dataclass
class PipelineConfig:
    out: str = ""                           # folder of the pipeline
    resume: bool = False                    # go on with it
    quick: bool = False                     # a few steps of everything: to see that it works
    without: str = ""                       # a stage that is left out
    data: str = ""                          # family, truth or arithmetic (docs/tasks.md); with
                                            # --model also gsm8k, math, or a file with solutions;
                                            # empty: family; of r1 and principles-curriculum
                                            # arithmetic

    eval_data: str = ""                     # held-out problems; a file as --data needs one
    model: str = ""                         # the base; empty: a new small one
    sft_steps: int = setting(0, least=0)    # optimizer steps of each SFT stage (the base: half of
                                            # them; r1's cold start on puzzles: 3/10); 0: 1,000,
                                            # with --quick 100

    grpo_steps: int = setting(0, least=0)   # rollouts of all GRPO or DPO stages together, those of
                                            # distillation not counted; 0: 100, with --quick 6
    max_new_tokens: int = setting(128, least=1)
    train_flags: str = ""                   # more flags of each train.py, as one word:
                                            # --train-flags="--lora-rank 16 --lr 1e-4";
                                            # a --reward there adds to a stage's own

    sft_flags: str = ""                     # the same of each sft.py
    ranks: int = setting(1, least=1)        # processes of each program, by torchrun
    gate: float = setting(-1.0, least=-1, most=1)   # held-out pass@1 that a stage must reach;
                                            # -1: 0.01, and 0 with --quick

    seed: int = setting(0, least=0)
    threads: int = setting(2, least=1)      # CPU threads of each program
    device: str = setting("", choices=DEVICES)      # cpu, cuda, npu; empty: the accelerator here

    def __post_init__(self):
        if self.gate < 0:
            self.gate = 0.0 if self.quick else 0.01


# what each program makes in the folder of its stage, and where in it a model lies
MAKES = {"sft.py": "model", "train.py": "run", "rejection.py": "corpus.jsonl"}
MODELS = {"sft.py": "model", "train.py": "run/model"}


@dataclass
class Stage:
    """One command. Its folder is named after it, within the pipeline's."""
    name: str
    program: str                    # one of MAKES
    args: list                      # flags without --out
    files: dict = field(default_factory=dict)       # {name: text} written beside it before it runs


# ------------------------------------------------------------------------------------- the stages

class Plan:
    """Builds the stages of a pipeline: sizes, folders, and what is left out."""

    def __init__(self, config, without=""):
        self.c = config
        self.without = without
        self.out = Path(config.out)
        self.task = config.data
        self.stages = []
        quick = config.quick
        self.sft_steps = config.sft_steps or (100 if quick else 1000)
        self.grpo_steps = config.grpo_steps or (6 if quick else 100)    # of all stages together
        self.problems = 400 if quick else 8000
        self.width = 64 if quick else 128
        self.tokens = config.max_new_tokens

        # more flags of each SFT on solutions, of each run of train.py, and of those with DPO,
        # which falls at the rate that is good for GRPO
        rate = 2e-4 if self.task == "arithmetic" else 5e-4
        self.of_sft = ["--problems", self.problems, "--lr", 1e-3, "--max-length", 400]
        self.of_train = ["--problems", self.problems, "--lr", rate]
        self.of_dpo = ["--algo", "dpo", "--sft-weight", 1, "--lr", 1e-4]

    def path(self, stage):
        """The model that a stage makes. Raises ValueError where that stage was left out."""
        made = [str(model_of(s, self.c)) for s in self.stages if s.name == stage]
        if not made:
            raise ValueError(f"--without {self.without}: what comes behind it needs it")
        return made[0]

    def add(self, name, program, args, after="", files=None):
        """Add a stage, unless it is left out. Returns the name of the stage to go on from."""
        if name == self.without:
            return after
        if "--steps" in args and not args[args.index("--steps") + 1]:
            of = "--sft-steps" if program == "sft.py" else "--grpo-steps"
            raise ValueError(f"{of}: too few: stage {name} would make no step")
        # others draw other problems at each stage; models of the same solutions share a tokenizer
        other = 1000 * (1 + zlib.crc32(name.encode()) % 1000)
        seed = self.c.seed + (0 if program == "sft.py" else other)
        common = ["--seed", seed, "--threads", self.c.threads]
        if self.c.device:
            common += ["--device", self.c.device]
        more = {"train.py": self.c.train_flags, "sft.py": self.c.sft_flags}.get(program, "")
        args = [str(arg) for arg in (*args, *common, *shlex.split(more))]
        self.stages.append(Stage(name, program, args, files or {}))
        return name

    def base(self, levels="2", name="base", width=None):
        """The base: --model, or a new small model that has seen some solutions of the easiest."""
        if self.c.model:
            args = ["--data", self.levels(levels), "--model", self.c.model]
        else:
            args = ["--data", f"{self.levels('2')},boolean:1-2", "--hidden-size",
                    width or self.width, "--muon-lr", 0.02]
        return self.add(name, "sft.py", [
            *args, "--steps", self.sft_steps // 2, "--problems", self.problems, "--lr", 4e-3,
            "--max-length", 400])

    def sft(self, name, after, data, now=""):
        """Cross-entropy on solutions, from the model of another stage, `after`.

        now: what goes on where this stage is left out; empty: `after`."""
        # no file has a problem that is tested: neither a corpus of ours, nor one with --eval-data
        all_of_it = ["--hold-out", 0] if ".jsonl" in data or is_file(data) else []
        return self.add(name, "sft.py", [
            "--model", self.path(after), "--data", data, "--steps", self.sft_steps,
            *self.of_sft, *all_of_it], now or after)

    def cold_start(self, after):
        """A short SFT that shows two habits: to tell the steps, or to guess.

        GRPO chooses between them; a model that is sure of one habit has nothing to choose from.
        No small model tells more steps than it was shown, so of arithmetic it sees all levels."""
        data = self.levels("2-6" if self.task == "arithmetic" else "2-3")
        return self.add("cold-start", "sft.py", [
            "--model", self.path(after), "--data", data, "--steps", self.sft_steps // 4,
            "--terse-steps", self.sft_steps // 20, "--problems", self.problems, "--lr", 4e-3,
            "--muon-lr", 0.02, "--max-length", 400], after)

    def train(self, name, after, data, steps, *more, files=None):
        """GRPO, or with --algo another objective, from the model of another stage."""
        return self.add(name, "train.py", [
            "--model", self.path(after), "--data", data, "--steps", steps,
            "--max-new-tokens", self.tokens, *self.of_train, "--eval-every", 10 ** 6,
            "--eval-problems", 20, "--eval-samples", 1, "--save-every", 5, *more], after, files)

    def right_answers(self, name, after, data):
        """A corpus of the right answers of a stage's model."""
        return self.add(name, "rejection.py", [
            "--model", self.path(after), "--data", data, "--problems",
            60 if self.c.quick else 1500, "--samples", 8,
            "--max-new-tokens", self.tokens], after)

    def corpus(self, stage):
        return str(self.out / stage / "corpus.jsonl")

    def levels(self, text):
        return f"{self.task}:{text}"

    def held_out(self):
        """What every stage is measured on."""
        return self.c.eval_data or self.levels("2-6")


class OnProblems(Plan):
    """The same on problems of a file, gsm8k or math, from --model: the programs' own rates."""

    def __init__(self, config, without=""):
        super().__init__(config, without)
        self.of_sft = ["--max-length", self.tokens + 512]
        self.of_train = ["--eval-data", config.eval_data] if config.eval_data else []
        self.of_dpo = ["--algo", "dpo", "--sft-weight", 1]

    def path(self, stage):
        return self.c.model if stage == "base" else super().path(stage)

    def base(self, levels="2", name="base", width=None):
        return name                     # the checkpoint as it is

    def cold_start(self, after):
        return self.sft("cold-start", after, self.c.data)

    def levels(self, text):
        return self.c.data              # to evaluate.py, the test split of gsm8k and math


PUZZLES = ("family", "truth", "arithmetic")


def r1(plan):
    first = plan.grpo_steps // 2
    both = plan.without not in ("grpo", "grpo-2")
    steps = first if both else plan.grpo_steps
    start = plan.base()
    now = plan.cold_start(start)
    now = plan.train("grpo", now, plan.levels("2-5"), steps)
    corpus = plan.right_answers("right-answers", now, plan.levels("2-5"))
    if corpus == "right-answers":       # a stage that was left out gives the one before it
        now = plan.sft("sft-of-base", start, plan.corpus(corpus), now)
    plan.train("grpo-2", now, plan.levels("2-6"), steps)


def dpo_self_training(plan):
    start = plan.base()
    now = plan.sft("sft", start, plan.levels("2-3"))
    for number in (1, 2, 3):
        now = plan.train(f"dpo-{number}", now, plan.levels("2-5"), plan.grpo_steps // 3,
                         *plan.of_dpo)
        corpus = plan.right_answers(f"right-answers-{number}", now, plan.levels("2-5"))
        if corpus == f"right-answers-{number}":
            now = plan.sft(f"sft-{number}", start,
                           f"{plan.levels('2-3')},{plan.corpus(corpus)}", now)


def progressive(plan):
    steps = plan.grpo_steps // 4
    now = plan.sft("sft", plan.base(), plan.levels("2-3"))
    for levels, tokens in (("2-3", 48), ("3-4", 96), ("4-6", 128)):
        now = plan.train(f"grpo-{tokens}-tokens", now, plan.levels(levels), steps,
                         "--max-new-tokens", tokens)
    teacher = now
    wide = plan.base(name="wider-base", width=2 * plan.width)
    now = plan.train("distill", wide, plan.levels("2-6"), steps, "--algo", "distill",
                     "--teacher", plan.path(teacher))
    plan.train("grpo-wider", now, plan.levels("2-6"), steps)


def curriculum_grpo(plan):
    now = plan.sft("sft", plan.base(), plan.levels("2-3"))
    plan.train("grpo-adaptive", now, plan.levels("2-6"), plan.grpo_steps, "--curriculum",
               "adaptive")


def multitask_dpo(plan):
    others = ["boolean", "arithmetic" if plan.task == "truth" else "truth"]
    easy = [plan.levels("2-3"), f"{others[0]}:2-4", f"{others[1]}:2"]
    hard = [plan.levels("2-5"), f"{others[0]}:2-6", f"{others[1]}:2-3"]

    now = plan.sft("sft", plan.base(), ",".join(easy))
    plan.train("dpo", now, ",".join(hard), plan.grpo_steps, *plan.of_dpo)


def distill_grpo(plan):
    steps = plan.grpo_steps // 2
    wide = plan.base(name="teacher-base", width=2 * plan.width)
    teacher = plan.sft("teacher-sft", wide, plan.levels("2-3"))
    teacher = plan.train("teacher-grpo", teacher, plan.levels("2-5"), steps)
    now = plan.base(name="student-base")
    now = plan.train("distill", now, plan.levels("2-5"), steps, "--algo", "distill", "--teacher",
                     plan.path(teacher))
    plan.train("grpo", now, plan.levels("2-5"), steps)


PRINCIPLES = "check: equations\ncheck: consistent\n"
REWARD = 'from judge import judged\n\nprincipled = judged("", {file!r})\n'


def principles_curriculum(plan):
    if plan.task != "arithmetic":
        raise ValueError(f"--data {plan.c.data}: principles-curriculum is for arithmetic, whose "
                         "steps are equations that programs can check")
    now = plan.sft("sft", plan.base(), plan.levels("2-3"))
    folder = plan.out / "grpo-principled"
    files = {"principles.txt": PRINCIPLES,
             "reward.py": REWARD.format(file=str((folder / "principles.txt").resolve()))}
    plan.train("grpo-principled", now, plan.levels("2-6"), plan.grpo_steps, "--curriculum",
               "adaptive", "--reward", f"{folder / 'reward.py'}:principled=0.2", files=files)


PIPELINES = {
    "r1": r1,
    "dpo-self-training": dpo_self_training,
    "progressive": progressive,
    "curriculum-grpo": curriculum_grpo,
    "multitask-dpo": multitask_dpo,
    "distill-grpo": distill_grpo,
    "principles-curriculum": principles_curriculum,
}


# ------------------------------------------------------------------------------------ running them

def run_stage(stage, config):
    """Run a stage until it is whole, unless it is so already. Its folder then has stage.json.

    Raises ValueError with the end of its output where the program fails."""
    folder = Path(config.out) / stage.name
    done = folder / "stage.json"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in stage.files.items():
        write_whole(folder / name, text)

    # what a killed program left is taken up again, or begins anew
    target = folder / MAKES[stage.program]
    command = [stage.program, *stage.args, "--out", str(target)]
    if stage.program in MODELS:
        command = prepare_resume(target, command)

    seconds = 0.0               # of a corpus that was whole, but not yet said to be
    if not target.is_file():
        begin = time.perf_counter()
        call(command, folder / "output.txt", "--resume", ranks=config.ranks)
        seconds = time.perf_counter() - begin
    write_whole(done, json.dumps({"seconds": round(seconds, 1), "command": shlex.join(
        ["python", stage.program, *stage.args])}, indent=1) + "\n")


def prepare_resume(out, command):
    """Make the folder of a stopped stage ready. Returns the command to run in it.

    A run of train.py with a checkpoint goes on by --resume; sft.py goes on by its own command.
    REMOVES `out` where it holds no checkpoint and is a run of train.py, or a finished model of
    sft.py that no later stage has used. Raises ValueError where another process still writes
    there: the program that began it was killed, and it was not."""
    of_train = command[0] == "train.py"
    if in_use(out):
        raise ValueError(f"{out}: another run is writing there: stop it, or let it end, and "
                         "go on then")
    if checkpoints(out / "checkpoints"):
        return ["train.py", "--resume", "--out", str(out)] if of_train else command
    if of_train or (out / "config.json").exists():
        shutil.rmtree(out, ignore_errors=True)
    return command


def call(command, log, again, cores=None, bars=None, ranks=1):
    """Run one of the project's programs, with what it says on stdout in the log.

    bars: whether its bars are shown on this terminal; None: if it is one. cores: those that it may
    use; None: all. ranks: processes, under torchrun if there are several. Raises ValueError where
    it fails, with its last line and how to go on: `again`."""
    pinned = None
    if cores and hasattr(os, "sched_setaffinity"):
        pinned = functools.partial(os.sched_setaffinity, 0, cores)

    launcher = []
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    shown = sys.stderr.isatty() if bars is None else bars
    with open(log, "ab") as file:
        child = subprocess.Popen([sys.executable, *launcher, str(HERE / command[0]), *command[1:]],
                                 stdout=file, stderr=None if shown else subprocess.PIPE,
                                 preexec_fn=pinned)
        said = wait_for(child)
    if child.returncode:
        lines = said.decode(errors="replace").replace("\r", "\n").strip().split("\n")
        own = [line for line in lines if line.startswith("error: ")]        # torchrun says more
        raise ValueError(f"{command[0]} ended with status {child.returncode}: "
                         f"{(own or lines)[-1]} (its output: {log}); "
                         f"mend it, then go on with {again}")


def wait_for(child):
    """Returns what a program writes to a piped stderr, in bytes, when it has ended.

    Ctrl-C reaches the program too, and it is given the time to save; a second one ends both."""
    try:
        return child.communicate()[1] or b""
    except KeyboardInterrupt:
        print("\ninterrupted: waiting until this stage is saved (Ctrl-C again to stop at once)",
              file=sys.stderr)
        try:
            child.communicate()
        except KeyboardInterrupt:
            child.terminate()
        raise


def model_of(stage, config):
    """Where the model of a stage lies; None where it makes none."""
    if stage.program not in MODELS:
        return None
    return Path(config.out) / stage.name / MODELS[stage.program]


def measure(stage, plan):
    """Evaluate the model of a stage on held-out puzzles. Returns the result of evaluate.py."""
    c = plan.c
    file = Path(c.out) / stage.name / "eval.json"
    device = ["--device", c.device] if c.device else []
    if not file.exists():
        call(["evaluate.py", "--model", str(model_of(stage, c)), "--data", plan.held_out(),
              "--limit", "60" if c.quick else "400", "--samples", "2",
              "--max-new-tokens", str(plan.tokens), "--threads", str(c.threads), *device,
              "--json", str(file)], file.with_name("output.txt"), "--resume", ranks=c.ranks)
    return json.loads(file.read_text())


def run(name, config):
    """Run a pipeline. Returns [(stage, result of evaluate.py or None)].

    Raises ValueError where a stage fails, or stays below the gate."""
    plan = build(name, config)
    results = []
    for number, stage in enumerate(plan.stages, 1):
        print(f"[{number}/{len(plan.stages)}] {stage.name}: {stage.program}", flush=True)
        run_stage(stage, config)
        if model_of(stage, config) is None:
            results.append((stage, None))
            continue

        # what cannot solve anything now and then has nothing to learn from
        result = measure(stage, plan)
        results.append((stage, result))
        accuracy = result["strict"]["avg@2"]["mean"]
        print(f"    held-out pass@1 {accuracy:.3f}", flush=True)
        last = number == len(plan.stages)
        if accuracy < config.gate and not last:
            raise ValueError(f"stage {stage.name}: held-out pass@1 {accuracy:.3f} is below --gate "
                             f"{config.gate}: what comes next would have nothing to learn from")
    return results


def build(name, config):
    """Returns the plan of a pipeline. Raises ValueError for a stage to leave out that is none."""
    usual = "arithmetic" if name in ("r1", "principles-curriculum") else "family"
    config = replace(config, data=config.data or usual)
    kind = Plan if config.data in PUZZLES else OnProblems
    if kind is OnProblems:
        check_problems(name, config)
    whole = kind(config)
    PIPELINES[name](whole)
    names = [stage.name for stage in whole.stages]
    if kind is Plan:
        names = names[1:]           # without a base there is nothing
    if not config.without:
        return whole
    if config.without not in names:
        raise ValueError(f"--without {config.without}: {name} has the stages {', '.join(names)}")

    plan = kind(config, config.without)
    PIPELINES[name](plan)
    return plan


def check_problems(name, config):
    """Raise ValueError where a pipeline cannot run on problems that are no puzzles."""
    given = f"--data {config.data}"
    if name not in ("r1", "dpo-self-training"):
        raise ValueError(f"{given}: {name} needs levels: choose {', '.join(PUZZLES)}")
    if not config.model:
        raise ValueError(f"{given} needs --model, a pretrained checkpoint: no new small model "
                         "learns it")
    if config.data not in HUB and not (is_file(config.data) and config.eval_data):
        raise ValueError(f"{given} must be {', '.join(PUZZLES)}, {', '.join(HUB)}, or a file "
                         "with solutions, and then --eval-data another with held-out problems")

    if is_file(config.data):
        if Path(config.data).name == "corpus.jsonl":
            raise ValueError(f"{given}: rename it, stages have files of that name")
        trained = {p["problem"] for p in from_jsonl(config.data, answered=False)}
        tested = {p["problem"] for p in load_problems(config.eval_data, "test", answered=False)}
        if trained & tested:
            raise ValueError(f"{given}: {len(trained & tested)} of its problems stand in "
                             "--eval-data too, and SFT would show their solutions")


def check_stages(plan):
    """Raise ValueError for a stage whose program would refuse its flags, before anything runs."""
    import rejection
    import sft
    parsers = {"sft.py": sft.parse, "train.py": parse, "rejection.py": rejection.parse}
    somewhere = Path(tempfile.gettempdir()) / f"no-stage-{os.getpid()}"
    for stage in plan.stages:
        try:
            parsers[stage.program]([*stage.args, "--out", str(somewhere)])
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from None


# ------------------------------------------------------------------------- what it shows at the end

def table(results, config):
    """Returns a Markdown table: accuracy after each stage, for all levels together and each."""
    kinds = next((list(r["kinds"]) for _, r in results if r), [])
    rows = []
    for stage, result in results:
        done = json.loads((Path(config.out) / stage.name / "stage.json").read_text())
        cells = [stage.name, stage.program, f"{done['seconds'] / 60:.1f}"]
        if result:
            whole = result["strict"]["avg@2"]
            cells.append(f"{whole['mean']:.3f} ± {whole['se'] or 0:.3f}")
            cells += [f"{result['kinds'][kind]['avg@2']['mean']:.2f}" for kind in kinds]
        rows.append(cells)
    return report.markdown(["stage", "program", "minutes", "pass@1", *kinds], rows)


def draw(results, file):
    """Draw accuracy after each stage, a line for each level. A failure is a warning, no more."""
    try:
        measured = [(stage.name, result) for stage, result in results if result]
        figure, (axis,) = report.new_figure(1, width=9, height=4)
        names = [name for name, _ in measured]
        for kind in measured[0][1]["kinds"]:
            axis.plot(names, [r["kinds"][kind]["avg@2"]["mean"] for _, r in measured], "o-",
                      label=kind, alpha=0.7)
        axis.plot(names, [r["strict"]["avg@2"]["mean"] for _, r in measured], "ko-", label="all")
        axis.set(title="held-out accuracy after each stage", ylim=(0, 1))
        axis.tick_params(axis="x", rotation=20)
        report.save_figure(figure, file)
    except Exception as error:
        print(f"warning: {file} was not drawn ({error})", file=sys.stderr)


# ------------------------------------------------------------------------------------- the program

def named_command(argv, what, names, config_class, description):
    """Read a command line that begins with the name of `what`. Returns (name, config).

    Raises ValueError, in one line, for another name, wrong settings, or without --out."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    config = config_class(**command_line(config_class, description, argv))
    if name not in names:
        raise ValueError(f"give {what}, one of {', '.join(names)}, not {name!r}")
    check_settings(config)
    if not config.out:
        raise ValueError("give --out, a folder")

    # both become parts of other flags: --data A,B --reward A=1
    whole = {**absolute(config), "out": str(Path(config.out).resolve())}
    for flag in ("out", "data"):
        path = whole.get(flag, "")
        if set(",=") & set(path) and (flag == "out" or is_file(path)):
            raise ValueError(f"--{flag} {getattr(config, flag)}: choose a path without a comma or "
                             f"=, not {path}")
    return name, replace(config, **whole)       # --resume finds them from another folder too


def sources_of(config):
    """Checksums of the checkpoint and of the files that a pipeline works on, by their flags."""
    found = {}
    if config.model:
        found["model"] = fingerprint_of_model(config.model)
    for name, path in (("data", config.data), ("eval_data", config.eval_data)):
        if is_file(path):
            found[name] = f"{checksum(path):08x}"
    return found


def claim(name, config):
    """Take the folder. Raises ValueError where it is another pipeline's, or not asked to go on."""
    folder = Path(config.out)
    file = folder / "pipeline.json"
    mine = {"name": name, **asdict(config), "resume": False, "sources": sources_of(config)}

    if file.exists():
        theirs = json.loads(file.read_text())
        if not config.resume:
            raise ValueError(f"--out {folder} holds a pipeline: go on with --resume, or choose "
                             "another folder")
        # neither the gate nor the number of processes decides what is learned
        before = {**asdict(PipelineConfig()), **theirs}         # of an older version, too
        if before.get("sources", mine["sources"]) != mine["sources"]:
            raise ValueError("--resume: --model, --data or --eval-data hold something else than "
                             "when the pipeline began: put it back, or choose another --out")
        free = ("gate", "ranks", "sources")
        differ = [key for key in mine if key not in free and mine[key] != before[key]]
        if differ:
            raise ValueError(f"--resume goes on as it was: {differ[0]} was "
                             f"{theirs.get(differ[0])!r}, not {mine[differ[0]]!r}")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out {folder} is not empty: choose another folder")

    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    write_whole(file, json.dumps(mine, indent=1) + "\n")


def main(argv=None):
    with program(lambda: "interrupted: go on with the same command and --resume"):
        name, config = named_command(argv, "a pipeline", PIPELINES, PipelineConfig, __doc__)
        check_stages(build(name, config))       # what cannot run is said now
        claim(name, config)
        results = run(name, config)
        text = table(results, config)
        write_whole(Path(config.out) / "table.md", text + "\n")
        draw(results, Path(config.out) / "pipeline.png")
        print(text)


if __name__ == "__main__":
    main()
