"""The specification of families.py: a config.json is read as transformers reads it, or refused."""
import json
import os
import resource

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from engine.weights import find_checkpoint
from families import read_config
from model import ModelConfig, Transformer
from test_model import LLAMA3, SIZES, assert_same_logits, edit_json, one_line, own_model, reference

torch.set_num_threads(1)

RAW = {"model_type": "qwen3", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48,
       "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture
def folder(tmp_path):
    own_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------- what is said twice

@pytest.mark.parametrize("rope", [
    {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"rope_theta": 700.0, "rope_parameters": {"rope_type": "default"}},
    {"rope_theta": 700.0, "rope_parameters": None, "rope_scaling": None},
    {"rope_parameters": None},
    {"rope_theta": 700.0, "rope_scaling": {"rope_type": "default"},
     "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_scaling": {**LLAMA3, "rope_theta": 900.0}, "rope_theta": 800.0, "rope_parameters": {}},
    {"rope_scaling": {"type": "default"}, "rope_parameters": LLAMA3},
])
def test_settings_of_rope_that_contradict_are_read_as_transformers_reads_them(tmp_path, rope):
    reference("llama").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update(rope))
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    assert ours.config.rope_theta == hf.config.rope_parameters["rope_theta"]
    assert_same_logits(ours, hf)
    ours.save_pretrained(tmp_path / "again")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), hf)


@pytest.mark.parametrize("kind, hf_class", [
    ("qwen2", Qwen2Config), ("qwen3", Qwen3Config), ("llama", LlamaConfig)])
def test_what_is_not_said_is_what_transformers_takes(kind, hf_class):
    raw = {"model_type": kind, "vocab_size": 60, "hidden_size": 64, "intermediate_size": 48,
           "num_hidden_layers": 2, "num_attention_heads": 32}
    theirs = hf_class.from_dict(dict(raw))
    ours = read_config(raw)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "eos_token_id",
                 "tie_word_embeddings", "initializer_range"):
        assert ours[name] == getattr(theirs, name), name
    assert ours["head_dim"] == (getattr(theirs, "head_dim", None) or 2)
    assert ours["rope_theta"] == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_tied_flag_beside_another_head_is_read_as_transformers_reads_it(tmp_path, family):
    """transformers ties them only if they are equal; here the last row of the head alone differs."""
    reference(family).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    edit_json(tmp_path / "config.json", lambda config: config.update(tie_word_embeddings=True))
    same = Transformer.from_pretrained(tmp_path)
    assert same.lm_head.weight is same.model.embed_tokens.weight
    assert_same_logits(same, AutoModelForCausalLM.from_pretrained(tmp_path))

    tensors["lm_head.weight"][-1] *= -1       # no larger: its logits keep the rounding of the rest
    save_file(tensors, file, metadata={"format": "pt"})
    other = Transformer.from_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(other, hf)
    other.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), hf)


def test_the_folder_of_a_run_is_not_that_of_its_model(tmp_path):
    (tmp_path / "config.json").write_text('{"algo": "grpo", "lr": 1e-4}')
    with one_line("that of a run of train.py: give its model/ folder", error=ValueError):
        Transformer.from_pretrained(tmp_path)


def test_a_head_of_another_shape_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(64, 32)
    save_file(tensors, folder / "model.safetensors")
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    with one_line("lm_head.weight", "(64, 32)", "(60, 32)"):
        Transformer.from_pretrained(folder)


def test_of_two_sets_of_files_the_one_counts_that_transformers_reads(folder):
    tensors = {name: torch.zeros_like(x) for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_logits(Transformer.from_pretrained(folder),
                       AutoModelForCausalLM.from_pretrained(folder))


# ----------------------------------------------------------------------- types, bounds, shapes

WRONG = ["64", True, 64.0, [64], {"a": 1}, -1, 0, 10 ** 9, 2 ** 63, 10 ** 400, float("nan")]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "head_dim",
                                  "num_hidden_layers", "num_attention_heads",
                                  "num_key_value_heads"])
