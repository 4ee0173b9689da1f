"""Checkpoint folders in Hugging Face layout: where their files are, what is in them, how they are written.

    config.json, model.safetensors (or model-00001-of-0000N.safetensors with an index), tokenizer and generation files

Only safetensors is read: a pickle could run code. Everything that is missing, cut short or malformed is one line that names the
file. A parameter may be sharded over ranks (FSDP2): each rank reads its own rows, and it is gathered to be written.
"""
import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

CARRIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
           "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
SHARD_BYTES = 5 * 10 ** 9  # a larger checkpoint is written as several files


def read_json(file):
    """A JSON file's object; one line that names the file when it is absent or malformed."""
    try:
        content = json.loads(Path(file).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist: is the folder a Hugging Face checkpoint?") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def open_shard(file):
    """An open safetensors file; one line that names it when it is cut short (a broken download) or something else."""
    try:
        return safe_open(file, framework="pt")
    except Exception as error:   # SafetensorError derives from Exception alone
        raise ValueError(f"{file} is not a whole safetensors file ({error}): download or copy it again") from None


def find_checkpoint(path_or_id):
    """A local folder as it is; otherwise a hub id, downloaded by huggingface_hub (safetensors only, no pickle)."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if str(path_or_id).startswith((".", "/", "~")) or str(path_or_id).count("/") != 1:
        raise FileNotFoundError(f"{path_or_id} is neither a checkpoint folder nor a hub id such as Qwen/Qwen3-4B")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(path_or_id), allow_patterns=["*.json", "*.safetensors", *CARRIED]))
    except Exception as error:   # offline, no such repository, no permission: many types, one meaning here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{path_or_id} is not a folder here and the hub did not give it ({reason}); "
                                "download the checkpoint and pass its folder") from None


def weight_files(folder):
    """The safetensors files of a checkpoint folder, one or many."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{folder} has no weights: {file.name} does not exist (only safetensors is read)")
    return files


def own_rows(p):
    """(what this rank holds of a parameter, as a tensor; which rows these are). FSDP2 cuts the first dimension."""
    if not isinstance(p, DTensor):
        return p, slice(None)
    size, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return p.to_local(), slice(offset[0], offset[0] + size[0])


def whole(p):
    """A parameter with all its rows: gathered from the ranks that share it."""
    return p.full_tensor() if isinstance(p, DTensor) else p


def write_shards(path, tensors, dtype):
    """Write tensors as model.safetensors, or as model-00001-of-0000N.safetensors with an index above SHARD_BYTES."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        n = tensor.numel() * dtype.itemsize
        if shards[-1] and size + n > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: whole(tensors[name]).detach().to("cpu", dtype).contiguous() for name in names}
        try:
            save_file(shard, path / file, metadata={"format": "pt"})
        except Exception as error:      # SafetensorError, which derives from Exception alone
            raise OSError(f"{path / file} could not be written ({error})") from None
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(t.numel() * dtype.itemsize for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
