"""Problems from files, the hub and built-in tasks, and the order in which training takes them.

A problem is a dict with "problem", "answer", "task" and, where the source has one, "solution",
"level" and "id". Every source gives a plain list of them, so GSM8K, MATH, your own file and the
built-in tasks take the same road from here on. A problem of a task that checks answers by itself
also carries "check", a function of the completion (tasks.py).

Several sources are a mix. truth:2-4@2,seating:3-5,gsm8k is two parts of truth with 2 to 4 people,
one of seating with 3 to 5, and one of GSM8K.

Left out: streaming from disk (GSM8K and MATH are megabytes) and few-shot prompts. Needs tasks.py,
extraction.py to find the answer in a solution and reward.py to try it; prompts.py then turns
problems into token ids.
"""
import functools
import itertools
import json
import math
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import tasks
from config import is_file, parse_levels
from extraction import extract_answer
from reward import correct_counts, verifies_itself

TAKEN = ("prompt", "messages", "check", "task", "structure", "system", "opened", "columns")   # ours
GIVEN = ("prompt", "messages", "system")        # of those, what users' reward functions are given
MOST_KINDS = 40     # tasks and levels that are counted apart, in the log and elsewhere
MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
    "prealgebra", "precalculus")
HUB = {     # name -> split -> [(dataset, configuration, split on the hub)]
    "gsm8k": {
        "train": [("openai/gsm8k", "main", "train")],
        "test": [("openai/gsm8k", "main", "test")]},
    "math": {
        "train": [("EleutherAI/hendrycks_math", subject, "train") for subject in MATH_SUBJECTS],
        "test": [("HuggingFaceH4/MATH-500", None, "test")]},
}


# ------------------------------------------------------------------------------------- sources

@dataclass
class Part:
    """A source of a mix."""
    source: str                     # a task, gsm8k, math, or a file
    levels: tuple | None = None     # (easiest, hardest) of a built-in task; None: its usual ones
    weight: float = 1.0             # share of the problems, beside the other parts


def parts_of(data, levels=None):
    """Turn "truth:2-4@2,gsm8k" into its Parts; a file that exists is one Part, whatever its name.

    levels (easiest, hardest) are those of built-in tasks that name none. Raises ValueError, in one
    line, for a part that cannot be read, that has levels without being a task, or is named twice.
    """
    parts = []
    for text in [data] if is_file(data) else data.split(","):
        if is_file(text):
            parts.append(Part(text))
            continue
        match = re.fullmatch(r"(.+?)(?::(\d+)(?:-(\d+))?)?(?:@(\d*\.?\d+))?", text.strip())
        if not match:
            raise ValueError(f"--data {data}: {text!r} is no source; "
                             "give such as truth:2-4@2,seating:3-5")
        source, low, high, weight = match.groups()
        own = (int(low), int(high or low)) if low else None

        if own and source not in tasks.TASKS:
            raise ValueError(f"--data {data}: {source} has no levels: "
                             f"only {', '.join(tasks.TASKS)} have")
        if own and own[0] > own[1]:
            raise ValueError(f"--data {data}: {text.strip()} must be easiest-hardest")
        if weight and float(weight) == 0:
            raise ValueError(f"--data {data}: {text.strip()} has no weight: leave it out")
        usual = levels if source in tasks.TASKS else None
        parts.append(Part(source, own or usual, float(weight or 1)))

    names = [name_of(part.source) for part in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"--data {data}: two parts are called {twice}, and the log could not tell "
                         "them apart: name a task once with all its levels, rename a file")
    return parts


def takes_levels(data):
    """Whether a source or mix has a built-in task that names no levels."""
    return any(part.source in tasks.TASKS and not part.levels for part in parts_of(data))


def name_of(source):
    """The name of a source's problems in the log: without the folder of a file."""
    return Path(source).name


