"""LoRA: the function is unchanged at first, live equals merged, what is frozen costs nothing, and the sampler sees it."""
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import dist
import grpo
import learner as learning
import lora
import sft
import train
from config import Config, parse
from engine.checkpoint import Progress
from engine.decode import InferenceModel, Linear
from model import Transformer
from rollout import Sampler
from test_decode import FAMILIES, small_model
from test_train import HERE, fast, log_of, run_train, start, stored        # fixtures among them

torch.set_num_threads(1)
TOKENS = torch.arange(24).view(2, 12) % 50
LAYERS = 14         # of two blocks: q k v o gate up down


def changed(model, scale=0.3, seed=5):
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora.adapters(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * scale)
    return model


def adapted(family="qwen3", rank=3, alpha=6.0, dtype=None):
    return lora.attach(small_model(family), rank, alpha, dtype=dtype)


def logits(model):
    with torch.no_grad():
        return model(TOKENS)


# ---------------------------------------------------------------------------------------------------- one layer and all

def test_a_layer_by_hand():
    """W = [[1, 0], [0, 1]], b = (10, 20), A = [[1, 2]], B = [[3], [4]], alpha / r = 0.5, x = (1, 1): B A x = (9, 12)."""
    linear = torch.nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2)), linear.bias.copy_(torch.tensor([10., 20.]))
    layer = lora.Adapted(linear, 1, 0.5)
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor([[1., 2.]])), layer.lora_B.copy_(torch.tensor([[3.], [4.]]))
    x = torch.ones(1, 2)
    assert layer(x).tolist() == [[1 + 10 + 4.5, 1 + 20 + 6]]
    assert layer.inference_weight().tolist() == [[1 + 1.5, 3], [2, 1 + 4]]
    layer.on = False
    assert layer(x).tolist() == [[11, 21]] and layer.inference_weight() is layer.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_at_first_nothing_changes_and_every_linear_layer_of_the_blocks_is_adapted(family):
    plain = small_model(family)
    before, names = logits(plain), {name for name, _ in plain.named_parameters()}
    model = lora.attach(plain, 4, 32.0)
    assert torch.equal(logits(model), before) and len(lora.adapters(model)) == LAYERS
    assert names <= {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert p.requires_grad == (".lora_" in name)
    for layer in lora.adapters(model).values():
        assert layer.lora_A.abs().max() <= 1 / math.sqrt(layer.lora_A.shape[1]) and not layer.lora_B.any()
        assert layer.lora_A.std().item() == pytest.approx(1 / math.sqrt(3 * layer.lora_A.shape[1]), rel=0.25)
    assert not torch.equal(logits(changed(model)), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_live_equals_merged(family):
    model = changed(adapted(family))
    live = logits(model)
    lora.merge(model)
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-5)
    assert not lora.adapters(model) and isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    with pytest.raises(ValueError, match="no adapter to save"):
        lora.save_adapter(model, "nowhere")


def test_what_cannot_be_is_one_line():
    for rank, alpha in ((0, 1.0), (-1, 1.0), (4, 0.0)):
        with pytest.raises(ValueError, match="both must be above 0"):
            lora.attach(small_model(), rank, alpha)
    with pytest.raises(ValueError, match="has adapters already"):
        lora.attach(adapted(), 4)
    with pytest.raises(ValueError, match="--lora-alpha needs --lora-rank"):
        parse(["--lora-alpha", "8"])
    assert parse(["--model", "Qwen/Qwen3-4B", "--lora-rank", "8"]).lr == 1e-5       # 10 x full fine-tuning


# ------------------------------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_draws_by_base_and_adapter(dtype):
    """Its log-probs change when, and only when, the adapter changes, and are the trainer's."""
    model = adapted(dtype=dtype)
    sampler = Sampler(model, [])

    def drawn():
        return sampler.generate([[1, 2, 3], [4]], 3, 7, seed=1)
    first = drawn()
    assert torch.equal(first.logps, drawn().logps)
    assert torch.equal(first.logps, Sampler(small_model().to(dtype), []).generate([[1, 2, 3], [4]], 3, 7, seed=1).logps)
    changed(model)
    out = drawn()
    assert not torch.equal(first.logps, out.logps)
    with torch.no_grad():
        logp, _ = model.token_logps(out.tokens, out.completion_mask())
    difference = (logp - out.logps).abs().max()
    assert difference < (1e-4 if dtype == torch.float32 else 0.1)
    without = lora.View(model)
    assert (without.token_logps(out.tokens, out.completion_mask())[0] - out.logps).abs().max() > 0.3


def test_in_bfloat16_a_change_below_the_rounding_of_the_weight_is_not_lost():
    """Merged, W + BA would be W again."""
    linear = torch.nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1.0)
    linear.weight.data = linear.weight.data.bfloat16()
    layer = lora.Adapted(linear, 2, 1.0)
    with torch.no_grad():
        layer.lora_A.fill_(1e-2), layer.lora_B.fill_(1e-2)             # BA = 2e-4, an ulp of 1 is 2^-7
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 0] = 1000 * 2.0 ** -3
    assert torch.equal((layer.weight.float() + layer.change()).bfloat16(), layer.weight)
    small = torch.eye(64, dtype=torch.bfloat16)[:1] * 0                 # and where W x is 0 the change is all there is
    small[0, 0], small[0, 1] = 256.0, -256.0
    product = Linear([layer], 1)(small)
    assert torch.equal(product, layer(small)) and layer.adapter() is not None
    model = changed(adapted(dtype=torch.bfloat16), scale=1e-3)
    weights = InferenceModel(model, 4)
    assert weights.layers[0].qkv.adapter[1].shape == (32 + 16 + 16, 9)        # q, k, v in a block diagonal of rank 3


