"""Checkpoint folders in Hugging Face layout: where their files are, how they are read and written.

    config.json                     the shape of the model
    model.safetensors               the weights, or model-00001-of-0000N.safetensors with an index
    COMPANION_FILES                 tokenizer and generation settings, carried along as they are

Only safetensors is read, because a pickle could run code. Whatever is missing, cut short or
malformed raises an error of one line that names the file. A parameter may be sharded over ranks
(FSDP2): each rank reads its own rows, and the parameter is gathered to be written. model.py is the
caller; families.py knows what config.json means, and compares it with what the files hold.
"""
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

COMPANION_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
SHARD_BYTES = 5 * 10 ** 9  # a larger checkpoint is written as several files


# --------------------------------------------------------------------------------------- reading

def find_checkpoint(path_or_id, check=None):
    """Returns the folder of a checkpoint: a local folder as it is, or a hub id once downloaded.

    check is a function of its config.json, a dict, which is fetched first: what it refuses is not
    downloaded. Of the rest only the files that are read here are. Raises FileNotFoundError for a
    path that is no folder, and for an id that the hub does not give."""
    path = Path(path_or_id)
    name = str(path_or_id)
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name} is neither a checkpoint folder nor a hub id "
                                "such as Qwen/Qwen3-4B")

    if check:
        check(read_json(download(name, ["config.json"]) / "config.json"))
    return download(name, ["config.json", *WEIGHT_FILES, *COMPANION_FILES])


def download(name, patterns):
    """Returns the folder of a hub id, in which the files of these patterns are now."""
    try:
        from huggingface_hub import snapshot_download
        # no folders: they hold the same weights in other forms
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:   # offline, no such repository, no permission: many types
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise FileNotFoundError(
            f"{name} is not a folder here and the hub did not give it ({reason}); "
            "download the checkpoint and pass its folder") from None


def read_json(file):
    """Returns the object of a JSON file.

    Raises FileNotFoundError if it is absent and ValueError if it is malformed or no object."""
    try:
        content = json.loads(Path(file).read_text())
    except FileNotFoundError:
        hint = "is the folder a Hugging Face checkpoint?"
        if (Path(file).parent / "adapter_config.json").exists():
            hint = "the folder holds an adapter alone; give that of the merged model"
        raise FileNotFoundError(f"{file} does not exist: {hint}") from None
    except (ValueError, RecursionError) as error:       # RecursionError: nested too deep
        raise ValueError(f"{file} is not valid JSON: {error}") from None

    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def read_companions(folder):
    """Returns the COMPANION_FILES that a checkpoint folder has, as {name: bytes}."""
    files = {name: folder / name for name in COMPANION_FILES}
    return {name: file.read_bytes() for name, file in files.items() if file.exists()}


def weight_files(folder):
    """Returns the safetensors files of a checkpoint folder, one or many.

    Where there is both, the one counts, as for transformers. Raises FileNotFoundError for a file
    that does not exist, and ValueError for an index that names no files of the folder."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists() and not (folder / names[0]).exists():
        weight_map = read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(x, str) and x == Path(x).name for x in names):
            raise ValueError(f"{index}: weight_map must name a file of this folder a tensor")
        names = sorted(set(names))

    files = [folder / name for name in names]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{folder} has no weights: {file.name} does not exist "
                                    "(only safetensors is read)")
    return files


def open_shard(file):
    """Open a safetensors file.

    Raises ValueError if it is cut short (a broken download) or something else."""
    try:
        return safe_open(file, framework="pt")
    except Exception as error:   # SafetensorError derives from Exception alone
        raise ValueError(f"{file} is not a whole safetensors file ({error}): "
                         "download or copy it again") from None


def is_implied(name, parameters):
    """Returns whether a stored tensor is not read.

    RoPE's frequencies are computed by the model, and a tied head is the embedding."""
    tied_head = name == "lm_head.weight" and name not in parameters
    return tied_head or name.endswith("rotary_emb.inv_freq")


@torch.no_grad()
def read_weights(folder, parameters):
    """Copy every stored tensor of a checkpoint folder into the parameter of its name.

    parameters: {name: parameter}, which families.check_shapes has passed; of a sharded one, only
    this rank's rows are read."""
    for _, name, stored in stored_tensors(folder):
        if not is_implied(name, parameters):
            part, rows = own_rows(parameters[name])
            if part.numel():
                part.copy_(stored[rows])


def stored_tensors(folder):
    """Yield (file, name, slice) for every stored tensor of a checkpoint folder.

    A slice of safetensors knows its shape and reads only the rows that it is asked for."""
    for file in weight_files(folder):
        with open_shard(file) as shard:
            for name in shard.keys():
                yield file, name, shard.get_slice(name)


# ----------------------------------------------------------------- parameters sharded over ranks

def own_rows(parameter):
    """Returns the part of a parameter that this rank holds, and the slice of rows that it is.

    FSDP2 cuts the first dimension. A parameter that is not sharded is one part of all rows."""
    if not isinstance(parameter, DTensor):
        return parameter, slice(None)
    size, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), slice(offset[0], offset[0] + size[0])


def whole(parameter):
    """Returns a parameter with all its rows, gathered from the ranks that share it."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


# --------------------------------------------------------------------------------------- writing

def write_json(file, content):
    """Write an object as an indented JSON file."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def write_shards(path, tensors, dtype):
    """Write tensors, {name: tensor}, into the folder `path` in the given dtype.

    They become model.safetensors, or above SHARD_BYTES several files and their index. Raises
    OSError for a file that could not be written."""
    shards = names_by_shard(tensors, dtype)
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"

        # tensor by tensor: gather it from the ranks, move it to the host and convert it
        shard = {}
        for name in names:
            shard[name] = whole(tensors[name]).detach().to("cpu", dtype).contiguous()
        try:
            save_file(shard, path / file, metadata={"format": "pt"})
        except Exception as error:      # SafetensorError, which derives from Exception alone
            raise OSError(f"{path / file} could not be written ({error})") from None
        weight_map.update(dict.fromkeys(names, file))

    if len(shards) > 1:
        total = sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(path / "model.safetensors.index.json", index)


def names_by_shard(tensors, dtype):
    """Returns lists of the tensors' names, one a file: at most SHARD_BYTES or one tensor each."""
    shards = [[]]
    shard_bytes = 0

    for name, tensor in tensors.items():
        tensor_bytes = tensor.numel() * dtype.itemsize
        if shards[-1] and shard_bytes + tensor_bytes > SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += tensor_bytes
    return shards