def load_problems(data, split="train", seed=0, levels=None, count=20000, report=print, whole=True,
                  fill=False, spare=0, answered=True):
    """Returns the problems of a source or of a mix, in the order of the sources.

    seed, levels (easiest, hardest) and count concern built-in tasks; a mix shares the count by its
    weights. whole=False: files too give no more than their share, of the training split a random
    one, by the seed. fill=True: in a mix they give no less, by repeating problems. spare: leave out
    what a run with so many --eval-problems holds out of a file.

    report takes the line that says how many problems were dropped: an empty answer cannot be given,
    and one that the verifier does not find equal to itself is never paid. With answered=False those
    of files stay, for rewards that look at none. Raises FileNotFoundError or ValueError, in one
    line, when there is nothing usable."""
    parts = parts_of(data, levels)
    if levels and not takes_levels(data):
        raise ValueError(f"--levels {levels[0]}-{levels[1]} does nothing for {data}: it is for "
                         "built-in tasks that name no levels")

    problems = []
    tested = set()          # texts that are left out of a file, and so of all others
    for part, share in zip(parts, shares(parts, count)):
        loaded = load_part(part, split, seed, share, report, answered)
        if spare and is_file(part.source) and len({p["problem"] for p in loaded}) >= 10:
            used, held_out = hold_out(loaded, spare)
            report(f"data: left {len(held_out)} of {len(loaded)} problems of {part.source} out, "
                   "which a run on this file is tested on")
            loaded = used
            tested |= {p["problem"] for p in held_out}
        if fill and len(parts) > 1:
            loaded = list(itertools.islice(itertools.cycle(loaded), max(share, len(loaded))))
        if not whole:
            if split == "train" and not tasks.known(part.source):
                loaded = random.Random(f"part/{seed}").sample(loaded, len(loaded))
            loaded = loaded[:share]
        problems += loaded
    return [p for p in problems if p["problem"] not in tested]


def shares(parts, count):
    """Share a number of problems among the parts of a mix, by weight: at least one each."""
    total = sum(part.weight for part in parts)
    return [max(1, round(count * part.weight / total)) for part in parts]


def load_part(part, split, seed, count, report, answered=True):
    """Returns the problems of one source, each with its "task"; see load_problems."""
    source = part.source
    if tasks.known(source):
        problems = tasks.problems(source, count, split, seed, part.levels)
        return [tasks.checked(problem) for problem in problems]

    name = name_of(source)
    if tasks.known(name):
        raise ValueError(f"--data {source}: a file must not be called like a built-in task: "
                         "rename it")
    if source in HUB:
        problems = from_hub(source, split, report)
    else:
        problems = from_jsonl(source, answered)
    if problems and not answered:
        return [{**problem, "task": name} for problem in problems]

    with_answer = [p for p in problems if p["answer"].strip()]
    kept = [p for p in with_answer if verifies_itself(p["answer"])]
    reasons = []
    if len(with_answer) < len(problems):
        reasons.append(f"{len(problems) - len(with_answer)} with an empty answer")
    if len(kept) < len(with_answer):
        reasons.append(f"{len(with_answer) - len(kept)} whose answer does not verify against "
                       "itself")
    if reasons:
        report(f"data: dropped {len(problems) - len(kept)} of {len(problems)} problems "
               f"of {source}: {', '.join(reasons)}")
    if not kept:
        raise ValueError(f"{source} holds no problems")
    return [{**problem, "task": name} for problem in kept]


def kind_of(problem):
    """The name under which a problem is counted: its task, and its level if it has one."""
    task, level = problem["task"], problem.get("level")
    return task if level is None else f"{task}:{level}"


def kinds_of(problems):
    """Returns {kind: its task} of all kinds of problems, by task and then by level.

    Levels stand in the order of their numbers (`number_of`), behind them those that have none."""
    one = {kind_of(p): p for p in problems}

    def place(kind):
        number = number_of(one[kind].get("level"))
        return one[kind]["task"], number is None, number or 0.0, kind
    return {kind: one[kind]["task"] for kind in sorted(one, key=place)}


def number_of(level):
    """The number in a level, such as 3, 0.25, "-1" or "Level 5"; None if there is not just one."""
    numbers = re.findall(r"(?:^-)?(?:\d+(?:\.\d+)?|\.\d+)(?:e-?\d+)?", str(level), re.ASCII)
    return float(numbers[0]) if len(numbers) == 1 else None


