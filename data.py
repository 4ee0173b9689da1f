"""Problems as token ids: jsonl files, hub datasets, the built-in arithmetic task, prompt templates, tokenizers.

A problem is a dict with "problem", "answer" and, where the source has one, "solution", "level" and "id". Every source
gives a plain list of them, so GSM8K, MATH, your own file and the built-in task take the same road from here on.
Left out: streaming from disk (GSM8K and MATH are megabytes) and few-shot prompts.

The built-in task needs no download: stories of several steps such as
    "Mia has 7 shells. She finds 5 more. She gives half of them to Ben. How many shells does Mia have?"
whose single steps a tiny model learns, while their composition, told step by step or guessed at once, it does not.
Training and held-out stories differ in start and operations, not only in words: see `_held_out`.
"""
import json
import math
import random
import zlib
from pathlib import Path

from reward import extract_answer

HUB = {   # name -> split -> [(dataset, configuration, split on the hub)]
    "gsm8k": {"train": [("openai/gsm8k", "main", "train")], "test": [("openai/gsm8k", "main", "test")]},
    "math": {"train": [("EleutherAI/hendrycks_math", subject, "train") for subject in (
        "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
        "precalculus")], "test": [("HuggingFaceH4/MATH-500", None, "test")]},
}
EOS = "<|endoftext|>"
BOXED_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
REASONING_PROMPT = ("Answer the question. First write your reasoning, then only the final answer, in this form:\n"
                    "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>")


# ------------------------------------------------------------------------------------------------------ sources

def load_problems(data, split="train", seed=0, levels=(4, 6), count=20000, report=print):
    """Problems of a source: "arithmetic", "gsm8k", "math", or the path of a jsonl file (which has no splits).

    seed, levels (fewest, most steps) and count concern only the built-in task; report takes the line that says how
    many problems were dropped for want of an answer. Returns a list of problems in the order of the source.
    FileNotFoundError or ValueError, one line, when there is nothing usable."""
    if data == "arithmetic":
        return arithmetic(count, split, seed, levels)
    problems = from_hub(data, split, report) if data in HUB else from_jsonl(data)
    kept = [p for p in problems if p["answer"].strip()]
    if len(kept) < len(problems):
        report(f"data: dropped {len(problems) - len(kept)} of {len(problems)} problems of {data}: their answer is empty")
    if not kept:
        raise ValueError(f"{data} holds no problems")
    return kept


def from_jsonl(path):
    """One problem a line; a malformed line is a ValueError that gives file, line number and reason."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file; give arithmetic, gsm8k, math or a .jsonl file")
    problems = []
    # not splitlines: GSM8K holds U+2028 inside a string, where that would cut
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                problems.append(normalize(json.loads(line), f"{path}:{number}"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    return problems


def read_text(path):
    """A UTF-8 file (with or without a byte-order mark); one line that names it when it is something else."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}): convert it first") from None


