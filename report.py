"""What a run leaves to be read, and several runs side by side.

The first half is for train.py: log.jsonl, samples.jsonl, curve.png, and the warnings that a
beginner should see at once. The second half is a program that compares finished runs:

    python report.py runs/grpo-s* runs/reuse-s* --x num_samples --reach 0.9 --png compare.png

Runs of one folder whose names differ only in the seed (NAME-s0, NAME-seed1) are one line, their
mean and standard error over seeds. A run is its folder, or its log.jsonl under another name. What
evaluate.py wrote is compared problem by problem, each file with the first:

    python report.py before.json after.json

Needs matplotlib, which is imported only when something is drawn.
"""
import argparse
import json
import math
import os
import re
import sys
from pathlib import Path

from tqdm import tqdm

import dist
import grpo
from config import Parser
from data import MOST_KINDS, kind_of
from reward import correct_counts

SAMPLES = 4         # completions of each problem that samples.jsonl shows
PANELS = (          # of curve.png: (title, keys of the log)
    ("accuracy", ("eval_pass@1", "eval_greedy")),
    ("reward", ("reward", "eval_reward")),
    ("completion length (tokens)", ("completion_length", "eval_length")))


# ----------------------------------------------------------------------------- of one run

def rollout_metrics(learner, drawn, seconds, kinds=()):
    """Means over all ranks of what was drawn in this step; its tokens and completions are counted.

    drawn: a list of train.Drawn, one a round; seconds: of the rollout; kinds: of all problems
    (data.kinds_of), whose means stand apart."""
    c, progress = learner.config, learner.progress
    here = {}
    for d in drawn:
        tokens = (d.rollout.lengths - d.rollout.prompt_lengths).float()
        right = d.parts["correct"] > 0
        sums = {
            "rows": d.rewards.numel(),
            "reward": d.rewards.sum(),
            "spread": d.rewards.std(1, correction=0).sum(),
            "flat_groups": (~grpo.informative(d.rewards)).sum(),
            "drawn": tokens.sum(),
            "cut": (~d.rollout.finished).sum(),
            "drawn_whole": tokens[d.rollout.finished].sum(),
            "tokens": d.rollout.lengths.sum(),
            "entropy": -d.rollout.logps.sum(),
            "solved": right.any(1).sum(),
            "right": right.sum(),
            **{f"rewards/{name}": part.nansum() for name, part in d.parts.items()},
            **{f"right/{name}": part[right].nansum() for name, part in d.parts.items()},
            **{f"rows/{name}": applies(part) for name, part in d.parts.items()},
            **{f"right rows/{name}": applies(part[right]) for name, part in d.parts.items()},
            **sums_by_kind(d, kinds, tokens.view(d.rewards.shape)),
        }
        here = {name: here.get(name, 0) + value for name, value in sums.items()}
    sums = dist.all_reduce(here, learner.device)

    # a rank may hold no prompt at all, so every mean is taken over the sums of all ranks
    rows = sums["rows"]
    groups = rows / c.group_size
    progress.num_tokens += int(sums["tokens"])
    progress.num_samples += int(rows)
    return {
        "step": progress.step,
        "reward": sums["reward"] / rows,
        "reward_std": sums["spread"] / groups,
        "frac_reward_zero_std": sums["flat_groups"] / groups,
        **{f"rewards/{name}": sums[f"rewards/{name}"] / sums[f"rows/{name}"]
           for name in drawn[0].parts if sums[f"rows/{name}"]},
        **apart(sums, [name for name in drawn[0].parts if name != "correct"]),
        "completion_length": sums["drawn"] / rows,
        "truncated_frac": sums["cut"] / rows,
        "terminated_length": sums["drawn_whole"] / max(rows - sums["cut"], 1),
        "num_tokens": progress.num_tokens,
        "num_samples": progress.num_samples,
        "entropy": sums["entropy"] / sums["drawn"],     # the sampler's; `learn` may have a better
        "pass@G": sums["solved"] / groups,
        "rollout_time": seconds,
        "rollout_tokens_per_s": sums["drawn"] / seconds,
        **means_by_kind(sums, kinds, c.group_size),
    }


