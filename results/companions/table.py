"""The table of run.sh, and its numbers in one file, from the results of evaluate.py:

    python results/companions/table.py FOLDER       writes table.md and results.json there
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import report

ORDER = ("start", "grpo-1", "grpo-2", "grpo", "rejection-1", "rejection-2", "rejection-3", "dpo-st-1",
         "dpo-st-2", "dpo-st-3", "teacher", "response", "logits", "relations", "on-policy")


def main(folder):
    every = {}
    for file in sorted(Path(folder).glob("*.json")):
        result = json.loads(file.read_text())
        if "strict" in result:
            every[file.stem] = {
                "pass@1": result["strict"]["avg@2"]["mean"],
                "greedy": result["strict"]["greedy"]["mean"],
                "levels": {kind: cell["avg@2"]["mean"] for kind, cell in result["kinds"].items()}}
    (Path(folder) / "results.json").write_text(json.dumps(every, indent=1) + "\n")

    found = {}
    for name, result in every.items():
        found.setdefault(re.sub(r"-s\d+$", "", name), []).append(result)
    rows = []
    for name in filter(found.get, ORDER):
        runs = found[name]
        cells = [report.cell_text(report.mean_se([run[key] for run in runs]))
                 for key in ("pass@1", "greedy")]
        levels = [report.mean_se([run["levels"][kind] for run in runs])[0]
                  for kind in runs[0]["levels"]]
        rows.append([name, str(len(runs)), *cells, " ".join(f"{level:.2f}" for level in levels)])
    text = report.markdown(["", "runs", "pass@1", "greedy", "levels 2 to 6"], rows)
    (Path(folder) / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1])
