"""Counts by hand, which the measurements are measured against. Speed itself is never tested."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
import prompts
from measure import capacity, common, llamacpp, sampler, verifier, vllm
from measure.worker import Worker, command_of
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

    # each of 6 rows may keep a prompt of its own in the cache: 6 seats for 8 prompts, not 2 x 2
    many = capacity.Load(8, 4, 10, 100, 6, 1000)
    assert capacity.memory(config, many, 1, 1, 4)["kv_cache"] == (6 * 100 + 6 * 10) * 32

    load.new_tokens = capacity.KEEP_BYTES // 8 // 32 + 1
    assert capacity.memory(config, load, 1, 1, 4, whole=True, on_cpu=True)["kv_kept"] == 0


def test_predicted_lora_by_hand():
    """r (in + out) a layer: q and o 8 each, k and v 6 each, the MLP's three 10 each, two blocks: 116 r.

    The 316 parameters are frozen, in 2 bytes; 232 are trained. Gathered are all, reduced the adapters' gradients alone. A frozen
    weight costs 4 FLOP a token in place of 6."""
    assert capacity.adapter_parameters(TINY, 1) == 116 and capacity.adapter_parameters(TINY, 0) == 0
    everything, block, root = capacity.counts(TINY)
    load = capacity.Load(4, 2, 10, 100, 8, 1000, lora_rank=2, checkpointing=False)
    parts = capacity.memory(TINY, load, 1, 1, 2)
    assert parts["weights"] == 4 * 232 + 2 * everything and parts["moments"] == 8 * 232 and parts["gradients"] == 4 * 232

    found = {(c.kind, c.phase): c for c in capacity.traffic(TINY, 8, 4, 3, 2, lora_rank=2)}
    assert found["all_gather", "rollout"].tensor_bytes == 2 * (everything + 232)
    assert found["all_gather", "training"].tensor_bytes == 2 * (2 * (2 * block + 232) + root)
    assert (found["reduce_scatter", "training"].times, found["reduce_scatter", "training"].tensor_bytes) == (3, 4 * 232)
    assert found["all_reduce", "training"].tensor_bytes == 4 * 232 / 4

    def seconds(lora_rank, checkpointing):
        return capacity.compute_seconds(TINY, replace(load, lora_rank=lora_rank, checkpointing=checkpointing), 1, 2)[1]
    assert seconds(2, False) / seconds(0, False) == pytest.approx(4 / 6)
    assert seconds(2, True) / seconds(0, True) == pytest.approx(6 / 8)


@pytest.mark.slow
@pytest.mark.parametrize("rank, shard", [(4, 0), (4, 1), (0, 0)])
def test_two_ranks_send_the_bytes_that_are_predicted(rank, shard, tmp_path):
    """With LoRA the gradients of adapters alone, whole or over copies."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", bench.__file__, "comm",
               "--prompts", "4", "--group-size", "2", "--threads", "1", "--lora-rank", str(rank), "--shard", str(shard), "--dtype",
               "float32", "--json", str(tmp_path / "c.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=300)
    result = json.loads((tmp_path / "c.json").read_text())
    for kind in ("all_gather", "reduce_scatter") if shard != 1 else ("all_reduce",):
        found = result[kind]["bytes"] - (40 if kind == "all_reduce" else 0)     # 40: counts and means of a step
        assert found == result[kind]["predicted_bytes"] > 0


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


# ------------------------------------------------------------------------ flags and their mistakes

@pytest.mark.parametrize("flags, message", [
    ("train --vs hf", "--vs hf has no meaning for train: rollout --vs hf, .*train --vs trl.*"),
    ("reward --vs vllm", "--vs vllm has no meaning for reward: .*"),
    ("memory --model x", "--model has no meaning for memory: rollout --model, train --model"),
    ("rollout --lora-rank 4", "--lora-rank has no meaning for rollout: .*"),
    ("logps --data x", "--data has no meaning for logps: .*"),
    ("rollout --predict", "--predict has no meaning for rollout: .*"),
    ("memory --predict --shard 4", "--shard does nothing with --predict, .*"), ("comm --predict --shape qwen2.5-0.5b", "--shape does nothing .*"),
    ("memory --predict --no-checkpointing", "--checkpointing does nothing .*"),
    ("rollout --prompts 0", "--prompts 0: must be at least 1"), ("train --group-size 1", "train --group-size 1: .*"),
    ("rollout --rounds 0", "--rounds 0: must be at least 1"), ("memory --shard -1", "--shard -1: must be at least 0"),
    ("logps --new-tokens 0", "--new-tokens 0: must be at least 1"), ("comm --rows -1", "--rows -1: must be at least 0"),
    ("rollout --data x.jsonl", "--data needs --model: .*"),
    ("rollout --model nowhere", "--model nowhere is no folder: .*"),
    ("train --model .", ".*config.json.*"),
    ("train --vs trl --model .", "train --vs trl --model needs --data: .*"),
    ("rollout --vs vllm --vllm-python /no/python", "--vs vllm: there is no program /no/python"),
    ("rollout --vs llamacpp --dtype bfloat16", "--vs llamacpp needs --dtype float32; .*"),
])
def test_a_mistake_is_one_line(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split(), "--threads", "1"])
    with pytest.raises(SystemExit, match=rf"^error: {message}$"):
        bench.main()