def applies(part):
    """Of how many completions a reward function says something: it is nan for the others."""
    return (~part.isnan()).sum()


def apart(sums, names):
    """Means of rewards other than correctness over right completions, and over wrong ones.

    What wrong ones earn is what can be had without an answer."""
    found = {}
    for name in names:
        right, total = sums[f"right/{name}"], sums[f"rewards/{name}"]
        rows, right_rows = sums[f"rows/{name}"], sums[f"right rows/{name}"]
        for kind, earned, count in (("right", right, right_rows),
                                    ("wrong", total - right, rows - right_rows)):
            if count:
                found[f"rewards/{name}/{kind}"] = earned / count
    return found


def names_of(kinds):
    """The names under which problems are counted: each kind, and each task if there are several.

    Above MOST_KINDS, as where a file's levels are measured numbers, only the tasks are."""
    if len(kinds) < 2:
        return {}
    names = {kind: {kind} for kind in kinds} if len(kinds) <= MOST_KINDS else {}
    tasks = dict.fromkeys(kinds.values())
    if len(tasks) > 1:
        names |= {task: {kind for kind in kinds if kinds[kind] == task} for task in tasks}
    return names


def indices_by_kind(problems, kinds):
    """Returns {name of names_of: indices of its problems}."""
    found = {}
    for name, members in names_of(kinds).items():
        found[name] = [i for i, problem in enumerate(problems) if kind_of(problem) in members]
    return found


def sums_by_kind(drawn, kinds, tokens):
    """The sums of one train.Drawn behind `means_by_kind`; tokens (n, G) of its completions."""
    sums = {}
    for name, chosen in indices_by_kind(drawn.problems, kinds).items():
        sums[f"groups/{name}"] = len(chosen)
        sums[f"reward/{name}"] = drawn.rewards[chosen].sum()
        sums[f"pass@1/{name}"] = (drawn.parts["correct"][chosen] > 0).sum()
        sums[f"length/{name}"] = tokens[chosen].sum()
    return sums


def means_by_kind(sums, kinds, group_size):
    """Share of the groups, mean reward, success and length of each task and level in a step."""
    means = {}
    names = names_of(kinds)
    all_groups = sums["rows"] / group_size
    for name in names:
        groups = sums[f"groups/{name}"]
        means[f"share/{name}"] = groups / all_groups
        if groups:
            rows = groups * group_size
            for what in ("reward", "pass@1", "length"):
                means[f"{what}/{name}"] = sums[f"{what}/{name}"] / rows
    return means


def write_samples(folder, step, problems, groups, rewards):
    """Append some completions of a step to samples.jsonl, to be read by a person.

    groups holds the texts of each problem's completions, rewards a number for each of them."""
    lines = ""
    for problem, texts, scores in zip(problems, groups, rewards):
        for text, score in zip(texts[:SAMPLES], scores):
            sample = {"step": step, "problem": problem["problem"], "answer": problem["answer"],
                      "completion": text, "reward": float(score)}
            lines += json.dumps(sample, ensure_ascii=False) + "\n"
    append(Path(folder) / "samples.jsonl", lines)


def write_line(folder, line, log_to=""):
    """Append a step's metrics to log.jsonl; of several ranks the first one writes.

    log_to="tensorboard" also gives them to TensorBoard, under the same names."""
    if dist.rank() != 0:
        return
    finite = {}
    for key, value in line.items():
        missing = isinstance(value, float) and not math.isfinite(value)
        finite[key] = None if missing else value            # NaN is not JSON
    append(Path(folder) / "log.jsonl", json.dumps(finite) + "\n")
    if log_to:
        write_to_board(str(folder), line)


boards = {}         # by run folder; None: it has failed


