"""Prompts and tokenizers: from a problem to token ids, and which ids end a completion."""
import json
from pathlib import Path

EOS = "<|endoftext|>"
BOXED_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
REASONING_PROMPT = ("Answer the question. First write your reasoning, then only the final answer, in this form:\n"
                    "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>")


def uses_chat(tokenizer, template):
    """Does this template go through the tokenizer's chat template? ValueError for an unknown or impossible one."""
    if template not in ("auto", "chat", "plain", "reasoning"):
        raise ValueError(f"--template must be auto, chat, plain or reasoning, not {template!r}")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise ValueError("--template chat, but this tokenizer has no chat template; use plain or reasoning")
    return has_chat and template != "plain" and (template != "auto" or speaks_chat(tokenizer))


def prompt_text(question, tokenizer, template="auto"):
    """The text that a completion continues.

    "chat": the tokenizer's chat template, with BOXED_PROMPT as system message; "reasoning": the same (or plain text)
    with REASONING_PROMPT; "plain": the question and a newline, for base models; "auto": chat for instruct models."""
    system = REASONING_PROMPT if template == "reasoning" else BOXED_PROMPT
    if uses_chat(tokenizer, template):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        return render(tokenizer, messages, add_generation_prompt=True)
    return f"{system}\n\n{question}\n" if template == "reasoning" else question + "\n"


def render(tokenizer, messages, **options):
    """A conversation as text. Llama's template would put today's date in: a fixed one keeps runs repeatable."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024", **options)
    except Exception as error:      # a template is a program: some refuse a system message
        raise ValueError(f"the chat template refuses this prompt ({error}): use --template plain") from None


def speaks_chat(tokenizer):
    """Is this an instruct model? Base checkpoints carry a chat template too, but their eos does not end its turns."""
    turns = render(tokenizer, [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}])
    return tokenizer.eos_token is not None and tokenizer.eos_token in turns


def encode_prompts(problems, tokenizer, template):
    """Token ids of each problem's prompt. A chat template writes its own bos; other text gets the tokenizer's, if any."""
    chat = uses_chat(tokenizer, template)
    if template == "auto":          # decided once, not for every problem
        template = "chat" if chat else "plain"
    texts = [prompt_text(p["problem"], tokenizer, template) for p in problems]
    return tokenizer(texts, add_special_tokens=not chat)["input_ids"]


def tokenize_prompts(problems, tokenizer, template, max_length, report=print):
    """Problems with "prompt" (token ids) added; those above max_length tokens are dropped, and the count reported.

    report: a function of one line. ValueError when nothing is left."""
    ids = encode_prompts(problems, tokenizer, template)
    kept = [{**p, "prompt": i} for p, i in zip(problems, ids) if len(i) <= max_length]
    if len(kept) < len(problems):
        report(f"data: dropped {len(problems) - len(kept)} of {len(problems)} problems: "
               f"their prompts exceed --max-prompt-tokens {max_length}")
    if not kept:
        raise ValueError(f"no problem is left: every prompt exceeds --max-prompt-tokens {max_length}")
    return kept


# --------------------------------------------------------------------------------------------------- tokenizers

def train_tokenizer(texts, vocab_size=512):
    """A byte-level BPE tokenizer (arXiv 1508.07909) with digits one by one, as a transformers tokenizer.

    Any text can be encoded and decoded back exactly. eos and pad are EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)


def save_tokenizer(tokenizer, folder):
    """Write the tokenizer's files, under the class name that transformers of any recent version knows."""
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if settings.get("tokenizer_class") == "TokenizersBackend":       # transformers 5's name for the same thing
        file.write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def load_tokenizer(folder):
    """The tokenizer of a checkpoint folder (no remote code). ValueError when there is none."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("1 + 1")["input_ids"]:     # without its files transformers gives an empty tokenizer, not an error
            raise ValueError("it has no vocabulary: are the tokenizer files missing?")
        return tokenizer
    except Exception as error:   # transformers raises many types; all mean the same to the user
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(f"{folder}: cannot read its tokenizer ({reason})") from None


def stop_ids(model, tokenizer):
    """Every id that ends a completion: of config.json, generation_config.json and the tokenizer."""
    try:
        generation = json.loads(model.files.get("generation_config.json", b"{}"))
    except ValueError as error:
        raise ValueError(f"generation_config.json is not valid JSON: {error}") from None
    ids, named = set(), generation.get("eos_token_id") if isinstance(generation, dict) else None
    for value in (model.config.eos_token_id, named, tokenizer.eos_token_id):
        ids |= set(value) if isinstance(value, list) else {value}
    ids = {i for i in ids if isinstance(i, int) and 0 <= i < model.config.vocab_size}
    if not ids:
        raise ValueError("no stop token: neither config.json, generation_config.json nor the tokenizer names an eos id")
    return sorted(ids)
