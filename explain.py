"""A page that shows one training step from inside: every token, and what each objective does to it.

    python explain.py runs/NAME --html step.html
    python explain.py runs/NAME --step 40 --steps 0,40,50 --html step.html

The page is one file. It needs no server and no network, and holds no script from elsewhere. It
shows some groups of completions, right and wrong. Each token has the colour of what the reader
picks: advantage, weight in the gradient, log-prob, entropy, ratio, clip, KL to the reference,
importance weight, conflict tokens, gate. GRPO, GTPO and off-policy stand side by side on the same
rollout. The page explains itself to who has never seen these methods.

The numbers are the trainer's own, because the trainer computes them:

    rollout     train.draw with the weights of --step K: what step K + 1 of the run drew, if fresh
                weights draw (--sync-every 1); its first --groups groups whose rewards differ
    mu          the weights of step K, which drew
    prox        mu after half of the --updates, made by learner.Learner on these groups
    pi          mu after all of them: without updates every ratio would be 1, and nothing clipped
    weight      d J / d log pi of a token, where J = -loss: autograd of the objective's own `loss`

So the sum of weight x gradient of log pi, over all tokens, is the gradient that the learner uses.
The test of that reads the weights from the page. A small run has few tokens; a large one is cut to
TOKENS of them, and says so where it is cut.

Everything that a model wrote is untrusted. It stands in the page as JSON in which no tag can end,
is set as text and never as HTML, and signs that could reorder a line have a visible name. The
page's Content-Security-Policy allows the page's own script and no connection.

Left out: dpo and distill, whose runs are shown as if GRPO had trained them; several processes. It
computes in float32. Needs train.py and pages/explain.html, the page without its numbers.
"""
import argparse
import base64
import hashlib
import json
import math
import unicodedata
from dataclasses import dataclass, fields, replace
from pathlib import Path

from engine import machine      # before torch: it tells OpenMP's threads how to wait
import torch
from tqdm import tqdm

import data
import dist
import grpo
import gtpo
import offpolicy
import prompts
import refill
import report
import reward
from config import Common, Config, Parser, parse_template_kwargs, stored_config
from engine.checkpoint import Progress, checkpoints, load_checkpoint, tensors_of
from engine.logps import chunked_logps
from engine.weights import read_json, read_weights
from learner import Learner, adamw, micro_batches_of
from policies import load_policies
from rollout import Sampler, draw_groups
from train import Run, draw

PAGE = Path(__file__).resolve().parent / "pages" / "explain.html"
OBJECTIVES = {"grpo": grpo, "gtpo": gtpo, "offpolicy": offpolicy}

# bounds of a page, which is to stay small whatever a model writes
LARGEST = 3_000_000     # bytes
TOKENS = 8_000          # of all completions together that are shown
LETTERS = 60            # of a token
LONGEST = 3_000         # letters of a problem, or of an answer over training
CANDIDATES = 5          # for the next token
POINTS = 400            # of a curve


# -------------------------------------------------------------------------- the run and its weights

@dataclass
class Source:
    """A run folder, or a model folder that no run surrounds."""
    folder: Path
    config: object          # settings of the run, with float32 and one update a pass
    start: str              # the starting model
    is_run: bool


def find_source(args):
    """Look at the folder that was given. Raises ValueError where it holds neither run nor model."""
    folder = Path(args.run)
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is neither a run of train.py nor a model: "
                         "it has no config.json")
    is_run = "algo" in read_json(file)

    if not is_run:
        c = Config("grpo", model=str(folder), data=args.data or "arithmetic", seed=args.seed or 0)
        prompts.follow_run(c)
        return Source(folder, one_update(c), str(folder), False)
    if args.data or args.seed is not None:
        raise ValueError("--data and --seed are for a model folder: a run has its own")
    c = stored_config(folder)
    start = c.model or str(folder / "warm_start")
    return Source(folder, one_update(c), start, True)


def one_update(c, **changes):
    """The settings, such that a pass makes one update and everything is float32."""
    return replace(c, epochs=1, minibatches=1, variance_every=0, refill=0, dtype="float32",
                   **changes)


