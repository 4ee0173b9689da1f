"""The table of run.sh, and the end of every run in one file, from the runs' logs:

    python results/template/table.py FOLDER         writes table.md and results.json there

Length and entropy are the means of the last five steps; "gtpo minus it" is paired by seed.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import report

METHODS = ("sequence", "token", "gtpo")


def end_of(folder):
    _, lines = report.read_log(folder)
    measured = [line["eval_pass@1"] for line in lines if "eval_pass@1" in line]
    last = lines[-5:]
    return {"before": measured[0], "pass@1": measured[-1],
            "length": sum(line["completion_length"] for line in last) / len(last),
            "entropy": sum(line["entropy"] for line in last) / len(last)}


def main(folder):
    ends = {}           # {start: {method: {seed: end}}}
    for path in sorted(Path(folder).glob("*-s?")):
        method, start, seed = path.name.split("-")
        ends.setdefault(start, {}).setdefault(method, {})[seed] = end_of(path)

    rows = []
    for start in sorted(ends, key=int):
        for method in METHODS:
            runs = ends[start][method]
            behind = [ends[start]["gtpo"][seed]["pass@1"] - run["pass@1"]
                      for seed, run in runs.items()]
            cells = [report.cell_text(report.mean_se([run[key] for run in runs.values()]))
                     for key in ("before", "pass@1", "length", "entropy")]
            rows.append([start, method, str(len(runs)), *cells, "" if method == "gtpo" else
                         report.cell_text(report.mean_se(behind))])
    text = report.markdown(["steps of SFT", "", "runs", "pass@1 before", "pass@1", "length",
                            "entropy", "gtpo minus it"], rows)
    (Path(folder) / "results.json").write_text(json.dumps(ends, indent=1) + "\n")
    (Path(folder) / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1])
