"""Counts by hand, which the measurements are measured against. Speed itself is never tested."""
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
from measure import capacity, common, sampler
from model import ModelConfig, Transformer

TINY = ModelConfig(vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
                   num_attention_heads=2, num_key_value_heads=1, head_dim=2)


@pytest.mark.parametrize("tied", [True, False])
def test_matrix_parameters_are_those_of_all_products(tied):
    """Norms and the embedding lookup are no products.

    lm_head is one, also where it shares the embedding's weights."""
    config = ModelConfig(**{**vars(TINY), "tie_word_embeddings": tied})
    named = Transformer(config).named_parameters()
    matrices = sum(p.numel() for name, p in named if p.ndim == 2 and "embed" not in name)
    assert common.matrix_parameters(config) == matrices + (40 if tied else 0)


def test_roofline_by_hand():
    """Two prompts of 3 tokens have one completion each, of 1 and of 2 tokens.

    Matrices: 2 x (4 x 2 x (2 x 2 + 2 x 1) + 3 x 4 x 6) + 40 = 280, 40 of them lm_head."""
    prompts = [[1, 2, 3], [4, 5, 6]]
    by_flops = sampler.roofline_seconds(TINY, torch.float32, prompts, [1, 2], 1, 1.0, 1e9)
    by_bytes = sampler.roofline_seconds(TINY, torch.float32, prompts, [1, 2], 1, 1e9, 1.0)

    # every prompt token: 120 of the first block, 2 x 4 x 2 of the second's keys and values
    arithmetic = 2 * 6 * (120 + 16)
    # the last token of each prompt: the 104 others of the second block, and lm_head's 40
    arithmetic += 2 * 2 * (104 + 40)
    # attention, 4 x 2 x 2 FLOP a query and key: (9 + 9) / 2 in the first block, 3 + 3 in the second
    arithmetic += 16 * (9 + 6)

    # then one step with one row: 2 x 280 + 32 x (3 + 1) FLOP, or 280 weights and 8 x (3 + 1)
    # numbers of keys and values, 4 bytes each
    assert by_flops == pytest.approx(arithmetic + 2 * 280 + 32 * 4)
    assert by_bytes == pytest.approx(4 * (280 + 8 * 4), rel=1e-4)


def test_ragged_lengths_are_a_third_of_the_longest_in_the_mean():
    args = SimpleNamespace(prompts=100, group_size=8, prompt_tokens=64, new_tokens=300,
                           lengths="ragged")
    prompts, lengths = common.workload(args, TINY)
    assert max(lengths) == 300
    assert min(lengths) >= 1
    assert np.mean(lengths) == pytest.approx(100, rel=0.05)
    assert len(prompts) == 100
    assert {len(p) for p in prompts} <= set(range(32, 65))

    args.lengths = "equal"
    assert common.workload(args, TINY)[1] == [300] * 800


def test_predicted_memory_by_hand():
    """The model has 300 parameters, and eight rows of 100 own tokens are drawn.

    128 parameters are in each of two blocks (48 of attention, 72 of the MLP, 8 of norms), 40 in the
    tied embedding, 4 in the last norm. An own token has 32 bytes of keys and values. On the CPU
    they stay through training, if they take at most KEEP_BYTES."""
    load = capacity.Load(4, 2, 10, 100, 8, 1000)
    config = ModelConfig(**{**vars(TINY), "qk_norm": False})
    assert capacity.counts(config) == (2 * 128 + 44, 128, 44)

    cpu = capacity.memory(config, load, 1, 1, 4, whole=True, on_cpu=True)
    chip = capacity.memory(config, load, 1, 1, 4, whole=True, on_cpu=False)
    own = 8 * 100 * sampler.bytes_per_token(config, torch.float32)
    assert own == 8 * 100 * 32
    assert cpu["kv_cache"] == own + 4 * 10 * 32
    assert (cpu["kv_kept"], chip["kv_kept"]) == (own, 0)
    assert cpu["training_phase"] - chip["training_phase"] == own
    assert cpu["rollout_phase"] == chip["rollout_phase"]
    assert cpu["weights"] == cpu["gradients"] == 4 * 300
    assert cpu["moments"] == 8 * 300

    load.new_tokens = capacity.KEEP_BYTES // 8 // 32 + 1
    assert capacity.memory(config, load, 1, 1, 4, whole=True, on_cpu=True)["kv_kept"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["rollout --vs hf", "train", "train --vs trl", "memory",
                                     "logps"])
def test_every_measurement_runs(command, tmp_path):
    """Each runs once at the smallest size, and what it compares is the same on both sides."""
    if command == "train --vs trl":
        pytest.importorskip("trl", reason="pip install trl, to compare with it")
    file = tmp_path / "out.json"
    smallest = "--new-tokens 8 --prompt-tokens 6 --rounds 1 --threads 1"
    full = [sys.executable, bench.__file__, *command.split(), *smallest.split(),
            "--json", str(file)]
    done = subprocess.run(full, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    result = json.loads(file.read_text())
    assert result["command"].startswith("python bench.py " + command)
    if command == "train":
        one, other = result["loss_and_grad_norm"].values()
        assert one == pytest.approx(other, rel=1e-4)
        assert result["through_model"]["shared"] < result["through_model"]["alone"]
    if command == "train --vs trl":     # on their batch, the same objective
        for trl, ours in (x.values() for x in result["same_batch"].values()):
            assert ours == pytest.approx(trl, rel=1e-4)
    if command == "rollout --vs hf":
        assert result["largest_logp_deviation_from_trainer"] < 1e-4
        assert len(result["ratio"]["rounds"]) == 1


@pytest.mark.parametrize("command", bench.COMMANDS)
def test_every_command_has_its_function(command):
    """Their modules are imported by name, so a wrong name would only show when it is asked for."""
    assert callable(bench.measurement(command))


@pytest.mark.parametrize("what", bench.COMMANDS)
def test_a_result_is_never_overwritten(what, monkeypatch, tmp_path):
    file = tmp_path / "out.json"
    file.write_text("a result")
    monkeypatch.setattr(sys, "argv", ["bench.py", what, "--json", str(file)])
    with pytest.raises(SystemExit, match=r"^error: --json \S*out.json already exists: [^\n]*$"):
        bench.main()
    assert file.read_text() == "a result"