def steps_of(source):
    """The steps whose weights are at hand, {step: checkpoint folder}. Step 0 is the start."""
    found = {0: None}
    if source.is_run:
        last = source.folder / "model"
        if (last / "config.json").is_file():
            found[source.config.steps] = last
        found |= {int(path.name[5:]): path for path in checkpoints(source.folder / "checkpoints")}
    return found


def check_step(source, step, name):
    """Raise ValueError when the weights of a step are not at hand."""
    known = steps_of(source)
    if step not in known:
        raise ValueError(f"{name} {step}: {source.folder} has the weights of steps "
                         f"{', '.join(map(str, sorted(known)))}; train with --save-every and "
                         "--keep-checkpoints for more")
    if step == 0 and not Path(source.start).is_dir() and source.config.model == "":
        raise ValueError(f"{name} 0: the starting model {source.start} is gone")


def put_weights(source, step, model, optimizer):
    """Bring model and optimizer to the end of a step. Returns the run's Progress and extra state.

    Without a run, and at step 0, the model must be fresh from its files."""
    path = steps_of(source)[step]
    if path is None:
        return Progress(), {}
    if path.name != "model":
        return load_checkpoint(path, tensors_of(model, optimizer))

    # without checkpoints the run's model is left: Adam and the order of the problems begin anew
    if source.config.lora_rank:
        raise ValueError(f"{path}: of a LoRA run a checkpoint is needed; there is none")
    read_weights(path, dict(model.named_parameters()))
    return Progress(step=step), {}


# ------------------------------------------------------------------------------- what is looked at

@dataclass
class Column:
    """One objective at pi, on the rollout that all of them share."""
    learner: Learner
    batch: object               # of the objective's own Batch
    weights: torch.Tensor       # (B, T) d J / d log pi of each token, 0 where nothing is trained


@dataclass
class Seen:
    """A rollout, the policies that it met, and the objectives on it."""
    source: Source
    step: int
    updates: int
    run: Run
    problems: list
    rollout: object
    rewards: torch.Tensor       # (N, G)
    right: torch.Tensor         # (N, G) bool
    columns: dict               # {objective: Column}
    logps: dict                 # {"mu", "prox", "pi", "reference": (B, T)}
    entropy: torch.Tensor       # (B, T) of pi
    candidates: tuple           # ids and probabilities under pi, both (B, T, CANDIDATES)


def look(args):
    """Draw the rollout, move pi away from mu, and ask every objective. Returns Seen."""
    source = find_source(args)
    c = source.config
    step = newest(source) if args.step is None else args.step
    check_step(source, step, "--step")
    run, reference = make_run(source, step, args.device)
    learner = run.learner

    # the groups of the next step, as train_step draws them
    learner.progress.step += 1
    drawn = draw(run)
    rollout, rewards, places = choose(drawn, args.groups)
    right = drawn.parts["correct"][places] > 0
    N = len(places)

    # the three objectives meet the rollout at mu
    config = replace(c, prompts_per_step=N, lr=args.lr or c.lr)
    if hasattr(config, "prox"):
        config = replace(config, prox="forward")        # prox is measured here
    learners = {name: learner_of(name, config, learner, reference) for name in OBJECTIVES}
    restore_gtpo(learners["gtpo"], run)
    batches = {name: learners[name].batch(rollout, rewards) for name in ("grpo", "gtpo")}
    everything = replace(batches["grpo"], mask=rollout.completion_mask())
    logps = {"mu": rollout.logps}

    # half of the updates lead to prox, at which a pass of off-policy begins; the rest to pi
    mover = "gtpo" if c.algo == "gtpo" else "grpo"
    first = args.updates // 2
    move(learners[mover], batches[mover], first)
    logps["prox"], _ = score(learner, everything)
    versions = torch.full_like(rollout.lengths, learner.progress.step)
    batches["offpolicy"] = offpolicy.pass_batch(
        learners["offpolicy"], rollout, rewards, versions, fresh=True, on_policy=first == 0)
    move(learners[mover], batches[mover], args.updates - first)

    logps["pi"], entropy = score(learner, everything)
    if reference is not None:
        logps["reference"], _ = score(learner, everything, reference)
    columns = {}
    for name in OBJECTIVES:
        weights = gradient_weights(learners[name], batches[name], logps["pi"], entropy)
        columns[name] = Column(learners[name], batches[name], weights)

    return Seen(source=source, step=step, updates=args.updates, run=run,
                problems=[drawn.problems[i] for i in places], rollout=rollout, rewards=rewards,
                right=right, columns=columns, logps=logps, entropy=entropy,
                candidates=next_tokens(learner, everything))