def test_a_result_that_cannot_be_written_is_shown_all_the_same(monkeypatch, tmp_path, capsys):
    """The folder went while it was measured, and a file has its name."""
    def measured(args, device):
        (tmp_path / "r").rmdir()
        (tmp_path / "r").write_text("")
        return {"seconds": 1.5}

    (tmp_path / "r").mkdir()
    monkeypatch.setattr(bench, "measurement", lambda command: measured)
    monkeypatch.setattr(sys, "argv", ["bench.py", "logps", "--threads", "1", "--json", str(tmp_path / "r" / "x.json")])
    with pytest.raises(SystemExit, match="^error: --json .*x.json: .*the result stands above$"):
        bench.main()
    assert json.loads(capsys.readouterr().out)["seconds"] == 1.5


def test_the_python_of_a_worker_is_found_from_here(tmp_path, monkeypatch):
    """The worker runs in another folder; a name without a folder is looked for as a shell does."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    model = SimpleNamespace(dtype=torch.float32)
    for given, found in (("bin/python", str(tmp_path / "bin" / "python")), ("python3", shutil.which("python3"))):
        asked = []
        monkeypatch.setattr(sampler, "Worker", lambda name, command, environment: asked.append(command))
        sampler.start_worker(SimpleNamespace(vs="vllm", vllm_python=given, llamacpp_python=""), model)
        assert asked[0][0] == found


def test_a_file_with_a_line_separator_inside_a_string_is_read(tmp_path):
    row = {"output": "a\u2028b", "gold": "1", "correct": False}
    (tmp_path / "x.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert verifier.labelled(tmp_path)


def test_help_names_every_side(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.parser().parse_args(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for words in ("--model FOLDER --data FILE.jsonl --vs vllm", "rollout --vs llamacpp",
                  "--vllm-python", "--gguf-dtype"):
        assert words in text


# -------------------------------------------------------------------------- a process beside ours

ECHO = """
from measure.worker import serve
def load(request):
    print("a library that prints")
    def one_round(warm):
        print("and prints")
        if request.get("fails"):
            raise KeyError("lost\\nsecond line")
        if request.get("ends"):
            import os
            print("ran out of memory", flush=True)
            os._exit(3)
        return {"seconds": 0.5, "warm": warm, "double": 2 * request["number"]}
    return {"version": "1"}, one_round
