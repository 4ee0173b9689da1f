r"""Rewards: find the final answer of a completion and compare it with the gold answer.

A completion is untrusted text. Nothing in it is ever executed: no eval, no algebra system, no
signals, no processes. Every step is bounded (text read, answer length, nesting, size of numbers).
The worst input costs tens of milliseconds, and `verify` never raises. In doubt it says False: a
wrong answer that is paid teaches the policy a trick, a right one that is not paid costs one sample.

Extraction (extraction.py). Only what follows a thought is read. The last mark of any form is the
answer: \boxed{x}, <answer>x</answer>, #### x, or a statement such as "The answer is x". A mark that
the text denies ("is not \boxed{5}") is none, and several side by side are one list.

Equality (answers.py). Spelling is normalised (latex.py): LaTeX, Unicode, thousands separators,
currency, degrees, units and labels in words. Then answers are compared by form: lists and sets in
any order; tuples, intervals and matrices entry by entry; unions; equations and inequalities. A leaf
is an expression (expression.py). Numbers and rational functions are compared exactly, others at
four fixed pseudo-random points to 1e-9, constants to 1e-12. A rounded decimal is not equal to the
exact value. What is no expression is compared as words, without case.
  Names    x = 5 is 5. A chain of equalities must be true, so 98765 = 5 is not 5. A \approx B is A
           if B is near. An equation that still has to be solved is not its solution: 2x + 1 = 11
           does not answer x = 5.
  Letters  f(z) = z is f(x) = x, and n \pi is k \pi, as an integer is meant. Otherwise names are
           what they are.
  Percent  on one side only: a unit (12% is 12) if the bare number is at least 1, else 1/100 (50% is
           .5).
  Around   what stands around equal values must not differ: f(1) = 5 is not f(2) = 5, nor is "5
           cents" 5 dollars, or "wrong = 5" 5. A word left of a value has to be a known label.
  Units    ignored, not converted, if they are in verifier/units.txt: 5 m, 5 square feet. Any other
           word behind a number makes it wrong (million, tenths, below zero), unless the gold answer
           has it too. Cents are not dollars.
  Angles   degrees are a unit too, but beside an answer with \pi they are converted.
  Ratios   equal up to a factor, in order: 1:2:3 is 2:4:6 and not 1:3:2. One of two terms is also
           its quotient: 3:1 is 3. 8:34 p.m. is 20:34.
  Choices  of a gold answer (C) 12 the letter, the value or both are right; "C: the third" is C.
  Sides    where the gold answer alone has a left side, such as \frac{NO}{BO} = 2 or m_{\max} = 2,
           its right side is compared. Not so for an equation in letters: 3 does not answer x+y = 3.
  Bases    12_5 is equal to 12_5 alone, not to 12, 12_6 or 7.

Left out: number words, unit conversion, limits, integrals, piecewise functions. Of this project,
verifying needs this file, extraction.py, thoughts.py and verifier/.
"""

import math
import re

from extraction import answer_and_number_before, extract_answer
from verifier import answers
from verifier.answers import MAX_ANSWER, NAME, replaced
from verifier.expression import near, same_value, value
from verifier.latex import clean

# ----------------------------------------------------------------------------------------- equality

_DEGREES = re.compile(r"\\circ|\\degree|°|\bdegrees?\b")
_LETTER = re.compile("[A-Za-z°]")
_WORDED = re.compile(r"[=:]|(?<![\\A-Za-z])[A-Za-z]{3,}|\\(?:text|mathrm|sum)")
_ARGUMENT = re.compile(r"[A-Za-z]\(([A-Za-z])\)=")
_LETTER_UNIT = re.compile(                                           # 5 m, 5\,m/s^2, but not 5m
    r"(?<=[0-9})])(?: |~|\\[ ,;:])+(?:[mgshlLNJWV]|[cmk]m|k?g|ft)(?![A-Za-z])"
    r"(?: ?[/*]? ?(?:[mgshlL]|[cmk]m)(?![A-Za-z]))?(?:\^\{?-?[0-9]\}?|[²³])?"
    r"(?=[ .$]*(?:$|[,;)\]}]))")
