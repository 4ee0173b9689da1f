"""Accuracy of a checkpoint on problems: greedy, and with K samples each avg@k, pass@k and maj@k.

    avg@K    mean over all samples
    pass@k   1 - C(n-c, k) / C(n, k): chance that k of the n samples drawn, c of them right, hold a
             right one. Unbiased (Chen et al., 2107.03374); the plug-in 1 - (1 - c/n)^k is too low
    maj@k    chance that the most frequent answer of k samples is right (self-consistency, Wang et
             al., 2203.11171)

Each is a mean over problems, +- its standard error over problems; where problems are of several
tasks and levels, of each kind too. Answers are read strictly, as rewards are, and leniently, which
takes the last number in the text if no answer is marked. A gap between the two columns is a matter
of format. A built-in task with a checker of its own has one verdict for both.

    python evaluate.py --model runs/NAME/model --data arithmetic --samples 8 --json eval.json

--perturb asks whether puzzles were learned by heart (arXiv 2410.23123). Each problem is followed by
a held-out one that differs in a single statement and has another answer; its names and words are
drawn anew. consistency (CR there) is, of the problems solved greedily, the share whose changed ones
are solved too; LiMem = accuracy * (1 - consistency) is 0 where all of those are. With --train-seed
S the problems are the first that a run with --seed S, without --curriculum, trains on. Without
--perturb --train-seed S takes problems of that run's training split.

A problem's completions depend on --seed and its place in the file, not on what shares its batch
(up to rounding, which can decide between two nearly equal logits). So problems are split over the
ranks of torchrun, and with --json an evaluation that was stopped goes on by the same command: what
is done lies in .FILE.part-RANK beside it. --model may also be a run's adapter/ folder. Needs
rollout.py to draw and reward.py to grade. `python report.py BEFORE.json AFTER.json` sets two
results side by side, paired by problem. Left out: few-shot prompts, several seeds in one run.
"""
import functools
import itertools
import json
import math
import re
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine import machine      # before torch: it tells OpenMP's threads how to wait
import torch
from tqdm import tqdm

import data
import dist
import prompts
import reward
import tasks
from config import (DEVICES, DTYPES, TEMPLATES, Config, check_new_file, check_settings,
                    command_line, is_file, is_small, parse_levels, parse_template_kwargs, setting)
from engine.weights import read_json
from folder import Parts, absolute
from model import Transformer
from policies import is_merged
from puzzles.common import final_answer
from report import indices_by_kind, standard_error
from rollout import Sampler, draw_groups

SUBSETS = 1000      # maj@k looks at all k-subsets up to this number, else at so many random ones
WAIT = 86_400       # seconds that a rank that is done waits for the others
ENDLESS = 1000      # problems of a built-in task without --limit
HELD_OUT = Config().eval_problems       # problems that train.py holds out of a file by default
READINGS = ("strict", "lenient")       # of an answer


@dataclass
class EvalConfig:
    """The flags of the program, each with its default."""
    model: str = ""                     # checkpoint folder or hub id
    data: str = "arithmetic"            # a built-in task, gsm8k, math (MATH-500), a .jsonl,
                                        # or a mix of them: truth:2-4,gsm8k
    json: str = ""                      # receives the result; empty: only the table on stdout
    samples: int = setting(8, least=1)              # K completions a problem, and a greedy one
    temperature: float = setting(1.0, above=0, least=1e-4, most=1e4)    # of the samples;
                                                    # greedy is always there

    top_p: float = setting(1.0, above=0, most=1)    # of the samples; below 1: nucleus sampling
    top_k: int = setting(0, least=0)                # of the samples; 0: the whole vocabulary
    max_new_tokens: int = setting(256, least=1)     # a longer completion is cut and counted
    also_at: int = setting(0, least=0)              # a smaller limit: the same completions, cut
                                                    # there, are graded too; 0: none

    max_prompt_tokens: int = setting(512, least=1)  # problems with longer prompts are dropped
    limit: int = setting(0, least=0)                # only the first problems;
                                                    # 0: all (of a built-in task 1000)

    template: str = setting("auto", choices=TEMPLATES)  # of prompts, see prompts.py
    chat_template_kwargs: str = ""                  # what the chat template shall read, as JSON;
                                                    # empty: what a run's model was trained with

    levels: str = ""                                # of built-in tasks, easiest-hardest;
                                                    # empty: the usual ones

    train_seed: int = setting(-1, least=-1)         # problems of the training split of a run of
                                                    # this seed; -1: held-out ones

    perturb: bool = False                           # also changed problems (built-in tasks)
    seed: int = setting(0, least=0)                 # of the samples; the problems stay the same
    device: str = setting("", choices=DEVICES)      # cpu, cuda, npu; empty: the accelerator here
    dtype: str = setting("", choices=DTYPES)        # float32, bfloat16;
                                                    # empty: float32 on cpu and of weights with a
                                                    # LoRA change in them, else bfloat16

    rows_at_once: int = setting(1024, least=1)      # completions drawn together, at most;
                                                    # memory may allow fewer

    threads: int = setting(0, least=0)              # CPU threads; 0: measured


