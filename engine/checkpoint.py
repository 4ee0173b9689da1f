"""A run's folder, and checkpoints that survive a crash, a full disk and another world size.

    folder/config.json          the run's settings
    folder/.lock                held while a run writes here
    folder/checkpoints/step-000020/
        *.distcp, .metadata     weights, Adam's moments, the lagging weights: each rank its part
        extra.pt                the objective's state, the same on every rank
        state.json              Progress, and the size of every file

A checkpoint is written into a hidden folder and renamed when every rank's part is on disk: it is
whole or absent. Tensors are saved by torch.distributed.checkpoint under their names, whatever part
of them a rank held, so any number of ranks can go on from them. Several nodes need a folder that
all of them see. The index of the tensors is a pickle: resume only your own runs.
"""
import fcntl
import json
import os
import re
import shutil
import sys
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from dist import Agreed, barrier, broadcast_object, first_line, gather_objects, rank
from engine.machine import choose_threads


@dataclass
class Progress:
    """How far a run has come: the numbers that every checkpoint keeps, in state.json."""
    step: int = 0                   # rollouts made
    updates: int = 0                # optimizer steps made
    behaviour_version: int = 0      # updates that the weights which draw had seen
    cursor: int = 0                 # problems taken from the stream
    num_tokens: int = 0             # of prompts and completions, over all ranks
    bad_steps: int = 0              # non-finite updates in a row
    seconds: float = 0.0            # of all starts of the run together
    first: dict = field(default_factory=dict)       # evaluation before the first step


# ------------------------------------------------------------------------------------- run folder

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
    out = c.out or f"runs/{c.algo}-{Path(c.data).stem}-seed{c.seed}"
    folder, config = Path(out), Path(out) / "config.json"
    resume, threads = c.resume, c.threads

    if restarted and not resume and config.exists():
        stored = json.loads(config.read_text())
        mine = {**asdict(c), "out": out, "threads": stored.get("threads")}
        if stored == mine:
            resume, threads = True, stored["threads"]

    taken = folder.exists() and any(not x.name.startswith(".") for x in folder.iterdir())
    if taken and not resume:
        hint = f"python train.py --resume --out {out}" if config.exists() else "an empty one"
        raise ValueError(f"--out {out} is not empty: choose another folder, "
                         f"or go on with it: {hint}")
    if resume:
        lock(folder)
    return {"out": out, "resume": resume, "threads": threads or choose_threads()}


def together(act):
    """Let rank 0 act. Every rank gets its result, or raises the error that it met."""
    result = problem = None
    if rank() == 0:
        try:
            result = act()
        except Exception as error:      # a full disk is an OSError, or of torch.save a RuntimeError
            problem = first_line(error)

    result, problem = broadcast_object((result, problem))
    if problem:
        raise Agreed(problem)
    return result


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


def release():
    """Let another run of this process have the folder."""
    _lock.clear()


def claim(c, folder):
    """Write config.json: from here on the folder is this run's. Every rank enters.

    It is called only after the input has proved readable."""
    def write():
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        settings = {**asdict(c), "resume": False}
        write_whole(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    together(write)


def write_whole(file, text):
    """Write a file such that there is never half of it."""
    part = file.with_name("." + file.name)
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


# ------------------------------------------------------------------------------------ checkpoints

def checkpoints(folder):
    """The whole checkpoints of a folder, oldest first."""
    found = [x for x in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", x.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def tensors_of(model, optimizer, lagging=None):
    """The (possibly sharded) tensors of a checkpoint, {name: tensor}: weights and Adam's state.

    lagging: another copy of the weights, which draws completions."""
    found = {f"model.{name}": p for name, p in model.named_parameters()}
    if lagging is not None:
        found |= {f"behaviour.{name}": p for name, p in lagging.named_parameters()}
    for name, p in model.named_parameters():
        moments = optimizer.state.get(p, {})            # a frozen weight has none
        found |= {f"{kind}.{name}": value for kind, value in moments.items()}
    return {name: tensor.detach() for name, tensor in found.items()}


def save_checkpoint(folder, progress, tensors, extra=None, keep=2):
    """Write folder/step-NNNNNN, whole or not at all. Every rank enters.

    tensors: {name: tensor, sharded or the same on every rank}. extra: a dict of tensors, lists and
    numbers, of which rank 0's is written. The newest `keep` checkpoints stay. Raises ValueError on
    every rank when it cannot be written."""
    step = progress.step
    final, part = Path(folder) / f"step-{step:06d}", Path(folder) / f".part-{step:06d}"
    try:
        together(lambda: make_part(folder, part))
        sees = gather_objects(part.is_dir())
        if not all(sees):
            blind = [i for i, there in enumerate(sees) if not there]
            raise OSError(f"ranks {blind} do not see {folder}: give an --out that all nodes share")

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of dcp: that there is one process only
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(part, sync_files=True))
        together(lambda: finish_part(folder, part, final, progress, extra, keep))

    # a CheckpointException, which is no Exception, holds the errors of all ranks
    except (Exception, dcp.CheckpointException) as error:
        barrier()
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)     # on a full disk, room for others
        raise Agreed(not_written(folder, step, error)) from None


