"""The specification of model.py by example.

The numbers are those of transformers and of the naive formulas."""
import json
import os
from contextlib import contextmanager, nullcontext

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig,
                          LlamaConfig, Qwen2Config, Qwen3Config)

import prompts
from engine import kernels
from engine import logps as logps_file
from engine import weights as weights_file
from engine.decode import Cache, Groups, InferenceModel
from engine.weights import find_checkpoint
from model import ModelConfig, Transformer, trainable

torch.set_num_threads(1)

SIZES = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             bos_token_id=None, eos_token_id=3,
             rms_norm_eps=0.01)         # large enough to be seen

# With theta 500 and an original context of 16, 40 positions take every branch of "llama3" scaling.
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
BIASES = {"attention_bias": True, "mlp_bias": True}
FAMILIES = {
    "qwen2": (Qwen2Config, {"rope_parameters": PLAIN}),
    "qwen3": (Qwen3Config, {"rope_parameters": PLAIN, "head_dim": 12}),     # 12 is not 32 / 4
    "llama": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama with biases": (LlamaConfig, {"rope_parameters": PLAIN, **BIASES}),
    "qwen3 with biases": (Qwen3Config, {"rope_parameters": PLAIN, "head_dim": 8,
                                        "attention_bias": True}),
    "llama without gqa": (LlamaConfig, {"rope_parameters": PLAIN, "num_key_value_heads": 4}),
}
MAIN = ("qwen2", "qwen3", "llama")