# ------------------------------------------------------------------------------------- metrics

def pass_at_k(n, c, k):
    """Chance that k of n samples, drawn without replacement, hold at least one of the c right ones.

    Counts must satisfy 0 <= c <= n and 1 <= k <= n. Returns 1 - C(n-c, k) / C(n, k), computed as
    the product 1 - prod_{j=n-c+1..n} (1 - k/j), which does not overflow (Chen et al., 2107.03374).
    Raises ValueError for other counts."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    if n - c < k:       # too few wrong ones to fill k places
        return 1.0
    return 1.0 - math.prod(1.0 - k / j for j in range(n - c + 1, n + 1))


def vote_labels(answers, equal=reward.equal):
    """Number the answers (n,), text or None, by equality. Returns labels (n,), -1 for None.

    An answer joins the first group whose first member it equals. reward.equal is no strict
    equivalence (12% equals both 12 and 0.12, which differ), so the order of the samples can matter
    in such cases."""
    label_of = {None: -1}
    leaders = []            # the first member of each group

    for answer in answers:
        if answer in label_of:
            continue
        matches = (i for i, leader in enumerate(leaders) if equal(answer, leader))
        label_of[answer] = next(matches, len(leaders))
        if label_of[answer] == len(leaders):
            leaders.append(answer)
    return [label_of[answer] for answer in answers]


def majority_at_k(labels, right, k):
    """Chance that the most frequent answer of k of the n samples is right; without any answer 0.

    labels (n,) are integers, equal for equal answers; -1 is no answer and casts no vote. right (n,)
    is 0 or 1, and 1 <= k <= n. Tied answers share the credit. Returns a float in [0, 1], the mean
    over all k-subsets of the samples, or over SUBSETS random ones (fixed seed) where there are
    more. Raises ValueError for other counts or lengths."""
    labels = np.asarray(labels)
    right = np.asarray(right, float)
    if labels.shape != right.shape or not 1 <= k <= len(labels):
        raise ValueError("majority_at_k needs 1 <= k <= n and equal lengths, "
                         f"not k={k}, {labels.shape}, {right.shape}")

    groups = np.unique(labels[labels >= 0])
    member = (labels[:, None] == groups).astype(np.float32)         # (n, groups)
    if not member.size:
        return 0.0

    # 0 or 1, as far as equality is an equivalence
    credit = right @ member / member.sum(0)                         # (groups,)
    votes = subsets(len(labels), k) @ member                        # (subsets, groups)
    winner = (votes == votes.max(1, keepdims=True)) & (votes > 0)   # (subsets, groups)
    winners = np.maximum(winner.sum(1), 1)                          # (subsets,)
    return float((winner @ credit / winners).mean())


@functools.lru_cache(maxsize=None)
def subsets(n, k):
    """Returns k-subsets of n samples as rows of 0/1 float32 (subsets, n).

    They are all of them, or SUBSETS random ones where there are more."""
    if math.comb(n, k) > SUBSETS:
        order = np.random.default_rng(0).random((SUBSETS, n)).argsort(1)    # a permutation a row
        return (order < k).astype(np.float32)

    members = np.array(list(itertools.combinations(range(n), k)))           # (subsets, k)
    return (members[:, :, None] == np.arange(n)).any(1).astype(np.float32)


def metrics(greedy, sampled, reading):
    """Metrics of N problems for one of READINGS, by the names of the file's docstring.

    greedy and sampled hold the grades of each problem's completions (`grade`). Returns a dict
    {name: {"mean", "se"}}, where se is None for a single problem."""
    greedy = [grades[reading] for grades in greedy]
    sampled = [grades[reading] for grades in sampled]
    n = len(sampled[0]["right"])
    counts = [sum(grades["right"]) for grades in sampled]           # right samples of each problem
    powers = [2 ** i for i in range(n.bit_length())]
    ks = sorted({n, *powers})                                       # 1, 2, 4, ... and n itself

    values = {}         # name -> one number a problem
    values["greedy"] = [sum(grades["right"]) for grades in greedy]
    values[f"avg@{n}"] = [count / n for count in counts]
    for k in ks:
        values[f"pass@{k}"] = [pass_at_k(n, count, k) for count in counts]
    for k in ks[1:]:    # maj@1 is the mean
        values[f"maj@{k}"] = [
            majority_at_k(grades["labels"], grades["right"], k) for grades in sampled]

    return {name: {"mean": sum(each) / len(each), "se": standard_error(each)}
            for name, each in values.items()}


# ------------------------------------------------------------------------------------ settings

def parse(argv=None):
    """Returns the command line as an EvalConfig. Raises ValueError, in one line, for wrong ones."""
    return check(EvalConfig(**command_line(EvalConfig, __doc__, argv)))


def check(config):
    """Returns the config if it can work, before anything is loaded, let alone generated.

    Raises ValueError, in one line, otherwise."""
    check_settings(config)
    parse_levels(config.levels)
    parse_template_kwargs(config.chat_template_kwargs)
    if not config.model:
        raise ValueError("give --model, a checkpoint folder or hub id")
    if config.also_at >= config.max_new_tokens:
        raise ValueError(f"--also-at {config.also_at}: must be below --max-new-tokens "
                         f"{config.max_new_tokens}")

    check_new_file("--json", config.json)
    return config


def start(config):
    """Load model, tokenizer and problems, and fill in the settings that were left to the machine.

    Returns the sampler, the tokenizer, the problems with prompts in the file's order, and how many
    were dropped for their length."""
    device = dist.setup(config.device, timeout=WAIT)
    config.device = str(device)
    if not config.dtype:
        exact = device.type == "cpu" or is_merged(config.model)
        config.dtype = "float32" if exact else "bfloat16"

    problems = load_problems(config)
    model, source = load_model(config.model, device, getattr(torch, config.dtype))
    prompts.follow_run(config)
    options = parse_template_kwargs(config.chat_template_kwargs)
    tokenizer = prompts.load_tokenizer(source, options)
    prompts.report_template(tokenizer, config.template, warn)
    tokenized = prompts.tokenize_prompts(
        problems, tokenizer, config.template, config.max_prompt_tokens, warn)

    config.threads = config.threads or machine.choose_threads(not is_small(source))
    torch.set_num_threads(config.threads)
    sampler = Sampler(model, prompts.stop_ids(model, tokenizer), config.rows_at_once)
    return sampler, tokenizer, tokenized, len(problems) - len(tokenized)


def load_problems(config):
    """Returns the problems that the settings ask for, each with its place among them, "index".

    A problem's seed follows from that place, also when others are dropped."""
    levels = parse_levels(config.levels)
    count = config.limit or ENDLESS
    split, seed = ("test", 0) if config.train_seed < 0 else ("train", config.train_seed)
    run = prompts.settings_of_run(config.model)
    trained_by_rl = "algo" in run       # by train.py, else by sft.py or elsewhere
    if split == "train" and trained_by_rl:
        warn_of_others(config, run)

    spare = run["eval_problems"] if trained_by_rl else HELD_OUT
    if config.perturb and split == "train":
        problems = trained_on(config, count, run)
    else:
        problems = data.load_problems(config.data, split, seed, levels, count, warn,
                                      whole=not config.limit,
                                      spare=spare if split == "train" else 0)

    trained = files_of(str(run.get("data", "")))
    for file in sorted(files_of(config.data) & trained):
        warn(f"{file} is what {config.model} was trained on, all but what that run held "
             "out: to measure it, take other problems")

    if config.perturb:
        problems = with_perturbed(problems)
    return [{**problem, "index": i} for i, problem in enumerate(problems)]