def write_to_board(folder, line):
    """Give a step's metrics to TensorBoard. Where that fails, the run goes on without, and says so.

    What is shown never ends what is computed."""
    try:
        board = board_of(folder, line["step"])
        if board is None:
            return
        for name, value in line.items():
            board.add_scalar(name, value, line["step"])
        board.flush()
    except Exception as error:
        boards[folder] = None
        print(f"warning: TensorBoard gets no more lines ({dist.first_line(error)}); log.jsonl has "
              "all of them", file=sys.stderr)


def board_of(folder, step):
    """The SummaryWriter of a run; what an earlier start wrote from this step on is hidden."""
    if folder not in boards:
        from torch.utils.tensorboard import SummaryWriter
        boards[folder] = SummaryWriter(Path(folder) / "tensorboard", purge_step=step)
    return boards[folder]


def append(file, lines):
    """Append lines to a log, whole or not at all.

    Where that fails, as on a full disk, the lines are lost and the run goes on with a warning."""
    size = file.stat().st_size if file.exists() else 0
    try:
        with open(file, "ab") as opened:
            opened.write(lines.encode("utf-8", "backslashreplace"))
    except OSError as error:
        tqdm.write(f"warning: {file} lacks some lines ({dist.first_line(error)})", file=sys.stderr)
        if file.exists():
            os.truncate(file, size)


def new_warnings(line, config, dtype, said):
    """Returns the warnings about a step whose kind is not yet in the set `said`, and adds it."""
    found = warnings_of(line, config, exact=str(dtype) == "torch.float32")
    new = [text for kind, text in found.items() if kind not in said]
    said.update(found)
    return new


def warnings_of(line, config, exact=True):
    """Returns what a beginner should see at once about a step: {kind: one line of text}.

    line holds the step's metrics. exact: the model computes in float32.
    docs/troubleshooting.md says what to do about each."""
    step, cut = line["step"], line["truncated_frac"]
    said = {}
    if step == 1 and correct_counts(getattr(config, "reward", "")):
        said["first"] = (f"first rollout: {line['pass@G']:.0%} of the prompts have a right answer "
                         f"among {config.group_size} samples")
        if line["pass@G"] == 0:
            said["never right"] = (
                "warning: pass@G is 0: with no right answer there is nothing to learn from; use a "
                "better start (sft.py), easier problems or a larger --group-size")

    if cut == 1:
        said["all cut"] = (f"warning: step {step}: every completion was cut at --max-new-tokens "
                           f"{config.max_new_tokens}")
    elif cut > 0.2:
        said["cut"] = (f"warning: step {step}: {cut:.0%} of the completions were cut at "
                       f"--max-new-tokens {config.max_new_tokens}, most of them before an answer: "
                       "raise it, or the model learns to be short")

    if line.get("grad_norm") == 0 and line["frac_reward_zero_std"] < 1:
        said["no gradient"] = (f"warning: step {step}: the gradient is 0, although rewards "
                               "differ within groups: nothing was learned")
    if line.get("ess", 1) < 0.1:
        said["old samples"] = (f"warning: step {step}: ess is {line['ess']:.2f}: the samples are "
                               "too old for the policy; lower --replay-ratio, --sync-every or --lr")
    fresh = getattr(config, "sync_every", 1) == 1
    if not exact and fresh and line.get("ratio_mean_dev", 0) > 0.2:
        said["drawn otherwise"] = (
            f"warning: step {step}: ratio_mean_dev is {line['ratio_mean_dev']:.2g}, more than "
            "rounding: sampler and trainer disagree on what was drawn; try --dtype float32")
    if exact and fresh and line.get("ratio_max_dev", 0) > 0.01:
        said["disagree"] = (f"warning: step {step}: ratio_max_dev is {line['ratio_max_dev']:.3g}: "
                            "sampler and trainer disagree on what was drawn, which is a bug")
    return said


def outcome(first, last, seconds):
    """The last line of a run: what evaluations found before and after it, if any, and its time.

    first, last: what heldout.evaluate_run returned."""
    minutes, seconds = divmod(round(seconds), 60)
    found = ""
    if first and last:
        found = (f"pass@1 {first['eval_pass@1']:.2f} -> {last['eval_pass@1']:.2f}, completion "
                 f"length {first['eval_length']:.0f} -> {last['eval_length']:.0f}, ")
    return f"{found}{minutes} min {seconds} s"