def from_jsonl(path, answered=True):
    """Returns the problems of a file with one JSON object a line, in any layout of `normalize`.

    Raises ValueError for a malformed line, with the file, the line's number and the reason."""
    path = Path(path)
    if not is_file(path):
        names = ", ".join([*tasks.TASKS, *HUB])
        raise FileNotFoundError(f"{path}: no such file; give {names} or a .jsonl file")

    problems = []
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        raise ValueError(f"{path}:1: a JSON array; one object a line is needed")
    # not splitlines, which would cut at the U+2028 that GSM8K holds inside a string
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            problems.append(normalize(json.loads(line), f"{path}:{number}", answered))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: {error}; one object a line is needed") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return problems


def read_text(path):
    """Returns the text of a UTF-8 file, with or without a byte-order mark.

    Raises ValueError that names the file when it is something else."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}): convert it first") from None


def from_hub(name, split, report):
    """Returns gsm8k or math through the `datasets` library, which is imported only here.

    Rows without an answer are dropped and reported. Raises FileNotFoundError, with another way to
    get the data, when the library or the hub is out of reach."""
    instead = (f"download it and pass the file instead: "
               f"--data {name}_{split}.jsonl (fields problem, answer)")
    try:
        from datasets import load_dataset
    except ImportError:
        message = f"--data {name} needs `pip install datasets`, or {instead}"
        raise FileNotFoundError(message) from None

    rows = []
    for dataset, configuration, hub_split in HUB[name][split]:
        try:
            rows += list(load_dataset(dataset, configuration, split=hub_split))
        # no network, no such dataset, a proxy: whatever it is, the way out is the same
        except Exception as error:
            reason = f"the hub did not give {dataset} ({type(error).__name__})"
            raise FileNotFoundError(f"--data {name}: {reason}; {instead}") from None

    problems = []
    for i, row in enumerate(rows):
        try:
            problems.append(normalize(row, f"{name}/{split}/{i}"))
        except ValueError as error:     # MATH has solutions with an empty box
            report(f"data: dropped {name}/{split}/{i}: {error}")
    return problems


# GSM8K writes for a calculator too: "48/2 = <<48/2=24>>24". To a model it says everything twice.
CALCULATOR = re.compile(r"<<[-+*/().0-9 ,%$]{0,100}=[^<>\n]{0,100}>>")


def normalize(row, name, answered=True):
    """Turn a row in any of the field's layouts into a problem; `name` is its id if it has none.

    The question stands in "problem", "question" or, as text or as a conversation, in "prompt" (TRL,
    verl) or "messages". The answer is "answer", text or a number, verl's reward_model.ground_truth,
    or the end of the solution; null and NaN are the empty answer. "system" is what a chat is told
    first. Raises ValueError that says which of them is missing or no text; with answered=False an
    answer may be missing."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    said = {}
    question = row.get("problem") or row.get("question") or row.get("prompt") or row.get("messages")
    if not question and isinstance(row.get("chosen"), list):        # a pair, both whole: dpo.py
        question = row["chosen"]
    if isinstance(question, list):
        said = said_in(question)
        question = said["user"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError('no text in the field "problem" or "question", nor in "prompt" '
                         'or "messages"')

    graded = row.get("reward_model")
    answer = row.get("answer")
    graded = isinstance(graded, dict) and "ground_truth" in graded
    if answer is None and graded:
        answer = row["reward_model"]["ground_truth"]
    solution = row.get("solution") or said.get("assistant")
    # GSM8K: the answer field holds the solution
    if isinstance(answer, str) and "####" in answer:
        solution = answer
        answer = None
    if not isinstance(solution, (str, type(None))):
        raise ValueError('no text in the field "solution"')
    if solution:
        solution = CALCULATOR.sub("", solution)
    # MATH: the answer stands in the solution's box only
    if (answer is None or answer == "") and isinstance(solution, str):
        answer = extract_answer(solution) or answer
    # a number becomes text; True is an int for Python, but no answer
    not_finite = isinstance(answer, float) and not math.isfinite(answer)
    if not_finite or answer is None and ("answer" in row or graded):
        answer = ""
    elif isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not answered and not isinstance(answer, str):
        answer = ""
    if not isinstance(answer, str):
        raise ValueError(
            'no "answer", and no solution that ends in "#### ..." or holds a \\boxed{...}; '
            "--reward correct=0,FILE.py:FUNCTION needs none")

    problem = {"problem": question, "answer": answer, "solution": solution,
               "level": row.get("level"), "id": row.get("id", name)}
    system = said.get("system") or row.get("system")
    if isinstance(system, str) and system.strip():
        problem["system"] = system
    # reward functions of the user's may read the row's other fields, under their own names: those
    # that we use otherwise, and an answer that is no text, stand in "columns"
    others = {key: value for key, value in row.items() if key not in (*problem, *TAKEN)}
    problem = {**others, **problem}
    hidden = {key: row[key] for key in TAKEN if key in row and key not in GIVEN}
    if not isinstance(row.get("answer"), (str, type(None))):
        hidden["answer"] = row["answer"]
    if hidden:
        problem["columns"] = hidden
    for field, text in problem.items():
        if isinstance(text, str):
            check_characters(field, text)
    return problem


def check_characters(field, text):
    """Raise ValueError where a text holds a lone surrogate, which UTF-8 cannot say."""
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ValueError(f'half of a character (a lone surrogate) in the field "{field}"')


def system_of(problem):
    """The system message that a problem brings, as a field of a row; {} if it has none."""
    return {"system": problem["system"]} if "system" in problem else {}


def said_in(conversation):
    """Returns {role: text} of a conversation with one question: system, user, assistant.

    Raises ValueError for one of several turns, or of messages without text."""
    said = {}
    for message in conversation:
        role, text = (message.get(key) if isinstance(message, dict) else None
                      for key in ("role", "content"))
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            raise ValueError('a conversation has messages {"role": system, user or assistant, '
                             '"content": text}')
        if role in said:
            raise ValueError("a conversation of several turns: one question is needed")
        said[role] = text
    if "user" not in said:
        raise ValueError("a conversation without a question of the user")
    return said


# --------------------------------------------------------------------------------------- order

def load_split(c, report=print):
    """As `split`, and each problem has all fields that any of them has.

    A user's reward function is called with all of them, as in TRL, whichever a batch holds: None
    where the row has no such field."""
    train, held_out = split(c, report)
    everyone = train + held_out
    names = {name for p in everyone for name in (*p, *p.get("columns", ()))} - {"columns"}
    for problem in everyone:
        missing = names - set(problem) - set(problem.get("columns", ())) - set(TAKEN)
        if missing:
            problem["columns"] = {**problem.get("columns", {}), **dict.fromkeys(sorted(missing))}
    return train, held_out


def split(c, report=print):
    """Returns (training problems, held-out problems) of a run's settings, which never overlap.

    The held-out ones are those of --eval-data or, without it, of each source's test split. A file
    has none, so a part of it is held out. Of a mix there are --eval-problems, shared by its
    weights. Raises ValueError when nothing is left to train on, or a curriculum finds no levels."""
    levels, eval_count = parse_levels(c.levels), c.eval_problems
    answered = correct_counts(c.reward)
    train = load_problems(c.data, "train", c.seed, levels, c.problems, report, answered=answered)
    kinds = kinds_of(train)
    if c.curriculum not in ("", "uniform") and len(kinds) == len(set(kinds.values())):
        raise ValueError(f"--curriculum {c.curriculum} needs problems of several levels")
    if c.curriculum:
        check_curriculum(c, kinds, train)
    if c.curriculum == "adaptive" and len(kinds) > MOST_KINDS:
        raise ValueError(f"--curriculum adaptive follows at most {MOST_KINDS} tasks and levels, "
                         f"and these problems have {len(kinds)}")

    parts = parts_of(c.data, levels)
    if c.eval_data:
        alone = len(parts_of(c.eval_data)) == 1
        held_out = load_held_out(c, report, alone, answered)
        return without(train, held_out, report), held_out

    # what has a test split, and files, of which a part is held out
    kept, held_out = [], []
    for part, share in zip(parts, shares(parts, eval_count)):
        mine = [p for p in train if p["task"] == name_of(part.source)]
        if tasks.known(part.source) or part.source in HUB:
            theirs = load_part(part, "test", 0, share, report)
            mine = without(mine, theirs, report)
        else:
            mine, theirs = hold_out(mine, share)
        kept += mine
        held_out += theirs if len(parts) == 1 else theirs[:share]
    # files of a mix may share problems
    return without(kept, held_out, report) if len(parts) > 1 else kept, held_out


def load_held_out(c, report, whole, answered):
    """Returns the problems of --eval-data; see load_problems for whole and answered."""
    levels = parse_levels(c.levels) if takes_levels(c.eval_data) else None
    return load_problems(c.eval_data, "test", 0, levels, c.eval_problems, report, whole=whole,
                         answered=answered)


def check_curriculum(c, kinds, problems):
    """Raise ValueError, one line, where levels have no order, or not that many levels a floor."""
    import curriculum
    for task in dict.fromkeys(kinds.values()):
        levels = {str(p.get("level")) for p in problems if p["task"] == task}
        needs_order = len(levels) > 1 and c.curriculum != "uniform"
        if needs_order and not any(number_of(level) is not None for level in levels):
            raise ValueError(f"--curriculum {c.curriculum} needs levels in an order, and those of "
                             f"{task} are no numbers: {', '.join(sorted(levels)[:4])}")
        curriculum.weights(c.curriculum, 0.0, len(levels), floor=c.curriculum_floor or None)


def without(train, held_out, report):
    """Returns the training problems whose text is not held out. ValueError if none is left."""
    texts = {p["problem"] for p in held_out}
    kept = [p for p in train if p["problem"] not in texts]
    if len(kept) < len(train):
        report(f"data: left {len(train) - len(kept)} of {len(train)} training problems out: "
               "they are held out as well")
    if not kept:
        raise ValueError("every training problem is held out as well: give another --eval-data")
    return kept


def hold_out(problems, count):
    """Split the problems of a file without splits. Returns (training, held-out) problems.

    Held out are those with the smallest checksums, `count` texts and a tenth of all at most.
    Equal texts have equal checksums and fall on the same side, so a duplicate never leaks.
    Raises ValueError when one side would be empty."""
    def checksum(problem):
        return zlib.crc32(problem["problem"].encode())

    checksums = sorted({checksum(p) for p in problems})
    chosen = set(checksums[:min(count, len(checksums) // 10)])
    training = [p for p in problems if checksum(p) not in chosen]
    held_out = [p for p in problems if checksum(p) in chosen]

    if not training or not held_out:
        raise ValueError(
            f"{len(problems)} problems are too few to hold some out: give --eval-data FILE")
    return training, held_out


def stream_of(c, problems):
    """Returns the order in which a run takes its training problems.

    One source without --curriculum is shuffled; otherwise curriculum.py chooses task and level."""
    parts = parts_of(c.data)
    if len(parts) == 1 and not c.curriculum:
        return Stream(problems, c.seed)

    import curriculum
    kinds = kinds_of(problems)
    streams = {}
    for kind in kinds:
        mine = [problem for problem in problems if kind_of(problem) == kind]
        streams[kind] = Stream(mine, f"{c.seed}/{kind}")
    weights = {name_of(part.source): part.weight for part in parts}
    return curriculum.Mixed(streams, kinds, weights, c)


class Stream:
    """An endless stream of problems, in a new order every epoch.

    An epoch's order depends on the seed and the epoch's number alone. `cursor`, the number of
    problems taken so far, is therefore all that a checkpoint has to keep."""

    def __init__(self, problems, seed, cursor=0):
        self.problems = problems
        self.seed = seed
        self.cursor = cursor
        self._epoch = None      # the epoch whose order is in self._order
        self._order = None      # indices of the problems

    def next(self, count, progress=0.0):
        """Returns the next `count` problems and moves the cursor behind them."""
        picked = []
        for _ in range(count):
            epoch, position = divmod(self.cursor, len(self.problems))
            if epoch != self._epoch:
                self._order = self._shuffled(epoch)
                self._epoch = epoch
            picked.append(self.problems[self._order[position]])
            self.cursor += 1
        return picked

    def _shuffled(self, epoch):
        """Returns the indices of all problems in the order of an epoch."""
        rng = random.Random(f"order/{self.seed}/{epoch}")
        return rng.sample(range(len(self.problems)), len(self.problems))

    @functools.cached_property
    def kinds(self):
        """{kind: its task} of the problems, see kinds_of."""
        return kinds_of(self.problems)

    def feedback(self, line):
        """Take notice of a step's metrics, which this order does not depend on."""

    @property
    def state(self):
        """What a checkpoint has to keep, as JSON."""
        return {"cursor": self.cursor}

    @state.setter
    def state(self, state):
        self.cursor = state["cursor"]