serve(load)
"""


def worker_of(code):
    root = os.path.dirname(bench.__file__)
    return Worker("fake", [sys.executable, "-c", code], {"PYTHONPATH": root})


def test_a_worker_loads_once_and_answers_round_after_round():
    with worker_of(ECHO) as worker:
        assert worker.start({"number": 21}) == {"version": "1"}
        for warm in (True, False, False):
            answer = worker.round(warm)
            assert answer["double"] == 42 and answer["warm"] is warm
            assert answer["seconds"] == 0.5
            assert answer["cpu_seconds_while_waiting"] >= 0 and answer["peak_memory_mb"] > 0
    assert worker.process.poll() is not None


@pytest.mark.parametrize("request_, message", [
    ({"fails": 1, "number": 1}, r"^--vs fake: KeyError: [^\n]*$"),
    ({"ends": 1, "number": 1}, r"^--vs fake: its process has ended \(ran out of memory\)$"),
])
def test_what_goes_wrong_in_a_worker_is_one_line(request_, message):
    with worker_of(ECHO) as worker:
        worker.start(request_)
        with pytest.raises(ValueError, match=message):
            worker.round(False)


@pytest.mark.parametrize("code, message", [
    ("print('hello', flush=True); input(); input()", "an answer that is no JSON object: 'hello"),
    ("print('[1]', flush=True); input(); input()", "an answer that is no JSON object"),
    ("import sys; sys.exit('no such thing')", r"its process has ended \(no such thing\)"),
    ("pass", "it printed nothing"),
    ("import time; time.sleep(60)", "no answer within 0.5 s"),
])
def test_an_answer_that_cannot_be_used_is_one_line(code, message):
    with worker_of(code) as worker, pytest.raises(ValueError, match=message):
        worker.ask({}, 0.5 if "sleep" in code else 60)
    assert worker.process.poll() is not None


def test_a_worker_ends_with_its_input_also_in_the_middle_of_a_round():
    """So it does not outlive a bench.py that was killed."""
    slow = ECHO.replace('print("and prints")', "import time; time.sleep(600)")
    with worker_of(slow) as worker:
        worker.start({"number": 1})
        worker.process.stdin.write('{"warm": false}\n')
        worker.process.stdin.close()
        assert worker.process.wait(timeout=60) != 0


@pytest.mark.parametrize("module, words", [
    ("measure.vllm", "this Python has no vllm: pip install vllm there"),
    ("measure.llamacpp", "this Python has no llama_cpp: pip install llama-cpp-python"),
])
def test_a_library_that_is_missing_is_one_line(module, words):
    hide = "import sys; sys.modules['vllm'] = sys.modules['llama_cpp'] = None; "
    python, _, code, *rest = command_of(module, sys.executable)
    code = code.replace("importlib.import_module", "None or importlib.import_module")
    with Worker("fake", [python, "-c", hide + code, *rest]) as worker:
        with pytest.raises(ValueError, match=words):
            worker.start({})


def test_variables_that_the_user_has_set_stay(monkeypatch, tmp_path):
    """The environment of vLLM brings Intel's OpenMP, wherever this test runs."""
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    python = tmp_path / "bin" / "python"

    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = vllm.environment(python, 2)
    assert str(library) in found["LD_PRELOAD"].split(":")
    assert found["OMP_NUM_THREADS"] == "2"

    monkeypatch.setenv("LD_PRELOAD", "mine.so")
    assert vllm.environment(python, 2)["LD_PRELOAD"] == "mine.so"


