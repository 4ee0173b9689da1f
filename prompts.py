"""Prompts and tokenizers: from a problem to token ids, and from a completion's ids to its text.

A template turns the question into the text that a completion continues (--template). Instruct
models have a chat template of their own, a small program in their tokenizer that marks whose turn
it is; base models get plain text.

    auto        chat for instruct models, plain for all others
    chat        the tokenizer's chat template, with BOXED_PROMPT as system message
    plain       the question and a newline; a system message of the problem's own stands above it
    reasoning   REASONING_PROMPT as system message, or above the question where there is no chat
    r1-zero     the same with R1_PROMPT, that of DeepSeek-R1-Zero: made for base models

A model is taken for an instruct model if the token that ends a turn in its chat template also ends
its completions: by the tokenizer's eos, config.json or generation_config.json. `report_template`
says what was chosen, and why. A problem may bring its own system message (data.normalize), which
takes BOXED_PROMPT's place.

A tokenizer turns text into token ids. A checkpoint's own is read through transformers, and no code
of the checkpoint is run but the chat template, which chat.py keeps within bounds. For a new small
model `train_tokenizer` makes one by byte-pair encoding (Sennrich et al., arXiv 1508.07909).
Training works on ids alone: what was drawn is decoded to be graded, but never tokenized again.

Left out: few-shot prompts and conversations of several turns. Needs transformers and tokenizers,
both imported where they are used.
"""
import json
import re
from pathlib import Path

import chat
import thoughts
from config import TEMPLATES
from engine.weights import download, read_json
from families import token_ids

EOS = "<|endoftext|>"
BOXED_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
REASONING_PROMPT = (
    "Answer the question. First write your reasoning, then only the final answer, in this form:\n"
    "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>")

R1_PROMPT = (       # arXiv 2501.12948, table 1
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>.")
FORMS = {"reasoning": REASONING_PROMPT, "r1-zero": R1_PROMPT}       # templates that ask for a form


# ----------------------------------------------------------------------------------- templates

def uses_chat(tokenizer, template):
    """Tell whether this template goes through the tokenizer's chat template.

    Raises ValueError for an unknown template, and for "chat" where the tokenizer has none."""
    if template not in TEMPLATES:
        raise ValueError("--template must be auto, chat, plain or reasoning, or r1-zero, "
                         f"not {template!r}")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise ValueError(
            "--template chat, but this tokenizer has no chat template; use plain or reasoning")

    if not has_chat or template == "plain":
        return False
    return template != "auto" or speaks_chat(tokenizer)


def speaks_chat(tokenizer):
    """Tell whether this is the tokenizer of an instruct model.

    Base checkpoints carry a chat template too, but none of their stop tokens ends its turns. A
    fine-tuned one may name the end of its turns in generation_config.json only."""
    eos = tokenizer.eos_token
    if eos is not None and eos in sample_turns(tokenizer)[0]:
        return True
    return any(i in stops_of_files(tokenizer) for i in turn_ends(tokenizer))


def report_template(tokenizer, template, report):
    """Say which template is in use, and for "auto" why: report is a function that takes the line.

    Raises ValueError for --chat-template-kwargs that would do nothing."""
    chosen = uses_chat(tokenizer, template)
    options = chat_options(tokenizer)
    if options and not chosen:
        raise ValueError("--chat-template-kwargs needs a chat template: give --template chat, "
                         "or a checkpoint that has one")
    read = names_read(tokenizer.get_chat_template()) if options else ()
    unread = [name for name in options if name not in read]
    if unread:
        raise ValueError(f"--chat-template-kwargs: this chat template does not read {unread[0]}; "
                         f"it reads {', '.join(sorted(read))}")

    ends = ["no token"]
    if chosen or template == "auto":
        ends = tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) or ends
    if template != "auto":
        line = f"{template} ({ends[0]} ends a turn)" if chosen else template
    elif chosen:
        line = f"chat ({ends[0]} ends a turn, and is a stop token of this checkpoint)"
    elif getattr(tokenizer, "chat_template", None):
        line = (f"plain (a base model: {ends[0]} ends a turn of its chat template, and is no "
                "stop token of this checkpoint); --template chat uses the chat template")
    else:
        line = "plain (the tokenizer has no chat template)"
    report(f"template: {line}{' with ' + json.dumps(options) if options else ''}")


def names_read(template):
    """The variables that a chat template reads and does not set by itself."""
    from jinja2 import meta
    environment = chat.environment()
    asked = meta.find_undeclared_variables(environment.parse(template))
    return asked - set(environment.globals)


