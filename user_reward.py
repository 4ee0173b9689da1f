"""A reward function from a file of the user's own, in TRL's signature.

    python train.py --reward mine.py:brief=0.1 ...

    from reward import verify

    def brief(completions, answer, **columns):          # TRL's GRPOTrainer takes the same function
        # a completion is a text, or with a chat template a list of one message
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]

        # wrong ones earn nothing, or giving up early would pay
        return [verify(text, gold) / (1 + len(text)) for text, gold in zip(texts, answer)]

A function gets lists with an entry for each completion and returns a list of as many numbers:

    prompts, completions    as TRL gives them: texts or, when the model speaks a chat template,
                            lists of messages [{"role": ..., "content": ...}]
    completion_ids          lists of token ids, the stop token included
    problem, answer, solution, level, id, and each further field of the data file, as it stands
                            there; but of GSM8K answer is the last line alone, and solution has no
                            calculator marks
    opened                  the mark of a thought with which the chat template ends, if it does
    log_extra, log_metric   may be called as in TRL; what they are told is dropped

None says that the function does not apply to a completion, which then gets nothing from it and does
not count in the mean rewards/NAME. Of a function without **kwargs only the arguments that it names
are given. Errors are one line with the function's name and the place in its file. Left out: async
functions and TRL's trainer_state. The file is run as a program, so it must be one that you trust.
"""
import copy
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

OURS = ("prompt", "messages", "check", "columns")       # fields of a problem, not of its data
HERE = Path(__file__).resolve().parent
MODULES = {}        # (file, when it was changed): its module, so that its functions share one


def load(text):
    """Load FILE.py:FUNCTION. Returns (name, reward function of reward.py).

    Raises ValueError, one line, when there is no such file or function, or the file fails."""
    path, _, name = text.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"--reward {text}: there is no file {file}")

    version = file.absolute(), file.stat().st_mtime_ns
    try:
        if version not in MODULES:
            MODULES[version] = run(file.absolute())
    except KeyboardInterrupt:
        raise
    except BaseException as error:              # whatever a user's program may raise
        raise ValueError(f"--reward {text}: {where(error, file)}") from None
    module = MODULES[version]

    function = getattr(module, name, None)
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"--reward {text}: {name} is async, which nothing waits for here: write "
                         f"def {name}")
    if not callable(function):
        found = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"--reward {text}: {file} has no function {name}; it has "
                         f"{', '.join(found) or 'none'}")
    try:
        state = inspect.signature(function).parameters.get("trainer_state")
    except ValueError:
        raise ValueError(f"--reward {text}: {name} does not say which arguments it takes: wrap it "
                         "in a function that does") from None
    if state and state.default is state.empty:
        raise ValueError(f"--reward {text}: {name} asks for trainer_state, which only TRL has: "
                         "give it a default, and do without it here")
    return name, UserReward(function, file)


def run(file):
    """Run a file of the user's as a module, which finds what lies beside it. Returns the module.

    What lies there may be called config.py or reward.py too: our modules of these names are out of
    sight meanwhile, and theirs afterwards."""
    folder, name = str(file.parent), f"user_reward_{len(MODULES)}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)

    sys.modules[name] = module          # dataclasses and pickle look for it there
    sys.path.insert(0, folder)
    names = same_names(file.parent)
    ours = take_out(names)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        take_out(names)
        sys.modules.update(ours)
        sys.path.remove(folder)
        if folder not in sys.path:      # a function may import later; behind our own modules
            sys.path.append(folder)
    return module


def same_names(folder):
    """Names of modules that stand in a user's folder and in ours, {} if it is ours."""
    if folder == HERE:
        return set()
    theirs, own = ({x.stem for x in place.iterdir()
                    if x.suffix == ".py" or (x / "__init__.py").exists()}
                   for place in (folder, HERE))
    return theirs & own


def take_out(names):
    """Forget the modules of these names and what lies below them. Returns them, as sys.modules."""
    found = [module for module in sys.modules if module.partition(".")[0] in names]
    return {module: sys.modules.pop(module) for module in found}


def dropped(*args, **kwargs):
    """What log_extra and log_metric are here."""


class UserReward:
    """A user's function as one of reward.py's: (problems, groups, rollout) -> (N, G)."""

    sees_rollout = True

    def __init__(self, function, file):
        self.function = function
        self.file = file
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes = {p.name for p in parameters}
        self.needs = [p.name for p in parameters if p.default is p.empty
                      and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]

    def __call__(self, problems, groups, rollout):
        """Return the function's numbers, (N, G); nan where it does not apply.

        Raises ValueError, one line, when the function fails or gives something else."""
        if not problems:
            return []
        arguments = columns(problems, groups, rollout.completions())
        arguments |= {"log_extra": dropped, "log_metric": dropped}
        absent = [name for name in self.needs if name not in arguments]
        if absent:
            raise ValueError(f"asks for {absent[0]}; there are {', '.join(sorted(arguments))}")
        if not self.takes_all:
            arguments = {name: arguments[name] for name in arguments if name in self.takes}
        count = sum(map(len, groups))

        try:
            numbers = self.function(**arguments)
            if isinstance(numbers, Iterator):           # of map or yield, which fail only now
                numbers = list(numbers)
        except (Exception, SystemExit) as error:        # exit() would end the run without a word
            raise ValueError(where(error, self.file)) from None

        try:
            numbers = [None if number is None else float(number) for number in numbers]
        except (TypeError, ValueError):
            raise ValueError(f"gave {str(numbers)[:100]!r}, not a list of numbers") from None
        if len(numbers) != count:
            raise ValueError(f"gave {len(numbers)} numbers for {count} completions")
        if not all(number is None or math.isfinite(number) for number in numbers):
            raise ValueError("gave a number that is not finite")

        G = count // len(problems)
        numbers = [math.nan if number is None else number for number in numbers]
        return [numbers[start:start + G] for start in range(0, count, G)]


def columns(problems, groups, ids):
    """The arguments of a function in TRL's signature: {name: list of N x G}.

    Each completion has lists of its own, so that a function may change what it is given."""
    found = {"prompts": [], "completions": [], "completion_ids": list(ids)}
    fields = [{name: value for name, value in problem.items() if name not in OURS}
              | problem.get("columns", {}) for problem in problems]
    names = {name for own in fields for name in own if name not in found}
    found |= {name: [] for name in names}

    for problem, own, texts in zip(problems, fields, groups):
        messages = problem.get("messages")
        for text in texts:
            answered = [{"role": "assistant", "content": text}]
            found["prompts"].append(copy.deepcopy(messages or problem["problem"]))
            found["completions"].append(answered if messages else text)
            for name in names:
                found[name].append(copy.deepcopy(own.get(name)))
    return found


def where(error, file):
    """One line: the error, and the last line of the file that it came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if Path(frame.filename) == file.absolute()]
    place = f"{file}:{lines[-1]}: " if lines else f"{file}: "
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"{place}{type(error).__name__}: {reason}"
