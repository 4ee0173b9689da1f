"""A run's folder: who may write there, and what the run was started from.

    config.json     the run's settings
    sources.json    fingerprints of the model and the data that it was started from
    start/          the starting model without its weights: config, tokenizer, chat template
    made_by.jsonl   a line each time that it began or went on: commit, packages, machine, command
    .lock           held while a run writes here
    .NAME.part-0    of other programs: a result as far as it is (`Parts`)
    log.jsonl, samples.jsonl, curve.png (report.py), checkpoints/ (engine/checkpoint.py), model/

With --resume the same problems must come in the same order, and a reference must be the model that
the run began from. So changed data, and with --beta a changed model, are refused. Without --beta
and --lora-rank the starting weights are not needed any more, and may be gone.
"""
import fcntl
import glob
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, fields, replace
from importlib import metadata
from pathlib import Path

from config import free_on_resume, is_file, is_small
from dist import Agreed, barrier, gather_objects, rank, together, world
from engine.checkpoint import checkpoints, checksum, write_whole
from engine.machine import choose_threads
from engine.weights import find_checkpoint, read_json, weight_files
from reward import reward_items


# ------------------------------------------------------------------------------- who writes there

_lock = []      # the open lock file of this process


def agree_on_run(c):
    """Choose the run's folder and settings. Returns (settings, folder), the same on every rank.

    Rank 0 looks at the folder. Raises ValueError on every rank when it is another run's, or when
    the ranks were not started with the same settings."""
    for name, values in differing(gather_objects(asdict(c))).items():
        raise Agreed(f"--{name.replace('_', '-')} is not the same on all ranks: "
                     f"{', '.join(map(str, values))}; start all nodes by one command")

    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    restarted = any(gather_objects(restarts > 0))       # of any node's torchrun
    chosen = together(lambda: open_run(c, restarted))
    return replace(c, **chosen), Path(chosen["out"])


def differing(settings):
    """The settings (a dict a rank) that are not the same on all ranks: {name: values}."""
    found = {}
    for name in settings[0]:
        values = sorted({str(of_rank.get(name)) for of_rank in settings})
        if len(values) > 1:
            found[name] = values
    return found


def open_run(c, restarted):
    """Look at the run's folder, without writing to it. Returns the settings that follow from it.

    restarted: torchrun started the processes again after one of them was lost. A run of these
    settings then goes on by itself; one of others is left alone. Raises ValueError when the folder
    is taken."""
    data = Path(c.data).stem if is_file(c.data) else re.sub(r"[^\w.-]+", "-", c.data)[:100]
    out = c.out or f"runs/{c.algo}-{data}-seed{c.seed}"
    folder, config = Path(out), Path(out) / "config.json"
    resume, threads = c.resume, c.threads
    places = {} if resume else absolute(c)

    if restarted and not resume and config.exists():
        stored = json.loads(config.read_text())
        mine = {**asdict(c), **places, "out": out, "threads": stored.get("threads")}
        if stored == mine:
            resume, threads = True, stored["threads"]

    taken = folder.exists() and any(not x.name.startswith(".") for x in folder.iterdir())
    if taken and not resume:
        hint = f"python train.py --resume --out {out}" if config.exists() else "an empty one"
        raise ValueError(f"--out {out} is not empty: choose another folder, "
                         f"or go on with it: {hint}")
    if resume:
        lock(folder)
    threads = threads or choose_threads(not is_small(c.model))
    return {**places, "out": out, "resume": resume, "threads": threads}


def absolute(c):
    """Settings that may name files or folders, with absolute paths where they do: a run may go on
    elsewhere."""
    found = {}
    for name in ("model", "base", "teacher"):
        text = getattr(c, name, "")
        if text and Path(text).is_dir():
            found[name] = str(Path(text).resolve())

    for name in ("data", "eval_data", "reward"):
        text = getattr(c, name, "")
        if is_file(text):
            found[name] = str(Path(text).resolve())
        elif text:
            found[name] = ",".join(map(absolute_item, text.split(",")))
    return found