def newest(source):
    return max(steps_of(source))


def make_run(source, step, device_name=""):
    """Returns a train.Run with the weights of a step, and the reference model or None."""
    c, say = source.config, tqdm.write
    device = dist.setup(device_name or "cpu")
    begins_at = source.start
    if not Path(begins_at).is_dir() and not c.model:    # its weights are gone: no KL to it
        begins_at = source.folder / "start"

    wanted = c
    if hasattr(c, "beta") and begins_at == source.start:
        wanted = replace(c, beta=c.beta or 1.0)         # load the reference also without --beta
    elif begins_at == source.start:
        wanted = grpo_like(c)
    policies = load_policies(wanted, device, source.start, begins_at)
    model = policies.pi
    learner = Learner(config=c, objective=grpo, model=model, progress=Progress(), say=say,
                      optimizer=adamw(model, c.lr, c.weight_decay))
    progress, extra = put_weights(source, step, model, learner.optimizer)
    learner.progress, learner.state = progress, extra

    tokenizer = prompts.load_tokenizer(begins_at, parse_template_kwargs(c.chat_template_kwargs))
    train, _ = data.load_split(c, say)
    train = prompts.tokenize_prompts(train, tokenizer, c.template, c.max_prompt_tokens, say)
    stream = data.stream_of(c, train)
    if progress.stream:
        stream.state = progress.stream

    functions = reward.weighted(c.reward, format=c.format_reward, consistency=c.consistency_reward)
    sampler = Sampler(model, prompts.stop_ids(model, tokenizer), c.rows_at_once)
    sampler.version = progress.updates
    run = Run(learner=learner, sampler_of_pi=sampler, sampler_of_mu=sampler, stream=stream,
              held_out=[], reward_functions=functions, tokenizer=tokenizer, folder=source.folder)
    return run, policies.reference


def grpo_like(c):
    """GRPO's settings with a reference, and all else as in the run."""
    common = {f.name: getattr(c, f.name) for f in fields(Common)}
    return Config(**{**common, "algo": "grpo"}, beta=1.0)


def choose(drawn, count):
    """Choose groups of a step, first those whose rewards differ.

    Returns (Rollout, rewards (n, G)), and the numbers of the groups."""
    differs = grpo.informative(drawn.rewards).tolist()
    places = sorted(range(len(differs)), key=lambda i: not differs[i])[:count]
    rollout, rewards = refill.joined([refill.group_of(drawn, i) for i in places], drawn)
    return rollout, rewards, places


def learner_of(name, c, like, reference):
    """A Learner of an objective, with the model and optimizer of another.

    The run's own objective has the run's settings. Another has its defaults, but the settings that
    GRPO and off-policy share are the run's."""
    module = OBJECTIVES[name]
    common = {f.name: getattr(c, f.name) for f in fields(Common)}
    if name == c.algo:
        shared = fields(module.Settings)
    elif isinstance(c, grpo.Settings) and issubclass(module.Settings, grpo.Settings):
        shared = fields(grpo.Settings)
    else:
        shared = ()
    common |= {f.name: getattr(c, f.name) for f in shared}
    config = Config(**{**common, "algo": name})

    state = gtpo.State(config) if name == "gtpo" else None
    for group in like.optimizer.param_groups:
        group["lr"] = config.lr
    return Learner(config=config, objective=module, model=like.model, optimizer=like.optimizer,
                   progress=like.progress, say=like.say, state=state,
                   reference=None if name == "gtpo" else reference)