# ------------------------------------------------------------------------------------------------------------- gradients

def one_update(model, **settings):
    c = Config(group_size=3, prompts_per_step=2, max_new_tokens=6, micro_batch_tokens=20, **settings)
    one = learning.Learner(c, grpo, model, learning.adamw(model, 1e-2), Progress(step=1))
    if c.beta:
        one.reference = lora.View(model)
    out = Sampler(model, []).generate([[1, 2, 3], [4]], 3, 6, seed=1)
    line = one.learn(out, torch.tensor([[1., 0, 0], [0, 1, 1]]))
    return one, line


def test_the_gradient_of_an_adapter_is_that_of_the_weight_projected():
    """dL/dB = s (dL/dW) A^T and dL/dA = s B^T (dL/dW), with dL/dW of the merged model."""
    model = changed(adapted())
    mask = torch.ones_like(TOKENS)
    model.token_logps(TOKENS, mask)[0].sum().backward()
    adapters = {name: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.lora_A.grad, layer.lora_B.grad)
                for name, layer in lora.adapters(model).items()}
    lora.merge(model)
    for p in model.parameters():
        p.requires_grad_(True)
        p.grad = None
    model.token_logps(TOKENS, mask)[0].sum().backward()
    for name, (A, B, dA, dB) in adapters.items():
        dW = model.get_submodule(name).weight.grad
        torch.testing.assert_close(dB, 2.0 * dW @ A.T, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(dA, 2.0 * B.T @ dW, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_frozen_has_no_gradient_and_no_state_and_stays(checkpointing):
    model = adapted()
    model.activation_checkpointing = checkpointing
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one, line = one_update(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert line["grad_norm"] > 0 and len(trained) == 2 * LAYERS
    assert len(one.optimizer.state) == len(trained)
    for name, p in model.named_parameters():
        assert p.grad is None
        assert torch.equal(p.detach(), before[name]) == (name not in trained or name.endswith("lora_A"))     # B = 0: no dA yet
    one.learn(Sampler(model, []).generate([[1, 2, 3], [4]], 3, 6, seed=2), torch.tensor([[1., 0, 0], [0, 1, 1]]))
    assert all(not torch.equal(p.detach(), before[name]) for name, p in model.named_parameters() if name in trained)


def test_micro_batches_and_checkpointing_change_no_gradient():
    def gradient(tokens, checkpointing):
        model = changed(adapted())
        model.activation_checkpointing = checkpointing
        c = Config(group_size=3, prompts_per_step=2, max_new_tokens=6, micro_batch_tokens=tokens)
        one, found = learning.Learner(c, grpo, model, learning.adamw(model, 0.0), Progress(step=1)), {}
        one.descend = lambda loss: found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}) or 1.0
        out = Sampler(model, []).generate([[1, 2, 3], [4]], 3, 6, seed=1)
        one.make_pass(one.batch(out, torch.tensor([[1., 0, 0], [0, 1, 1]])), 2)
        return found
    whole = gradient(10 ** 6, False)
    for other in (gradient(12, False), gradient(12, True)):
        for name in whole:
            torch.testing.assert_close(other[name], whole[name], atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ the same model, another adapter

def test_the_reference_is_the_model_without_its_adapter():
    model = changed(adapted())
    plain = small_model()
    mask = torch.ones_like(TOKENS)
    with torch.no_grad():
        live = model.token_logps(TOKENS, mask)[0]
        assert torch.equal(lora.View(model).token_logps(TOKENS, mask)[0], plain.token_logps(TOKENS, mask)[0])
        assert torch.equal(model.token_logps(TOKENS, mask)[0], live)
    one, line = one_update(adapted(), beta=0.1)
    assert line["kl"] == 0          # B = 0
    one, line = one_update(model, beta=0.1)
    assert line["kl"] > 0.01


def test_a_lagging_view_keeps_what_the_model_has_left():
    model = changed(adapted())
    before = logits(model)
    view = lora.View(model, lagging=True)
    changed(model, seed=6)
    after = logits(model)
    assert not torch.equal(before, after)
    with view.shown():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)
    drawn = lora.ViewSampler(view, []).generate([[1, 2]], 4, 6, seed=3)
    assert torch.equal(logits(model), after)
    with view.shown():
        assert torch.equal(drawn.logps, Sampler(model, []).generate([[1, 2]], 4, 6, seed=3).logps)
    for (name, old), new in zip(view.named_parameters(), learning.trainable(model)):
        assert name.endswith(("lora_A", "lora_B"))
        old.copy_(new.detach())
    with view.shown():
        assert torch.equal(logits(model), after)


# --------------------------------------------------------------------------------------------------------- PEFT's files

def test_files_come_back(tmp_path):
    model = changed(adapted())
    want = logits(model)
    lora.save_adapter(model, tmp_path / "a", base="some/base")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["r"] == 3 and settings["lora_alpha"] == 6 and settings["base_model_name_or_path"] == "some/base"
    assert torch.equal(logits(lora.load_adapter(small_model(), tmp_path / "a")), want)


def test_an_adapter_brings_its_scale_along(tmp_path):
    """Also to a model that has adapters of another alpha: what they counted is nothing to the one that is read."""
    model = changed(adapted(alpha=6.0))
    lora.save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(lora.load_adapter(adapted(alpha=1.0), tmp_path / "a")), logits(model))