_CHOICE = re.compile(r"\(?([A-J])[).:]([^,;:=<>≤≥≠≈∈*/^_!')+].*)")
_HEDGED = re.compile(
    r"\b(?:[A-J]|or|nor|not|neither|never|wrong|false|incorrect|maybe|perhaps|cannot|ruled|out"
    r"|except|invalid|impossible|unlikely|unsure|guess|reject(?:ed)?|eliminated?|excluded?"
    r"|discard(?:ed)?|dismiss(?:ed)?|fail(?:s|ed)?|no|none$)\b|n['’]t\b|[?]", re.I)
_CHOICES = re.compile(r"\([A-J]\)|\b[A-J][).:]")
_SPELLINGS = [(re.compile(pattern), usual) for pattern, usual in (
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"^\$?([^{}$]*)\\over(?![a-z])([^{}$]*)\$?$", r"\\frac{\1}{\2}"),
    (r"\\(?:SI|qty)\{([^{}]*)\}\{([^{}\\]*)\}", r"\1\\text{ \2}"),
    (r"^(?:US|USD|Rs\.?|INR)\s*(?:\\?\$\s*)?(?=[0-9])", ""),
    (r"^(?:\\text\{)?(?:minus|negative)\s*\}?\s*(?=[0-9\\])", "-"))]
_SPELLED = re.compile(r"\\(?:over(?![a-z])|SI|qty)|US|Rs|INR|minus|negative")
_PARAMETERS = set("jklmnpqrst")       # letters that an integer parameter may have,
_USUAL_PARAMETERS = set("jklmn")      # and that it has where nothing says that it is an integer


def _same_angle(given, gold):
    r"""Return whether degrees on one side are π without degrees on the other: 135^\circ is 3π/4."""
    given_in_degrees, gold_in_degrees = (bool(_DEGREES.search(s)) for s in (given, gold))
    given, gold = clean(given), clean(gold)
    if given_in_degrees == gold_in_degrees or "π" not in (gold if given_in_degrees else given):
        return False

    if given_in_degrees:
        given = f"({given})*π/180"
    else:
        gold = f"({gold})*π/180"
    return same_value(value(given), value(gold))


def _same_renamed(given, gold):
    r"""Return whether two answers are equal once a letter that may have any name is renamed.

    This is the argument of a function, as in f(x) = x and f(z) = z, or an integer, as in k \pi.
    """
    texts = clean(given), clean(gold)
    functions = [_ARGUMENT.match(text) for text in texts]
    if not all(functions):
        hinted = any(hint in s for s in (given, gold) for hint in ("integer", r"\mathbb"))
        if not hinted and "π" not in texts[0] + texts[1]:
            return False
        texts = [_without_name(text) for text in texts]

    # exactly one letter of each side is not on the other
    given_letters, gold_letters = map(_letters, texts)
    renamed, names = given_letters - gold_letters, gold_letters - given_letters
    if len(renamed) != 1 or len(names) != 1:
        return False
    [letter], [name] = renamed, names

    if all(functions):
        may_differ = [match[1] for match in functions] == [letter, name]
    else:
        may_differ = bool({letter, name} & _PARAMETERS) if hinted else (
            {letter, name} <= _USUAL_PARAMETERS and _is_periodic(texts[1], name))
    given, gold = texts
    return may_differ and answers.equal(replaced(given, letter, name), gold)


def _is_periodic(s, name):
    r"""Return whether the next integer adds a constant to each entry: k \pi, but not k \pi r^2."""
    entries = [entry for entry in re.split("[,;]", s) if name in _letters(entry)]
    steps = [value(f"({replaced(entry, name, f'({name}+1)')})-({entry})") for entry in entries]
    for step in steps:
        if step is None or None in step.floats or not all(step.floats):
            return False
        if not all(near(x, step.floats[0]) for x in step.floats):
            return False
    return bool(steps)


def _without_name(s):
    """Return the right side of `name = right side`, and anything else as it is."""
    left, _, right = s.partition("=")
    return right if NAME.fullmatch(left) else s


def _letters(s):
    r"""Return the set of letters of `s` that are not part of a \command."""
    return {name for name in re.findall(r"\\[A-Za-z]+|[A-Za-z]", s) if len(name) == 1}


