"""Checkpoint folders in Hugging Face layout: where their files are, how they are read and written.

    config.json                     the shape of the model
    model.safetensors               the weights, or model-00001-of-0000N.safetensors with an index
    COMPANION_FILES                 tokenizer and generation settings, carried along as they are

Only safetensors is read, because a pickle could run code. Whatever is missing, cut short or
malformed raises an error of one line that names the file. A parameter may be sharded over ranks
(FSDP2): each rank reads its own rows, and the parameter is gathered to be written. model.py is the
only caller.
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
SUPPORTED = ("qwen2", "qwen3", "llama")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads")
SHARD_BYTES = 5 * 10 ** 9  # a larger checkpoint is written as several files


# ----------------------------------------------------------------------------------- config.json

def read_config(raw):
    """Returns the fields of model.ModelConfig, {name: value}, that a config.json (a dict) says.

    Raises ValueError with one line for anything that model.py does not compute."""
    check_required(raw)
    rope = rope_settings(raw)
    check_supported(raw, rope)

    kind = raw["model_type"]
    heads = raw["num_attention_heads"]
    attention_bias = bool(raw.get("attention_bias", False))
    return {
        "model_type": kind,
        **{name: raw[name] for name in REQUIRED},
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": rope if rope["rope_type"] == "llama3" else None,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "max_position_embeddings": raw.get("max_position_embeddings", 2048),
        "initializer_range": raw.get("initializer_range", 0.02),
        "qkv_bias": kind == "qwen2" or attention_bias,
        "o_bias": kind != "qwen2" and attention_bias,
        "mlp_bias": kind == "llama" and bool(raw.get("mlp_bias", False)),
        "qk_norm": kind == "qwen3",
        "eos_token_id": raw.get("eos_token_id"),
    }


def check_required(raw):
    """Raise ValueError if a config.json is of another family, or lacks a size without a default."""
    kind = raw.get("model_type")
    if kind not in SUPPORTED:
        supported = ", ".join(SUPPORTED)
        raise ValueError(f"model_type {kind!r} is not supported; supported: {supported}")

    missing = [name for name in REQUIRED if name not in raw]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")


def rope_settings(raw):
    """Returns the settings of RoPE in a config.json, always with rope_type and rope_theta.

    Older files have rope_theta and rope_scaling, newer ones have rope_parameters."""
    scaling = raw.get("rope_scaling") or {}
    parameters = raw.get("rope_parameters") or {}
    rope = {"rope_theta": 10000.0, **scaling, **parameters}
    rope["rope_theta"] = raw.get("rope_theta", rope["rope_theta"])
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    return rope


def check_supported(raw, rope):
    """Raise ValueError if a config.json asks for something that this file does not compute."""
    rope_type = rope["rope_type"]
    activation = raw.get("hidden_act", "silu")
    layer_types = raw.get("layer_types") or ()
    sliding = raw.get("use_sliding_window") or any(t != "full_attention" for t in layer_types)

    refused = {
        f"rope type {rope_type!r}": rope_type not in ("default", "llama3"),
        f"hidden_act {activation!r}": activation != "silu",
        "sliding-window attention": sliding,
        "partial rotary embedding": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    if rope_type == "llama3":
        for name in ("factor", "low_freq_factor", "high_freq_factor",
                     "original_max_position_embeddings"):
            refused[f"llama3 rope without {name}"] = name not in rope

    for feature, found in refused.items():
        if found:
            raise ValueError(f"{raw['model_type']} with {feature} is not supported")


def new_config(config):
    """Returns a config.json, as a dict, that any recent version of transformers reads.

    config holds the fields of model.ModelConfig, {name: value}."""
    same = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "head_dim", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
            "rope_theta", "tie_word_embeddings", "max_position_embeddings",
            "initializer_range", "eos_token_id", "mlp_bias")
    rope = config["rope_scaling"] or {"rope_type": "default"}
    return {
        **{name: config[name] for name in same},
        "architectures": [f"{config['model_type'].capitalize()}ForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": config["qkv_bias"] and config["model_type"] != "qwen2",
        "use_sliding_window": False,
        "rope_scaling": config["rope_scaling"],
        "rope_parameters": {**rope, "rope_theta": config["rope_theta"]},
    }


# --------------------------------------------------------------------------------------- reading

def find_checkpoint(path_or_id):
    """Returns the folder of a checkpoint: a local folder as it is, or a hub id once downloaded.

    huggingface_hub downloads safetensors only, no pickle. Raises FileNotFoundError for a path that
    is no folder, and for an id that the hub does not give."""
    path = Path(path_or_id)
    name = str(path_or_id)
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name} is neither a checkpoint folder nor a hub id "
                                "such as Qwen/Qwen3-4B")

    try:
        from huggingface_hub import snapshot_download
        patterns = ["*.json", "*.safetensors", *COMPANION_FILES]
        return Path(snapshot_download(name, allow_patterns=patterns))
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
        raise FileNotFoundError(f"{file} does not exist: "
                                "is the folder a Hugging Face checkpoint?") from None
    except ValueError as error:
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

    Raises FileNotFoundError for one that does not exist."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))

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


@torch.no_grad()
def read_weights(folder, parameters, model_type):
    """Copy every stored tensor of a checkpoint folder into the parameter of its name.

    parameters: {name: parameter}; of a sharded one, only this rank's rows are read. Raises
    ValueError for a tensor that is missing, unexpected or of another shape."""
    missing = set(parameters)
    for file, name, stored in stored_tensors(folder):
        # RoPE's frequencies are computed by the model, and a tied head is the embedding
        tied_head = name == "lm_head.weight" and name not in parameters
        if tied_head or name.endswith("rotary_emb.inv_freq"):
            continue
        if name not in parameters:
            raise ValueError(f"{file}: unexpected tensor {name} for a {model_type} model")

        shape = tuple(stored.get_shape())
        expected = tuple(parameters[name].shape)
        if shape != expected:
            raise ValueError(f"{file}: {name} has shape {shape}, config.json says {expected}")

        part, rows = own_rows(parameters[name])
        if part.numel():
            part.copy_(stored[rows])
        missing.discard(name)

    if missing:
        count, first = len(missing), min(missing)
        raise ValueError(f"{folder}: {count} tensors are missing, the first is {first}")


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
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


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
