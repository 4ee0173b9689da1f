"""Studies: the same question put to many runs, with several seeds, one table and one figure.

    python study.py curricula --out results/study/curricula --jobs 2
    python study.py all --quick --out runs/look

A study is a list of starts (warm-started models) and a list of runs of train.py from them. Every
run has a folder of its own, so a study that was killed goes on by the same command: whole runs are
skipped, and the others resume. Runs go seed by seed, so that a study that was stopped early has
about as many seeds of everything. --jobs runs go side by side, each on cores of its own.

studies.py says which studies there are and what each runs. What is left behind: study.json (every
run with its curve, none dropped), table.md (mean and standard error over seeds, and the paired
difference to the first row), study.png and, where runs differ in a number, ends.png, where theory
foretells one, against.png. `theory` runs nothing: it draws the exact curves of theory.py. Needs
train.py, sft.py, report.py and pipeline.py, which calls programs.
"""
import json
import math
import os
import re
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

import report
import studies
import theory
from config import setting
from engine.checkpoint import write_whole
from engine.machine import program
from folder import lock
from pipeline import call, prepare_resume, named_command
from sft import copy_whole
from studies import MEASURES, STUDIES


@dataclass
class StudyConfig:
    out: str = ""                           # folder of the study; of "all": of the studies
    seeds: int = setting(5, least=1)        # runs of each setting
    jobs: int = setting(1, least=1)         # runs side by side
    base: str = ""                          # of lora: the pretrained checkpoint
    quick: bool = False                     # one seed, a few steps: to see that it works
    keep_models: bool = False               # of the runs; else only their logs stay


# ------------------------------------------------------------------------------------ running them

def claim(folder, name, study):
    """Write down what the folder's runs are. Raises ValueError where it holds others.

    Runs may be added to a study, but a run that is there is never reported under other flags."""
    file = folder / "which.json"
    mine = {"study": name}
    for kind, made in (("start", study.starts), ("run", study.runs)):
        for key, flags in made.items():
            mine[f"{kind} {key}"] = shlex.join(map(str, flags))

    theirs = json.loads(file.read_text()) if file.exists() else {}
    for key, said in mine.items():
        if theirs.get(key, said) != said:
            raise ValueError(f"--out {folder} holds other runs, {key} was {theirs[key]!r}, not "
                             f"{said!r}: choose another folder")
    write_whole(file, json.dumps({**theirs, **mine}, indent=1) + "\n")


def make_start(folder, name, flags, threads, beside=()):
    """Make a start, unless it is there: it appears when it is whole.

    beside: folders of other studies of the same call, from which an equal start is copied."""
    target = folder / "start" / name
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    for other in beside:
        twin, which = other / "start" / name, other / "which.json"
        said = json.loads(which.read_text()) if twin.exists() else {}
        if said.get(f"start {name}") == shlex.join(map(str, flags)):
            return copy_whole(twin, target)

    part = target.with_name("." + name)
    command = ["sft.py", *map(str, flags), "--out", str(part), "--threads", str(threads)]
    call(prepare_resume(part, command), folder / "start" / f"{name}.txt", "the same command",
         bars=False)
    os.replace(part, target)


def run_one(folder, name, seed, flags, threads, cores, keep_models):
    """Make a run whole: skip it, go on with it, or begin it. Returns the lines of its log."""
    out = folder / "runs" / f"{name}-s{seed}"

    if not (out / "model").exists():
        flags = [str(flag).replace("START", str(folder / "start")) for flag in flags]
        command = ["train.py", *flags, "--seed", str(seed), "--threads", str(threads),
                   "--save-every", "20", "--out", str(out)]
        out.parent.mkdir(parents=True, exist_ok=True)
        call(prepare_resume(out, command), out.with_suffix(".txt"), "the same command", cores,
             bars=False)
        if not keep_models:
            for file in (out / "model").glob("*.safetensors"):
                file.unlink()
    elif keep_models and not list((out / "model").glob("*.safetensors")):
        print(f"warning: {out} was made without --keep-models, so its weights are gone",
              file=sys.stderr)

    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return report.read_log(out)[1]