def restore_gtpo(learner, run):
    """Give GTPO the initial entropy that its run began with, if the run was GTPO's."""
    if run.learner.config.algo == "gtpo" and run.learner.state:
        learner.state.load_state_dict(run.learner.state)


def move(learner, batch, updates):
    """Make some updates on the rollout, as the run would."""
    groups = learner.config.prompts_per_step
    for _ in range(updates):
        learner.make_pass(batch, groups)


def score(learner, batch, model=None):
    """Log-probs and entropies of all completion tokens: two (B, T)."""
    return learner.score(batch, rows=range(len(batch.tokens)), model=model)


def gradient_weights(learner, batch, logp, entropy):
    """d J / d log pi of every token, where J = -loss of the whole update: (B, T).

    The loss is the objective's own, on the rows that an update would take."""
    weights = torch.zeros_like(logp)
    rows = batch.active.nonzero()[:, 0].tolist()
    if not rows:
        return weights

    normalizer = learner.normalizer(batch, rows, learner.config)
    part = batch.rows(rows)
    T = part.tokens.shape[1]
    leaf = logp[rows][:, :T].clone().requires_grad_()
    loss, _ = learner.objective.loss(leaf, entropy[rows][:, :T], part, learner.config, normalizer)
    weights[rows, :T] = -torch.autograd.grad(loss, leaf)[0]
    return weights


