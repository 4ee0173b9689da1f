"""Pretrained checkpoints as they are: `REAL_MODELS=DIR pytest tests/test_real_models.py`, where each folder of DIR is one.

Skipped where there are none. Logits and greedy tokens are those of transformers, LoRA learns on them and its files come back."""
import os
from pathlib import Path

import pytest
import torch

import lora
import prompts
from model import Transformer
from rollout import Sampler

FOLDERS = sorted(p.parent for p in Path(os.environ.get("REAL_MODELS", "/nowhere")).glob("*/config.json"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDERS, reason="REAL_MODELS names no folder with checkpoints")]
QUESTIONS = ["What is 17 + 25?", "Natalia sold 48 clips in April and half as many in May. How many did she sell in all?"]
NEW = 40


@pytest.fixture(scope="module", params=FOLDERS or [None], ids=lambda p: p.name if p else "none")
def real(request):
    """(folder, our model, transformers' model, tokenizer), in float32."""
    from transformers import AutoModelForCausalLM
    folder = request.param
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, Transformer.from_pretrained(folder), theirs, prompts.load_tokenizer(folder)


def encoded(tokenizer, template):
    return prompts.encode_prompts([{"problem": q} for q in QUESTIONS], tokenizer, template)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_logits_are_those_of_transformers(real, template):
    _, ours, theirs, tokenizer = real
    for ids in encoded(tokenizer, template):
        ids = torch.tensor([ids])
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_greedy_tokens_are_those_of_transformers(real, template):
    _, ours, theirs, tokenizer = real
    stops = prompts.stop_ids(ours, tokenizer)
    drawn = Sampler(ours, stops).generate(encoded(tokenizer, template), 1, NEW, temperature=0.0).completions()
    for ids, got in zip(encoded(tokenizer, template), drawn):
        want = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=NEW, do_sample=False,
                               eos_token_id=stops, pad_token_id=stops[0])[0, len(ids):].tolist()
        assert got == want


def test_the_template_is_chat_and_its_turns_end_with_a_stop_token(real):
    _, ours, _, tokenizer = real
    assert prompts.uses_chat(tokenizer, "auto")
    assert set(prompts.turn_ends(tokenizer)) <= set(prompts.stop_ids(ours, tokenizer))
    for question, ids in zip(QUESTIONS, encoded(tokenizer, "chat")):
        messages = prompts.conversation({"problem": question}, "chat")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def test_saved_again_transformers_loads_the_same(real, tmp_path):
    from transformers import AutoModelForCausalLM
    folder, ours, theirs, tokenizer = real
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([encoded(tokenizer, "plain")[0]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_the_sampler_draws_by_the_adapter_and_its_files_come_back(real, tmp_path):
    folder, _, _, tokenizer = real
    model = lora.attach(Transformer.from_pretrained(folder), 8)
    with torch.no_grad():
        for layer in lora.adapters(model).values():
            layer.lora_B.normal_(std=0.01)
    out = Sampler(model, prompts.stop_ids(model, tokenizer)).generate(encoded(tokenizer, "chat"), 2, 12, seed=1)
    with torch.no_grad():
        mask = out.completion_mask()
        assert (model.token_logps(out.tokens, mask)[0] - out.logps).abs().max() < 1e-4
        assert (lora.View(model).token_logps(out.tokens, mask)[0] - out.logps).abs().max() > 1e-2
    lora.save_adapter(model, tmp_path / "a", base=folder)
    again = lora.load_adapter(Transformer.from_pretrained(folder), tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again.token_logps(out.tokens, mask)[0], model.token_logps(out.tokens, mask)[0])


def test_adapters_learn_a_text_and_the_base_stays(real):
    """Four steps of Adam on a solution: it gets likelier, and no frozen weight has a gradient or has changed."""
    folder, _, _, tokenizer = real
    model = lora.attach(Transformer.from_pretrained(folder), 4)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) > 100 and all((".lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    before = {name: p.clone() for name, p in list(frozen.items())[:3]}
    prompt, answer = encoded(tokenizer, "chat")[1], tokenizer("48 + 24 = 72\n#### 72")["input_ids"]
    tokens = torch.tensor([prompt + answer])
    mask = torch.zeros(tokens.shape)
    mask[:, len(prompt):] = 1

    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3), []
    for _ in range(5):
        loss = -(model.token_logps(tokens, mask)[0] * mask).sum() / mask.sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is None for p in frozen.values()) and all(torch.equal(frozen[name], p) for name, p in before.items())
