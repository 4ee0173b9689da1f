"""Rejection sampling: a corpus of a model's own right answers (RFT, arXiv 2308.01825).

    python rejection.py --model runs/r/model --data truth:2-5 --samples 8 --out corpus.jsonl
    python sft.py --data corpus.jsonl --hold-out 0 --model BASE --out runs/next

Completions of the *training* problems are drawn and verified. Of each problem the right ones that
differ are kept, at most --per-problem of them, and fewer of what is easy: of a problem solved with
success p, ceil(per_problem (1 - p)) and at least one. So the corpus leans to the hard problems.
With --check-steps every equation that a completion writes down must be true: a right answer by a
wrong way is thrown away.

The corpus is a jsonl file with problem, answer, solution, from (the task), level and success. Of a
file the problems that train.py holds out by default are left out. Every batch is written as it
comes, and the same command goes on after a crash. Runs under torchrun too. Needs data.py,
rollout.py, reward.py. Left out: scoring the ways by anything but their equations.
"""
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from engine import machine      # before torch: it tells OpenMP's threads how to wait
from tqdm import tqdm

import data
import dist
import evaluate
import reward
from config import (DEVICES, TEMPLATES, check_new_file, check_settings, command_line, parse_levels,
                    parse_template_kwargs, setting)
from engine.checkpoint import write_whole
from folder import Parts
from rollout import draw_groups
from verifier.expression import same_value, value


@dataclass
class RejectionConfig:
    model: str = ""                         # checkpoint that draws
    data: str = "arithmetic"                # training problems: a built-in task, gsm8k, math,
                                            # a .jsonl, or a mix

    out: str = ""                           # the corpus, a jsonl file that must not exist yet
    samples: int = setting(8, least=1)      # completions a problem
    per_problem: int = setting(4, least=1)  # right ones that are kept of a problem, at most
    check_steps: bool = False               # only those whose written equations are true
    problems: int = setting(2000, least=1)  # how many; of a file, gsm8k or math, drawn by --seed
    levels: str = ""                        # of built-in tasks, easiest-hardest; empty: usual ones
    temperature: float = setting(1.0, above=0, least=1e-4, most=1e4)
    max_new_tokens: int = setting(256, least=1)
    max_prompt_tokens: int = setting(512, least=1)
    batch: int = setting(64, least=1)       # problems drawn together
    template: str = setting("auto", choices=TEMPLATES)  # of prompts, see prompts.py
    chat_template_kwargs: str = ""          # what the chat template shall read, as JSON
    seed: int = setting(0, least=0)         # of problems and completions
    device: str = setting("", choices=DEVICES)      # cpu, cuda, npu; empty: the accelerator here
    threads: int = setting(0, least=0)              # CPU threads; 0: measured


# --------------------------------------------------------------------------------- pure functions

MOST_EQUATIONS = 200        # of a completion that are looked at: it is untrusted text
LONGEST_SIDE = 100          # characters of a side
_BEFORE = re.compile(r"[-−+*/().0-9 ×÷·⋅,$%]*$")
_BEHIND = re.compile(r"[-−+*/().0-9 ×÷·⋅,$%]*")
_SIGNS = str.maketrans("×·⋅÷−", "***/-", " ,$")
_NUMBER = re.compile(r"-?[.0-9]+%?")
_BULLET = re.compile(r" *(?:[-+*]|[0-9]+[.)]) +")       # of a list
_REMAINS = re.compile(r"^(?:[+*/)]|\.(?![0-9]))+")      # of what stands before a side; but .5
_MIXED = re.compile(r"[0-9] +[0-9]")                    # 1 1/2

# words behind which numbers are no whole side, "half of 10", and before which, "3 remainder 2"
_WORDS = frozenset("""
    of mod times plus minus by over per to root squared cdot div pm power twice double triple half
    square cube sqrt log ln sin cos tan gcd lcm abs negative choose step day week month
    year""".split())
_GOES_ON = re.compile(
    r"(?:[a-z]|r[0-9]+|rem|remainder|mod|times|plus|minus|divided|hundred|[a-z]*thousand|[mb]illion"
    r"|dozen|percent|per cent)\b", re.I)
_OPERATORS = tuple("+-*/×÷·⋅−")