def files_of(sources):
    """Returns the files among the sources of --data, as absolute paths."""
    try:
        parts = data.parts_of(sources)
    except ValueError:          # of a run whose file is gone
        return set()
    return {Path(part.source).resolve() for part in parts if is_file(part.source)}


def warn_of_others(config, run):
    """Say where --train-seed takes other problems than the run that wrote the model did.

    run: the run's settings, in which files have absolute paths."""
    asked = {"data": absolute(config).get("data", config.data), "levels": config.levels,
             "seed": config.train_seed, "curriculum": ""}
    for name, value in asked.items():
        was = run.get(name, value)
        if was != value:
            warn(f"warning: --train-seed: {config.model} was trained with --{name} "
                 f"{was if was != '' else 'empty'}, not {value if value != '' else 'empty'}, so "
                 "these are other problems than it has seen")


def trained_on(config, count, settings):
    """Returns the problems that a run with --train-seed as its seed takes first.

    settings: of the run that wrote the model; they say how many it made and held out, else the
    defaults do."""
    sizes = {key: settings[key] for key in ("problems", "eval_problems") if "algo" in settings}
    run = Config(data=config.data, levels=config.levels, seed=config.train_seed, **sizes)
    problems, _ = data.load_split(run, warn)
    return data.stream_of(run, problems).next(min(count, len(problems)))


