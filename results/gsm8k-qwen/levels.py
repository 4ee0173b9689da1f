"""Give each problem of a GSM8K file a level, its number of written calculations, 1 to 6.

    python results/gsm8k-qwen/levels.py gsm8k_train.jsonl levels.jsonl
    python results/gsm8k-qwen/levels.py gsm8k_train.jsonl easier.jsonl 3      up to three of them
"""
import json
import sys

HARDEST = 6         # and above: few problems have more


def main(source, target, most=HARDEST):
    with open(source, encoding="utf-8") as rows, open(target, "w", encoding="utf-8") as file:
        for line in rows:
            row = json.loads(line)
            steps = (row.get("solution") or row["answer"]).count("<<")
            row["level"] = min(max(steps, 1), HARDEST)
            if row["level"] <= int(most):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
