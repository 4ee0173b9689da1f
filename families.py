"""Families of models: what a config.json says, or one line about why it cannot be computed here.

A checkpoint's config.json names its family (model_type), its sizes and a few switches.
`read_config` turns it into the fields of model.ModelConfig, and `new_config` writes one. What is
not said has the default of transformers. What is said twice (rope_theta beside another
rope_parameters.rope_theta, a tied head beside another one) is read as transformers reads it,
because anything else would be another model, without any sign of it.

The folder may come from a stranger. Every value has its type and its bounds, and the headers of the
weight files are compared with it before anything of that size is built. model.py is the caller;
prompts.py reads stop ids as they are read here. Needs engine/weights.py, which opens the files.
"""
import torch

from engine.weights import is_implied, stored_tensors

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads")         # without a default here
DEFAULTS = {
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "llama": {"max_position_embeddings": 2048, "eos_token_id": 2},
}
LARGEST = 2 ** 24       # of a size; the product of two still counts bytes without an overflow
MOST_LAYERS = 10_000
LONGEST = 2 ** 40       # of max_position_embeddings, which takes no memory
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(raw):
    """Returns the fields of model.ModelConfig, {name: value}, that a config.json (a dict) says.

    Raises ValueError with one line for a value that is none, and for anything that model.py does
    not compute."""
    kind = raw.get("model_type")
    if kind is None and "algo" in raw:
        raise ValueError("this config.json is that of a run of train.py: give its model/ folder")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ValueError(f"model_type {shown(kind)} is not supported; "
                         f"supported: {', '.join(DEFAULTS)}")
    missing = [name for name in SIZES if name not in raw]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")

    raw = {**DEFAULTS[kind], **raw}
    rope = rope_settings(raw)
    check_supported(raw, rope)
    attention_bias = switch(raw, "attention_bias")
    token_ids(raw.get("eos_token_id"), "config.json")
    return {
        "model_type": kind,
        **sizes(raw),
        "rms_norm_eps": number(raw, "rms_norm_eps", 1e-6, most=1),
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": rope if rope["rope_type"] == "llama3" else None,
        "tie_word_embeddings": switch(raw, "tie_word_embeddings"),
        "initializer_range": number(raw, "initializer_range", 0.02, most=100),
        "qkv_bias": kind == "qwen2" or attention_bias,
        "o_bias": kind != "qwen2" and attention_bias,
        "mlp_bias": kind == "llama" and switch(raw, "mlp_bias"),
        "qk_norm": kind == "qwen3",
        "eos_token_id": raw.get("eos_token_id"),
    }


