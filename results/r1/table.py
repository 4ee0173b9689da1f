"""The table of run.sh, and its numbers in one file, from the evaluations of each stage:

    python results/r1/table.py FOLDER       writes table.md and results.json there
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import report

STAGES = ("base", "cold-start", "grpo", "sft-of-base", "grpo-2")


def of(folder, name, stage):
    """The results of evaluate.py after a stage, one a seed, and the stage's seconds in it."""
    files = sorted(Path(folder).glob(f"without-{name}-s*/{stage}/eval.json"))
    times = [json.loads(file.with_name("stage.json").read_text())["seconds"] for file in files]
    return [{**json.loads(file.read_text()), "seconds": t} for file, t in zip(files, times)]


def numbers(results):
    """What results.json keeps of a stage: lists with one entry a seed."""
    kinds = results[0]["kinds"]
    return {
        "pass@1": [r["strict"]["avg@2"]["mean"] for r in results],
        **{kind: [r["kinds"][kind]["avg@2"]["mean"] for r in results] for kind in kinds},
        "seconds": [round(r["seconds"]) for r in results],
    }


def cell(results):
    """Their pass@1, mean and standard error; nothing for a stage that was left out."""
    if not results:
        return ""
    return report.cell_text(report.mean_se([r["strict"]["avg@2"]["mean"] for r in results]))


def main(folder):
    rows = []
    everything = {}
    for name in ("nothing", "cold-start", "grpo", "sft-of-base", "grpo-2"):
        seeds = len(list(Path(folder).glob(f"without-{name}-s*/table.md")))
        results = {stage: of(folder, name, stage) for stage in STAGES}
        everything[name] = {stage: numbers(found) for stage, found in results.items() if found}
        rows.append([name, str(seeds), *map(cell, results.values())])
    text = report.markdown(["left out", "runs", *(f"after {stage}" for stage in STAGES)], rows)
    (Path(folder) / "table.md").write_text(text + "\n")
    (Path(folder) / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1])
