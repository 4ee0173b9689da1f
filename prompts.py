"""Prompts and tokenizers: from a problem to token ids, and which ids end a completion.

A template turns the question into the text that a completion continues (--template). Instruct
models have a chat template of their own, a small program in their tokenizer that marks whose turn
it is; base models get plain text.

    auto        chat for instruct models, plain for all others
    chat        the tokenizer's chat template, with BOXED_PROMPT as system message
    plain       the question and a newline
    reasoning   REASONING_PROMPT as system message, or above the question where there is no chat

A tokenizer turns text into token ids. A checkpoint's own is read through transformers, and no code
of the checkpoint is run. For a new small model `train_tokenizer` makes one by byte-pair encoding
(Sennrich et al., arXiv 1508.07909). Training works on ids alone: what was drawn is decoded to be
graded, but never tokenized again.

Left out: few-shot prompts and conversations of several turns. Needs transformers and tokenizers,
both imported where they are used.
"""
import json
from pathlib import Path

EOS = "<|endoftext|>"
BOXED_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
REASONING_PROMPT = (
    "Answer the question. First write your reasoning, then only the final answer, in this form:\n"
    "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>")


# ----------------------------------------------------------------------------------- templates

def uses_chat(tokenizer, template):
    """Tell whether this template goes through the tokenizer's chat template.

    Raises ValueError for an unknown template, and for "chat" where the tokenizer has none."""
    if template not in ("auto", "chat", "plain", "reasoning"):
        raise ValueError(f"--template must be auto, chat, plain or reasoning, not {template!r}")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise ValueError(
            "--template chat, but this tokenizer has no chat template; use plain or reasoning")

    if not has_chat or template == "plain":
        return False
    return template != "auto" or speaks_chat(tokenizer)


def speaks_chat(tokenizer):
    """Tell whether this is the tokenizer of an instruct model.

    Base checkpoints carry a chat template too, but their eos does not end its turns."""
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    turns = render(tokenizer, messages)
    return tokenizer.eos_token is not None and tokenizer.eos_token in turns


def prompt_text(question, tokenizer, template="auto"):
    """Returns the text that a completion continues; the file's docstring lists the templates."""
    system = REASONING_PROMPT if template == "reasoning" else BOXED_PROMPT
    if uses_chat(tokenizer, template):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        return render(tokenizer, messages, add_generation_prompt=True)
    if template == "reasoning":
        return f"{system}\n\n{question}\n"
    return question + "\n"


def render(tokenizer, messages, **options):
    """Returns a conversation as text. Raises ValueError when the chat template refuses it."""
    try:
        # Llama's template would put today's date in: a fixed one keeps runs repeatable
        return tokenizer.apply_chat_template(
            messages, tokenize=False, date_string="26 Jul 2024", **options)
    except Exception as error:      # a template is a program: some refuse a system message
        message = f"the chat template refuses this prompt ({error}): use --template plain"
        raise ValueError(message) from None


def encode_prompts(problems, tokenizer, template):
    """Returns the token ids of each problem's prompt.

    A chat template writes its own bos; other text gets the tokenizer's, if it has one."""
    chat = uses_chat(tokenizer, template)
    if template == "auto":          # decided once, not for every problem
        template = "chat" if chat else "plain"
    texts = [prompt_text(p["problem"], tokenizer, template) for p in problems]
    return tokenizer(texts, add_special_tokens=not chat)["input_ids"]


def tokenize_prompts(problems, tokenizer, template, max_length, report=print):
    """Returns the problems with "prompt" (token ids) added, without those above max_length tokens.

    report is a function that takes the line with the count of dropped problems. Raises ValueError
    when no problem is left."""
    kept = []
    for problem, ids in zip(problems, encode_prompts(problems, tokenizer, template)):
        if len(ids) <= max_length:
            kept.append({**problem, "prompt": ids})

    dropped = len(problems) - len(kept)
    if dropped:
        report(f"data: dropped {dropped} of {len(problems)} problems: "
               f"their prompts exceed --max-prompt-tokens {max_length}")
    if not kept:
        raise ValueError(
            f"no problem is left: every prompt exceeds --max-prompt-tokens {max_length}")
    return kept


# ---------------------------------------------------------------------------------- tokenizers

def train_tokenizer(texts, vocab_size=512):
    """Train a byte-level BPE tokenizer (arXiv 1508.07909); every digit is a token of its own.

    Returns a transformers tokenizer whose eos and pad are EOS. Any text can be encoded and decoded
    back exactly, because every byte is in the alphabet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)


def save_tokenizer(tokenizer, folder):
    """Write the tokenizer's files, under the class name that any recent transformers knows."""
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    # transformers 5 has another name for the same class, which older ones do not find
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(settings, indent=2) + "\n")


def load_tokenizer(folder):
    """Returns the tokenizer of a checkpoint folder or hub id, without running any code of it.

    Raises ValueError, in one line, when there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # without its files transformers gives an empty tokenizer, not an error
        if not tokenizer("1 + 1")["input_ids"]:
            raise ValueError("it has no vocabulary: are the tokenizer files missing?")
        return tokenizer
    except Exception as error:      # transformers raises many types; all mean the same to the user
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise ValueError(f"{folder}: cannot read its tokenizer ({reason})") from None


def stop_ids(model, tokenizer):
    """Returns every id that ends a completion, sorted.

    config.json, generation_config.json and the tokenizer may each name some; all of them count.
    Raises ValueError when none of them names an id of the vocabulary."""
    try:
        generation = json.loads(model.files.get("generation_config.json", b"{}"))
    except ValueError as error:
        raise ValueError(f"generation_config.json is not valid JSON: {error}") from None
    if not isinstance(generation, dict):
        generation = {}

    of_model = model.config.eos_token_id
    named = []
    for value in (of_model, generation.get("eos_token_id"), tokenizer.eos_token_id):
        named += value if isinstance(value, list) else [value]

    size = model.config.vocab_size
    ids = {i for i in named if isinstance(i, int) and 0 <= i < size}
    if not ids:
        raise ValueError("no stop token: neither config.json, generation_config.json nor the "
                         "tokenizer names an eos id")
    return sorted(ids)