def equations(text):
    """Returns the equations between numbers that a text writes down, as pairs of sides.

    "48/2=24 and 24 + 48 = 72" has two; "x = 5", "x + 3 = 7" and "Day 2 = 14" have none. Of a chain
    a = b = c both are given."""
    found = []
    pieces = text.split("=")[:MOST_EQUATIONS + 1]
    for number, (before, behind) in enumerate(zip(pieces, pieces[1:])):
        left, right = left_side(before, number > 0), right_side(behind)
        if right and (left[-1:].isdigit() or left[-1:] in (")", "%")):
            found.append((left, right))
    return found


def left_side(before, in_chain):
    """Returns the numbers and operators at the end of a text, or "" if they go on before that."""
    raw = _BEFORE.search(before[-LONGEST_SIDE:])[0]
    rest = before[:len(before) - len(raw)]
    if len(raw) == LONGEST_SIDE:
        return ""

    # a full stop or a comma before a blank ends a sentence
    *sentences, left = re.split("[.,] ", raw)
    if rest[-1:] == "\n" or not rest and not in_chain:
        left = _BULLET.sub("", left, count=1) if _BULLET.match(left) else left
    elif rest and not sentences and not begins(left, rest):
        return ""
    if _MIXED.search(left):
        return ""

    left = _REMAINS.sub("", left.translate(_SIGNS))
    while left.startswith("(") and left.count("(") > left.count(")"):       # "(3 + 4 = 7)"
        left = left[1:]
    middle = in_chain and not rest      # between two "=" a number is a side: 2*3 = 6 = 12/2
    return "" if _NUMBER.fullmatch(left) and not middle else left


def begins(left, rest):
    """Tell whether numbers and operators begin a side behind the text `rest`.

    They do behind an opening sign, and behind a word, "so 3 + 4": not "x + 3", "x1", "2^3", "9:30".
    """
    if rest[-1] == ":" and rest[-2:-1].isdigit() and left[:1].isdigit():
        return False
    if rest[-1] in "\n,;:([{<>=\"'`“‘*" or rest[-1] == "\\" and left[:1] == "(":
        return True
    word = re.split(r"[^A-Za-z]", rest[-20:])[-1].lower()
    return len(word) > 1 and word not in _WORDS and bool(re.match(r" +[-−]?[.(]*[0-9]", left))


def right_side(behind):
    """Returns the numbers and operators at the beginning of a text, or "" if they go on."""
    raw = _BEHIND.match(behind[:LONGEST_SIDE])[0]
    after = behind[len(raw):len(raw) + 20]
    right, *sentences = re.split("[.,] ", raw)
    if not sentences and not ends(raw, after) or _MIXED.search(right):
        return ""

    right = right.translate(_SIGNS).rstrip("+-*/.(")
    while right.endswith(")") and right.count(")") > right.count("("):
        right = right[:-1]
    return right


def ends(raw, after):
    """Tell whether numbers and operators end a side before the text `after`: not "2 + y", "3²"."""
    if after[:1] == ":" and after[1:2].isdigit():       # 11:30
        return False
    if not after or after[0] in "\n;:?)]}<>=\"'`”’*" or after[:2] in ("\\)", "\\]", "\\\\"):
        return True
    goes_on = raw.rstrip().endswith(_OPERATORS) or _GOES_ON.match(after)
    return raw[-1:] == " " and after[0].isalpha() and not goes_on


def steps_hold(text):
    """Tell whether every equation of a text is true: exactly, or rounded to the decimals that its
    right side shows, if any. What is no number on a side is not judged."""
    return all(equation_holds(left, right) for left, right in equations(text))


def equation_holds(left, right):
    """Tell whether two sides are equal, or cannot be compared. A share may be said in percent."""
    if "%" in left or "%" in right[:-1]:
        return True
    in_percent = right.endswith("%")
    a, b = value(left), value(right.rstrip("%"))
    if a is None or b is None or same_value(a, b):
        return True
    digits = max(map(len, re.findall(r"\.([0-9]+)", right)), default=0)
    allowed = 0.5 * 10 ** -digits * (digits > 0)
    x, y = a.floats[0], b.floats[0]
    return abs(x - y) <= allowed or in_percent and abs(100 * x - y) <= max(allowed, 1e-9)