def _same_without_letter(given, gold):
    r"""Return whether two answers are equal once a unit of one letter is dropped: 5 m is 5.

    It is no variable where the other side has none, and in the gold answer where \text says so.
    """
    if not _letters(clean(gold)):
        given, dropped = _LETTER_UNIT.subn("", given)
    elif re.search(r"\\(?:text|mathrm)", given) and not _letters(clean(given)):
        gold, dropped = _LETTER_UNIT.subn("", gold)
    else:
        return False
    return dropped > 0 and answers.equal(given, gold)


def _same_choice(given, gold):
    r"""Return whether the letters, or values, agree where one side has both: \textbf{(C)}\ 12.

    Words behind a letter count as its value only beside a letter alone, and not if they hedge.
    """
    given, gold = clean(given), clean(gold)
    both = [_CHOICE.fullmatch(s) for s in (given, gold)]
    if both[0] and _HEDGED.search(both[0][2]) or both[1] and _CHOICES.search(both[1][2]):
        return False
    if all(both):
        return both[0][1] == both[1][1] and answers.equal(both[0][2], both[1][2])
    if not any(both):
        return False

    letter, meant = (both[0] or both[1]).groups()
    other = gold if both[0] else given
    return other.strip("()") == letter or answers.equal(meant, other)


def _same_respelled(given, gold):
    r"""Return whether two answers are equal once 1 \over 2, \SI{5}{cm} and US\$5 are rewritten."""
    if not (_SPELLED.search(given) or _SPELLED.search(gold)):
        return False
    respelled = [_respelled(s) for s in (given, gold)]
    return respelled != [given, gold] and answers.equal(*respelled)


def _respelled(s):
    """Return an answer with a few spellings of numbers rewritten in a usual one."""
    for pattern, usual in _SPELLINGS:
        s = pattern.sub(usual, s)
    return s


_CONVENTIONS = (_same_angle, _same_renamed, _same_without_letter, _same_choice, _same_respelled)

# ----------------------------------------------------------------------------------- contradictions

# words that may stand left of a value: "Area = 9", "Total: 5"; any other may deny it
_LABELS = set("""
    answer area total sum perimeter volume length width height radius diameter distance speed rate
    time cost price profit number count value result solution product difference quotient remainder
    ratio probability average mean median mode range domain minimum maximum min max least greatest
    smallest largest slope intercept angle degree side base altitude age weight mass set final lcm
    gcd hcf gcf det rank dim surface option choice theta alpha beta gamma delta lambda""".split())
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}|\$")
_WORD = re.compile(r"(?<![\\A-Za-z_{])([A-Za-z]{3,})\s*[:=]|=\s*([A-Za-z]{3,})\s*$")
_LABELLED = re.compile(r"([A-Za-z][\w{}']*)\s*[:=]\s*([^\s,;:=]+)")
_COUNTED = re.compile(r"(?<![\w.])(-?[0-9][0-9.,/]*)\s+([a-z]{3,})\b")
_MEASURES = re.compile(
    r"\b(second|minute|hour|day|week|month|year|cent|dollar|inch|foot|yard|mile|meter|centimeter"
    r"|kilometer|millimeter|gram|kilogram|pound|ounce)(?:e?s)?\b")
_EACH = re.compile(r"\bfor (?:each|every|any) (?:[0-9]|[A-Za-z]\b)")
_CLOCK = re.compile(r"\s*([0-9]{1,2}):([0-5][0-9])\s*")
_SUM = re.compile(r"(.*?)\\sum\s*_\s*\{?\s*([A-Za-z])\s*=", re.S)
_NAMED = re.compile(
    r"([A-Za-z]|\\[a-z]+)(_(?:\{[^{}]*\}|\w))?('*)(\^\{-1\})?(\([^=]*\))?")


def _contradicts(given, gold):
    """Return whether what stands around equal values differs: 5 cents is not 5 dollars."""
    given, gold = (_TEXT.sub(r" \1 ", s).strip() for s in (given, gold))
    measures = [set(_MEASURES.findall(s.lower())) for s in (given, gold)]
    if all(measures) and not measures[0] & measures[1]:
        return True

    # Tom: 6, Ann: 5 is not Tom: 5, Ann: 6
    given_values, gold_values = _labelled(given), _labelled(gold)
    if given_values and given_values.keys() == gold_values.keys():
        if not all(answers.equal(v, gold_values[label]) for label, v in given_values.items()):
            return True

    # "wrong = 5", "Guess: 5" and "5 for every 3" are not 5
    words = [word for pair in _WORD.findall(given) for word in pair if word]
    if len(words) == 1 and not _may_label(words[0]) and words[0].lower() not in gold.lower():
        return True
    if "=" not in given and _EACH.search(given) and not _EACH.search(gold):
        return True
    return _is_clock_beside_number(given, gold) or _names_differ(given, gold) or any(
        _uses_index_outside(s) for s in (given, gold))