def with_perturbed(problems):
    """Returns each problem, and behind it one that differs in a statement; without it, neither.

    The changed one has "perturbs", the id of the other, and is a held-out puzzle. Raises
    ValueError for a problem of a file, and where no problem has such a neighbour."""
    pairs = []
    for problem in problems:
        if not tasks.known(problem["task"]):
            raise ValueError(f"--perturb: problems of {problem['task']} cannot be changed; "
                             f"choose of {', '.join(tasks.TASKS)}")
        changed = tasks.perturbed(problem)
        if changed is not None:
            pairs += [problem, {**tasks.checked(changed), "perturbs": problem["id"]}]

    if not pairs:
        raise ValueError(f"--perturb: none of these {len(problems)} problems has a held-out puzzle "
                         "as its neighbour: take more of them, or harder levels")
    warn(f"perturb: {len(pairs) // 2} of {len(problems)} problems have a held-out neighbour, "
         "the others are left out")
    return pairs


def load_model(name, device, dtype):
    """Load a checkpoint, or an adapter on the model that it names. Returns (model, what has the
    tokenizer)."""
    settings = Path(name) / "adapter_config.json"
    if not settings.exists():
        return Transformer.from_pretrained(name, device, dtype), name

    import lora
    base = read_json(settings).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{settings} does not name its base_model_name_or_path")
    try:
        model = Transformer.from_pretrained(base, device, dtype)
    except FileNotFoundError as error:
        raise ValueError(f"{settings} names {base} as its base_model_name_or_path: {error}; mend "
                         "it there") from None
    return lora.load_adapter(model, name), base


def warn(line):
    """Print a line on stderr, above the bar; stdout holds the table alone."""
    if dist.rank() == 0:
        tqdm.write(line, file=sys.stderr)


# --------------------------------------------------------------------------------- completions

class Kept:
    """The rows of problems that are done, in memory and, with --json, in a file as they come.

    A row is {"kind": "greedy" | "sampled", "index": of the problem, "lengths", "cut": of its
    completions, "grades", "also": see `grade`}. Files that other ranks left are read as well."""

    def __init__(self, config, problems):
        self.rows = {}
        self.parts = None
        if not config.json:
            return
        place = {"json", "device", "threads", "rows_at_once"}       # these change no result
        settings = {k: v for k, v in asdict(config).items() if k not in place}
        self.parts = Parts(config.json, settings, problems, "evaluation", "--json")
        self.take(self.parts.found)

    def take(self, rows):
        self.rows |= {(row["kind"], row["index"]): row for row in rows}

    def add(self, rows):
        self.take(rows)
        if self.parts:
            self.parts.add(rows)


# Completions of the first batch; later ones grow until one takes BATCH_SECONDS, which a stop can
# lose. Few batches waste less: in the tail of each few rows are left, and all weights are read for
# them.
FIRST_BATCH = 64
BATCH_SECONDS = 200.0