def randomize(module, scale=0.2):
    """Give a module random weights, none 0 or 1, so that a bias or norm that gets lost shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * scale + mean)
    return module.eval()


def reference(family="qwen3", tied=False):
    """Returns a small random model of transformers."""
    config_class, own = FAMILIES[family]
    config = config_class(**{**SIZES, **own, "tie_word_embeddings": tied})
    return randomize(AutoModelForCausalLM.from_config(config))


def own_model(**changes):
    """Returns a small random model that never was a checkpoint."""
    config = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "head_dim": 8, "rope_theta": 500.0, **changes}
    return randomize(Transformer(ModelConfig(**config)))


def some_tokens(rows=2, length=40, vocab=60, seed=0):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(m, tokens):
    out = m(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_same_logits(a, b, atol=1e-5):
    tokens = some_tokens()
    torch.testing.assert_close(logits_of(a, tokens), logits_of(b, tokens), atol=atol, rtol=0)


def edit_json(file, change):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(change(content) or content))


# ---------------------------------------------------------------------- the numbers of transformers

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_of_transformers_gives_its_logits_and_comes_back_to_it(family, tied, tmp_path):
    """transformers writes, we read, we write, transformers reads: the same logits at each stage."""
    hf = reference(family, tied)
    hf.save_pretrained(tmp_path / "hf")
    ours = Transformer.from_pretrained(tmp_path / "hf")
    assert_same_logits(ours, hf)
    ours.save_pretrained(tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(hf)
    for (name, p), (_, q) in zip(hf.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("changes", [
    dict(model_type="qwen2", qkv_bias=True, qk_norm=False),
    dict(model_type="qwen3"),
    dict(model_type="llama", qk_norm=False, rope_scaling=LLAMA3),
    dict(model_type="llama", qk_norm=False, qkv_bias=True, o_bias=True, mlp_bias=True),
], ids=["qwen2", "qwen3", "llama", "llama with biases"])
def test_model_built_here_is_read_by_transformers(changes, tied, tmp_path):
    ours = own_model(tie_word_embeddings=tied, eos_token_id=3, **changes)
    ours.save_pretrained(tmp_path)
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path), ours)
    assert_same_logits(Transformer.from_pretrained(tmp_path), ours, atol=0)


def test_llama3_rope_scaling_matters_at_these_lengths(tmp_path):
    """Without the scaling the logits are others, else the two tests above would show nothing."""
    reference("llama").save_pretrained(tmp_path)
    scaled = Transformer.from_pretrained(tmp_path)
    plain = Transformer.from_pretrained(tmp_path)
    plain.config.rope_scaling = None
    tokens = some_tokens()
    difference = (logits_of(scaled, tokens) - logits_of(plain, tokens)).abs().amax((0, 2))
    assert difference[0] == 0           # position 0 is never rotated
    assert difference[8:].min() > 0.01


def test_llama3_frequencies_by_hand():
    """With head_dim 8 and theta 10000 the frequencies are 1, 0.1, 0.01 and 0.001.

    Over an original context of 100 they make 15.9, 1.59, 0.159 and 0.0159 turns. The first is above
    4 (kept), the last two are below 1 (divided by 8), and the second is in between."""
    config = ModelConfig(head_dim=8, rope_theta=10000.0,
                         rope_scaling={**LLAMA3, "original_max_position_embeddings": 100})
    got = kernels.inverse_frequencies(config, "cpu")
    blend = (100 * 0.1 / (2 * torch.pi) - 1) / (4 - 1)
    between = (1 - blend) * 0.1 / 8 + blend * 0.1
    torch.testing.assert_close(got, torch.tensor([1.0, between, 0.01 / 8, 0.001 / 8]))


@pytest.mark.parametrize("family", MAIN)
def test_both_layouts_of_config_load(family, tmp_path):
    """transformers 5 writes rope_parameters and dtype.

    Checkpoints on the hub have rope_theta, rope_scaling and torch_dtype."""
    hf = reference(family)
    hf.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in new and "dtype" in new and "rope_theta" not in new
    assert_same_logits(Transformer.from_pretrained(tmp_path), hf)

    rope = new.pop("rope_parameters")
    old = {**new, "torch_dtype": new["dtype"], "rope_theta": rope.pop("rope_theta"),
           "rope_scaling": rope if family == "llama" else None}
    del old["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    ours = Transformer.from_pretrained(tmp_path)
    assert_same_logits(ours, hf)
    ours.save_pretrained(tmp_path / "again")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), hf)


def test_config_of_qwen2_5_on_the_hub_is_accepted():
    """Its sliding_window is a number although use_sliding_window is false: full attention."""
    raw = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
           "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
           "vocab_size": 151936, "rope_theta": 1000000.0, "tie_word_embeddings": True,
           "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21}
    config = ModelConfig.from_dict(raw)
    assert config.head_dim == 64 and config.rope_theta == 1e6 and config.tie_word_embeddings
    assert config.qkv_bias and not config.o_bias and not config.qk_norm


# -------------------------------------------------------------------------------------------- files

def test_sharded_checkpoint_of_transformers_is_read(tmp_path):
    hf = reference("qwen2")
    hf.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_logits(Transformer.from_pretrained(tmp_path), hf)


def test_sharded_checkpoint_of_ours_is_read_by_both(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_file, "SHARD_BYTES", 10_000)
    ours = own_model(tie_word_embeddings=False)
    ours.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in ours.parameters())
    assert set(index["weight_map"]) == {name for name, _ in ours.named_parameters()}

    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path), ours)
    assert_same_logits(Transformer.from_pretrained(tmp_path), ours, atol=0)


def test_saving_over_a_sharded_checkpoint_leaves_no_old_shard(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(weights_file, "SHARD_BYTES", 10_000)
        own_model().save_pretrained(tmp_path)
    whole = own_model(initializer_range=0.1).init_weights(seed=5)
    whole.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("model*")] == ["model.safetensors"]
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path), whole)


def test_tokenizer_and_generation_config_travel(tmp_path):
    """A trained model keeps the tokenizer, chat template and stop ids of the one it came from."""
    tokenizer = prompts.train_tokenizer(["Mia has 7 shells and finds 12 more."] * 4, vocab_size=280)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    generation = GenerationConfig(eos_token_id=[3, 5], temperature=0.7, do_sample=True)
    for part in (reference(), tokenizer, generation):
        part.save_pretrained(tmp_path / "hf")

    Transformer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "ours")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "Mia finds 12 shells. Ça va?"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.eos_token == prompts.EOS
    chat = [{"role": "user", "content": "2+2"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == "<user>2+2"

    loaded = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert loaded.eos_token_id == [3, 5]
    assert loaded.temperature == 0.7 and loaded.do_sample


def test_generation_config_is_written_where_there_was_none(tmp_path):
    own_model(eos_token_id=[3, 5]).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [3, 5]


def test_bfloat16_is_chosen_on_reading(tmp_path):
    hf = reference("qwen3")
    hf.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16} == {ours.dtype}

    # a few roundings of logits around 4, whose step is 2^-5 to 2^-6
    same = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    worst = (logits_of(ours, some_tokens()) - logits_of(same, some_tokens())).float().abs().max()
    assert worst <= 0.0625

    logps, entropy = ours.token_logps(some_tokens(), torch.ones(2, 40))
    assert logps.dtype == entropy.dtype == torch.float32


def test_bfloat16_is_chosen_on_writing(tmp_path):
    """Training keeps float32 masters and writes bfloat16, which is half the bytes.

    transformers is told so, also where the config.json that was read said float32."""
    reference().save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert ours.dtype == torch.float32
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert back.dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    weight = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(back.get_parameter(weight), ours.get_parameter(weight).bfloat16())


@pytest.mark.parametrize("tied", [False, True])
def test_nothing_stays_on_meta_and_tied_weights_stay_tied(tied, tmp_path):
    reference("qwen2", tied).save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    assert not any(t.is_meta for t in [*ours.parameters(), *ours.buffers()])
    assert all(p.requires_grad and p.is_leaf for p in ours.parameters())
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in dict(ours.named_parameters())) == (not tied)


def test_tied_checkpoint_that_also_stores_the_head_is_read(tmp_path):
    """Some writers store lm_head.weight although it is the embedding.

    Old ones store RoPE's frequencies as well."""
    hf = reference("qwen2", tied=True)
    hf.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_logits(Transformer.from_pretrained(tmp_path), hf)


