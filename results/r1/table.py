"""The table of run.sh: python results/r1/table.py FOLDER, from the evaluations of each stage."""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import report

STAGES = ("base", "cold-start", "grpo", "sft-of-base", "grpo-2")


def of(folder, name, stage):
    """The results of evaluate.py after a stage, one a seed."""
    files = sorted(Path(folder).glob(f"without-{name}-s*/{stage}/eval.json"))
    return [json.loads(file.read_text()) for file in files]


def cell(results):
    """Their pass@1, mean and standard error; nothing for a stage that was left out."""
    if not results:
        return ""
    return report.cell_text(report.mean_se([r["strict"]["avg@2"]["mean"] for r in results]))


def main(folder):
    rows = []
    for name in ("nothing", "cold-start", "grpo", "right-answers", "sft-of-base", "grpo-2"):
        seeds = len(list(Path(folder).glob(f"without-{name}-s*/table.md")))
        cells = [cell(of(folder, name, stage)) for stage in STAGES]
        rows.append([name, str(seeds), *cells])
    text = report.markdown(["left out", "runs", *(f"after {stage}" for stage in STAGES)], rows)
    (Path(folder) / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1])
