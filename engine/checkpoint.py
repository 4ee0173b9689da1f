"""Checkpoints that survive a crash, a full disk, a flipped bit and another world size.

    checkpoints/step-000020/
        *.distcp                weights, Adam's moments, the lagging weights: each rank its part
        .metadata               the index: which tensor lies where
        extra.pt                the objective's state, the same on every rank
        state.json              Progress, and the size and checksum of every file

A checkpoint is written into a hidden folder and renamed when every rank's part is on disk: it is
whole or absent. Tensors are saved by torch.distributed.checkpoint under their names, whatever part
of them a rank held, so any number of ranks can go on from them. Several nodes need a folder that
all of them see. No file of a checkpoint can run code: tensors are read with weights_only, and the
index, which is a pickle, into stand-ins, from whose numbers and names it is made anew.
"""
import json
import os
import pickle
import re
import shutil
import sys
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (ChunkStorageMetadata, Metadata, MetadataIndex,
                                                   StorageMeta, TensorProperties,
                                                   TensorStorageMetadata)

from dist import Agreed, barrier, each, first_line, gather_objects, rank, together, world


@dataclass
class Progress:
    """How far a run has come: the numbers that every checkpoint keeps, in state.json."""
    step: int = 0                   # rollouts made
    updates: int = 0                # optimizer steps made
    behaviour_version: int = 0      # updates that the weights which draw had seen
    behaviour_step: int = 0         # the step that they were taken at
    stream: dict = field(default_factory=dict)      # where the problems' order stands
    num_tokens: int = 0             # of prompts and completions, over all ranks
    num_samples: int = 0            # completions
    bad_steps: int = 0              # non-finite updates in a row
    seconds: float = 0.0            # of all starts of the run together
    first: dict = field(default_factory=dict)       # evaluation before the first step
    run: str = ""                   # a checksum of what the run was started with (folder.py)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, (int, float) if f.type is float else f.type):
                raise ValueError(f"state.json: {f.name} is {value!r}, not of type "
                                 f"{f.type.__name__}")


# ------------------------------------------------------------------------------------ checkpoints

def checkpoints(folder):
    """The whole checkpoints of a folder, oldest first."""
    found = [x for x in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", x.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def tensors_of(model, optimizer, lagging=None):
    """The (possibly sharded) tensors of a checkpoint, {name: tensor}: what is trained, and Adam's
    state.

    lagging: an older copy of that, which draws completions."""
    found = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    if lagging is not None:
        found |= {f"behaviour.{name}": p for name, p in lagging.named_parameters()}
    for name, p in model.named_parameters():
        moments = optimizer.state.get(p, {})            # a frozen weight has none
        found |= {f"{kind}.{name}": value for kind, value in moments.items()}
    return {name: tensor.detach() for name, tensor in found.items()}


def save_checkpoint(folder, progress, tensors, extra=None, keep=2):
    """Write folder/step-NNNNNN, whole or not at all. Every rank enters.

    tensors: {name: tensor, sharded or the same on every rank}. extra: a dict of tensors, lists and
    numbers, of which rank 0's is written. The newest `keep` checkpoints stay, and so does one of
    this step that is there. Raises ValueError on every rank when it cannot be written."""
    step = progress.step
    final, part = Path(folder) / f"step-{step:06d}", Path(folder) / f".part-{step:06d}"
    if together(final.is_dir):
        return
    try:
        together(lambda: make_part(folder, part))
        sees = gather_objects(part.is_dir())
        if not all(sees):
            blind = [i for i, there in enumerate(sees) if not there]
            raise OSError(f"ranks {blind} do not see {folder}: give an --out that all nodes share")

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of dcp: that there is one process only
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(part, sync_files=True))
        mine = {file.name: checksum(file) for file in part.glob(f"__{rank()}_*.distcp")}
        checksums = {name: crc for of_rank in gather_objects(mine) for name, crc in of_rank.items()}
        together(lambda: finish_part(folder, part, final, progress, extra, checksums, keep))

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


def finish_part(folder, part, final, progress, extra, checksums, keep):
    """Add what rank 0 adds, then rename; then let the oldest go.

    checksums: those of the ranks' parts."""
    torch.save(extra or {}, part / "extra.pt")
    checksums = {**checksums, **{name: checksum(part / name) for name in (".metadata", "extra.pt")}}
    files = {name: [(part / name).stat().st_size, crc] for name, crc in checksums.items()}

    state = json.dumps({"progress": asdict(progress), "files": files})
    whole = {"state": state, "checksum": zlib.crc32(state.encode())}
    (part / "state.json").write_text(json.dumps(whole))
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
    go_on = f"{whole[-1].name} is whole: mend it, then go on" if whole else "there is none yet"
    return (f"checkpoint of step {step} not written ({reason(error)}; "
            f"{free_mb} MB are free there); {go_on}")