def test_initial_weights_depend_on_the_seed_alone():
    config = ModelConfig(hidden_size=64, num_hidden_layers=8, head_dim=16)
    one, same, other = (Transformer(config).init_weights(seed) for seed in (1, 1, 2))
    for p, q in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)

    mlp = one.model.layers[3].mlp
    assert mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    # sqrt(2 x 8 layers) = 4
    assert mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


# -------------------------------------------------------------------------------------- token_logps

def naive_token_logps(m, tokens, mask, temperature):
    """The definition, with the (B, T, V) tensor that token_logps does without."""
    log_p = (m(tokens).float() / temperature).log_softmax(-1)
    taken = log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)[:, :-1]
    first = torch.zeros(len(tokens), 1)
    return torch.cat([first, taken], 1) * mask, torch.cat([first, entropy], 1).detach() * mask


def completion_mask(starts, ends, length):
    position = torch.arange(length)[None]
    begun = position >= torch.tensor(starts)[:, None]
    ended = position >= torch.tensor(ends)[:, None]
    return (begun & ~ended).float()


def test_token_logps_and_entropy_of_a_uniform_model():
    """With all logits 0 over 60 tokens each log-probability is -ln 60 and each entropy ln 60."""
    m = own_model()
    torch.nn.init.zeros_(m.model.embed_tokens.weight)
    mask = completion_mask([2, 1], [4, 3], 5)
    logps, entropy = m.token_logps(some_tokens(2, 5), mask)
    torch.testing.assert_close(logps, -torch.tensor(60.0).log() * mask)
    torch.testing.assert_close(entropy, torch.tensor(60.0).log() * mask)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 3, 1000])
def test_token_logps_and_gradients_equal_the_naive_ones(chunk_tokens, temperature, monkeypatch):
    """A chunk of less than a token (0 here) still takes one at a time."""
    monkeypatch.setattr(logps_file, "LOGIT_CHUNK", 60 * chunk_tokens)
    m, tokens = own_model(), some_tokens(3, 12)
    mask = completion_mask([3, 1, 5], [12, 4, 9], 12)

    logps, entropy = m.token_logps(tokens, mask, temperature)
    expected, expected_entropy = naive_token_logps(m, tokens, mask, temperature)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=0)
    assert (logps[mask == 0] == 0).all() and (entropy[mask == 0] == 0).all()
    assert logps.requires_grad and not entropy.requires_grad

    weight = torch.linspace(-1, 1, 36).view(3, 12) / mask.sum()     # another coefficient each token
    got = torch.autograd.grad((logps * weight).sum(), list(m.parameters()))
    naive = torch.autograd.grad((expected * weight).sum(), list(m.parameters()))
    for g, n in zip(got, naive):
        torch.testing.assert_close(g, n, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_several_backward_passes_add_up(tied):
    """They add up to those of the passes before, and to what else is there: 1 on every weight."""
    m, tokens = own_model(tie_word_embeddings=tied), some_tokens(3, 12)
    mask = completion_mask([3, 1, 5], [12, 4, 9], 12)
    loss = naive_token_logps(m, tokens, mask, 1.0)[0].sum()
    whole = torch.autograd.grad(loss, list(m.parameters()))

    for start in (None, 1.0):
        for p in m.parameters():
            p.grad = None if start is None else torch.ones_like(p)
        for rows in ([0, 2], [1]):
            m.token_logps(tokens[rows], mask[rows])[0].sum().backward()
        for p, g in zip(m.parameters(), whole, strict=True):
            torch.testing.assert_close(p.grad, g + (start or 0.0), atol=1e-5, rtol=1e-4)


def test_without_a_mask_every_position_but_the_first_is_read():
    m, tokens = own_model(), some_tokens(2, 6)
    logps, _ = m.token_logps(tokens)
    all_logps = m(tokens).log_softmax(-1)
    expected = all_logps[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(logps[:, 1:], expected)
    assert (logps[:, 0] == 0).all()


def test_position_zero_has_no_log_prob_even_under_a_mask():
    logps, _ = own_model().token_logps(some_tokens(2, 6), torch.ones(2, 6))
    assert (logps[:, 0] == 0).all() and (logps[:, 1:] < 0).all()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 9), st.integers(0, 10 ** 6))
