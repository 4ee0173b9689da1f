"""`--data gym:NAME`: any task of the package reasoning-gym (pip install reasoning-gym).

It has about a hundred generators of puzzles, each with a scorer of its own, which is the checker
here: an answer is right if it scores 1. The package is imported only when it is asked for.

    python train.py --model DIR --data gym:knights_knaves

Security: the scorer is that package's code, and reads the answer that the model wrote. Some of
its scorers hand formulas to sympy, whose parser evaluates text. An answer that is too long is
wrong, and so is one at which the scorer raises. There is no other protection, and no limit of time.

Left out: levels, because the package's settings differ from task to task, and perturbed puzzles.
"""
import functools
import zlib

from puzzles.common import Task, final_answer
from thoughts import tail

LONGEST = 1000      # characters of an answer that a scorer gets to see


def task(name):
    """Returns the Task of "gym:NAME". Raises ValueError where package or name are unknown."""
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError(f"--data {name}: pip install reasoning-gym") from None

    inner = name.partition(":")[2]
    known = reasoning_gym.factory.DATASETS
    if inner not in known:
        raise ValueError(f"--data {name}: reasoning-gym has no such task; it has "
                         f"{', '.join(sorted(known))}")
    return Task(problems=functools.partial(problems, name), check=check)


@functools.lru_cache(maxsize=None)
def dataset(name, size, seed):
    """Returns the package's data set: `size` puzzles, which it makes when they are asked for."""
    import reasoning_gym
    return reasoning_gym.create_dataset(name.partition(":")[2], size=size, seed=seed)


def problems(name, count, split, seed, levels):
    """Returns `count` problems; the splits are drawn from different seeds.

    Easy tasks repeat themselves: what is held out is taken out of training by data.py."""
    own_seed = zlib.crc32(f"{name}/{split}/{seed}".encode()) % 2 ** 31
    found = []
    for i, entry in enumerate(dataset(name, count, own_seed)):
        answer = str(entry["answer"])
        found.append({
            "problem": entry["question"], "answer": answer, "solution": f"#### {answer}",
            "task": name, "level": None, "id": f"{name}/{split}/{seed}/{i}",
            "structure": entry,
        })
    return found


def check(problem, completion):
    """Whether the package's scorer gives the answer of a completion the full score.

    The answer is what follows the last "####", which may be several lines, such as a grid; without
    it, what extraction.py finds."""
    before, mark, behind = tail(completion).rpartition("####")
    answer = behind.strip() if mark else final_answer(completion)
    if not answer or len(answer) > LONGEST:
        return False
    try:
        scorer = dataset(problem["task"], 1, 0)
        return float(scorer.score_answer(answer=answer, entry=problem["structure"])) >= 1.0
    except Exception:       # it is other people's code, and the answer is anything
        return False
