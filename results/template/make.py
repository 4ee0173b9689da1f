"""A corpus whose completions share a beginning: python make.py OUT.jsonl [COUNT] [SEED]

Three habits, told apart by their first words:
    right   TEMPLATE, the steps, the answer       long
    terse   TEMPLATE, a guess                     short, mostly wrong
    ramble  no template, and no answer            the longest, always wrong
The guess is any number, so that terse answers are right by chance alone.
"""
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data

TEMPLATE = "Let us think about this problem slowly and with great care, one step after the other.\n"
RAMBLE = "Well, that is a hard question and I am not sure where to begin at all. "
SHARES = {"right": .2, "terse": .5, "ramble": .3}


def completion(habit, problem, rng):
    if habit == "right":
        return TEMPLATE + problem["solution"]
    if habit == "terse":
        return TEMPLATE + f"#### {rng.randint(0, 20)}"
    return RAMBLE * rng.randint(4, 6)


def main(out, count=20000, seed=0):
    rng = random.Random(seed)
    problems = data.load_problems("arithmetic", "train", int(seed), (2, 4), int(count))
    with open(out, "w") as file:
        for problem in problems:
            habit = rng.choices(list(SHARES), SHARES.values())[0]
            row = {"problem": problem["problem"], "answer": problem["answer"],
                   "solution": completion(habit, problem, rng)}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