def run_study(name, c, folder):
    """Run a study, --jobs runs side by side. Returns (Study, {(run, seed): lines of its log})."""
    study = STUDIES[name](c)
    every = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    beside = [Path(c.out) / other for other in STUDIES] if folder != Path(c.out) else []
    for start, flags in study.starts.items():
        print(f"{name}: warm start {start}", flush=True)
        make_start(folder, start, flags, len(every) or 1, beside)

    seeds = 1 if c.quick else c.seeds
    todo = [(run, seed) for seed in range(seeds) for run in study.runs]
    threads = max(1, len(every) // c.jobs)
    places = [every[i * threads:(i + 1) * threads] for i in range(c.jobs)]
    logs, free = {}, list(places)

    with ThreadPoolExecutor(c.jobs) as pool, tqdm(total=len(todo), desc=name) as bar:
        def work(run, seed):
            cores = free.pop()              # a list's pop and append are atomic
            try:
                return run_one(folder, run, seed, study.runs[run], threads, cores, c.keep_models)
            finally:
                free.append(cores)

        futures = {item: pool.submit(work, *item) for item in todo}
        try:
            for item, future in futures.items():
                logs[item] = future.result()
                bar.update()
        except BaseException:
            for future in futures.values():
                future.cancel()
            raise

    run_after(study, folder, len(every) or 1)
    return study, logs


def run_after(study, folder, threads):
    """Make what a study wants besides its runs, unless it is there."""
    def text(word):
        places = {"START": str(folder / "start"), "STUDY": str(folder)}
        return re.sub("START|STUDY", lambda found: places[found.group()], str(word))

    for made, command in study.after.items():
        if not Path(text(made)).exists():
            command = [*map(text, command), "--threads", str(threads)]
            out = Path(text(made)).parent
            if command[0] == "train.py":
                command = prepare_resume(out, command)
            call(command, folder / "after.txt", "the same command", bars=False)


# --------------------------------------------------------------------------------- what they show

def last_value(lines, key):
    """The last value of a key in a log, or nan."""
    found = [line[key] for line in lines if line.get(key) is not None]
    return found[-1] if found else math.nan


def first_value(lines, key):
    return next((line[key] for line in lines if line.get(key) is not None), math.nan)


def end_of(lines, key):
    """What a column of the table says of a run."""
    return MEASURES[key](lines) if key in MEASURES else last_value(lines, key)


def summary(study, logs):
    """Every run with what it ended at, and its curve: the content of study.json."""
    runs = []
    for (name, seed), lines in sorted(logs.items()):
        curve = [{key: line.get(key) for key in (study.x, *study.panels)} for line in lines
                 if "eval_pass@1" in line]
        runs.append({
            "name": name, "seed": seed, "flags": shlex.join(map(str, study.runs[name])),
            "first": {key: first_value(lines, key) for key in study.columns},
            "last": {key: end_of(lines, key) for key in study.columns},
            "num_samples": last_value(lines, "num_samples"),
            "seconds": last_value(lines, "seconds"), "curve": curve})
    return runs


def share_to_end(run, other, key):
    """The completions after which a run first has the accuracy that another ends at, as a share of
    those after which the other first has it; nan if the run never does, or the other did at once.

    One evaluation is noisy: the end is the mean of the last two. It is a share of the other's first
    time, not of all its completions: a noisy curve often has that accuracy before its end."""
    curves = [report.curve(one["curve"], "num_samples", key) for one in (run, other)]
    ends = [y for _, y in curves[1][-2:]]
    level = sum(ends) / len(ends)
    reached, others = (report.first_reach(points, level) for points in curves)
    return math.nan if reached is None or others == 0 else reached / others


def table(study, runs):
    """A Markdown table: mean ± standard error over seeds at the end, and paired differences.

    The differences are those of the first column to the first row's run of the same seed: at the
    end and, over samples, in what it takes to get where that one ends."""
    def runs_of(name):
        return [run for run in runs if run["name"] == name]

    def values(name, key):
        return [run["last"][key] for run in runs_of(name)]

    first = next(iter(study.runs))
    key = study.columns[0]
    before = []
    for column in study.columns:
        found = [run["first"][column] for run in runs if column.startswith("eval_")]
        before.append(f"{sum(found) / len(found):.3f}" if found else "")
    over_samples = study.x == "num_samples"
    rows = [["start", "", *before, *[""] * (1 + over_samples)]]
    for name in study.runs:
        cells = [name, str(len(values(name, key)))]
        for column in study.columns:
            cells.append(report.cell_text(report.mean_of_all(values(name, column))))
        gaps = [a - b for a, b in zip(values(name, key), values(first, key))]
        cells.append("" if name == first else report.cell_text(report.mean_se(gaps)))
        if over_samples:
            shares = [share_to_end(run, other, key)
                      for run, other in zip(runs_of(name), runs_of(first))]
            cells.append("" if name == first else report.cell_text(report.mean_of_all(shares)))
        rows.append(cells)

    head = ["", "runs", *study.columns, f"{key} - {first}"]
    return report.markdown([*head, f"samples to {first}'s end"] if over_samples else head, rows)


def table_of_probes(files):
    """A Markdown table of what probe.py says of several models."""
    rows = []
    for file in files:
        found = json.loads(file.read_text())
        numbers = [found[name] for name in ("c1", "c2", "c3", "best_group_size")]
        cells = ["" if x is None else f"{x:.3g}" for x in numbers]
        error = "{:.3g} to {:.3g}".format(*found["between"]) if found["between"] else ""
        rows.append([file.stem.removeprefix("probe-"), *cells, error])
    head = ["model", "c1", "c2", "c3", "best group size", "one standard error"]
    return report.markdown(head, rows)


def show(name, study, logs, c, folder):
    """Write study.json, table.md and study.png; print the table."""
    runs = summary(study, logs)
    write_whole(folder / "study.json", json.dumps({
        "study": name, "config": asdict(c), "starts": {
            start: shlex.join(map(str, flags)) for start, flags in study.starts.items()},
        "runs": runs}, indent=1) + "\n")

    text = table(study, runs)
    probes = sorted(folder.glob("probe-*.json"))
    if probes:
        text += "\n\n" + table_of_probes(probes)
    write_whole(folder / "table.md", text + "\n")
    print(text, flush=True)

    try:
        by_name = {run: [logs[item] for item in sorted(logs) if item[0] == run]
                   for run in study.runs}
        report.draw_runs(by_name, study.x, study.panels, folder / "study.png")
        if study.ends:
            number, lines = study.ends
            key = study.columns[0]
            drawn = {line: {x: [run["last"][key] for run in runs if run["name"] == name]
                            for x, name in sorted(members.items())}
                     for line, members in lines.items()}
            report.draw_ends(drawn, number, key, folder / "ends.png")
        if study.against:
            points = {name: [[run["last"][key] for key in study.against]
                             for run in runs if run["name"] == name] for name in study.runs}
            report.draw_against(points, *study.against, folder / "against.png")
    except Exception as error:
        print(f"warning: no figure was drawn ({error})", file=sys.stderr)


# ------------------------------------------------------------------------------------- the program

def main(argv=None):
    with program(lambda: "interrupted: the same command goes on"):
        asked, config = named_command(argv, "a study", ("theory", *STUDIES, "all"), StudyConfig,
                                      f"{__doc__}\n{studies.__doc__}")
        names = [asked]
        if asked == "all":
            names = ["theory", *(name for name in STUDIES if name != "lora" or config.base)]
        if asked == "lora" and not config.base:
            raise ValueError("lora needs --base, a pretrained checkpoint")

        for name in names:
            folder = Path(config.out) / name if len(names) > 1 else Path(config.out)
            folder.mkdir(parents=True, exist_ok=True)
            if name == "theory":
                theory.draw(folder / "theory.png")
                continue

            lock(folder)
            claim(folder, name, STUDIES[name](config))
            study, logs = run_study(name, config, folder)
            show(name, study, logs, config, folder)


if __name__ == "__main__":
    main()