@torch.no_grad()
def next_tokens(learner, batch):
    """The likeliest next tokens under pi where each token was drawn.

    Returns ids and probabilities, both (B, T, CANDIDATES)."""
    c, model = learner.config, learner.model
    count = min(CANDIDATES, model.config.vocab_size)
    shape = (*batch.mask.shape, count)
    ids = torch.zeros(shape, dtype=torch.int64, device=batch.mask.device)
    chances = torch.zeros(shape, device=batch.mask.device)

    for part, micro in micro_batches_of(batch, range(len(batch.tokens)), c):
        found = []

        def watch(hidden, weight, targets, temperature):
            for chunk in hidden.split(256):         # a (256, V) tensor at a time
                logits = (chunk @ weight.T).float() / temperature
                found.append(logits.softmax(-1).topk(count))
            return chunked_logps(hidden, weight, targets, temperature)

        groups = [row // c.group_size for row in part]
        model.token_logps(micro.tokens, micro.mask, c.temperature, groups, watch)
        rows, columns = micro.mask.nonzero(as_tuple=True)
        rows = torch.tensor(part, device=rows.device)[rows]
        chances[rows, columns] = torch.cat([top.values for top in found])
        ids[rows, columns] = torch.cat([top.indices for top in found])
    return ids, chances


# --------------------------------------------------------------------------------- text, untrusted

def visible(text, most=LETTERS):
    """A text in which every sign can be seen: controls and marks of direction by their names.

    Line breaks, tabs and the joiner of emoji stay. A longer text is cut, and says how much."""
    cut = len(text) - most
    shown = []
    for sign in text[:most]:
        hidden = unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        if hidden and sign not in "\n\t\u200d":
            sign = f"⟨U+{ord(sign):04X}⟩"
        shown.append(sign)
    return "".join(shown) + (f"… {cut} more" if cut > 0 else "")


def token_texts(tokenizer, ids):
    """The text of each token (visible, see there).

    A letter may be several tokens. It then stands at the last of them, and "·" at the others."""
    texts, pending = [], []
    for i in ids:
        pending.append(i)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        broken = text.endswith("\ufffd") and len(pending) < 4       # of UTF-8's four bytes
        texts.append("·" if broken else visible(text))
        if not broken:
            pending = []
    return texts


class Words:
    """Texts of tokens, each written once: `number` gives a text its place in `texts`."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.texts = []
        self.places = {}
        self.of_id = {}

    def number(self, text):
        if text not in self.places:
            self.places[text] = len(self.texts)
            self.texts.append(text)
        return self.places[text]

    def of_token(self, i):
        if i not in self.of_id:
            self.of_id[i] = self.number(token_texts(self.tokenizer, [i])[0])
        return self.of_id[i]


# ------------------------------------------------------------------------------- the page's numbers

def describe(seen):
    """Everything that the page shows, as one JSON object."""
    words = Words(seen.run.tokenizer)
    G = seen.rewards.shape[1]
    details = {name: details_of(name, column, seen) for name, column in seen.columns.items()}
    completions = seen.rollout.completions()
    shared = shared_numbers(seen)

    groups = []
    for i, problem in enumerate(seen.problems):
        rows = []
        for row in range(i * G, (i + 1) * G):
            mine = row_of(seen, row, completions[row], shared, details, words)
            rows.append({"right": bool(seen.right.flatten()[row]), **mine})
        groups.append({"problem": visible(problem["problem"], LONGEST), "rows": rows,
                       "answer": visible(str(problem["answer"]), LONGEST)})

    return {"about": about(seen), "groups": groups, "words": words.texts,
            "curves": curves_of(seen.source), "training": []}


def about(seen):
    """The settings of the step and of each objective."""
    c = seen.columns["grpo"].learner.config
    own = {name: vars(column.learner.config) for name, column in seen.columns.items()}
    wanted = {"grpo": ("clip_low", "clip_high", "beta", "aggregation", "advantage_scale",
                       "ratio_level"),
              "gtpo": ("gtpo_gamma", "gtpo_amplify", "aggregation", "advantage_scale"),
              "offpolicy": ("clip_low", "clip_high", "beta", "aggregation", "advantage_scale",
                            "ratio_level", "correction", "importance", "importance_level",
                            "importance_cap")}
    settings = {name: {key: own[name][key] for key in keys} for name, keys in wanted.items()}

    gate = seen.columns["gtpo"].batch.initial_entropy
    settings["gtpo"]["initial_entropy"] = rounded(float(gate[0])) if len(gate) else 0
    fresh = getattr(seen.source.config, "sync_every", 1) == 1
    return {"run": visible(seen.source.folder.resolve().name), "is_run": seen.source.is_run,
            "algo": seen.source.config.algo, "step": seen.step, "updates": seen.updates,
            "first_updates": seen.updates // 2, "lr": c.lr, "group_size": c.group_size,
            "temperature": c.temperature, "data": visible(c.data), "settings": settings,
            "of_run": seen.source.is_run and fresh,
            "drawn_groups": seen.source.config.prompts_per_step,
            "has_reference": "reference" in seen.logps}


def shared_numbers(seen):
    """What does not depend on the objective: {name: (B, T)}."""
    logps, mask = seen.logps, seen.rollout.completion_mask()
    found = {"logp": logps["pi"], "mu": logps["mu"], "prox": logps["prox"], "entropy": seen.entropy}
    if "reference" in logps:
        found["reference"] = logps["reference"]
        found["kl"] = grpo.kl_penalty(logps["pi"], logps["reference"], "k3", mask=mask)
    return found


def details_of(name, column, seen):
    """An objective's numbers: {name: (B, T)} of tokens, {name: (B,)} of whole completions."""
    c, batch, pi = column.learner.config, column.batch, seen.logps["pi"]
    mask = batch.mask * batch.active[:, None]
    anchor = seen.logps["mu"]
    if name == "offpolicy" and c.correction == "decoupled" and batch.prox_logp is not None:
        anchor = batch.prox_logp

    level = getattr(c, "ratio_level", "token")
    found = {"advantage": batch.advantages, "weight": column.weights,
             "trained": batch.active.float()}
    found["ratio"] = grpo.policy_ratio(pi, anchor, seen.rollout.completion_mask(), level)
    if name == "gtpo":
        if c.gtpo_official or not c.gtpo_ratio:
            found["ratio"] = torch.ones_like(pi)
        H = gtpo.mean_entropy(seen.entropy, batch.mask)
        found |= {"conflict": batch.conflict, "mean_entropy": H,
                  "gate": gtpo.entropy_gate(H, float(batch.initial_entropy[0]))}
        return found

    clipped = grpo.clipped_tokens(pi, anchor, batch.advantages, mask, c.clip_low, c.clip_high,
                                  level)
    found["clip"] = torch.where(batch.advantages[:, None] > 0, clipped, -clipped)
    if name == "offpolicy":
        found["importance"] = batch.weight
    return found


def row_of(seen, row, ids, shared, details, words):
    """One completion: its tokens and their numbers, cut in the middle where it is long."""
    rollout, B = seen.rollout, len(seen.rollout.tokens)
    start = int(rollout.prompt_lengths[row])
    shown, omitted = kept_places(len(ids), max(8, TOKENS // B))
    columns = [start + t for t in shown]
    texts = token_texts(words.tokenizer, ids)

    def numbers(tensor):
        return [rounded(x) for x in tensor[row, columns].tolist()]

    objectives = {}
    for name, found in details.items():
        objectives[name] = {key: numbers(x) if x.ndim == 2 else rounded(x[row].item())
                            for key, x in found.items()}

    top_ids, chances = seen.candidates
    ids_here = top_ids[row, columns].tolist()
    return {"reward": rounded(seen.rewards.flatten()[row].item()),
            "finished": bool(rollout.finished[row]), "length": len(ids),
            "omitted": omitted, "places": columns_of(shown),
            "tokens": [words.number(texts[t]) for t in shown],
            "stop": bool(rollout.finished[row]),
            "candidates": [[words.of_token(i) for i in five] for five in ids_here],
            "chances": [[rounded(p, 4) for p in five] for five in chances[row, columns].tolist()],
            "shared": {key: numbers(x) for key, x in shared.items()}, **objectives}


def kept_places(length, most):
    """Which tokens of a completion are shown: all, or the first three quarters and the last.

    Returns their places, and [tokens before the gap, tokens left out] or None."""
    if length <= most:
        return list(range(length)), None
    head = most * 3 // 4
    tail = most - head
    places = [*range(head), *range(length - tail, length)]
    return places, [head, length - most]


def columns_of(shown):
    """The place of each shown token, or None where that is its index."""
    return None if shown == list(range(len(shown))) else shown


def rounded(x, digits=7):
    """A number with so many digits, as float32 has. JSON knows no infinity: that is None."""
    if not math.isfinite(x):
        return None
    short = float(f"{x:.{digits}g}")
    return int(short) if short == int(short) else short


# ----------------------------------------------------------------------- the run around the step

CURVES = (      # (title, [(key of the log, what it is called)])
    ("held-out accuracy", (("eval_pass@1", "drawn answers"),
                           ("eval_greedy", "most likely answers"))),
    ("training reward", (("reward", "mean of a step"),)),
    ("length of an answer, tokens", (("completion_length", "in training"),
                                     ("eval_length", "held-out"))))


def curves_of(source):
    """The run's curves, [{title, series: [{name, points}]}]; none without a log."""
    file = source.folder / "log.jsonl"
    if not source.is_run or not file.exists():
        return []
    _, lines = report.read_log(source.folder)

    panels = []
    for title, named in CURVES:
        series = []
        for key, name in named:
            points = report.curve(lines, "step", key)
            every = -(-len(points) // POINTS) or 1
            thin = [[x, rounded(y, 4)] for x, y in points[::every]]
            if points:
                series.append({"name": name, "points": thin})
        panels.append({"title": title, "series": series})
    return panels


def over_training(args, seen, samples=3):
    """The first problem of the page, answered by the weights of each of --steps.

    Returns [{step, right, length, answers}]. The first answer is greedy, the others are drawn, by
    the same random numbers at every step."""
    source, problem = seen.source, seen.problems[0]
    c = source.config
    found = []
    for step in args.steps:
        run, _ = make_run(source, step, args.device)
        with run.sampler_of_pi.loaded():
            greedy, _, _ = answers_of(run, problem, c, 1, 0.0)
            drawn, right, length = answers_of(run, problem, c, c.group_size, c.temperature)
        found.append({"step": step, "right": right, "length": length,
                      "answers": [*greedy, *drawn[:samples]]})
    return found


def answers_of(run, problem, c, count, temperature):
    """Draw completions of a problem. Returns them, the share of right ones, and the mean length."""
    rollout, groups = draw_groups(run.sampler_of_pi, run.tokenizer, [problem], count,
                                  c.max_new_tokens, temperature, [(c.seed, 0)])
    lengths = (rollout.lengths - rollout.prompt_lengths).tolist()
    verdicts = reward.correct([problem], groups)[0]

    answers = []
    for text, length, verdict in zip(groups[0], lengths, verdicts):
        answers.append({"text": visible(text, LONGEST), "length": length, "right": verdict > 0,
                        "greedy": temperature == 0})
    return answers, rounded(sum(verdicts) / count, 4), rounded(sum(lengths) / count, 4)


# ----------------------------------------------------------------------------------------- the page

def page(content):
    """The page's HTML with its numbers in it. Raises ValueError when it is too large.

    In the JSON there is no "<" and nothing beyond ASCII, so no tag can begin or end in it."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")

    template = PAGE.read_text(encoding="utf-8")
    script = between(template, "<script>", "</script>")
    style = between(template, "<style>", "</style>")
    policy = (f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
              f"script-src {fingerprint(script)}; style-src {fingerprint(style)}")

    head, rest = template.split("@POLICY@")
    middle, tail = rest.split("@DATA@")
    whole = head + policy + middle + text + tail
    if len(whole.encode()) > LARGEST:
        raise ValueError(f"the page would have {len(whole) / 1e6:.1f} MB: "
                         "show fewer --groups, or fewer --steps")
    return whole


def between(text, before, behind):
    return text.partition(before)[2].partition(behind)[0]


def fingerprint(text):
    """What a Content-Security-Policy allows a script or style by."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


# -------------------------------------------------------------------------------------- the program

def parse(argv=None):
    """Returns the command line's arguments. Raises ValueError, in one line, for wrong ones."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("run", help="run folder of train.py, or a model folder")
    parser.add_argument("--html", required=True, help="the page to write")
    parser.add_argument("--step", type=int, help="weights of this step [the newest checkpoint]")
    parser.add_argument("--steps", default="",
                        help="a,b,c: the same prompt by the weights of these steps")
    parser.add_argument("--groups", type=int, default=3, help="problems on the page [3]")
    parser.add_argument("--updates", type=int, default=4,
                        help="optimizer steps on the rollout that lead from mu to pi [4]")
    parser.add_argument("--lr", type=float, default=0.0, help="of these updates [the run's]")

    parser.add_argument("--data", default="", help="problems, with a model folder [arithmetic]")
    parser.add_argument("--seed", type=int, help="of a model folder's rollout [0]")
    parser.add_argument("--device", default="", help="cpu, cuda, npu [cpu]")
    args = parser.parse_args(argv)

    words = [word.strip() for word in args.steps.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--steps {args.steps}: give steps of the run, such as 0,20,40")
    args.steps = sorted({int(word) for word in words})
    for name, least, most in (("groups", 1, 16), ("updates", 0, 64), ("lr", 0, 1)):
        if not least <= getattr(args, name) <= most:
            raise ValueError(f"--{name} {getattr(args, name)}: must be from {least} to {most}")
    if not Path(args.html).resolve().parent.is_dir():
        raise ValueError(f"--html {args.html}: its folder does not exist")
    if Path(args.html).is_dir():
        raise ValueError(f"--html {args.html} is a folder: give a file")
    return args


def main(argv=None):
    with machine.program():
        args = parse(argv)
        source = find_source(args)
        for step in args.steps:
            check_step(source, step, "--steps")

        seen = look(args)
        content = describe(seen)
        content["training"] = over_training(args, seen)
        html = page(content)
        Path(args.html).write_text(html, encoding="utf-8")
        print(f"{args.html}: {len(html) / 1e6:.2f} MB, {len(seen.problems)} groups of step "
              f"{seen.step + 1}; open it in a browser")


if __name__ == "__main__":
    main()