def settings_of_run(model):
    """Returns the settings of the train.py or sft.py that wrote a model, {} if neither did.

    A run's model lies in its folder, beside the run's config.json. sft.py leaves its flags in
    sft.json beside the weights, and those beside an adapter/."""
    model = Path(model).resolve()       # "." and links have no parent to look into
    of_adapter = (model / "adapter_config.json").exists()
    flags = (model.parent if of_adapter else model) / "sft.json"
    if flags.exists():
        return {flag[2:].replace("-", "_"): of for flag, of in read_json(flags).items()}

    file = model.parent / "config.json"
    settings = read_json(file) if file.exists() else {}
    return settings if "algo" in settings else {}       # else of a model, or of something else


def follow_run(config):
    """Take over template and chat_template_kwargs of the train.py or sft.py that wrote a model.

    config: the settings of evaluate.py, of which those that were given stay."""
    settings = settings_of_run(config.model)
    if config.template == "auto":
        config.template = settings.get("template", "auto")
    if not config.chat_template_kwargs and config.template != "plain":
        config.chat_template_kwargs = str(settings.get("chat_template_kwargs", ""))


def prompt_text(question, tokenizer, template="auto"):
    """Returns the text that a completion continues; the file's docstring lists the templates."""
    return prompt_texts([{"problem": question}], tokenizer, template)[0]


def conversation(problem, template):
    """Returns a problem as the messages that a chat template is given."""
    system = FORMS.get(template) or problem.get("system", BOXED_PROMPT)
    return [{"role": "system", "content": system}, {"role": "user", "content": problem["problem"]}]


def prompt_texts(problems, tokenizer, template):
    """Returns the text that a completion continues, for each problem."""
    if uses_chat(tokenizer, template):
        conversations = [conversation(problem, template) for problem in problems]
        return render(tokenizer, conversations, add_generation_prompt=True)

    texts = []
    for problem in problems:
        above = FORMS.get(template) or problem.get("system")
        if template == "r1-zero":
            texts.append(f"{above} User: {problem['problem']} Assistant:")
        else:
            texts.append((f"{above}\n\n" if above else "") + problem["problem"] + "\n")
    return texts


def render(tokenizer, conversations, add_generation_prompt=False):
    """Returns conversations as texts. Raises ValueError when the chat template refuses one."""
    # Llama's template would put today's date in: a fixed one keeps runs repeatable
    options = {"date_string": "26 Jul 2024", "add_generation_prompt": add_generation_prompt,
               **chat_options(tokenizer)}
    try:
        from transformers import PreTrainedTokenizerBase
        own = getattr(tokenizer.apply_chat_template, "__func__", None)
        if own is not PreTrainedTokenizerBase.apply_chat_template:      # no Jinja: Mistral's
            return [tokenizer.apply_chat_template(messages, tokenize=False, **options)
                    for messages in conversations]
        variables = {"tools": None, "documents": None, **tokenizer.special_tokens_map, **options}
        return chat.render(tokenizer.get_chat_template(), conversations, variables)
    except Exception as error:      # a template is a program: some refuse a system message
        message = f"the chat template refuses this prompt ({error}): use --template plain"
        raise ValueError(message) from None


def chat_options(tokenizer):
    """Returns what --chat-template-kwargs gave to this tokenizer's chat template."""
    return getattr(tokenizer, "chat_options", {})


def encode_prompts(problems, tokenizer, template):
    """Returns the token ids of each problem's prompt.

    A chat template writes its own bos; other text gets the tokenizer's, if it has one."""
    return encode(prompt_texts(problems, tokenizer, template), tokenizer, template)


def encode(texts, tokenizer, template):
    """Returns the token ids of texts of `prompt_texts`."""
    return tokenizer(texts, add_special_tokens=not uses_chat(tokenizer, template))["input_ids"]


def tokenize_prompts(problems, tokenizer, template, max_length, report=print):
    """Returns the problems with "prompt" (token ids) added, without those above max_length tokens.

    Where the prompt is a chat, "messages" is added too, for users' reward functions; where it opens
    a thought, as templates of reasoning models do, its mark is "opened" (reward.with_thought).
    report is a function that takes the line with the count of dropped problems. Raises ValueError
    when no problem is left."""
    kept = []
    is_chat = uses_chat(tokenizer, template)
    texts = prompt_texts(problems, tokenizer, template)
    for problem, text, ids in zip(problems, texts, encode(texts, tokenizer, template)):
        if len(ids) > max_length:
            continue
        kept.append({**problem, "prompt": ids})
        if is_chat:
            kept[-1]["messages"] = conversation(problem, template)
            if mark := thoughts.opened(text):
                kept[-1]["opened"] = mark

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