def _labelled(s):
    """Return {label: value} of at least two labels: Tom: 5, x_1 = 5 and 5 boys."""
    pairs = _LABELLED.findall(s.replace("_{", "_").replace("}", ""))
    pairs += [(word, number) for number, word in _COUNTED.findall(s)]
    values = {label: number.strip(",.") for label, number in pairs}
    return values if 1 < len(values) == len(pairs) else {}


def _may_label(word):
    """Return whether a word left of a value says nothing about it; xyz = 6 is a product."""
    in_order = sorted(set(word)) == list(word)      # xyz, abc: letters of a product, no word
    product = len(word) == 3 and in_order and not set(word) & set("eio")
    return word.isupper() or product or word.lower() in _LABELS


def _is_clock_beside_number(given, gold):
    """Return whether one side is a time such as 10:30, no ratio in lowest terms, and one none."""
    clocks = [_CLOCK.fullmatch(s) for s in (given, gold)]
    if bool(clocks[0]) == bool(clocks[1]) or ":" in (gold if clocks[0] else given):
        return False
    hour, minute = map(int, (clocks[0] or clocks[1]).groups())
    return math.gcd(hour, minute) > 1


def _uses_index_outside(s):
    r"""Return whether the index of a sum stands before the sum: i \sum_{i=1}^n i."""
    match = _SUM.match(s)
    return bool(match) and match[2] in _letters(match[1])


def _names_differ(given, gold):
    """Return whether two equations name different things: f(1) and f(2), AB and BC, y and y'."""
    equations = [clean(s) for s in (given, gold) if "=" in s]
    if any("," in equation for equation in equations):
        return False
    names = [equation.partition("=")[0].strip("|") for equation in equations]
    parts = [_NAMED.fullmatch(re.sub(r"_\{(\w)\}", r"_\1", name)) for name in names]
    if len(names) < 2 or names[0] == names[1]:
        return False
    if all(re.fullmatch("[A-Z]{2,3}", name) for name in names):
        return sorted(names[0]) != sorted(names[1])                     # AB is BA
    if not all(parts):
        return False

    (base, index, primes, inverse, argument), other = parts[0].groups(), parts[1].groups()
    if primes != other[2]:
        return True
    if not (index or inverse or argument) or not any(other[1:]):
        return False                                                    # y is f(x), x is x_1
    if argument and other[4] and len(argument) == len(other[4]) == 3:
        argument = other[4] if argument[1].isalpha() and other[4][1].isalpha() else argument
    return (base, index, inverse, argument) != (other[0], other[1], other[3], other[4])


def equal(given: str, gold: str) -> bool:
    """Return whether two answers are equal by the rules in this file's docstring.

    Args: given and gold, answers as written, in LaTeX or plain text, without the mark around them.
    An empty answer equals none, and one longer than MAX_ANSWER only itself. Never raises.
    """
    if not (isinstance(given, str) and isinstance(gold, str)):
        return False
    digits = given.isdigit() and gold.isdigit() and given.isascii() and gold.isascii()
    if digits and len(given) < 50 and len(gold) < 50:
        return given.lstrip("0") == gold.lstrip("0")                    # most answers end here
    if answers.equal(given, gold):
        worded = given != gold and (":" in gold or _WORDED.search(given))
        return not (worded and _contradicts(given, gold))
    if max(len(given), len(gold)) > MAX_ANSWER or not _LETTER.search(given + gold):
        return False                                                # no convention is about digits

    try:
        return any(same(given, gold) for same in _CONVENTIONS) and not _contradicts(given, gold)
    except (ArithmeticError, RecursionError):           # a number too large to compare as a float
        return False


def verify(completion: str, answer: str, lenient: bool = False) -> bool:
    """Return whether the final answer of `completion` equals the gold `answer`.

    Args: completion, untrusted model text; answer, the gold answer, also a number with thousands
    commas; lenient, see `extract_answer`.
    Returns: a bool; False for an empty gold answer. Never raises, never runs code.
    """
    given = extract_answer(completion, lenient)
    return given is not None and equal(given, answer)


