"""Problems: from jsonl files, hub datasets and the built-in task, and the order in which training takes them.

A problem is a dict with "problem", "answer" and, where the source has one, "solution", "level" and "id". Every source
gives a plain list of them, so GSM8K, MATH, your own file and the built-in task take the same road from here on.
Left out: streaming from disk (GSM8K and MATH are megabytes) and few-shot prompts.
"""
import json
import math
import random
import zlib
from pathlib import Path

import tasks
from reward import extract_answer

HUB = {   # name -> split -> [(dataset, configuration, split on the hub)]
    "gsm8k": {"train": [("openai/gsm8k", "main", "train")], "test": [("openai/gsm8k", "main", "test")]},
    "math": {"train": [("EleutherAI/hendrycks_math", subject, "train") for subject in (
        "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
        "precalculus")], "test": [("HuggingFaceH4/MATH-500", None, "test")]},
}


# ------------------------------------------------------------------------------------------------------ sources

def load_problems(data, split="train", seed=0, levels=(4, 6), count=20000, report=print):
    """Problems of a source: "arithmetic", "gsm8k", "math", or the path of a jsonl file (which has no splits).

    seed, levels (fewest, most steps) and count concern only the built-in task; report takes the line that says how
    many problems were dropped for want of an answer. Returns a list of problems in the order of the source.
    FileNotFoundError or ValueError, one line, when there is nothing usable."""
    if data == "arithmetic":
        return tasks.arithmetic(count, split, seed, levels)
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