def make_part(folder, part):
    """Make the hidden folder that a checkpoint is written into; what a crash left goes."""
    for left_over in Path(folder).glob(".part-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    part.mkdir(parents=True)


def finish_part(folder, part, final, progress, extra, keep):
    """Add what rank 0 adds, then rename; then let the oldest go."""
    torch.save(extra or {}, part / "extra.pt")
    sizes = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
    (part / "state.json").write_text(json.dumps({**asdict(progress), "files": sizes}))
    for path in (*part.iterdir(), part):
        sync(path)
    os.replace(part, final)

    try:
        sync(folder)
        for old in checkpoints(folder)[:-keep]:
            gone = Path(folder) / f".part-{old.name}"       # half of it must not look whole
            os.replace(old, gone)
            shutil.rmtree(gone)
    except OSError as error:        # the new one is whole all the same
        print(f"warning: {folder}: {error}", file=sys.stderr)


def sync(path):
    """Wait until a file or folder is on disk: a rename must not get there before what it names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def not_written(folder, step, error):
    """The line that says why a checkpoint was not written, and how to go on."""
    whole = checkpoints(folder)
    there = next(path for path in Path(folder).absolute().parents if path.exists())
    free_mb = shutil.disk_usage(there).free // 2 ** 20
    go_on = f"{whole[-1].name} is whole: mend it, then --resume" if whole else "there is none yet"
    return (f"checkpoint of step {step} not written ({reason(error)}; "
            f"{free_mb} MB are free there); {go_on}")


@torch.no_grad()
def load_checkpoint(path, tensors):
    """Fill the tensors {name: tensor} in place, each rank its part. Every rank enters.

    Returns (Progress, extra). Raises ValueError on every rank when a file is missing, cut, or does
    not fit."""
    try:
        problem = progress = extra = None
        try:
            progress, extra = read_state(path)
        except Exception as error:      # foreign or misshapen files raise many types
            problem = first_line(error)
        problem = next(filter(None, gather_objects(problem)), None)
        if problem:
            raise ValueError(problem)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(path))

    except (ValueError, dcp.CheckpointException) as error:
        older = [x for x in checkpoints(path.parent) if x != path]
        instead = older[-1].name if older else "the start: there is no other"
        raise Agreed(f"checkpoint {path} cannot be read ({reason(error)}); "
                     f"remove that folder to resume from {instead}") from None
    return progress, extra


def read_state(path):
    """(Progress, extra) of a checkpoint.

    Raises an error when a file has not the size it was given."""
    state = json.loads((path / "state.json").read_text())
    for name, size in state.pop("files").items():
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes, {size} were written")
    extra = torch.load(path / "extra.pt", map_location="cpu", weights_only=True)
    return Progress(**state), extra


def reason(error):
    """The first line of an error that says something.

    A CheckpointException collects one error a rank."""
    failures = getattr(error, "failures", None)
    return first_line(next(iter(failures.values()))[0] if failures else error)


def cut_log(file, step):
    """Cut a log to the lines up to a step.

    With step None it begins anew, and what was there stays to be read beside it."""
    lines = list(open(file, encoding="utf-8")) if file.exists() else []
    whole = [line for line in lines if line.endswith("\n")]        # a crash may cut the last line
    if whole and step is None:
        os.replace(file, file.with_name(file.name + ".old"))
    kept = [line for line in whole if step is not None and json.loads(line)["step"] <= step]
    write_whole(file, "".join(kept))