def verifies_itself(answer: str) -> bool:
    """Return whether a gold answer, in a box, is right: else no completion can be.

    Not so are answers that clean to nothing ("$"), and those that end their box ("{1}, {2").
    """
    return answer.isdigit() or verify(f"\\boxed{{{answer}}}", answer)


# ------------------------------------------------------------------------ rewards of one completion

def right(problem, completion) -> bool:
    """Return whether `completion` answers `problem`.

    A task may bring its own checker along: a function (completion) -> bool under "check". Without
    one, `verify` compares with the problem's "answer".
    """
    completion = with_thought(problem, completion)
    check = problem.get("check")
    if check:
        return bool(check(completion))
    return verify(completion, problem["answer"])


def with_thought(problem, completion):
    """Return a completion behind the mark of a thought that its prompt opened, if it did.

    Chat templates of reasoning models end with <think>. Without it, what is said in a thought that
    was cut would look like an answer."""
    return problem.get("opened", "") + completion


def format_reward(completion: str, thought="reasoning") -> float:
    """Return 1.0 for exactly <reasoning>...</reasoning><answer>...</answer>, else 0.0.

    Each tag occurs once, neither part is empty, and there is no text outside of the two. thought:
    the name of the first tag.
    """
    tags = [f"<{thought}>", f"</{thought}>", "<answer>", "</answer>"]
    if re.findall("|".join(tags), completion) != tags:
        return 0.0

    parts = re.split("|".join(tags), completion)
    before, reasoning, between, answer, after = (part.strip() for part in parts)
    return float(bool(reasoning and answer) and not (before or between or after))


def consistency_reward(completion: str) -> float:
    """Return 1.0 when the last number before the final answer's mark equals it, else 0.0.

    That number may stand in the thought.
    """
    answer, number = answer_and_number_before(completion)
    return float(number is not None and equal(number, answer))


# ------------------------------------------------------------------------------- rewards of a batch

def _each(grade, problems, groups):
    """Return grade(problem, completion) as a float for each completion of each problem's group.

    Raises ValueError when there are not as many groups as problems.
    """
    if len(problems) != len(groups):
        raise ValueError(f"{len(problems)} problems but {len(groups)} groups of completions")
    rewards = []
    for problem, group in zip(problems, groups):
        rewards.append([float(grade(problem, completion)) for completion in group])
    return rewards


def correct(problems, groups) -> list[list[float]]:
    """Return (N, G) floats: 1.0 where a completion answers its problem, by `right`, else 0.0."""
    return _each(right, problems, groups)


def form(problems, groups) -> list[list[float]]:
    """Return (N, G) floats: `format_reward` of each completion; its usual weight is 0.2 to 1."""
    return _each(lambda *pair: format_reward(with_thought(*pair)), problems, groups)


def think(problems, groups) -> list[list[float]]:
    """Return (N, G) floats: the same of <think>...</think><answer>...</answer>, R1's form."""
    return _each(lambda *pair: format_reward(with_thought(*pair), "think"), problems, groups)


def consistency(problems, groups) -> list[list[float]]:
    """Return (N, G) floats: `consistency_reward` of each completion; its usual weight is 0.5."""
    return _each(lambda *pair: consistency_reward(with_thought(*pair)), problems, groups)


# A reward is a function (problems, groups) -> (N, G) floats. Problems are N dicts with at least
# "problem" and "answer", groups are N lists of G texts; ValueError when the two differ in length.
# To add one, write one function like those above and give it one line here.
REWARDS = {
    "correct": correct,
    "format": form,
    "think": think,
    "consistency": consistency,
}