def draw_curve(folder):
    """Draw curve.png from log.jsonl: accuracy, reward and completion length over steps.

    A figure that fails must not end the run, so any error becomes one warning on stderr."""
    try:
        lines = read_lines(Path(folder) / "log.jsonl")
        panels = [*PANELS]
        for title, what in (("accuracy of each kind", "eval_pass@1/"), ("problems", "share/")):
            keys = sorted({key for line in lines for key in line if key.startswith(what)})
            panels.append((title, keys))
        panels = [(title, keys) for title, keys in panels
                  if any(curve(lines, "step", key) for key in keys)]
        figure, axes = new_figure(len(panels), width=4, height=3.4)

        for axis, (title, keys) in zip(axes, panels):
            for key in keys:
                points = curve(lines, "step", key)
                if not points:
                    continue
                steps, values = zip(*points)
                marker = "o" if key.startswith("eval") else None
                axis.plot(steps, values, marker=marker, markersize=3, label=key)
            axis.set(title=title, xlabel="step")

        save_figure(figure, Path(folder) / "curve.png")
    except Exception as error:
        reason = f"{type(error).__name__}: {dist.first_line(error)}"
        tqdm.write(f"warning: curve.png was not drawn ({reason})", file=sys.stderr)


# ------------------------------------------------------------------------------- figures

def new_figure(panels, width, height):
    """Returns a figure and its panels, each of `width` x `height` inches, at most four in a row.

    The figure is not one of pyplot's, so it needs no display and is freed like any other object."""
    os.environ["MPLBACKEND"] = "agg"        # a notebook's choice, which need not be installed here
    from matplotlib.figure import Figure
    across = min(panels, 4)
    down = -(-panels // across)
    figure = Figure(figsize=(width * across, height * down))
    axes = [figure.add_subplot(down, across, i + 1) for i in range(panels)]
    return figure, axes


def save_figure(figure, file):
    """Write a figure as an image, with a grid and a legend in each panel."""
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        names = axis.get_legend_handles_labels()[1]
        if len(names) > 8:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))     # beside what it would cover
        elif names:
            axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


# ---------------------------------------------------------------------------- statistics

def standard_error(values):
    """Standard error of the mean of values (N,), one a problem or a run.

    It is the sample standard deviation / sqrt(N); for 0/1 values sqrt(p (1 - p) / (N - 1)). Returns
    None for fewer than two. With all values equal it is 0, which is too sure of itself: N right
    ones in a row still allow an accuracy of 1 - 3/N."""
    import numpy as np
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def mean_se(values):
    """Returns the mean of values, one a run or a problem, and its standard error: nan for one."""
    error = standard_error(values)
    return sum(values) / len(values), math.nan if error is None else error


# -------------------------------------------------------------------- several runs: reading