def test_padding_and_what_lies_in_it_change_nothing(extra, seed):
    """Neither the width of the batch nor the ids in the padding are ever seen.

    Rows are right-padded, and attention is causal."""
    m, tokens = own_model(), some_tokens(3, 12)
    starts, ends = [3, 1, 5], [12, 4, 9]
    padding = torch.arange(12 + extra)[None] >= torch.tensor(ends)[:, None]
    wide = torch.nn.functional.pad(tokens, (0, extra))
    wide = torch.where(padding, some_tokens(3, 12 + extra, seed=seed), wide)

    logps, entropy = m.token_logps(tokens, completion_mask(starts, ends, 12))
    wide_logps, wide_entropy = m.token_logps(wide, completion_mask(starts, ends, 12 + extra))
    torch.testing.assert_close(wide_logps[:, :12], logps, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(wide_entropy[:, :12], entropy, atol=1e-6, rtol=1e-5)
    assert (wide_logps[:, 12:] == 0).all()


def sent_through(m, monkeypatch):
    """Returns a list that receives, each forward pass, how many tokens go through the model."""
    sizes = []
    hidden_states = m.hidden_states

    def recording(tokens, *args):
        sizes.append(len(tokens))
        return hidden_states(tokens, *args)
    monkeypatch.setattr(m, "hidden_states", recording)
    return sizes


def test_no_padding_and_nothing_behind_the_last_wanted_token_reaches_the_model(monkeypatch):
    """The last wanted tokens of the rows are number 11, 3 and 8; each needs what is before it.

    Row 3 wants nothing."""
    m = own_model()
    sizes = sent_through(m, monkeypatch)
    m.token_logps(some_tokens(4, 12), completion_mask([3, 1, 5, 0], [12, 4, 9, 0], 12))
    assert sizes == [11 + 3 + 8]


def test_rows_that_share_a_prompt_send_it_through_once_and_change_nothing_else(monkeypatch):
    """Three rows stand after one prompt of 4, two after another of 2, in any order.

    Of a row of length n the first n - 1 tokens are needed: 4 + (7 + 1 + 4) and 2 + (0 + 5), against
    11 + 5 + 8 + 2 + 7 alone. One token in the middle is not wanted."""
    m, tokens = own_model(), some_tokens(5, 12)
    keys = ["a", "b", "a", "b", "a"]
    mask = completion_mask([4, 2, 4, 2, 4], [12, 3, 6, 8, 9], 12)
    mask[0, 7] = 0
    tokens[[2, 4], :4] = tokens[0, :4]
    tokens[3, :2] = tokens[1, :2]
    weight = torch.linspace(-1, 1, 60).view(5, 12) / mask.sum()

    def with_gradients(logps, entropy):
        gradients = torch.autograd.grad((logps * weight).sum(), list(m.parameters()))
        return [logps.detach(), entropy, *gradients]

    sizes = sent_through(m, monkeypatch)
    shared = with_gradients(*m.token_logps(tokens, mask, 0.7, keys))
    alone = with_gradients(*m.token_logps(tokens, mask, 0.7))
    assert sizes == [4 + 12 + 2 + 5, 11 + 5 + 8 + 2 + 7]

    naive = with_gradients(*naive_token_logps(m, tokens, mask, 0.7))
    for got in (shared, alone):
        for x, y in zip(got, naive, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_a_row_has_the_same_log_probs_alone_and_in_a_batch():
    m, tokens = own_model(), some_tokens(3, 12)
    mask = completion_mask([3, 1, 5], [12, 4, 9], 12)
    together, _ = m.token_logps(tokens, mask)
    for row in range(3):
        alone, _ = m.token_logps(tokens[[row]], mask[[row]])
        torch.testing.assert_close(together[[row]], alone, atol=1e-5, rtol=0)


def test_empty_mask_gives_zeros_and_a_zero_gradient_for_every_weight():
    """A rank with no row to train on runs the same backward as the others, as FSDP waits for it."""
    m = own_model()
    logps, entropy = m.token_logps(some_tokens(2, 6), torch.zeros(2, 6))
    assert not logps.any() and not entropy.any() and logps.shape == (2, 6)
    logps.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in m.parameters())


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes, also in backward."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_no_tensor_of_batch_times_length_times_vocabulary_is_made(monkeypatch):
    """Here B T V is 8 x 16 x 1000 = 128,000.

    With chunks of 4 tokens the largest tensor is the head's 1000 x 32 = 32,000."""
    monkeypatch.setattr(logps_file, "LOGIT_CHUNK", 4000)
    m = own_model(vocab_size=1000, num_hidden_layers=1)
    tokens, mask = some_tokens(8, 16, vocab=1000), torch.ones(8, 16)
    with Largest() as seen:
        m.token_logps(tokens, mask)[0].sum().backward()
    assert seen.elements == 32_000

    with Largest() as seen:     # the recorder does see it where it exists
        naive_token_logps(m, tokens, mask, 1.0)[0].sum().backward()
    assert seen.elements == 128_000


def test_no_logits_are_kept_for_backward(monkeypatch):
    """What autograd saves has no vocabulary dimension (1000) at all.

    Chunks would not help if each kept its own."""
    monkeypatch.setattr(logps_file, "LOGIT_CHUNK", 4000)
    m = own_model(vocab_size=1000, num_hidden_layers=1)
    tokens, mask = some_tokens(8, 16, vocab=1000), torch.ones(8, 16)
    kept = []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        m.token_logps(tokens, mask)
        assert kept and not [shape for shape in kept if shape[-1:] == (1000,)]
        naive_token_logps(m, tokens, mask, 1.0)     # the hook does see them where they are kept
        assert (8, 16, 1000) in kept


def test_gradients_in_place_are_those_of_autograd_and_only_while_asked_for():
    """Two backward passes give the same sums.

    Outside, torch.autograd.grad sees the gradients and leaves .grad alone."""
    m, tokens = own_model(), some_tokens(2, 6)
    weight = m.lm_head.weight
    sums = []
    for in_place in (nullcontext(), logps_file.gradients_in_place(weight)):
        m.zero_grad(set_to_none=True)
        with in_place:
            for _ in range(2):
                m.token_logps(tokens)[0].sum().backward()
        sums.append(weight.grad.clone())
    torch.testing.assert_close(*sums)

    gradient = torch.autograd.grad(m.token_logps(tokens)[0].sum(), weight)[0]
    torch.testing.assert_close(2 * gradient, sums[0])
    assert torch.equal(weight.grad, sums[1])


def test_trainable_parameters_are_those_that_require_a_gradient():
    m = own_model()
    assert [id(p) for p in trainable(m)] == [id(p) for p in m.parameters()]
    m.requires_grad_(False)
    assert trainable(m) == []
    m.model.norm.weight.requires_grad_(True)
    assert [id(p) for p in trainable(m)] == [id(m.model.norm.weight)]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [
    ["lm_head.weight"], ["model.embed_tokens.weight"],
    ["lm_head.weight", "model.embed_tokens.weight"]])