def weighted(text="", **weights):
    """Return the reward functions of a run, [(name, weight, function)]; correctness is among them.

    text is NAME=WEIGHT,FILE.py:FUNCTION=WEIGHT,...; without =WEIGHT it is 1. weights are the same
    by name. Those of weight 0 are left out, but `correct`, which is always measured. Raises
    ValueError, in one line, for a name that is unknown or given twice, a file or function that
    cannot be loaded, a weight that is no finite number, and where every weight is 0.
    """
    chosen = {"correct": 1.0, **weights}
    functions = dict(REWARDS)
    given = [name for name, weight in weights.items() if weight]
    for item, name, weight in reward_items(text):
        if ":" in name:
            from user_reward import load
            name, function = load(name)
            if name in (*REWARDS, "overlong"):
                raise ValueError(f"--reward {item}: {name} is the name of a function here; "
                                 "give yours another")
            functions.setdefault(name, function)
        if name not in functions:
            raise ValueError(f"--reward {item}: choose {', '.join(REWARDS)} or FILE.py:FUNCTION, "
                             "each with =WEIGHT")
        if name in given:
            raise ValueError(f"--reward {item}: {name} is given twice; two functions need two "
                             "names, and format and consistency have flags of their own too")
        given.append(name)
        chosen[name] = finite(item, weight or "1")

    if not any(chosen.values()):
        raise ValueError("--reward: every weight is 0, so there is nothing to learn from")
    return [(name, weight, functions[name]) for name, weight in chosen.items()
            if weight or name == "correct"]


def reward_items(text):
    """Return the items of --reward, [(item, name or FILE.py:FUNCTION, weight as text or "")]."""
    found = []
    for item in filter(None, text.split(",")):
        file, colon, rest = item.rpartition(":")        # a folder's name may hold = too
        name, _, weight = rest.partition("=")
        found.append((item, file + colon + name, weight))
    return found


def correct_counts(text):
    """Return whether correctness has a weight in --reward: not where it says correct=0."""
    weights = [weight for item, _, weight in reward_items(text) if item.startswith("correct=")]
    return not weights or finite(text, weights[0]) != 0


def finite(item, text):
    """Return a weight as a number. Raises ValueError when it is none, or not finite."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"--reward {item}: {text!r} is not a finite number")
    return number


def parts(functions, problems, groups, group_size, rollout=None):
    """Return what each reward function says, before its weight: {name: (N, G) float64 tensor}.

    functions are those of `weighted`; N may be 0; functions of the user's see the rollout, and give
    nan where they do not apply. Raises ValueError, which names the function, when one fails or
    gives something else.
    """
    import torch                        # here, so that whoever only verifies does not wait for it

    import dist
    found, shape = {}, (len(problems), group_size)
    for name, _, function in functions:
        dist.detail(f"reward {name}")
        try:
            own = getattr(function, "sees_rollout", False)
            seen = (problems, groups, rollout) if own else (problems, groups)
            numbers = function(*seen)
            numbers = torch.tensor(numbers, dtype=torch.float64)
        except Exception as error:
            kind = "" if own else f"{type(error).__name__}: "
            raise ValueError(f"reward {name}: {kind}{error}") from error

        if not problems:
            numbers = numbers.view(shape)
        known = numbers[~numbers.isnan()] if own else numbers       # nan: it does not apply
        if numbers.shape != shape or not known.float().isfinite().all():
            raise ValueError(f"reward {name} gave {tuple(numbers.shape)}, or a number that is not "
                             f"finite in float32; (prompts, completions) = {shape} finite numbers "
                             "are needed")
        found[name] = numbers
    return found


def total(functions, parts):
    """Return the rewards: (N, G), the weighted sum of `parts`. What does not apply adds nothing."""
    return sum(weight * parts[name].nan_to_num() for name, weight, _ in functions)


def overlong(lengths, finished, correct, limit, buffer):
    """Return DAPO's soft punishment of long completions, 0 to -1 (arXiv 2503.14476, equation 13).

    It is 0 up to limit - buffer tokens, and falls in a line to -1 at the limit. Only completions
    that are right or were cut pay it, the cut ones where their group has a right one: else a wrong
    one would gain by giving up early. lengths, finished, correct: (N, G) tensors.
    """
    excess = (lengths - (limit - buffer)) / buffer
    right = correct > 0
    pays = right | (~finished & right.any(1, keepdim=True))
    return -excess.clamp(0, 1) * pays


def overlong_of(rollout, correct, config):
    """Return `overlong` of a rollout's completions: (N, G), like correct.

    Where --reward leaves correctness out, those pay that were cut."""
    lengths = (rollout.lengths - rollout.prompt_lengths).cpu().view(correct.shape)
    finished = rollout.finished.cpu().view(correct.shape)
    if not correct_counts(config.reward):
        correct = (~finished).double()
    return overlong(lengths, finished, correct, config.max_new_tokens, config.overlong_buffer)