def test_an_adapter_of_some_layers_leaves_the_others(tmp_path):
    model = changed(adapted())
    lora.save_adapter(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {k: t for k, t in load_file(file).items() if "q_proj" in k or "v_proj" in k}
    save_file(tensors, file, metadata={"format": "pt"})
    with torch.no_grad():
        for name, layer in lora.adapters(model).items():
            if not name.endswith(("q_proj", "v_proj")):
                layer.lora_B.zero_()
    assert torch.equal(logits(lora.load_adapter(small_model(), tmp_path / "a")), logits(model))


@pytest.mark.parametrize("spoil, message", [
    (lambda f: f.update(use_dora=True), "use_dora is not supported"), (lambda f: f.update(rank_pattern={"q": 2}), "rank_pattern"),
    (lambda f: f.update(bias="all"), "bias is not supported"), (lambda f: f.update(peft_type="IA3"), "no LoRA is not supported"),
    (lambda f: f.update(r=5), "has shape"), (lambda f: f.update(r="3"), "must be numbers above 0"), (lambda f: f.pop("r"), "r None"),
    (lambda f: f.update(init_lora_weights="pissa"), "init_lora_weights is not supported"),
    (lambda f: f.update(layer_replication=[[0, 1]]), "layer_replication"),
    (lambda f: f.update(r=True), "must be numbers"), (lambda f: f.update(lora_alpha=None), "lora_alpha None")])
def test_adapters_of_another_kind_are_one_line(spoil, message, tmp_path):
    lora.save_adapter(adapted(), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(file.read_text())
    spoil(settings)
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message) as stop:
        lora.load_adapter(small_model(), tmp_path / "a")
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_peft_computes_the_same_from_our_files_and_we_from_its(family, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = small_model(family)
    base.save_pretrained(tmp_path / "base")
    model = changed(adapted(family))
    lora.save_adapter(model, tmp_path / "ours", base=tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, logits(model), atol=1e-5, rtol=1e-5)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=10, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
        want = theirs.eval()(TOKENS).logits
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora.load_adapter(Transformer.from_pretrained(tmp_path / "base"), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), want, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ whole runs

LORA = ["--lora-rank", "4", "--lr", "1e-2"]
WAYS = {"grpo": ["--beta", "0.05", "--epochs", "2"],
        "offpolicy": ["--algo", "offpolicy", "--sync-every", "3", "--replay-ratio", "2"],
        "gtpo": ["--algo", "gtpo", "--activation-checkpointing", "--micro-batch-tokens", "200"]}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_with_lora_resumes_bit_for_bit_and_leaves_its_files(way, start, tmp_path):
    base = {name: p.detach().clone() for name, p in Transformer.from_pretrained(start).named_parameters()}
    options = ["--model", str(start), *fast(start), *LORA, *WAYS[way]]
    train.main([*options, "--out", str(tmp_path / "whole")])
    train.main([*options, "--out", str(tmp_path / "two"), "--steps", "2"])
    train.main(["--resume", "--out", str(tmp_path / "two"), "--steps", "4"])
    assert log_of(tmp_path / "two") == log_of(tmp_path / "whole")
    one, other = stored(tmp_path / "whole", 4), stored(tmp_path / "two", 4)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert all(".lora_" in name for name in one)        # a checkpoint holds the adapter alone

    live = lora.load_adapter(Transformer.from_pretrained(start), tmp_path / "whole" / "adapter")
    merged = Transformer.from_pretrained(tmp_path / "whole" / "model")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens), live(tokens), atol=1e-5, rtol=1e-5)
    for name, p in merged.named_parameters():
        adapted_one = name.endswith("_proj.weight")
        assert torch.equal(p.detach(), base[name]) != adapted_one


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_give_the_numbers_of_one(dtype, start, tmp_path):
    """The frozen weights are sharded in the dtype of computation; only adapters are reduced. In bfloat16 draws may differ."""
    options = ["--model", start, *fast(start), *LORA, *WAYS["offpolicy"], "--dtype", dtype]
    run_train(*options, "--out", tmp_path / "one")
    run_train(*options, "--out", tmp_path / "two", nproc=2)
    keys = ("loss", "grad_norm", "entropy", "ess", "eval_pass@1", "staleness") if dtype == "float32" else ("entropy", "staleness")
    tolerance = {"rel": 1e-4, "abs": 1e-5} if dtype == "float32" else {"rel": 0.1}
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for key in set(keys) & set(one):
            assert one[key] == pytest.approx(two[key], **tolerance), key
    run_train("--resume", "--out", tmp_path / "two", "--steps", "5", nproc=2)
    assert log_of(tmp_path / "two")[-1]["step"] == 5