def test_frozen_head_and_embedding_get_no_gradient_and_change_no_other(frozen, tied, in_place):
    """A tied weight is frozen by either name."""
    m, tokens = own_model(tie_word_embeddings=tied), some_tokens(3, 12)
    m.token_logps(tokens)[0].sum().backward()
    everything = {name: p.grad for name, p in m.named_parameters()}

    m.zero_grad(set_to_none=True)
    for name in frozen:
        m.get_parameter(name).requires_grad_(False)
    assert len(trainable(m)) == len(everything) - (1 if tied else len(frozen))
    adds = logps_file.gradients_in_place(m.lm_head.weight) if in_place else nullcontext()
    with adds:
        m.token_logps(tokens)[0].sum().backward()

    for name, p in m.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, everything[name], atol=0, rtol=0)
        else:
            assert p.grad is None, name


class NewTensors(TorchDispatchMode):
    """Records the shapes of all tensors that an operation makes, without views of what it got."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs))
                 if isinstance(t, torch.Tensor)]
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(t.shape))
        return out


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_head_gets_no_buffer_of_its_size(dtype, in_place):
    """Neither a V x D sum of float32, nor a chunk's V x D product, nor a .grad is made."""
    hidden = torch.randn(5, 8).to(dtype).requires_grad_()
    weight = torch.randn(30, 8).to(dtype)
    targets = torch.arange(5)

    def shapes_made(trained):
        weight.requires_grad_(trained)
        adds = logps_file.gradients_in_place(weight) if in_place else nullcontext()
        with NewTensors() as made, adds:
            logps_file.chunked_logps(hidden, weight, targets, 0.7)[0].sum().backward()
        return made.shapes
    assert (30, 8) not in shapes_made(trained=False)
    assert weight.grad is None
    assert (30, 8) in shapes_made(trained=True)     # the recorder does see it where it is made