def sizes(raw):
    """Returns the sizes of a config.json. Raises ValueError for one that no model has."""
    found = {name: size(raw, name) for name in SIZES if name != "num_hidden_layers"}
    found["num_hidden_layers"] = size(raw, "num_hidden_layers", MOST_LAYERS)
    found["max_position_embeddings"] = size(raw, "max_position_embeddings", LONGEST)

    # null, or nothing, is what follows from the other sizes
    heads = found["num_attention_heads"]
    derived = {"num_key_value_heads": heads, "head_dim": found["hidden_size"] // heads}
    for name, value in derived.items():
        found[name] = value if raw.get(name) is None else size(raw, name)

    if heads % found["num_key_value_heads"]:
        raise ValueError(f"config.json: num_attention_heads {heads} is no multiple of "
                         f"num_key_value_heads {found['num_key_value_heads']}")
    if found["head_dim"] < 2 or found["head_dim"] % 2:
        raise ValueError(f"config.json: head_dim {found['head_dim']} must be even, for RoPE "
                         "turns pairs (hidden_size / num_attention_heads where it is not given)")
    if heads * found["head_dim"] > LARGEST:
        raise ValueError(f"config.json: {heads} heads of {found['head_dim']} numbers are more "
                         f"than {LARGEST}")
    return found


def rope_settings(raw):
    """Returns the settings of RoPE in a config.json, always with rope_type and rope_theta.

    Older files have rope_theta and rope_scaling, newer ones have rope_parameters. Where both are
    given, rope_scaling hides rope_parameters, and what is in either hides what stands beside it,
    as in transformers (RotaryEmbeddingConfigMixin)."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name) or {}, dict):
            raise ValueError(f"config.json: {name} must be an object, not {shown(raw[name])}")

    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    original = "original_max_position_embeddings"
    if original in raw:         # beside the others it counts, and hides the one among them
        rope[original] = raw[original]
    if "partial_rotary_factor" in raw:
        rope.setdefault("partial_rotary_factor", raw["partial_rotary_factor"])
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    number(rope, "rope_theta", None, above=0, most=1e30)
    return rope


def check_supported(raw, rope):
    """Raise ValueError if a config.json asks for something that this file does not compute."""
    rope_type = rope["rope_type"]
    activation = raw.get("hidden_act", "silu")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"config.json: layer_types must be a list, not {shown(layer_types)}")
    sliding = any(kind != "full_attention" for kind in layer_types)
    by_layer = any(isinstance(value, dict) for value in rope.values())

    refused = {
        f"rope type {shown(rope_type)}": rope_type not in ("default", "llama3"),
        "rope settings that differ by layer": by_layer,
        f"hidden_act {shown(activation)}": activation != "silu",
        "sliding-window attention": switch(raw, "use_sliding_window") or sliding,
        "partial rotary embedding": rope.get("partial_rotary_factor") not in (None, 1),
        "quantized weights": bool(raw.get("quantization_config")),
    }
    if rope_type == "llama3":
        for name in LLAMA3:
            refused[f"llama3 rope without {name}"] = name not in rope
    for feature, found in refused.items():
        if found:
            raise ValueError(f"{raw['model_type']} with {feature} is not supported")

    if rope_type == "llama3":
        for name in LLAMA3:
            number(rope, name, None, above=0, most=1e30)
        if rope["high_freq_factor"] <= rope["low_freq_factor"]:
            raise ValueError("config.json: high_freq_factor must be above low_freq_factor")


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


# ------------------------------------------------------------------ what the weight files hold

def has_other_head(folder):
    """Returns whether a checkpoint holds an lm_head that is not its embedding.

    Then config.json's tie_word_embeddings is wrong, and transformers does not tie the two."""
    found = {name: stored for _, name, stored in stored_tensors(folder)}
    head, embedding = found.get(HEAD), found.get(EMBEDDING)
    if head is None or embedding is None:
        return False
    if head.get_shape() != embedding.get_shape():
        return True         # which check_shapes then refuses

    parts = (slice(row, row + 4096) for row in range(0, head.get_shape()[0], 4096))
    return not all(torch.equal(head[part], embedding[part]) for part in parts)


def check_depth(folder, layers):
    """Raise ValueError for a checkpoint of fewer layers than config.json says, before it is built.

    A number of layers without bounds would be as many modules."""
    names = {name for _, name, _ in stored_tensors(folder)}
    for layer in range(layers):
        first = f"model.layers.{layer}.input_layernorm.weight"
        if first not in names:
            raise ValueError(f"{folder}: config.json says {layers} layers, {first} is missing")


def check_shapes(folder, parameters, model_type):
    """Compare what a checkpoint holds with the parameters, {name: tensor}, before any has memory.

    Raises ValueError for a tensor that is missing, unexpected, doubled, or of another shape or
    kind."""
    missing = set(parameters)
    seen = set()
    for file, name, stored in stored_tensors(folder):
        if is_implied(name, parameters):
            continue
        if name not in parameters:
            raise ValueError(f"{file}: unexpected tensor {name} for a {model_type} model")
        if name in seen:
            raise ValueError(f"{file}: {name} is in another file as well")

        shape = tuple(stored.get_shape())
        expected = tuple(parameters[name].shape)
        if shape != expected:
            raise ValueError(f"{file}: {name} has shape {shape}, config.json says {expected}")
        if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{file}: {name} holds {stored.get_dtype()}, not floating-point "
                             "numbers of 16 bits or more: quantized weights are not read")
        seen.add(name)

    missing -= seen
    if missing:
        count, first = len(missing), min(missing)
        raise ValueError(f"{folder}: {count} tensors are missing, the first is {first}")


# --------------------------------------------------------------------------- one value of the file

def size(raw, name, most=LARGEST):
    """Returns a size. Raises ValueError for what is no integer from 1 to `most`."""
    value = raw[name]
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"config.json: {name} must be an integer from 1 to {most}, "
                         f"not {shown(value)}")
    return value


def number(raw, name, default, least=0, above=None, most=None):
    """Returns a number, or its default where the file has null or nothing.

    Raises ValueError for what is no number or not within its bounds, as NaN never is."""
    value = raw.get(name)
    if value is None:
        value = default
    inside = type(value) in (int, float) and least <= value <= most
    if not inside or (above is not None and not value > above):
        bound = f"above {above}" if above is not None else f"from {least}"
        raise ValueError(f"config.json: {name} must be a number {bound} to {most:g}, "
                         f"not {shown(value)}")
    return value


def switch(raw, name):
    """Returns true or false, which null and nothing are. Raises ValueError for anything else."""
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {name} must be true or false, not {shown(value)}")
    return bool(value)


def token_ids(value, file):
    """Returns the ids that a file's eos_token_id names, as a list: one, several, or null.

    Raises ValueError for anything else."""
    ids = value if isinstance(value, list) else [value]
    if value is None:
        return []
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{file}: eos_token_id must be a token id or a list of them, "
                         f"not {shown(value)}")
    return ids


def shown(value):
    """Returns a value for an error's line, which a long one would fill."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