def absolute_item(item):
    """The same for an item of --data or --reward, such as A.jsonl@2 or MINE.py:NAME=1."""
    path, rest = re.fullmatch(r"(?s)(.*?)([@:][^@:/]*)?", item.strip()).groups("")
    found = str(Path(path).resolve()) if is_file(path) else path
    return item if "," in found else found + rest       # commas part items


def lock(folder):
    """Hold the folder until this process ends, however it ends.

    Raises ValueError when another does."""
    if _lock and Path(_lock[0].name) == folder / ".lock":
        return
    _lock[:] = [open(folder / ".lock", "a")]
    try:
        fcntl.flock(_lock[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _lock.clear()
        raise ValueError(f"{folder}: another run is writing there; "
                         "stop it, or choose another --out") from None
    except OSError:         # a file system without locks
        pass


def in_use(folder):
    """Whether a run that is alive, of this process or another, holds the folder."""
    try:
        with open(folder / ".lock", "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:         # no such file, or a file system without locks
        pass
    return False


def release():
    """Let another run of this process have the folder."""
    _lock.clear()


def claim(c, folder):
    """Write config.json: from here on the folder is this run's. Every rank enters.

    It is called only after the input has proved readable."""
    def write():
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        set_aside(c, folder)
        settings = {**asdict(c), "resume": False}
        write_whole(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    together(write)


def set_aside(c, folder):
    """Rename model/ of a run that had ended and goes on: where model/ is, a run has ended."""
    saved = checkpoints(folder / "checkpoints")
    step = int(saved[-1].name.removeprefix("step-")) if saved else c.steps
    if step < c.steps and (folder / "model").exists():
        aside = folder / f"model-at-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder / "model", aside)
        print(f"the run goes on: its model of step {step} is {aside} now", file=sys.stderr)


def stopped_line(c):
    """How to go on after Ctrl-C."""
    if not (c and c.out and (Path(c.out) / "config.json").exists()):
        return "stopped before anything was written"
    launcher = "torchrun ... train.py" if "WORLD_SIZE" in os.environ else "python train.py"
    return f"stopped; go on with: {launcher} --resume --out {c.out}"


# ----------------------------------------------------------------------- what it was started from

def is_under_way(folder):
    """Whether a run can go on from a checkpoint, and so does not need its starting weights."""
    def look():
        return bool(checkpoints(folder / "checkpoints")) and (folder / "start").is_dir()
    return together(look)


def fingerprint_of_problems(problems):
    """A checksum of problems, answers and system messages, in their order."""
    crc = 0
    for p in problems:
        seen = [p["problem"], p["answer"], *([p["system"]] if "system" in p else [])]
        crc = zlib.crc32(json.dumps(seen).encode(), crc)
    return f"{crc:08x}, {len(problems)} problems"


def fingerprint_of_model(folder):
    """A checksum of a checkpoint's shapes and weights, or of an adapter."""
    folder, crc = find_checkpoint(folder), 0
    if (folder / "adapter_config.json").exists():
        files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    else:
        files = [folder / "config.json", *weight_files(folder)]
    for file in files:
        crc = checksum(file, crc)
    return f"{crc:08x}"


def sources_of(folder):
    """What sources.json says; nothing where there is none.

    Raises ValueError for another content."""
    file = folder / "sources.json"
    if not file.exists():
        return {}
    found = read_json(file)
    if set(found) - {"teacher"} != {"model", "data", "eval_data"}:
        raise ValueError(f"{file} is not what a run has written: start another --out")
    return found


def fingerprint_of_run(c, folder):
    """A checksum of the settings that decide the numbers, of sources.json and of start/.

    Settings at their defaults do not count, so that a later version may have more of them."""
    free = free_on_resume(c)
    usual = {f.name: f.default for f in fields(c)}
    settings = {name: value for name, value in asdict(c).items()
                if name not in free and value != usual[name]}
    crc = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    for file in (folder / "sources.json", *sorted((folder / "start").glob("*"))):
        crc = checksum(file, crc)
    return f"{crc:08x}"


def check_run(progress, c, folder, say):
    """Raise ValueError when the run's own files are not those that the checkpoint was made with.

    Says so when no step is left."""
    if progress.run and progress.run != fingerprint_of_run(c, folder):
        raise Agreed(f"--resume: config.json, sources.json or start/ in {folder} have changed "
                     "since the checkpoint was written, or it is of another version of this "
                     "program: put them back, or start another --out")
    if progress.step >= c.steps:
        say(f"--steps {c.steps}: the run has made {progress.step} steps, so none is left to make")


def check_data(c, folder, train, held_out):
    """Raise ValueError when the problems are not those that the run in the folder began with.

    Of all problems, before any is left out as too long or too many. Returns their fingerprints."""
    known = together(lambda: sources_of(folder))
    now = {"data": fingerprint_of_problems(train), "eval_data": fingerprint_of_problems(held_out)}
    for name, source in (("data", c.data), ("eval_data", c.eval_data or c.data)):
        if name in known and known[name] != now[name]:
            which = "training" if name == "data" else "held-out"
            raise Agreed(f"--resume: the {which} problems of {source} have changed since the run "
                         f"began ({known[name]}; now {now[name]}): put the old ones back, or start "
                         f"another --out from {folder}/model")
    return now


def check_model(c, folder, source, needed, say):
    """Compare the model at `source` with the one that the run in the folder began from.

    Raises ValueError when it is another, or gone, and is needed, as with --beta. Otherwise only
    says so. The teacher of --algo distill is always needed."""
    check_teacher(c, folder)

    def look():
        known = sources_of(folder).get("model")
        if known is None:
            return None, None
        try:
            return known, fingerprint_of_model(source)
        except (OSError, ValueError):
            return known, "missing"

    known, now = together(look)
    if known == now:
        return
    what = "is not there any more" if now == "missing" else "has changed since the run began"
    if needed:
        raise Agreed(f"--resume: the starting model {source} {what}, and this run needs it: put it "
                     "back, or start another --out")
    say(f"the starting model {source} {what}; the run does not need it and goes on from its own "
        "checkpoint")


def check_teacher(c, folder):
    """Raise ValueError when --teacher is not the one that the run in the folder began with."""
    def look():
        known = sources_of(folder).get("teacher")
        return known, known and fingerprint_of_model(c.teacher)

    known, now = together(look)
    if known != now:
        raise Agreed(f"--resume: the teacher {c.teacher} has changed since the run began: put it "
                     "back, or start another --out")


def remember(c, folder, model, source, problems):
    """Write what the run is started from, once. Every rank enters.

    problems: their fingerprints, of check_data. Returns fingerprint_of_run, which each checkpoint
    keeps."""
    def write():
        warn_of_changed_rewards(c, folder)
        made = {**makers(), "reward_files": reward_files(c)}
        with open(folder / "made_by.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(made) + "\n")
        if (folder / "sources.json").exists():
            return fingerprint_of_run(c, folder)

        part = folder / ".start"
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(folder / "start", ignore_errors=True)
        sources = {"model": fingerprint_of_model(source), **problems}
        if getattr(c, "teacher", ""):           # a setting of --algo distill
            sources["teacher"] = fingerprint_of_model(c.teacher)
        try:
            model.save_description(part)
            os.replace(part, folder / "start")
            write_whole(folder / "sources.json", json.dumps(sources, indent=2) + "\n")
        except OSError as error:
            raise OSError(f"{folder} cannot be written to ({error}): mend it, then --resume "
                          f"--out {folder}") from None
        return fingerprint_of_run(c, folder)
    return together(write)


def reward_files(c):
    """{file of --reward: its checksum}."""
    files = [name.rpartition(":")[0] for _, name, _ in reward_items(c.reward)]
    return {file: f"{checksum(Path(file)):08x}" for file in files if is_file(file)}


def warn_of_changed_rewards(c, folder):
    """Say which files of --reward are not as they were when the run was last started.

    It is no error: a function that failed may have been mended."""
    try:
        lines = (folder / "made_by.jsonl").read_text(encoding="utf-8").splitlines()
        before = json.loads(lines[-1])["reward_files"]
    except (OSError, ValueError, LookupError, TypeError):       # none yet, or half a line
        return
    for name, now in reward_files(c).items():
        if before.get(name, now) != now:
            print(f"warning: {name} has changed since the run was last started: from here on the "
                  "log is of another reward", file=sys.stderr)


def makers():
    """The code, the packages and the machine that make a run; null for what is not known."""
    def git(*words):
        try:
            done = subprocess.run(["git", "-C", str(Path(__file__).parent), *words], timeout=10,
                                  capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else None
        except (OSError, subprocess.TimeoutExpired):
            return None

    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    edits = git("status", "--porcelain", "--untracked-files=no")
    return {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": git("rev-parse", "HEAD"),
            "edited": None if edits is None else bool(edits), "command": sys.argv,
            "python": platform.python_version(), "ranks": world(),
            **{name: version(name) for name in ("torch", "torch_npu", "transformers")},
            "machine": platform.platform(), "processor": platform.machine(),
            "cores": os.cpu_count()}


# ----------------------------------------------------------------------------------------- the log

def cut_log(file, step):
    """Cut a log to the lines up to a step.

    With step None it begins anew, and what was there stays to be read beside it. What is no line
    of a log (the last one when a crash cut it, a blank one of an editor) goes."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
    if any(lines) and step is None:
        os.replace(file, file.with_name(file.name + ".old"))
        print(f"there is no checkpoint yet: the run begins again, and what {file} held is "
              f"{file.name}.old", file=sys.stderr)
    kept = [line + "\n" for line in lines if step is not None and step_of(line) <= step]
    write_whole(file, "".join(kept))


def step_of(line):
    """The step of a log's line; infinity where that is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


# ------------------------------------------------------------- what a long program has done so far

class Parts:
    """Lines of a result, written as they come, so that a program that was stopped goes on.

    Each rank has a file of its own beside the target, .TARGET.part-RANK, so that a crash leaves no
    more than half a line. The first line says what the parts belong to: settings, of which "model"
    names the weights, those weights (`weights`, a checksum), and problems. `found` holds what
    earlier starts left, of any number of ranks. Every rank enters."""

    def __init__(self, target, settings, problems, what, flag):
        """Raises ValueError where the parts are of another `what`; flag: of the target."""
        self.target = Path(target)
        self.weights = together(lambda: fingerprint_of_model(settings["model"]))
        header = json.dumps([settings, self.weights, fingerprint_of_problems(problems)])
        lines = {}          # each once, though several ranks may have written it anew
        for path in self.files():
            first, *others = path.read_text(encoding="utf-8").split("\n")
            if first != header:
                raise ValueError(f"{path} is a part of another {what}: remove it, or choose "
                                 f"another {flag}")
            lines |= dict.fromkeys(others[:-1])         # the last one is empty, or cut by a crash
        self.found = [json.loads(line) for line in lines]

        barrier()
        self.file = self.target.with_name(f".{self.target.name}.part-{rank()}")
        write_whole(self.file, "\n".join([header, *lines]) + "\n")

    def files(self):
        """The files of all ranks."""
        return sorted(self.target.parent.glob(f".{glob.escape(self.target.name)}.part-*"))

    def add(self, rows):
        """Append rows, each a line of JSON."""
        with open(self.file, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def remove(self):
        """Remove the files of all ranks, when the result is written."""
        for path in self.files():
            path.unlink()