def kept(texts, right, per_problem, success=None):
    """Choose among the completions of a problem: those that are right and differ, the first first.

    texts: G completions; right: G verdicts; success: p, the share of right answers (None: that of
    right). Returns at most ceil(per_problem (1 - p)) of them and at least one; none where none is
    right."""
    different = {}
    for text, good in zip(texts, right):
        if good:
            different.setdefault(" ".join(text.split()), text)
    if success is None:
        success = sum(map(bool, right)) / max(len(texts), 1)
    count = max(1, math.ceil(per_problem * (1 - success) - 1e-9))
    return list(different.values())[:count]


# ------------------------------------------------------------------------------------ the program

def parse(argv=None):
    """Returns the checked command line. Raises ValueError, in one line, for wrong settings."""
    config = RejectionConfig(**command_line(RejectionConfig, __doc__, argv))
    check_settings(config)
    parse_levels(config.levels)
    parse_template_kwargs(config.chat_template_kwargs)
    if not config.model or not config.out:
        raise ValueError("give --model, a checkpoint folder, and --out, a file for the corpus")
    check_new_file("--out", config.out)
    return config


def rows_of(config, problem, texts):
    """The rows of a problem in the corpus, without those whose steps are wrong."""
    right = [reward.right(problem, text) for text in texts]
    success = sum(right) / len(texts)
    if config.check_steps:
        right = [good and steps_hold(text) for text, good in zip(texts, right)]

    rows = []
    for text in kept(texts, right, config.per_problem, success):
        rows.append({
            "problem": problem["problem"], "answer": problem["answer"], "solution": text,
            "from": problem["task"], "level": problem.get("level"), "success": success,
            **data.system_of(problem),
        })
    return rows


def sample(config):
    """Draw, verify and keep. Every rank enters.

    Returns all rows, the number of problems, and the Parts to remove when they are written."""
    sampler, tokenizer, problems, _ = evaluate.start(evaluate.EvalConfig(
        model=config.model, data=config.data, levels=config.levels, limit=config.problems,
        train_seed=config.seed, max_prompt_tokens=config.max_prompt_tokens,
        template=config.template, chat_template_kwargs=config.chat_template_kwargs,
        device=config.device, threads=config.threads))
    place = {"device", "threads", "batch"}              # these change no result
    settings = {name: of for name, of in asdict(config).items() if name not in place}
    parts = Parts(config.out, settings, problems, "corpus", "--out")
    done = dict(parts.found)            # {index of a problem: its rows}
    mine = problems[dist.rank()::dist.world()]
    todo = [problem for problem in mine if problem["index"] not in done]

    bar = tqdm(total=len(mine), initial=len(mine) - len(todo), unit=" problems",
               disable=dist.rank() > 0)
    with bar, sampler.loaded():
        while todo:
            batch, todo = todo[:config.batch], todo[config.batch:]
            seeds = [(config.seed, problem["index"]) for problem in batch]
            _, groups = draw_groups(sampler, tokenizer, batch, config.samples,
                                    config.max_new_tokens, config.temperature, seeds)
            rows = [[problem["index"], rows_of(config, problem, texts)]
                    for problem, texts in zip(batch, groups)]
            parts.add(rows)
            done |= dict(rows)
            bar.update(len(batch))

    everything = {}
    for of_rank in dist.gather_objects({p["index"]: done[p["index"]] for p in mine}):
        everything |= of_rank
    rows = [row for index in sorted(everything) for row in everything[index]]
    return rows, len(problems), parts


def main(argv=None):
    with machine.program(lambda: "interrupted: the same command goes on"):
        config = parse(argv)
        rows, count, parts = sample(config)
        if dist.rank() == 0:
            if rows:
                write_whole(Path(config.out), "".join(json.dumps(row) + "\n" for row in rows))
                solved = len({row["problem"] for row in rows})
                print(f"{len(rows)} solutions of {solved} problems, out of {count}, "
                      f"in {config.out}")
            parts.remove()
        if not rows:
            raise ValueError(f"no completion of {count} problems was right: nothing to keep")
        dist.barrier()


if __name__ == "__main__":
    main()
