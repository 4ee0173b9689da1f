"""The table of run.sh: python results/companions/table.py FOLDER, of evaluate.py's results."""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import report

ORDER = ("start", "grpo", "rejection-1", "rejection-2", "rejection-3", "dpo-st-1", "dpo-st-2",
         "dpo-st-3", "teacher", "response", "logits", "relations", "on-policy")


def main(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.json")):
        result = json.loads(file.read_text())
        if "strict" in result:
            found.setdefault(re.sub(r"-s\d+$", "", file.stem), []).append(result)

    rows = []
    for name in filter(found.get, ORDER):
        runs = found[name]
        cells = [report.cell_text(report.mean_se([run["strict"][key]["mean"] for run in runs]))
                 for key in ("avg@2", "greedy")]
        levels = [report.mean_se([run["kinds"][kind]["avg@2"]["mean"] for run in runs])[0]
                  for kind in runs[0]["kinds"]]
        rows.append([name, str(len(runs)), *cells, " ".join(f"{level:.2f}" for level in levels)])
    text = report.markdown(["", "runs", "pass@1", "greedy", "levels 2 to 6"], rows)
    (Path(folder) / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1])