def load_tokenizer(folder, options=None):
    """Returns the tokenizer of a checkpoint folder or hub id, without running any code of it.

    options: what every use of its chat template is given (--chat-template-kwargs). The tokenizer
    also knows the stop ids of the checkpoint's other files, see stops_of_files. Raises ValueError,
    in one line, when there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # without its files transformers gives an empty tokenizer, not an error
        if not tokenizer("1 + 1")["input_ids"]:
            raise ValueError("it has no vocabulary: are the tokenizer files missing?")
    except Exception as error:      # transformers raises many types; all mean the same to the user
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise ValueError(f"{folder}: cannot read its tokenizer ({reason})") from None

    names = ["config.json", "generation_config.json"]
    place = Path(folder) if Path(folder).is_dir() else download(str(folder), names)
    tokenizer.file_stops = []
    for file in (place / name for name in names):
        if file.exists():
            tokenizer.file_stops += token_ids(read_json(file).get("eos_token_id"), file)
    tokenizer.chat_options = dict(options or {})
    return tokenizer


# ------------------------------------------------------------------------- how a completion ends

ANSWER = "The answer is 4711."      # of `sample_turns`; no template writes it by itself


def sample_turns(tokenizer):
    """Returns two short conversations as text: one that ends with ANSWER, and one that goes on."""
    asked = {"role": "user", "content": "How many?"}
    answered = {"role": "assistant", "content": ANSWER}
    template = getattr(tokenizer, "chat_template", None)
    key = json.dumps([template, chat_options(tokenizer)])
    if getattr(tokenizer, "sampled_turns", (None, None))[0] != key:     # a process each time
        texts = render(tokenizer, [[asked, answered], [asked, answered, asked]])
        tokenizer.sampled_turns = key, texts
    return tokenizer.sampled_turns[1]


def turn_ends(tokenizer):
    """Returns the ids by which the chat template ends an answer, the last turn's first.

    There is none without a chat template, or where plain text ends a turn."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    special = set(tokenizer.get_added_vocab().values())
    found = []
    for text in sample_turns(tokenizer):
        behind = text.rpartition(ANSWER)[2].lstrip() if ANSWER in text else ""
        ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
        if ids and ids[0] in special and ids[0] not in found:
            found.append(ids[0])
    return found


def stops_of_files(tokenizer):
    """Returns the ids that config.json and generation_config.json beside a tokenizer name."""
    return getattr(tokenizer, "file_stops", [])


def end_id(tokenizer, template):
    """Returns the id that a worked solution ends with, for sft.py to teach.

    It is the end of a turn where the chat template is in use. Raises ValueError where no id is
    known."""
    ends = turn_ends(tokenizer) if uses_chat(tokenizer, template) else []
    eos = tokenizer.eos_token_id
    if ends:
        return eos if eos in ends else ends[0]
    named = [i for i in (eos, *stops_of_files(tokenizer)) if i is not None]
    if not named:
        raise ValueError("no stop token: the tokenizer has no eos_token (tokenizer_config.json), "
                         "and neither config.json nor generation_config.json names an id")
    return named[0]


def name_end(model, end):
    """Make generation_config.json, as the model is written, name the id that ends its completions.

    A base model that was trained on chat turns is taken for an instruct model by this."""
    file = "generation_config.json"
    generation = json.loads(model.files.get(file, b"{}"))
    named = token_ids(generation.get("eos_token_id", model.config.eos_token_id), file)
    if end not in named:
        generation["eos_token_id"] = [*named, end]
        model.files[file] = (json.dumps(generation, indent=2) + "\n").encode()


def stop_ids(model, tokenizer):
    """Returns every id that ends a completion, sorted.

    config.json, generation_config.json and the tokenizer may each name some, and the chat template
    ends its turns with one; all of them count. Raises ValueError when none of them names an id of
    the vocabulary."""
    try:
        generation = json.loads(model.files.get("generation_config.json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"generation_config.json is not valid JSON: {error}") from None
    if not isinstance(generation, dict):
        generation = {}

    named = token_ids(model.config.eos_token_id, "config.json")
    named = named + token_ids(generation.get("eos_token_id"), "generation_config.json")
    named = named + token_ids(tokenizer.eos_token_id, "the tokenizer")
    try:
        named = named + turn_ends(tokenizer)
    except ValueError:      # a template that refuses: who uses it has been told
        pass

    size = model.config.vocab_size
    ids = {i for i in named if 0 <= i < size}
    if not ids:
        raise ValueError("no stop token: neither config.json, generation_config.json nor the "
                         "tokenizer names an eos id")
    return sorted(ids)


def decode(tokenizer, completions, stops):
    """Returns the texts of completions (lists of ids), each up to its first stop id.

    stops: the ids that end a completion. The first one is taken away, and what stands behind it,
    which nobody asked for. All other special tokens stay: <answer> may be one."""
    kept = []
    for ids in completions:
        end = min((ids.index(i) for i in stops if i in ids), default=len(ids))
        kept.append(ids[:end])
    return tokenizer.batch_decode(kept, skip_special_tokens=False)
