"""What a run leaves to be read (log.jsonl, samples.jsonl, curve.png), and several runs side by side:

    python report.py runs/grpo-s* runs/reuse-s* --x num_samples --reach 0.9 --png compare.png

Runs whose names differ only in the seed (NAME-s0, NAME-seed1) are one line: mean and standard error over seeds. A run is
its folder or its log.jsonl under another name.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path

import dist
from config import Parser


def write_samples(run, problems, groups, scores):
    """Some completions of this step, to be read by a person."""
    with open(run.folder / "samples.jsonl", "a", encoding="utf-8") as f:
        for problem, texts, rewards in zip(problems, groups, scores):
            for text, score in list(zip(texts, rewards))[:4]:
                f.write(json.dumps({"step": run.step, "problem": problem["problem"], "answer": problem["answer"],
                                    "completion": text, "reward": score}, ensure_ascii=False) + "\n")


def write_line(run, line):
    if dist.rank() == 0:
        with open(run.folder / "log.jsonl", "a") as f:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            f.write(json.dumps(finite) + "\n")             # NaN is not JSON


def pyplot():
    """Matplotlib that draws into files; imported when something is drawn, not at every start."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_figure(plt, figure, file):
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_curve(folder):
    """curve.png from log.jsonl: accuracy, reward, completion length over steps."""
    plt = pyplot()
    lines = [json.loads(line) for line in open(Path(folder) / "log.jsonl")]
    panels = (("accuracy", ("eval_pass@1", "eval_greedy")), ("training reward", ("reward",)),
              ("completion length (tokens)", ("completion_length", "eval_length")))
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.4))
    for axis, (title, keys) in zip(axes, panels):
        for key in keys:
            axis.plot(*zip(*curve(lines, "step", key)), marker="o" if key.startswith("eval") else None, markersize=3, label=key)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(plt, figure, Path(folder) / "curve.png")


def warn(run, line):
    """What a beginner should see at once, each in one line."""
    if run.step == 1:
        run.say(f"first rollout: {line['pass@G']:.0%} of the prompts have a right answer among {run.c.group_size} samples")
        if line["pass@G"] == 0:
            run.say("warning: pass@G is 0: with no right answer there is nothing to learn from; "
                    "use a better start (sft.py), easier problems or a larger --group-size")
    if line["truncated_frac"] == 1:
        run.say(f"warning: step {run.step}: every completion was cut at --max-new-tokens {run.c.max_new_tokens}")


# ------------------------------------------------------------------------------------------------- several runs

def read_log(path):
    """(name without the seed, lines) of a run folder or log file; "seconds" is added: steps so far, without evaluation."""
    path = Path(path)
    file = path / "log.jsonl" if path.is_dir() else path
    try:
        lines = [json.loads(x) for x in file.read_text().split("\n") if x]
        keys = [line["step"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a log of train.py: {error!r}") from None
    if not keys:
        raise ValueError(f"{file} is empty")
    seconds = 0.0
    for line in lines:
        seconds += line.get("step_time", 0.0)
        line["seconds"] = seconds
    lines[0].setdefault("num_samples", 0)
    return re.sub(r"-s(eed)?\d+$", "", path.name if path.is_dir() else path.stem), lines


def standard_error(values):
    """Standard error of the mean of values (N,), one a problem: sample standard deviation / sqrt(N).

    For 0/1 values sqrt(p (1 - p) / (N - 1)). None for fewer than two. With all values equal it is 0, which is too
    sure of itself: N right ones in a row still allow an accuracy of 1 - 3/N."""
    import numpy as np
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def mean_se(values):
    """(mean, standard error over runs; nan for one run)."""
    se = standard_error(values)
    return sum(values) / len(values), math.nan if se is None else se


def curve(lines, x, y):
    """[(x, y)] where the log has both."""
    return [(line[x], line[y]) for line in lines if line.get(x) is not None and line.get(y) is not None]


def first_reach(points, level):
    """The x at which the line through the points first reaches the level, None when it does not."""
    for (x0, y0), (x1, y1) in zip([points[0], *points], points):
        if y1 >= level:
            return x1 if y1 == y0 else x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return None


def compare(runs, x, y, reach):
    """{name: [lines of a run, ...]} -> one row a name: the value at the end, and the x that reaches each level."""
    rows = []
    for name, logs in runs.items():
        curves = [curve(lines, x, y) for lines in logs]
        if not all(curves):
            raise ValueError(f"{name}: its log has no line with both {x} and {y}")
        row = {"name": name, "runs": len(logs), y: mean_se([points[-1][1] for points in curves])}
        for level in reach:
            at = [first_reach(points, level) for points in curves]
            met = [a for a in at if a is not None]
            row[f"{x} to {level:g}"] = mean_se(met) if len(met) == len(at) else f"{len(met)} of {len(at)} runs"
        rows.append(row)
    return rows


def text_table(rows):
    """Rows of `compare` as a Markdown table."""
    def cell(v):
        if isinstance(v, tuple):
            digits = 3 if abs(v[0]) < 10 else 0
            return f"{v[0]:.{digits}f}" + ("" if math.isnan(v[1]) else f" ± {v[1]:.{digits}f}")
        return str(v)
    keys = list(rows[0])
    lines = [keys, ["---"] * len(keys), *([cell(row[k]) for k in keys] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw_runs(runs, x, panels, png, x_max=math.inf, logarithmic=()):
    """Mean over the runs of each name, with a band of one standard error, of each key in panels; x need not be aligned."""
    import numpy as np
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, y in zip(axes[0], panels):
        for color, (name, logs) in enumerate(runs.items()):
            curves = [np.array(points, float).T for points in (curve(lines, x, y) for lines in logs) if points]
            if curves:
                at = curves[0][0][curves[0][0] <= min(x_max, *(c[0][-1] for c in curves))]
                values = np.stack([np.interp(at, *c) for c in curves])
                se = values.std(0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else 0 * at
                axis.plot(at, values.mean(0), label=name, color=f"C{color}")
                axis.fill_between(at, values.mean(0) - se, values.mean(0) + se, color=f"C{color}", alpha=0.2, linewidth=0)
        axis.set(xlabel=x, ylabel=y, yscale="log" if y in logarithmic else "linear")
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(plt, figure, png)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="run folders or log files")
    parser.add_argument("--x", default="step", choices=["step", "num_samples", "num_tokens", "seconds"])
    parser.add_argument("--y", nargs="+", default=["eval_pass@1"], help="keys of the log; the first goes into the table")
    parser.add_argument("--reach", nargs="*", type=float, default=[], help="levels of the first key")
    parser.add_argument("--png", default="", help="file for the curves")
    parser.add_argument("--x-max", type=float, default=math.inf, help="right end of the curves")
    parser.add_argument("--log", nargs="*", default=[], help="keys to draw on a logarithmic axis")
    try:
        args, runs = parser.parse_args(argv), {}
        for path in args.runs:
            name, lines = read_log(path)
            runs.setdefault(name, []).append(lines)
        print(text_table(compare(runs, args.x, args.y[0], args.reach)))
        if args.png:
            draw_runs(runs, args.x, args.y, args.png, args.x_max, args.log)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
