"""Built-in tasks: problems that a program makes, so that nothing has to be downloaded.

    arithmetic   stories of several steps; a level is the number of steps
    boolean      the truth value of a formula in words; operators
    family       how two people are related; links of the chain between them
    truth        who tells the truth and who lies; people
    seating      in which order people sit; people

Each puzzle is a file of puzzles/, with its worked solutions, its checker and the proof that it has
exactly one answer. `TASKS` is the table of them. `--data gym:NAME` hands out a task of the package
reasoning-gym, which has about a hundred (puzzles/gym.py).

Needs reward.py, for tasks without a checker of their own. data.py loads the problems.
"""
import functools

import reward
from puzzles import arithmetic, boolean, family, seating, truth
from puzzles.common import Task

# To add a task, add a line here. The short way is Task(make, check): make(count, split, seed,
# levels) returns dicts with "problem", "answer", "solution", "task", "level" and "id", and keeps
# the splits apart itself; check(problem, completion) is for answers that cannot just be compared.
# The other way, puzzles.common.puzzle, does all that follows from drawing a structure:
# docs/tasks.md has an example.
TASKS = {
    "arithmetic": arithmetic.TASK,
    "boolean": boolean.TASK,
    "family": family.TASK,
    "truth": truth.TASK,
    "seating": seating.TASK,
}


def known(name):
    """Whether a name is that of a built-in task, or of one of reasoning-gym's."""
    return name in TASKS or name.startswith("gym:")


def task_of(name):
    """Returns the Task of this name. Raises ValueError where there is none."""
    if name.startswith("gym:"):
        from puzzles import gym
        return gym.task(name)
    if name not in TASKS:
        raise ValueError(f"no built-in task is called {name!r}: choose {', '.join(TASKS)}")
    return TASKS[name]


def problems(name, count, split="train", seed=0, level=None):
    """Returns `count` problems of a built-in task; the same arguments give the same problems.

    level is an integer, a pair (easiest, hardest), or None for the task's usual ones. Each problem
    is a dict with "problem", "answer", "solution", "task", "level" and "id". Raises ValueError for
    an unknown task or split, or a level that the task does not have."""
    task = task_of(name)
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, not {split!r}")

    levels = (level, level) if isinstance(level, int) else level or task.levels
    easiest, hardest = levels
    if not task.least <= easiest <= hardest <= (task.most or hardest):
        there_are = f"from {task.least}" + (f" to {task.most}" if task.most else "")
        raise ValueError(f"{name} has levels {there_are} ({task.level_is}), "
                         f"not {easiest}-{hardest}")
    return task.problems(count, split, seed, tuple(levels))


def checked(problem):
    """Returns the problem with "check", a function of a completion, if its task has a checker."""
    check = task_of(problem["task"]).check
    if check is None:
        return problem
    return {**problem, "check": functools.partial(check, problem)}


def correct(problem, completion):
    """Tell whether a completion solves a problem, by the checker of the problem's task.

    reward.verify compares the answers where the task has no checker and where there is no task."""
    if known(problem.get("task") or ""):
        problem = checked(problem)
    return reward.right(problem, completion)


def perturbed(problem, seed=0):
    """Returns the problem with one statement changed, so that its answer is another one.

    Returns None where none was found. Raises ValueError for a task that cannot be changed so."""
    change = task_of(problem["task"]).perturb
    if change is None:
        raise ValueError(f"problems of {problem['task']} cannot be perturbed")
    return change(problem, seed)