def test_a_size_that_is_none_is_one_line(folder, name, value):
    edit_json(folder / "config.json", lambda config: config.update({name: value}))
    with one_line(name, error=ValueError):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize("change, culprit", [
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"), ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps"), ({"rms_norm_eps": True}, "rms_norm_eps"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings"), ({"attention_bias": [1]}, "attention_bias"),
    ({"use_sliding_window": "no"}, "use_sliding_window"), ({"layer_types": 3}, "layer_types"),
    ({"rope_parameters": [1]}, "rope_parameters"), ({"rope_scaling": "llama3"}, "rope_scaling"),
    ({"rope_parameters": None, "rope_theta": "1e4"}, "rope_theta"),
    ({"rope_parameters": None, "rope_theta": None}, "rope_theta"),
    ({"rope_parameters": None, "rope_theta": float("inf")}, "rope_theta"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ by layer"),
    ({"rope_parameters": {**LLAMA3, "factor": "8"}}, "factor"),
    ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial rotary"), ({"hidden_act": ["silu"]}, "hidden_act"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ({"eos_token_id": [[2]]}, "eos_token_id"), ({"eos_token_id": "2"}, "eos_token_id"),
    ({"eos_token_id": True}, "eos_token_id"), ({"eos_token_id": 2.0}, "eos_token_id"),
    ({"max_position_embeddings": 1e300}, "max_position_embeddings"),
    ({"max_position_embeddings": None}, "max_position_embeddings"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"head_dim": 7}, "head_dim"),
    ({"model_type": ["qwen3"]}, "model_type"), ({"model_type": {"qwen3": 1}}, "model_type"),
])
def test_a_value_of_another_kind_is_one_line(folder, change, culprit):
    edit_json(folder / "config.json", lambda config: config.update(change))
    with one_line(culprit, error=ValueError):
        Transformer.from_pretrained(folder)


SOME = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
                 st.sampled_from([2, 4, 8, 16, 0.5, "llama", "silu", "llama3", "default"]))
VALUES = st.recursive(SOME, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["rope_type", "rope_theta", "factor", "type"]), inner, max_size=3))
NAMES = [*RAW, "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "layer_types",
         "tie_word_embeddings", "hidden_act", "eos_token_id", "max_position_embeddings",
         "attention_bias", "partial_rotary_factor", "initializer_range"]


@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
@settings(deadline=None, max_examples=300)
def test_any_config_is_read_or_refused_in_one_line(changes):
    try:
        config = ModelConfig.from_dict({**RAW, **changes})
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert 0 < config.vocab_size <= 2 ** 24 and config.rope_theta > 0


def test_more_layers_than_the_file_has_are_refused_before_they_are_built(folder):
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=10_000))
    with one_line("10000 layers", "model.layers.2.", error=ValueError):
        Transformer.from_pretrained(folder)


def test_shapes_are_compared_before_memory_is_taken(folder):
    """2^24 x 2^24 numbers would be a million gigabytes."""
    big = {"vocab_size": 2 ** 24, "hidden_size": 2 ** 24, "intermediate_size": 2 ** 24}
    edit_json(folder / "config.json", lambda config: config.update(big))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with one_line("config.json says", error=ValueError):
        Transformer.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 18      # kB


def test_numbers_that_are_quantized_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with one_line("model.norm.weight", "I8", error=ValueError):
        Transformer.from_pretrained(folder)


def test_a_tensor_that_two_files_hold_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "b.safetensors")
    index = {"weight_map": {**dict.fromkeys(tensors, "a.safetensors"), "more": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with one_line("model.norm.weight", "another file", error=ValueError):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}, {"a": "../model.safetensors"},
                                        {"a": "/etc/passwd"}, {"a": None}])
def test_an_index_that_names_no_files_is_one_line(folder, weight_map):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with one_line("index.json", "weight_map", error=ValueError):
        Transformer.from_pretrained(folder)


def test_json_that_nests_too_deep_is_one_line(folder):
    (folder / "config.json").write_text("[" * 100_000)
    with one_line("config.json", "not valid JSON", error=ValueError):
        Transformer.from_pretrained(folder)


# ------------------------------------------------------------------------------------- the hub

def test_the_hub_gives_config_json_first_and_then_what_is_read(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects
    there = ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors",
             "model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md",
             "consolidated.safetensors", "consolidated.00.pth", "pytorch_model.bin",
             "original/params.json", "onnx/model.safetensors", "fp8/model-1.safetensors",
             "adapter_model.safetensors", "chat_template.jinja"]
    calls = []

    def snapshot_download(name, allow_patterns=None, ignore_patterns=None):
        calls.append(list(filter_repo_objects(there, allow_patterns=allow_patterns,
                                              ignore_patterns=ignore_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with one_line("mistral", error=ValueError):
        Transformer.from_pretrained("some/mistral")
    assert calls == [["config.json"]]

    (tmp_path / "config.json").write_text(json.dumps(RAW))
    assert find_checkpoint("some/qwen3", ModelConfig.from_dict) == tmp_path
    assert calls[1] == ["config.json"] and set(calls[2]) == {*there[:6], "chat_template.jinja"}


def test_sizes_of_the_tests_are_those_of_a_model():
    assert read_config({"model_type": "llama", **SIZES})["head_dim"] == 8