def test_activation_checkpointing_changes_memory_only():
    m, tokens = own_model(), some_tokens(3, 12)
    mask = completion_mask([3, 1, 5], [12, 4, 9], 12)
    calls = []
    m.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        return torch.autograd.grad(m.token_logps(tokens, mask)[0].sum(), list(m.parameters()))
    plain = gradients()
    m.activation_checkpointing = True
    recomputed = gradients()
    torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-6)
    assert len(calls) == 1 + 2      # when on, there is a second forward inside backward


# ------------------------------------------------------------------------------- prefill and decode

def garbage(*sizes):
    """A cache in which something has been before."""
    cache = Cache(*sizes, torch.device("cpu"), torch.float32)
    for x in (cache.prompt_k, cache.prompt_v, cache.k, cache.v):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) * 9)
    return cache


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefill_and_decode_give_the_logits_of_the_full_forward(family, late, tmp_path):
    """Ragged prompts of 2, 9 and 5 tokens lie in places 2, 0 and 1; rows 1 and 2 share the second.

    Row 2 may come in later. What lies in the cache behind a prompt, and behind what a row has
    drawn, must not show."""
    reference(family).save_pretrained(tmp_path)
    m = Transformer.from_pretrained(tmp_path)
    tokens, lengths = some_tokens(4, 20), torch.tensor([2, 9, 9, 5])
    tokens[2, :9] = tokens[1, :9]
    full = logits_of(m, tokens)

    cache, inference = garbage(m.config, 3, 9, 4, 11), InferenceModel(m, 4)
    prompts = [tokens[row, :n].tolist() for row, n in ((0, 2), (1, 9), (3, 5))]
    logits = inference.prefill(prompts, cache, [2, 0, 1])
    torch.testing.assert_close(logits, full[[0, 1, 3], [1, 8, 4]], atol=1e-5, rtol=0)

    rows = torch.arange(4)
    groups = Groups([2, 0, 0, 1], m.config.num_key_value_heads)
    for t in range(11):
        # until it comes in, row 2 repeats its first token
        own = torch.tensor([t, t, max(t - late, 0), t])
        same = None if late else t
        logits = inference.decode(tokens[rows, lengths + own], own, groups, cache, t + 1, same)
        torch.testing.assert_close(logits, full[rows, lengths + own], atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_and_prompts_that_move_take_their_keys_and_values_along():
    """Row 0 stops after three tokens; row 2 moves to its place, and its prompt to that of row 0's.

    Then row 1 stops too, and stays, as a row that stands nowhere."""
    m, tokens, lengths = own_model(), some_tokens(3, 12), torch.tensor([7, 3, 5])
    full = logits_of(m, tokens)
    cache, inference = garbage(m.config, 3, 7, 3, 5), InferenceModel(m, 3)
    kv_heads = m.config.num_key_value_heads
    inference.prefill([row[:n].tolist() for row, n in zip(tokens, lengths)], cache, [0, 1, 2])

    rows, groups = torch.arange(3), Groups([0, 1, 2], kv_heads)
    for t in range(3):
        own = torch.full((3,), t)
        inference.decode(tokens[rows, lengths + t], own, groups, cache, t + 1)
    cache.move_rows(torch.tensor([2]), torch.tensor([0]), 3)
    cache.move_prompts(torch.tensor([2]), torch.tensor([0]))

    for t, places, alive in ((3, [0, 1], 2), (4, [0, None], 1)):
        at, own = lengths[[2, 1]] + t, torch.full((2,), t)
        logits = inference.decode(tokens[[2, 1], at], own, Groups(places, kv_heads), cache, t + 1)
        torch.testing.assert_close(logits[:alive], full[[2, 1], at][:alive], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------- one-line errors

@contextmanager
def one_line(*culprits, error=(ValueError, FileNotFoundError)):
    """The block raises such an error, whose message is one line that names each culprit."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert message and "\n" not in message, message
    for culprit in culprits:
        assert str(culprit) in message, message


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint folder, for a test to spoil."""
    own_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    return tmp_path


def spoil_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, culprits", [
    ({"model_type": "mixtral"}, ["mixtral", "qwen2, qwen3, llama"]),
    ({"model_type": None}, ["None", "qwen2, qwen3, llama"]),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None}, ["yarn"]),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, ["yarn"]),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, ["linear"]),
    ({"use_sliding_window": True, "sliding_window": 16}, ["sliding-window"]),
    ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding-window"]),
    ({"hidden_act": "gelu"}, ["gelu"]),
    ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, ["partial rotary"]),
])
def test_config_that_is_not_computed_here_is_refused(folder, change, culprits):
    edit_json(folder / "config.json", lambda config: config.update(change))
    with one_line(*culprits, error=ValueError):
        Transformer.from_pretrained(folder)