def hold_out(problems, count):
    """(training, held-out): of a file without a split, `count` problems at most and a tenth at most, by checksum.

    Equal texts fall on the same side, so a duplicate never leaks."""
    keys = sorted({zlib.crc32(p["problem"].encode()) for p in problems})
    chosen = set(keys[:min(count, len(keys) // 10)])
    split = [[], []]
    for p in problems:
        split[zlib.crc32(p["problem"].encode()) in chosen].append(p)
    if not all(split):
        raise ValueError(f"{len(problems)} problems are too few to hold some out: give --eval-data FILE")
    return split[0], split[1]


def normalize(row, name):
    """Any of the field's layouts -> a problem. ValueError for what is missing."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    question = row.get("problem") or row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError('no text in the field "problem" or "question"')
    answer, solution = row.get("answer"), row.get("solution")
    if isinstance(answer, str) and "####" in answer:                # GSM8K: the answer field holds the solution
        answer, solution = None, answer
    if (answer is None or answer == "") and isinstance(solution, str):
        answer = extract_answer(solution) or answer
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    if not isinstance(answer, str):
        raise ValueError('no "answer", and no solution that ends in "#### ..." or holds a \\boxed{...}')
    return {"problem": question, "answer": answer, "solution": solution, "level": row.get("level"),
            "id": row.get("id", name)}


def from_hub(name, split, report):
    """gsm8k or math through the `datasets` library, which is imported only here."""
    instead = f"download it and pass the file instead: --data {name}_{split}.jsonl (fields problem, answer)"
    try:
        from datasets import load_dataset
    except ImportError:
        raise FileNotFoundError(f"--data {name} needs `pip install datasets`, or {instead}") from None
    rows = []
    for dataset, configuration, part in HUB[name][split]:
        try:
            rows += list(load_dataset(dataset, configuration, split=part))
        except Exception as error:   # no network, no such dataset, a proxy: whatever it is, the way out is the same
            raise FileNotFoundError(f"--data {name}: the hub did not give {dataset} ({type(error).__name__}); "
                                    + instead) from None
    problems = []
    for i, row in enumerate(rows):
        try:
            problems.append(normalize(row, f"{name}/{split}/{i}"))
        except ValueError as error:     # MATH has solutions with an empty box
            report(f"data: dropped {name}/{split}/{i}: {error}")
    return problems


# ------------------------------------------------------------------------------------------- the built-in task

LARGEST = 20      # no number in a story exceeds it: the single steps form a small table that can be learned
NAMES = {"Mia": "She", "Ben": "He", "Ana": "She", "Tom": "He", "Eva": "She", "Sam": "He", "Lily": "She", "Max": "He",
         "Zoe": "She", "Leo": "He", "Ruth": "She", "Omar": "He", "Ines": "She", "Hugo": "He", "Nora": "She", "Ivan": "He"}
THINGS = ("shells", "apples", "coins", "books", "stamps", "marbles", "pens", "cards", "beads", "plums", "stones",
          "buttons", "tickets", "cookies", "candles", "roses")
OPENINGS = ("{name} has {n} {things}.", "{name} starts with {n} {things}.", "There are {n} {things} on the table of {name}.",
            "{name} owns {n} {things}.", "In the box of {name} there are {n} {things}.")
WORDINGS = {
    "+": ("{She} finds {n} more.", "{She} buys {n} more.", "{friend} brings {n}.", "{She} gets {n} from {friend}.",
          "Then {n} more arrive.", "{She} wins {n} of them.", "{friend} adds {n}."),
    "-": ("{She} loses {n}.", "{She} gives {n} to {friend}.", "{She} sells {n} of them.", "{friend} takes {n}.",
          "Then {n} break.", "{She} puts {n} away.", "{She} drops {n} of them."),
    "*": ("Then the number doubles.", "{friend} brings as many again.", "{She} gets twice as many."),
    "/": ("{She} loses half of them.", "{She} gives half to {friend}.", "{friend} takes half of them."),
}
QUESTIONS = ("How many {things} does {name} have?", "How many {things} are left?", "How many {things} are there now?",
             "What is the number of {things} now?", "How many {things} does {name} have in the end?")


def arithmetic(count, split="train", seed=0, levels=(4, 6)):
    """`count` word problems; level = number of steps. The same arguments give the same problems.

    split "test" holds stories whose start and operations never occur in "train", whatever the seeds. The solution is
    in GSM8K's format: one equation a line, then "#### answer". Terse answers are made of it by sft.py."""
    low, high = levels
    if not 1 <= low <= high:
        raise ValueError(f"levels must be 1 <= fewest <= most, not {low}-{high}")
    rng = random.Random(f"arithmetic/{split}/{seed}")
    problems = []
    while len(problems) < count:
        start, steps = _chain(rng, rng.randint(low, high))
        if _held_out(start, steps) == (split == "test"):
            problems.append(_story(rng, start, steps, f"arithmetic/{split}/{seed}/{len(problems)}"))
    return problems


def _chain(rng, length):
    """A start and `length` operations (sign, number) whose results stay between 1 and LARGEST."""
    start = value = rng.randint(2, LARGEST)
    steps = []
    while len(steps) < length:
        sign, n = rng.choice("++--*/"), rng.randint(1, 9)
        n = 2 if sign in "*/" else n
        result = {"+": value + n, "-": value - n, "*": value * n, "/": value // 2 if value % 2 == 0 else 0}[sign]
        if 1 <= result <= LARGEST:
            steps.append((sign, n))
            value = result
    return start, steps


def _held_out(start, steps):
    """One story in ten, by a checksum of its numbers and operations: words can not move it to the other side."""
    return zlib.crc32(repr((start, steps)).encode()) % 10 == 0


def _story(rng, start, steps, name):
    who, friend = rng.sample(sorted(NAMES), 2)
    words = {"name": who, "friend": friend, "She": NAMES[who], "things": rng.choice(THINGS)}
    sentences = [rng.choice(OPENINGS).format(n=start, **words)]
    lines, value = [], start
    for sign, n in steps:
        sentences.append(rng.choice(WORDINGS[sign]).format(n=n, **words))
        result = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[sign]
        lines.append(f"{value}{sign}{n}={result}")
        value = result
    sentences.append(rng.choice(QUESTIONS).format(**words))
    return {"problem": " ".join(sentences), "answer": str(value), "solution": "\n".join([*lines, f"#### {value}"]),
            "level": len(steps), "id": name}


# ------------------------------------------------------------------------------------------ prompts and batches

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


class Stream:
    """Problems in a new order every epoch, decided by seed alone; `cursor` is all that a checkpoint has to keep."""

    def __init__(self, problems, seed, cursor=0):
        self.problems, self.seed, self.cursor = problems, seed, cursor
        self._epoch, self._order = None, None

    def next(self, count):
        """The next `count` problems."""
        picked = []
        for _ in range(count):
            epoch, position = divmod(self.cursor, len(self.problems))
            if epoch != self._epoch:
                self._order = random.Random(f"order/{self.seed}/{epoch}").sample(range(len(self.problems)), len(self.problems))
                self._epoch = epoch
            picked.append(self.problems[self._order[position]])
            self.cursor += 1
        return picked


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