def read_lines(file):
    """Returns the lines of a jsonl file as objects."""
    lines = Path(file).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def read_log(path):
    """Read a run folder or log file. Returns its name without the seed, and its lines.

    Each line gets a key "seconds", the time of all steps so far without evaluation, where the log
    (that of sft.py) does not say it. Raises ValueError for a file that is empty or no log, OSError
    for one that cannot be read."""
    path = run_of(path)
    file = path / "log.jsonl" if path.is_dir() else path
    try:
        lines = read_lines(file)
        steps = [line["step"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a log of train.py: {error!r}") from None
    if not steps:
        raise ValueError(f"{file} is empty")

    seconds = 0.0
    for line in lines:
        seconds += line.get("step_time") or 0.0
        line.setdefault("seconds", seconds)
    if lines[0]["step"] == 0:
        lines[0].setdefault("num_samples", 0)       # the line before the first step has none

    name = path.name if path.is_dir() else path.stem
    return re.sub(r"-s(eed)?\d+$", "", name), lines


def run_of(path):
    """The absolute path of a run: its folder, or its log under another name than log.jsonl."""
    path = Path(path).resolve()
    return path.parent if path.name == "log.jsonl" and path.is_file() else path


def read_runs(paths):
    """Read several runs. Returns {name: [lines of a run, ...]}.

    Only runs of one folder are seeds of each other: where several folders hold the same name, it
    begins with the folder. Raises ValueError for a run that is given twice, or without any."""
    found = {}          # {name: {folder: [lines, ...]}}
    seen = set()
    for path in map(run_of, paths):
        if path.suffix == ".txt":       # what study.py leaves beside its runs
            continue
        if path in seen:
            raise ValueError(f"{path} is given twice")
        seen.add(path)
        name, lines = read_log(path)
        found.setdefault(name, {}).setdefault(path.parent, []).append(lines)

    if not found:
        raise ValueError("no run was given")
    runs = {}
    for name, folders in found.items():
        shared = os.path.commonpath(folders)
        for folder, logs in folders.items():
            runs[name if len(folders) == 1 else os.path.relpath(folder / name, shared)] = logs
    return runs


def curve(lines, x, y):
    """Returns the points (x, y) of the lines that have numbers for both keys."""
    points = [(line.get(x), line.get(y)) for line in lines]
    return [point for point in points if all(isinstance(value, (int, float)) for value in point)]


def first_reach(points, level):
    """Returns the x at which the line through the points first reaches the level, or None.

    A level that the first point has reached already is reached at that point's x."""
    previous_x, previous_y = points[0]
    for x, y in points:
        if y >= level:
            if y == previous_y:
                return x
            share = (level - previous_y) / (y - previous_y)
            return previous_x + (x - previous_x) * share
        previous_x, previous_y = x, y
    return None


# ------------------------------------------------------------------ several runs: comparing

def compare(runs, x, y, reach):
    """Compare runs by the value of y at their end, and by the x at which y reaches each level.

    runs is {name: [lines of a run, ...]}. Returns one dict a name, from column to cell. A cell is
    text, a number of runs, or a pair (mean, standard error). Raises ValueError for a run whose log
    has no line with both x and y."""
    rows = []
    for name, logs in runs.items():
        curves = [curve(lines, x, y) for lines in logs]
        if not all(curves):
            raise ValueError(f"{name}: its log has no line with both {x} and {y}; choose others "
                             "by --x and --y, such as --y reward")
        last_values = [points[-1][1] for points in curves]
        row = {"name": name, "runs": len(logs), y: mean_se(last_values)}

        for level in reach:
            reached_at = [first_reach(points, level) for points in curves]
            row[f"{x} to {level:g}"] = mean_of_all(reached_at)
        rows.append(row)
    return rows


def mean_of_all(values):
    """Returns mean_se over runs; where some have no value (None or nan), how many have one.

    A mean of those that got there would flatter."""
    known = [x for x in values if x is not None and math.isfinite(x)]
    return mean_se(known) if len(known) == len(values) else f"{len(known)} of {len(values)} runs"


def cell_text(cell):
    """Returns a cell of a table as text; a pair (mean, standard error) as "mean ± error"."""
    if not isinstance(cell, tuple):
        return str(cell)
    mean, error = cell
    digits = 3 if abs(mean) < 10 else 0
    if 0 < abs(mean) < 0.01 and not error > 0:          # a rate, of runs that all have it
        return f"{mean:.3g}"
    if math.isnan(error):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def text_table(rows):
    """Returns the rows of `compare` as a Markdown table."""
    columns = list(rows[0])
    return markdown(columns, [[cell_text(row[column]) for column in columns] for row in rows])


def markdown(head, rows):
    """Returns a Markdown table of texts: a list of column names, and a list for each row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_curve(logs, x, y, x_max=math.inf):
    """Returns the mean curve of several runs and its standard error, as arrays (x, mean, error).

    The runs need not share their x. Each is interpolated linearly at the x of the first one, as far
    as all of them reach. Runs without y are left out; None when no run has it."""
    import numpy as np
    curves = [np.array(curve(lines, x, y), float) for lines in logs]        # (points, 2) each
    curves = [points for points in curves if len(points)]
    if not curves:
        return None

    first_x = curves[0][:, 0]
    common_end = min(points[-1, 0] for points in curves)
    grid = first_x[first_x <= min(common_end, x_max)]                       # (n,)

    values = [np.interp(grid, points[:, 0], points[:, 1]) for points in curves]
    values = np.stack(values)                                               # (runs, n)
    error = np.zeros_like(grid)
    if len(curves) > 1:
        error = values.std(0, ddof=1) / math.sqrt(len(curves))
    return grid, values.mean(0), error


def draw_runs(runs, x, panels, png, x_max=math.inf, logarithmic=()):
    """Draw a panel for each key in `panels`: the mean of each name's runs over x.

    A band around the mean is one standard error wide to each side. runs is {name: [lines of a run,
    ...]}, png the file, x_max the right end, logarithmic the keys with a logarithmic axis."""
    figure, axes = new_figure(len(panels), width=5 if len(runs) <= 8 else 7, height=4)
    from matplotlib import colormaps
    for axis, y in zip(axes, panels):
        # a name has the same colour in every panel, also where others are missing
        for number, (name, logs) in enumerate(runs.items()):
            found = mean_curve(logs, x, y, x_max)
            if found is None:
                continue
            grid, mean, error = found
            color = f"C{number}" if len(runs) <= 10 else colormaps["tab20"](number % 20)
            axis.plot(grid, mean, label=name, color=color)
            axis.fill_between(grid, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
        axis.set(xlabel=x, ylabel=y, yscale="log" if y in logarithmic else "linear")
    save_figure(figure, png)


def draw_ends(lines, x, y, png):
    """Draw what runs end at over a number that they differ in: mean and standard error over seeds.

    lines is {name: {number: [a value a seed]}}; x and y say what they are."""
    figure, (axis,) = new_figure(1, width=6, height=4)
    for name, ends in lines.items():
        means, errors = zip(*(mean_se(values) for values in ends.values()))
        axis.errorbar(list(ends), means, errors, marker="o", capsize=3, label=name)
    numbers = sorted({number for ends in lines.values() for number in ends})
    axis.set(xlabel=x, ylabel=y, xscale="log")
    axis.set_xticks(numbers, map(str, numbers), minor=False)
    axis.minorticks_off()
    save_figure(figure, png)


def draw_against(points, x, y, png):
    """Draw what was measured over what was predicted: a dot a run, and the line of equality.

    points is {name: [(predicted, measured), ...]}, all above 0; x and y say what they are."""
    figure, (axis,) = new_figure(1, width=6, height=6)
    numbers = [number for dots in points.values() for dot in dots for number in dot]
    ends = [min(numbers), max(numbers)]
    axis.plot(ends, ends, color="grey", linewidth=0.8)
    for name, dots in points.items():
        axis.plot(*zip(*dots), "o", alpha=0.7, label=name)
    axis.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    save_figure(figure, png)


# ------------------------------------------------------------- several evaluations: paired

MATTER = ("temperature", "top_p", "top_k", "max_new_tokens", "template", "chat_template_kwargs",
          "seed")           # settings that two evaluations should share


def read_evaluation(file):
    """Returns of what evaluate.py --json wrote ({(id, checksum): accuracies}, {setting: text}).

    Raises ValueError for another file, OSError for one that cannot be read."""
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
        problems, settings = result["problems"], {name: str(result["config"].get(name))
                                                  for name in MATTER}
        found = {(problem["id"], problem.get("checksum")): accuracies(problem)
                 for problem in problems}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file} is no result of evaluate.py --json: {error!r}") from None
    if len(found) < len(problems):
        raise ValueError(f"{file}: several problems have one id, so they cannot be paired: give "
                         "each its own in the data")
    return found, settings


def accuracies(problem):
    """Accuracies of a problem, {name: from 0 to 1}: of its greedy answer, and of its samples.

    The share of right samples is evaluate.py's avg@K. It estimates pass@1 for any K, so that two
    evaluations with another number of samples can be compared in it. pass@K, one right sample at
    least, is compared where both have the same K."""
    found = {}
    for key, right in problem.items():
        if key.startswith("greedy_correct"):
            suffix = key.removeprefix("greedy_correct")         # "", "_lenient", "_at_320", both
            words = suffix.replace("_at_", " at ").replace("_lenient", ", lenient")
            found[f"greedy{words}"] = float(right)
            found[f"pass@1{words}"] = problem[f"c{suffix}"] / problem["n"]
            if problem["n"] > 1:
                found[f"pass@{problem['n']}{words}"] = float(problem[f"c{suffix}"] > 0)
    return found


def compare_evaluations(files):
    """A Markdown table of accuracies over the problems that all files have, ± standard error.

    The column after the second and each later file is that file minus the first: the mean over
    problems of the paired differences, ± its standard error. Models tend to find the same problems
    hard, so that error is usually smaller than the two beside it suggest.

    Raises ValueError where no problem is in all files, or a file is given twice."""
    if len({Path(file).resolve() for file in files}) < len(files):
        raise ValueError("an evaluation is given twice, and would be compared with itself")
    results, settings = zip(*map(read_evaluation, files))
    common = [name for name in results[0] if all(name in other for other in results)]
    if not common:
        raise ValueError(f"no problem is in all of {', '.join(map(str, files))}; a problem goes by "
                         "its id and text or, without an id, by its file, as --data named it, and "
                         "line; results of before texts were looked at have to be made anew")
    columns = [[result[name] for name in common] for result in results]
    measures = [m for m in columns[0][0] if all(m in column[0] for column in columns)]
    for name in MATTER:
        values = [of[name] for of in settings]
        if len(set(values)) > 1:
            print(f"warning: the evaluations differ in --{name.replace('_', '-')}: "
                  f"{', '.join(values)}", file=sys.stderr)

    head = [f"{len(common)} problems", str(files[0])]
    for file in files[1:]:
        head += [str(file), "minus the first"]
    rows = []
    for measure in measures:
        baseline, *others = [[problem[measure] for problem in column] for column in columns]
        row = [measure, cell_text(mean_se(baseline))]
        for values in others:
            differences = [value - base for value, base in zip(values, baseline)]
            row += [cell_text(mean_se(values)), cell_text(mean_se(differences))]
        rows.append(row)
    return markdown(head, rows)


# --------------------------------------------------------------------------- command line

def parse(argv=None):
    """Returns the command line's arguments. Raises ValueError, in one line, for wrong ones."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("runs", nargs="+",
                        help="run folders or log files; or *.json of evaluate.py")
    parser.add_argument("--x", default="step",
                        choices=["step", "num_samples", "num_tokens", "seconds"])

    parser.add_argument("--y", nargs="+", default=["eval_pass@1"],
                        help="keys of the log; the first goes into the table")
    parser.add_argument("--reach", nargs="*", type=float, default=[],
                        help="levels of the first key")
    parser.add_argument("--png", default="", help="file for the curves")
    parser.add_argument("--x-max", type=float, default=math.inf, help="right end of the curves")
    parser.add_argument("--log", nargs="*", default=[], help="keys to draw on a logarithmic axis")
    return parser.parse_args(argv)


def main(argv=None):
    try:
        args = parse(argv)
        if all(name.endswith(".json") for name in args.runs):
            if args.png or args.reach:
                raise ValueError("evaluations have no curve: leave --png and --reach out")
            print(compare_evaluations(args.runs))
            return

        runs = read_runs(args.runs)
        print(text_table(compare(runs, args.x, args.y[0], args.reach)))
        for name, logs in runs.items():
            ends = sorted({lines[-1]["step"] for lines in logs})
            if len(ends) > 1:
                steps = ", ".join(map(str, ends))
                print(f"warning: runs of {name} end at steps {steps}: their mean is of unequal "
                      "lengths, its curve ends with the shortest", file=sys.stderr)
        if args.png:
            draw_runs(runs, args.x, args.y, args.png, args.x_max, args.log)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