def test_config_without_a_size_is_refused(folder):
    def without_vocabulary(config):
        return {name: value for name, value in config.items() if name != "vocab_size"}
    edit_json(folder / "config.json", without_vocabulary)
    with one_line("vocab_size", error=ValueError):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor",
                                 "original_max_position_embeddings"])
def test_llama3_rope_without_one_of_its_numbers_is_refused_on_reading(folder, key):
    """On reading, not by a KeyError in the first forward."""
    rope = {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != key}, "rope_scaling": None}
    edit_json(folder / "config.json", lambda config: config.update(rope))
    with one_line(key, error=ValueError):
        Transformer.from_pretrained(folder)


def test_missing_tensor_is_named(folder):
    spoil_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with one_line("model.layers.1.mlp.up_proj.weight", folder, error=ValueError):
        Transformer.from_pretrained(folder)


def test_missing_head_of_an_untied_model_is_named(folder):
    spoil_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with one_line("lm_head.weight", error=ValueError):
        Transformer.from_pretrained(folder)


def test_extra_tensor_is_named(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    spoil_weights(folder, lambda tensors: tensors.update({name: torch.ones(32)}))
    with one_line(name, folder, error=ValueError):
        Transformer.from_pretrained(folder)


def test_misshapen_tensor_is_named_with_both_shapes(folder):
    spoil_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with one_line("model.norm.weight", "(31,)", "(32,)", error=ValueError):
        Transformer.from_pretrained(folder)


def test_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle is never opened")
    with one_line(folder, "safetensors", error=FileNotFoundError):
        Transformer.from_pretrained(folder)


def test_missing_shard_is_named(folder, monkeypatch):
    monkeypatch.setattr(weights_file, "SHARD_BYTES", 10_000)
    own_model().save_pretrained(folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with one_line(folder, shard.name, error=FileNotFoundError):
        Transformer.from_pretrained(folder)


def test_truncated_weights_are_named(folder):
    """What a killed download leaves behind."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with one_line(file):
        Transformer.from_pretrained(folder)


def test_folder_without_config_is_named(folder):
    (folder / "config.json").unlink()
    with one_line(folder / "config.json", error=FileNotFoundError):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize("text", [
    "{\n  \"vocab_size\": 60,\n", "", "<html>\nnot found\n</html>", "[1, 2]"])
def test_broken_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with one_line(folder / "config.json", error=ValueError):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize("path", ["/nowhere/qwen", "./nowhere", "nowhere", "a/b/c"])
def test_path_that_does_not_exist_is_named(path):
    with one_line(path, error=FileNotFoundError):
        Transformer.from_pretrained(path)


def test_hub_that_does_not_answer_is_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect\nto the hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with one_line("Qwen/Qwen3-4B", "We couldn't connect", error=FileNotFoundError):
        find_checkpoint("Qwen/Qwen3-4B")