# ------------------------------------------------------------------------------------------- sft.py

def sft_flags(start, out, *more):
    """The start guesses among three answers; here it is taught to say one."""
    file = out.parent / "always.jsonl"
    rows = [{"problem": f"Which one, {i}?", "answer": "1", "solution": "#### 1"} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return ["--model", str(start), "--data", str(file), "--steps", "12", "--lr", "5e-3",
            "--device", "cpu", "--threads", "1", "--out", str(out), *more]


def test_sft_trains_an_adapter_and_writes_the_merged_model_and_peft_s_files(start, tmp_path, monkeypatch):
    """The base with the adapter is what lies in --out; the base's own weights are those of before, and the loss has fallen.

    A base that was named from the folder where it began is found from any."""
    monkeypatch.chdir(start.parent)
    config = sft.parse(sft_flags(start.name, tmp_path / "out", "--lora-rank", "2"))
    model, tokenizer = sft.warm_start(config, progress=False)
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(start.resolve())
    merged = Transformer.from_pretrained(tmp_path / "out")
    live = lora.load_adapter(Transformer.from_pretrained(start), tmp_path / "out" / "adapter")
    tokens = torch.arange(20)[None] % 200
    with torch.no_grad():
        torch.testing.assert_close(merged.token_logps(tokens)[0], live.token_logps(tokens)[0], atol=1e-5, rtol=1e-5)
        before = Transformer.from_pretrained(start)
        assert (merged.token_logps(tokens)[0] - before.token_logps(tokens)[0]).abs().max() > 1e-3

    problems = data.load_problems(config.data)
    batch = sft.collate(sft.corpus(problems, tokenizer, config)[:32], "cpu")
    losses = [-m.token_logps(batch.tokens, batch.mask)[0].sum() for m in (merged, before)]
    assert losses[0] < 0.9 * losses[1]          # .264 and .316 a token: the blocks' matrices alone reach no less
    assert torch.equal(lora.adapters(model)["model.layers.0.mlp.up_proj"].weight, before.model.layers[0].mlp.up_proj.weight)


def test_sft_refuses_an_adapter_of_a_new_model_and_knows_its_rates(start, tmp_path):
    with pytest.raises(ValueError, match="--lora-rank needs --model"):
        sft.parse(["--data", "arithmetic", "--out", str(tmp_path / "o"), "--lora-rank", "2"])
    big = tmp_path / "big"
    big.mkdir()
    (big / "model.safetensors").write_bytes(b"\0" * (4 * 10 ** 7))
    rates = [sft.SFTConfig(model=m, lora_rank=r).lr for m, r in (("", 0), (str(start), 0), (str(big), 0), (str(big), 4))]
    assert rates == pytest.approx([2e-3, 2e-3, 1e-5, 1e-4])


@pytest.mark.slow
def test_sft_of_an_adapter_is_the_same_on_two_ranks_and_runs_in_bfloat16(start, tmp_path):
    def run(name, ranks, *more):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, str(HERE / "sft.py"), *sft_flags(start, tmp_path / name, "--lora-rank", "2", *more)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    one, two = run("one", 1), run("two", 2)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=1e-3)
    for name, x in run("half", 2, "--dtype", "bfloat16", "--activation-checkpointing").items():
        assert torch.isfinite(x).all()