@torch.no_grad()
def load_checkpoint(path, tensors):
    """Fill the tensors {name: tensor} in place, each rank its part. Every rank enters.

    Returns (Progress, extra). Raises ValueError on every rank when a file is missing, cut, or does
    not fit."""
    try:
        (progress, extra), index = each(lambda: (read_state(path), read_index(path)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=IndexReader(path, index))

    except (ValueError, dcp.CheckpointException) as error:
        older = [x for x in checkpoints(path.parent) if x != path]
        instead = older[-1].name if older else "the start: there is no other"
        raise Agreed(f"checkpoint {path} cannot be read ({reason(error)}); "
                     f"remove that folder to resume from {instead}") from None
    return progress, extra


def read_state(path):
    """(Progress, extra) of a checkpoint. Of its files each rank checks a share.

    Raises an error when a file is not what was written."""
    whole = json.loads((path / "state.json").read_text())
    if zlib.crc32(whole["state"].encode()) != whole["checksum"]:
        raise ValueError("state.json is not as it was written")

    state = json.loads(whole["state"])
    for number, (name, (size, crc)) in enumerate(sorted(state["files"].items())):
        if Path(name).name != name:
            raise ValueError(f"{name} is no file of a checkpoint")
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes, {size} were written")
        if number % world() == rank() and checksum(path / name) != crc:
            raise ValueError(f"{name} is not as it was written: its checksum differs")

    extra = torch.load(path / "extra.pt", map_location="cpu", weights_only=True)
    return Progress(**state["progress"]), extra


def checksum(file, crc=0):
    """The CRC-32 of a file, going on from that of others."""
    with open(file, "rb") as opened:
        while block := opened.read(2 ** 20):
            crc = zlib.crc32(block, crc)
    return crc


# ------------------------------------------------------------------- the index, which is a pickle

CLASSES = {         # of an index, by module; of other modules nothing is allowed
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", "float32", "bfloat16", "float16", "int64"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",)}
OPCODES = (         # of pickle, that an index is written with
    "PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET STACK_GLOBAL NEWOBJ REDUCE BUILD EMPTY_DICT "
    "SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 NONE "
    "NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 SHORT_BINUNICODE BINUNICODE").split()


class Inert:
    """Stands for whatever class or function an index names: keeps what it is given, and no more."""

    def __new__(cls, *given):
        self = object.__new__(cls)
        self.given = given
        return self

    def __setstate__(self, state):
        self.state = state


class IndexUnpickler(pickle._Unpickler):        # in Python: its memo takes no more than is in it
    """Reads the index of a checkpoint into stand-ins. So nothing that it names is ever called."""

    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
                for name in OPCODES}

    def find_class(self, module, name):
        if name not in CLASSES.get(module, ()):
            raise ValueError(f".metadata names {module}.{name}, which no checkpoint needs: it is "
                             "not of this program, and could run code")
        return type(name, (Inert,), {})

    def set_items(self):
        self.put(self.pop_mark())

    def set_item(self):
        value = self.stack.pop()
        self.put([self.stack.pop(), value])

    def put(self, items):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, Inert)):       # a nested tuple takes for ever to hash
                raise ValueError(".metadata is no index of tensors")
            self.stack[-1][key] = value

    dispatch[pickle.SETITEMS[0]] = set_items
    dispatch[pickle.SETITEM[0]] = set_item


def read_index(path):
    """The index of a checkpoint as dcp's Metadata, made anew from the numbers and names in it.

    Raises an error when it is something else, points to a file that is no checkpoint's, or leaves
    a part of a tensor out."""
    with open(path / ".metadata", "rb") as file:
        try:
            index = IndexUnpickler(file).load().state
        except (KeyError, IndexError, TypeError, AttributeError, EOFError) as error:
            raise ValueError(f".metadata is no index of tensors ({error!r})") from None

    tensors = {}
    for name, tensor in index["state_dict_metadata"].items():
        if type(tensor).__name__ != "TensorStorageMetadata":
            raise ValueError(f".metadata: {name} is no tensor")
        size = size_of(tensor.state["size"])
        dtype = getattr(torch, tensor.state["properties"].state[0].__name__)
        chunks = [(size_of(chunk.state["offsets"]), size_of(chunk.state["sizes"]))
                  for chunk in tensor.state["chunks"]]
        check_whole(name, size, chunks)
        tensors[name] = TensorStorageMetadata(
            TensorProperties(dtype), size, [ChunkStorageMetadata(*chunk) for chunk in chunks])

    places = {}
    for key, stored in index["storage_data"].items():
        file, key = stored.state["relative_path"], key.state
        transformed = stored.state.get("transform_descriptors")
        if not re.fullmatch(r"__\d+_\d+\.distcp", file) or transformed:
            raise ValueError(f".metadata points to {file!r}, which is no file of a checkpoint")
        place = MetadataIndex(key["fqn"], size_of(key["offset"]), key["index"])
        places[place] = _StorageInfo(file, int(stored.state["offset"]), int(stored.state["length"]))
    return Metadata(tensors, {name: (name,) for name in tensors}, places)


def size_of(stand_in):
    """A torch.Size of an index, checked to be one."""
    [numbers] = stand_in.given
    if type(stand_in).__name__ != "Size" or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(".metadata: a size is none")
    return torch.Size(numbers)


def check_whole(name, size, chunks):
    """Raise ValueError unless the chunks are the rows of the tensor, each row once."""
    filled = sorted(chunk for chunk in chunks if 0 not in chunk[1])
    row = 0
    for offsets, sizes in filled:
        if len(size) and (offsets[0] != row or any(offsets[1:]) or sizes[1:] != size[1:]):
            raise ValueError(f".metadata: the parts of {name} do not make it whole")
        row += sizes[0] if len(size) else 1
    if 0 not in size and row != (size[0] if len(size) else 1):
        raise ValueError(f".metadata: the parts of {name} do not make it whole")


class IndexReader(dcp.FileSystemReader):
    """dcp's reader, given the index."""

    def __init__(self, path, index):
        super().__init__(path)
        self.index = index

    def read_metadata(self, *args, **kwargs):
        self.index.storage_meta = StorageMeta(load_id=self.load_id)
        return self.index


def reason(error):
    """The first line of an error that says something.

    A CheckpointException collects one error a rank."""
    failures = getattr(error, "failures", None)
    return first_line(next(iter(failures.values()))[0] if failures else error)


def write_whole(file, text):
    """Write a file such that there is never half of it."""
    part = file.with_name("." + file.name)
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, file)