def test_queries_in_llama_cpps_order_by_hand():
    """Two heads of four rows: 0 and 2 were rotated together, and so were 1 and 3."""
    rows = np.arange(8)
    assert llamacpp.halves_to_pairs(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    matrix = np.stack([rows, rows + 10], 1)
    assert llamacpp.halves_to_pairs(matrix, 2)[:, 1].tolist() == [10, 12, 11, 13, 14, 16, 15, 17]


# ------------------------------------------------------------------------------- a real checkpoint

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny model and its tokenizer, and a file of three questions."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = prompts.train_tokenizer(["1 + 1 = 2"], 300)
    config = ModelConfig(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                         eos_token_id=tokenizer.eos_token_id)
    Transformer(config).init_weights().save_pretrained(folder)
    prompts.save_tokenizer(tokenizer, folder)
    file = folder / "questions.jsonl"
    lines = [json.dumps({"problem": f"{i} + 1 = ?", "answer": str(i + 1)}) for i in range(3)]
    file.write_text("\n".join(lines))
    return folder, file


def run_bench(monkeypatch, file, flags):
    """Returns the result of bench.py in this process, at the smallest size."""
    monkeypatch.setattr(common, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(sampler, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(sampler, "bandwidth", lambda *_: 1e9)
    smallest = "--new-tokens 6 --rounds 1 --threads 1 --prompts 2 --group-size 2"
    command = ["bench.py", *flags.split(), *smallest.split(), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    return json.loads(file.read_text())


@pytest.mark.parametrize("flags", ["rollout", "train", "train --lora-rank 2"])
def test_a_checkpoint_and_real_prompts_take_the_place_of_a_shape(flags, checkpoint, monkeypatch,
                                                                 tmp_path):
    folder, questions = checkpoint
    more = f" --model {folder} --data {questions}"
    result = run_bench(monkeypatch, tmp_path / "out.json", flags + more)

    model = Transformer.from_pretrained(folder)
    adapters = 0
    if "lora" in flags:     # rank x (in + out) of q, k, v, o and of gate, up, down, in two blocks
        adapters = 2 * 2 * (32 + 24 + 24 + 32 + 3 * 40)
    assert result["parameters"] == common.parameter_count(model) + adapters

    if flags == "rollout":
        assert result["largest_logp_deviation_from_trainer"] < 1e-4
        assert result["mean_prompt"] == len(prompts.load_tokenizer(folder)("0 + 1 = ?\n").input_ids)
    else:
        shared, alone = result["loss_and_grad_norm"].values()
        assert shared == pytest.approx(alone, rel=1e-3)


def test_too_few_questions_are_one_line(checkpoint, monkeypatch):
    folder, questions = checkpoint
    flags = f"rollout --model {folder} --data {questions} --prompts 4"
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split(), "--threads", "1"])
    with pytest.raises(SystemExit, match="has 3 problems, which are fewer than --prompts 4$"):
        bench.main()


def test_a_worker_takes_turns_with_the_sampler(checkpoint, monkeypatch, tmp_path):
    """The fake one computes its continuation with our own model, so both are the same."""
    fake = """
from measure.worker import serve
def load(request):
    import torch
    from model import Transformer
    from rollout import Sampler
    model = Transformer.from_pretrained(request["model"])
    prompt = request["prompts"][0]
    out = Sampler(model, []).generate([prompt], 1, request["check_tokens"], temperature=0.0)
    logps, _ = model.token_logps(out.tokens)
    found = {"tokens": out.completions()[0], "logps": logps[0, len(prompt):].tolist()}
    return {"version": "fake", "check": found}, lambda warm: {"seconds": 2.0, "more": warm}
serve(load)
"""
    folder, _ = checkpoint
    root = os.path.dirname(bench.__file__)
    code = f"import sys; sys.path.insert(0, {root!r})" + fake
    monkeypatch.setattr(sampler, "command_of", lambda module, python: [python, "-c", code])
    result = run_bench(monkeypatch, tmp_path / "out.json",
                       f"rollout --model {folder} --prompt-tokens 8 --vs vllm")
    assert result["same_model"]["equal_until"] == result["same_model"]["tokens"] == sampler.CHECK
    assert result["same_model"]["largest_logp_difference"] < 1e-5
    tokens = result["mean_length"] * result["completions"]
    assert result["tokens_per_s"]["vllm"]["rounds"] == [round(tokens / 2, 4)]
    assert result["vllm"]["version"] == "fake" and result["vllm"]["last_round"]["more"] is False