def complete(config, sampler, tokenizer, problems, samples, temperature, kept, bar):
    """Draw and grade `samples` completions of the problems that are not kept yet, and keep them.

    The bar shows how far it is. Returns tokens drawn, and seconds."""
    kind = "greedy" if temperature == 0 else "sampled"
    todo = [p for p in problems if (kind, p["index"]) not in kept.rows]
    bar.update(samples * (len(problems) - len(todo)))
    begin, tokens = time.perf_counter(), 0

    # the longest prompts come first, so that memory peaks soon
    todo.sort(key=lambda problem: -len(problem["prompt"]))
    most = max(1, 4 * config.rows_at_once // samples)       # they take turns in the cache
    size = max(1, min(most, FIRST_BATCH // samples))
    while todo:
        batch, todo = todo[:size], todo[size:]
        batch_begin = time.perf_counter()
        seeds = [(config.seed, problem["index"]) for problem in batch]
        rollout, groups = draw_groups(
            sampler, tokenizer, batch, samples, config.max_new_tokens, temperature, seeds,
            top_k=config.top_k, top_p=config.top_p)

        kept.add(rows_of(config, sampler, tokenizer, batch, rollout, groups, kind))
        tokens += int((rollout.lengths - rollout.prompt_lengths).sum())
        if time.perf_counter() - batch_begin < BATCH_SECONDS:
            size = min(most, 2 * size)

        done = [row for row in kept.rows.values() if row["kind"] == kind]
        right = sum(sum(row["grades"]["strict"]["right"]) for row in done)
        bar.set_postfix(accuracy=f"{right / (samples * len(done)):.3f}",
                        tok_s=f"{tokens / (time.perf_counter() - begin):.0f}", refresh=False)
        bar.update(len(rollout.lengths))
    return tokens, time.perf_counter() - begin


def rows_of(config, sampler, tokenizer, problems, rollout, groups, kind):
    """The rows of some problems, see Kept, from what was drawn for them."""
    lengths = (rollout.lengths - rollout.prompt_lengths).view(len(problems), -1).tolist()
    cut = (~rollout.finished).view(len(problems), -1).tolist()
    shorter = groups
    if config.also_at:
        ids = [completion[:config.also_at] for completion in rollout.completions()]
        texts = prompts.decode(tokenizer, ids, sampler.eos_ids.tolist())
        n = len(groups[0])
        shorter = [texts[start:start + n] for start in range(0, len(texts), n)]

    rows = []
    for i, problem in enumerate(problems):
        row = {"kind": kind, "index": problem["index"], "lengths": lengths[i], "cut": cut[i],
               "grades": grade_for(problem, groups[i])}
        if config.also_at:
            row["also"] = grade_for(problem, shorter[i])
        rows.append(row)
    return rows


RIGHT = "\nright"       # no line of an answer is this


def last_words(text):
    """What a completion says behind its last mark, in small letters, to be compared as it stands.

    None where there is no answer. For tasks with a checker of their own, whose right answers are
    one whatever their spelling: names, an order, several lines."""
    said = text.rpartition("####")[2] if "####" in text else final_answer(text)
    return " ".join(re.findall(r"\w+", said.lower())) or None


def grade_for(problem, texts):
    """`grade` of completions of a problem."""
    texts = [reward.with_thought(problem, text) for text in texts]
    return grade(texts, problem["answer"], problem.get("check"))


def grade(texts, gold, check=None):
    """Grade the completions of one problem, strictly and leniently.

    gold is the answer as text. check, a function of a completion, decides in its stead where the
    problem's task has one; then the two kinds are the same. Returns {"strict" | "lenient":
    {"right": [bool], "labels": [int]}}. For the vote equal labels are equal answers, and -1 is no
    answer."""
    if check is not None:
        right = [bool(check(text)) for text in texts]
        answers = [RIGHT if good else last_words(text) for text, good in zip(texts, right)]
        one = {"right": right, "labels": vote_labels(answers, str.__eq__)}
        return {reading: one for reading in READINGS}

    # samples repeat each other, and so do the two kinds
    equal = functools.lru_cache(maxsize=None)(reward.equal)

    grades = {}
    for reading in READINGS:
        answers = [reward.extract_answer(text, lenient=reading == "lenient") for text in texts]
        right = [answer is not None and equal(answer, gold) for answer in answers]
        grades[reading] = {"right": right, "labels": vote_labels(answers, equal)}
    return grades


def evaluate(config):
    """Run the whole evaluation, on every rank. Returns the dict that --json receives, and Kept."""
    sampler, tokenizer, problems, dropped = start(config)
    kept = Kept(config, problems)
    mine = problems[dist.rank()::dist.world()]

    total = len(mine) * (1 + config.samples)
    hidden = dist.rank() > 0
    with tqdm(total=total, unit=" completions", disable=hidden) as bar, sampler.loaded():
        bar.set_description("greedy")
        greedy_speed = complete(config, sampler, tokenizer, mine, 1, 0.0, kept, bar)
        bar.set_description(f"{config.samples} samples")
        sampled_speed = complete(config, sampler, tokenizer, mine, config.samples,
                                 config.temperature, kept, bar)

    rows = {}
    for of_rank in dist.gather_objects(kept.rows):
        rows |= of_rank
    greedy = [rows["greedy", p["index"]] for p in problems]
    sampled = [rows["sampled", p["index"]] for p in problems]
    # a changed puzzle is no problem of its own: only its neighbour is counted
    own = [i for i, problem in enumerate(problems) if "perturbs" not in problem]
    result = {"config": asdict(config), "num_problems": len(own), "num_dropped": dropped,
              "greedy": statistics(config, greedy, greedy_speed),
              "sampled": statistics(config, sampled, sampled_speed)}
    if config.perturb:
        result["memorisation"] = memorisation(problems, greedy)

    problems, greedy, sampled = ([of[i] for i in own] for of in (problems, greedy, sampled))
    for reading in READINGS:
        result[reading] = metrics(*[[row["grades"] for row in rows] for rows in (greedy, sampled)],
                                  reading)
        if config.also_at:
            result[f"{reading}_at_{config.also_at}"] = metrics(
                *[[row["also"] for row in rows] for rows in (greedy, sampled)], reading)
    result["kinds"] = by_kind(problems, greedy, sampled)

    if config.json:
        result["weights"] = kept.parts.weights
    result["problems"] = [{"id": problem["id"], "checksum": checksum_of(problem),
                           "n": config.samples, **right_of(one, many, config)}
                          for problem, one, many in zip(problems, greedy, sampled)]
    return result, kept


def checksum_of(problem):
    """What tells a problem from another with the same id, as eight hexadecimal digits."""
    return f"{zlib.crc32(json.dumps([problem['problem'], problem['answer']]).encode()):08x}"


def right_of(greedy, sampled, config):
    """Grades of one problem for --json, which report.py compares: {"greedy_correct...": bool,
    "c...": number of right samples}, with "_lenient" and "_at_N" (--also-at) behind the names."""
    limits = {"": "grades", f"_at_{config.also_at}": "also"} if config.also_at else {"": "grades"}
    found = {}
    for at, grades in limits.items():
        for reading, name in (("strict", ""), ("lenient", "_lenient")):
            found[f"greedy_correct{name}{at}"] = greedy[grades][reading]["right"][0]
            found[f"c{name}{at}"] = sum(sampled[grades][reading]["right"])
    return found


def by_kind(problems, greedy, sampled):
    """Returns {kind: its number of problems, greedy accuracy and mean of the samples}, strict.

    Kinds are tasks and levels, see data.kind_of. Empty where there is one kind only."""
    kinds = {}
    for name, chosen in indices_by_kind(problems, data.kinds_of(problems)).items():
        values = metrics([greedy[i]["grades"] for i in chosen],
                         [sampled[i]["grades"] for i in chosen], "strict")
        n = len(sampled[0]["grades"]["strict"]["right"])
        kinds[name] = {"problems": len(chosen), "greedy": values["greedy"],
                       f"avg@{n}": values[f"avg@{n}"]}
    return kinds


def memorisation(problems, greedy):
    """Returns accuracy, consistency and LiMem of greedy answers to problems and changed ones.

    problems and greedy: the rows of `with_perturbed`. A problem of which one half was dropped, its
    prompt being too long, does not count. consistency is None where nothing was solved."""
    right = {problem.get("id"): row["grades"]["strict"]["right"][0]
             for problem, row in zip(problems, greedy)}
    pairs = [(right[problem["perturbs"]], right[problem["id"]]) for problem in problems
             if "perturbs" in problem and problem["perturbs"] in right]

    solved = [changed for original, changed in pairs if original]
    count = max(len(pairs), 1)
    accuracy = len(solved) / count
    consistency = sum(solved) / len(solved) if solved else None
    return {"problems": len(pairs), "accuracy": accuracy,
            "accuracy_perturbed": sum(changed for _, changed in pairs) / count,
            "consistency": consistency,
            "LiMem": accuracy * (1 - consistency) if solved else 0.0}


def statistics(config, rows, speed):
    """Length, truncation and speed of all completions.

    speed: (tokens, seconds) of what this rank drew now, without the rows that were kept from a
    call that was stopped. tokens_per_s is that of all ranks, and None where nothing was drawn."""
    lengths = [length for row in rows for length in row["lengths"]]
    cut = [was_cut for row in rows for was_cut in row["cut"]]
    if all(cut):
        warn(f"warning: every completion was cut at --max-new-tokens {config.max_new_tokens}")
    tokens_per_s = sum(tokens / seconds for tokens, seconds in dist.gather_objects(speed))
    return {"completion_length": sum(lengths) / len(lengths),
            "truncated_frac": sum(cut) / len(cut), "tokens_per_s": tokens_per_s or None}


# -------------------------------------------------------------------------------------- output

def table(result):
    """Returns the result as plain text: the metrics with their errors, then the statistics."""
    config = result["config"]
    dropped = ""
    if result["num_dropped"]:
        dropped = f" ({result['num_dropped']} more dropped: prompt too long)"
    lines = [f"{config['model']} on {config['data']}: {result['num_problems']} problems{dropped}, "
             f"{config['samples']} samples, temperature {config['temperature']:g}, "
             f"top-p {config['top_p']:g}, top-k {config['top_k']}, seed {config['seed']}"]

    lines.append(f"{'':12}{'strict':>18}{'lenient':>20}")
    for name in result["strict"]:
        cells = []
        for reading in READINGS:
            mean = result[reading][name]["mean"]
            error = result[reading][name]["se"]
            cells.append(f"{mean:9.4f} ± {error_text(error)}")
        lines.append(f"{name:12}" + "  ".join(cells))

    if config["also_at"]:
        at = config["also_at"]
        for name, cell in result[f"strict_at_{at}"].items():
            lenient = result[f"lenient_at_{at}"][name]["mean"]
            lines.append(f"{name} at {at} tokens: {cell['mean']:.4f} strict, {lenient:.4f} lenient")

    for kind, cell in result["kinds"].items():
        average = next(name for name in cell if name.startswith("avg"))
        errors = [error_text(cell[name]["se"]) for name in ("greedy", average)]
        lines.append(f"{kind:24} {cell['problems']:5} problems   "
                     f"greedy {cell['greedy']['mean']:.4f} ± {errors[0]}   "
                     f"{average} {cell[average]['mean']:.4f} ± {errors[1]}")
    if "memorisation" in result:
        m = result["memorisation"]
        shown = "-" if m["consistency"] is None else f"{m['consistency']:.4f}"
        lines.append(f"memorisation of {m['problems']} problems: accuracy {m['accuracy']:.4f}, "
                     f"changed ones {m['accuracy_perturbed']:.4f}, consistency {shown}, "
                     f"LiMem {m['LiMem']:.4f}")

    lines.append(f"{'':12}{'greedy':>18}{'sampled':>20}")
    for name, digits in (("completion_length", 1), ("truncated_frac", 4), ("tokens_per_s", 0)):
        greedy, sampled = [
            "-" if result[kind][name] is None else f"{result[kind][name]:.{digits}f}"
            for kind in ("greedy", "sampled")]
        lines.append(f"{name:18}{greedy:>12}{sampled:>20}")
    return "\n".join(lines)


def error_text(error):
    """Returns a standard error as six characters; None, of a single problem, has no number."""
    return "     -" if error is None else f"{error:.4f}"


def show(result):
    """Print the table. One that fails is a warning if the numbers are in a file."""
    try:
        print(table(result))
    except Exception as error:
        if not result["config"]["json"]:
            raise
        warn(f"warning: the table was not printed ({dist.first_line(error)})")


def main(argv=None):
    with machine.program(lambda: "interrupted: with --json the same command goes on"):
        config = parse(argv)
        result, kept = evaluate(config)
        if dist.rank() > 0:
            return
        if config.json:
            # "x" never overwrites, also when the file appeared in the meantime
            with open(config.json, "x", encoding="utf-8") as file:
                file.write(json.dumps(result, indent=1) + "\n")
            kept.parts.remove()
        show(result)


if __name__ == "__main__":
    main()
