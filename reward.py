r"""Rewards from verified answers: find a completion's final answer and compare it with the gold answer.

A completion is untrusted text. Nothing in it is ever executed: no eval, no algebra system, no signals, no
processes. Every step is bounded (text read, answer length, nesting, size of numbers): the worst input costs
tens of milliseconds, and `verify` never raises. In doubt it says False: a wrong answer that is paid teaches
the policy a trick, a right answer that is not paid costs one sample.

Extraction (strict). What follows an end-of-text token is cut. Four kinds of mark announce a final answer:
  box        \boxed{x}, \fbox{x}, \boxed 2        (balanced braces; an unclosed or empty box is no answer)
  tag        <answer>x</answer>
  hashes     #### x to the end of the line        (GSM8K; a Markdown heading "#### Step 2" is no answer)
  statement  "the final answer is x.", "**Answer:** x", "A: x" to the end of the sentence
The last mark wins, whatever its kind; but a statement overrides another kind only as "final answer" with a
value. Marks of one kind that directly follow each other (\boxed{3} or \boxed{4}) are one answer, the list
"3, 4": right when the gold answer is that list, a hedge and wrong when it is one value. Text without any mark
has an answer only as a worked conclusion: the last sentence, complete, gives one number, and the text has
computed it ("88 - 36 = 52. She bought 52 more tins."). lenient=True falls back to the last number in the text
instead; it is for a second column in an evaluation, never for a reward.

Equality (answers.py). Spelling is normalised (latex.py: LaTeX, Unicode, thousands separators, currency, degrees,
units and labels in words). Then by form: lists and sets in any order; tuples, intervals and matrices entry by
entry; unions; equations and inequalities. A leaf is an expression (expression.py): numbers and rational functions
are compared exactly, others at four fixed pseudo-random points to 1e-9, constants to 1e-12. A rounded decimal is
not equal to the exact value. What is no expression is compared as words, without case.
  Names    x = 5 is 5. A chain of equalities must be true: 98765 = 5 is not 5. A \approx B is A if B is near.
           An equation that still has to be solved is not its solution: 2x + 1 = 11 does not answer x = 5.
  Letters  f(z) = z is f(x) = x; n \pi is k \pi, as an integer is meant. Otherwise names are what they are.
  Percent  on one side only: a unit (12% is 12) if the bare number is at least 1, else 1/100 (50% is .5).
  Units    ignored, not converted. Cents are not dollars. Words that change a value (million) are no unit.
  Angles   degrees are a unit too, but beside an answer with \pi they are converted.
  Ratios   3:1 is 3; 8:34 p.m. is 20:34.
  Bases    12_5 is equal to 12_5 alone, not to 12, 12_6 or 7.

Left out: number words, unit conversion, limits, integrals, piecewise functions.
"""

import re

from verifier.answers import MAX_ANSWER, MAX_ITEMS, equal

TAIL = 20_000        # characters of a completion that are searched, from its end
MAX_PLACES = 50      # of the word "answer", from the end, where a statement is looked for

# ------------------------------------------------------------------------------------ marks

_END = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|im_start|>user", "</s>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}(?:(\{)|([^\s{}$.,\\]+))")
_TAG = re.compile(r"<answer>(.{0,%d}?)</answer>" % MAX_ANSWER, re.S | re.I)
_HASHES = re.compile(r"####(?![ \t]*(?:[A-Za-z]|[0-9]+[.)][ \t]))([^\n#]+)")
_SAID = re.compile(
    r"\b(?:the|correct|my|final)[ \t]+(?:(?:correct|final)[ \t]+)?answer\**"
    r"(?:[ \t]+(?:to|for)\b[^.\n:=]{0,60}?)?[ \t]*(?:\bis\b|:|=)"
    r"|^[ \t*]*answer\**[ \t]*(?:[:=]|(?=\$|\\\())|(?<=[.!?] )\**answer\**[ \t]*:", re.I | re.M)
_A = re.compile(r"(?:^|\n)[ \t]*A:")
_SENTENCE = re.compile(r"(?:\\\[|\$\$)(.*?)(?:\\\]|\$\$)|(.*?)(?=\.(?:[\s*$]|$)|\n|</|$)", re.S)
_CLAUSE = re.compile(r"(?:The|the) (?:[A-Za-z ]|\$[^$0-9]{1,40}\$)+ (?:is|are|equals) (?=[-$\\0-9(])")
_HEDGE = re.compile(r"\b(?:not|or|either|neither|maybe|perhaps|if|never|wrong|about)\b|n't|[?<>]|\\[a-z]", re.I)
_SCALED = re.compile(r"[0-9] ?(?:[A-Za-z]\b|%|per ?cent|hundred|thousand|[mb]illion|dozen)", re.I)
_CONNECTOR = re.compile(r"(?:\\(?:text|quad)|\b(?:and|or)\b|\b[A-Za-z]\s*=|[\s$,;.*{}()\[\]\\])*", re.I)
_NUMBER = re.compile(r"(?:(?<![0-9A-Za-z)}])-[ ]?)?\$?(?:\\[dt]?frac\{[0-9]+\}\{[0-9]+\}|\.[0-9]+"
                     r"|[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:/[0-9]+)?)")


def _tail(completion):
    """The part that is read: up to the first end-of-text token, and the last TAIL characters of that."""
    if "<|" in completion or "</s>" in completion:
        ends = [i for i in map(completion.find, _END) if i >= 0]
        completion = completion[:min(ends, default=len(completion))]
    return completion.rstrip()[-TAIL:]


def _closing_braces(text, start):
    """{index of an opening brace: index of its closing brace} from start on, escaped braces skipped."""
    closing, stack = {}, []
    for m in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        if m[0] == "{":
            stack.append(m.start())
        elif m[0] == "}" and stack:
            closing[stack.pop()] = m.start()
    return closing


def _boxes(text):
    start = min(i for i in (text.find("\\boxed"), text.find("\\fbox")) if i >= 0)
    closing, end = _closing_braces(text, start), 0
    for m in _BOX.finditer(text, start):
        if m.start() < end:
            continue                                        # a box inside a box: the outer one is the answer
        if not m[1]:
            yield m.start(), m.end(), m[2]
        elif m.start(1) in closing:
            end = closing[m.start(1)] + 1
            yield m.start(), end, text[m.end():end - 1]


def _announcements(text, start):
    """(start, end) of "the final answer is", "Answer:" and "A:" after start, read around the last places of the word."""
    found = [(m.start(), m.end()) for m in _A.finditer(text, start)] if "A:" in text else []
    places = [m.start() for word in ("nswer", "NSWER") if word in text for m in re.compile(word).finditer(text, start)]
    for at in sorted(places)[-MAX_PLACES:]:
        m = _SAID.search(text, max(start, at - 25), at + 80)
        if m:
            found.append((m.start(), m.end()))
            start = m.end()
    return sorted(found)


def _statements(text, start=0, only_final=False):
    for begin, end in _announcements(text, start)[-MAX_PLACES:]:
        if only_final and "final" not in text[begin:end].lower():
            continue
        while end < len(text) and text[end] in " \t\n*:":
            end += 1
        sentence = _SENTENCE.match(text, end, end + 2 * MAX_ANSWER)
        if sentence:
            content = sentence[1] or sentence[2] or ""
            clause = _CLAUSE.match(content)                 # Final answer: The area of $ABC$ is 12
            yield begin, sentence.end(), content[clause.end():] if clause and not _HEDGE.search(clause[0]) else content


def _matches(pattern, text):
    return ((m.start(), m.end(), m[1]) for m in pattern.finditer(text))


# ------------------------------------------------------------------------------------ extraction

def _last_group(text, marks):
    """(start, content) of the last of `marks` (start, end, content), joined with those directly before it."""
    marks = [(s, e, c.strip(" \t\n*")) for s, e, c in marks if c.strip(" \t\n*$.{}")]
    if len(marks) < 2:
        return (marks[0][0], marks[0][2]) if marks else None
    start, _, content = marks[-1]
    contents = [content]
    for s, e, c in marks[-2:-MAX_ITEMS:-1]:
        if not (e <= start <= e + 40 and _CONNECTOR.fullmatch(text, e, start)) or sum(map(len, contents)) > MAX_ANSWER:
            break
        start = s
        if not any(equal(c, other) for other in contents):
            contents.append(c)
    return start, ", ".join(reversed(contents))


def _conclusion(text):
    """(start, number) when the last sentence is complete and gives one number, which was computed there or before."""
    text = text.rstrip()
    begin = max(text.rfind("\n"), *(text.rfind(end, 0, -1) for end in (". ", "! ", "? "))) + 1
    sentence = text[begin:begin + MAX_ANSWER]
    before, equals, after = sentence.rpartition("=")
    numbers = list(_NUMBER.finditer(after))
    if len(numbers) != 1 or not text.endswith(".") or _SCALED.search(after):
        return None
    number = numbers[0][0].lstrip("$")
    if _HEDGE.search(before) or _HEDGE.search(after[:numbers[0].end() + 25]):
        return None
    computed = equals or re.search(r"(?:=|\bis)\s*\$?" + re.escape(number) + r"(?![0-9]|[.,][0-9])", text[:begin])
    return (begin, number) if computed else None


def _find(text):
    """(start of the final answer's mark, answer), or None."""
    marks = []
    if "\\boxed" in text or "\\fbox" in text:
        marks.append(_boxes(text))
    if "nswer>" in text or "NSWER>" in text:
        marks.append(_matches(_TAG, text))
    if "####" in text:
        marks.append(_matches(_HASHES, text))
    found = max(filter(None, [_last_group(text, group) for group in marks]), default=None)
    if found is None:
        return _last_group(text, _statements(text)) or _conclusion(text)
    if "final" not in text[found[0]:].lower():
        return found
    stated = _last_group(text, _statements(text, found[0], only_final=True))
    return max(found, stated) if stated and re.search(r"[0-9\\$]", stated[1]) else found


def extract_answer(completion: str, lenient: bool = False) -> str | None:
    """The final answer of `completion` by the rules in this file's docstring.

    Args: completion, the model's text; lenient, fall back to the last number in it.
    Returns: the answer as written (several adjacent ones joined by ", "), or None. Never raises.
    """
    text = _tail(completion) if isinstance(completion, str) else ""
    found = _find(text)
    if found:
        return found[1]
    numbers = _NUMBER.findall(text) if lenient else []
    return numbers[-1] if numbers else None


def verify(completion: str, answer: str, lenient: bool = False) -> bool:
    """Whether the final answer of `completion` equals the gold `answer`.

    Args: completion, untrusted model text; answer, the gold answer, also a number with thousands commas;
    lenient, see `extract_answer`.
    Returns: a bool; False for an empty gold. Never raises, never runs code.
    """
    given = extract_answer(completion, lenient)
    return given is not None and equal(given, answer)


# ------------------------------------------------------------------------------------ rewards

def format_reward(completion: str) -> float:
    """1.0 for exactly <reasoning>...</reasoning><answer>...</answer>, each once, neither empty; else 0.0."""
    tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    if any(completion.count(tag) != 1 for tag in tags):
        return 0.0
    parts = re.split("|".join(tags), completion)
    in_order = completion.strip() == "".join(f"{a}{b}" for a, b in zip(("",) + tags, parts)).strip()
    before, reasoning, between, answer, after = (part.strip() for part in parts)
    return float(in_order and bool(reasoning and answer) and not (before or between or after))


def consistency_reward(completion: str) -> float:
    """1.0 when the last number before the final answer's mark equals that answer; without one 0.0."""
    text = _tail(completion)
    found = _find(text)
    numbers = _NUMBER.findall(text[:found[0]]) if found else []
    return float(bool(numbers) and equal(numbers[-1], found[1]))


def score(completions: list[list[str]], answers: list[str], format_weight: float = 0.0,
          consistency_weight: float = 0.0) -> list[list[float]]:
    """Rewards of N groups of G completions.

    Args: completions (N, G) texts; answers (N,) gold answers; the weights of `format_reward` and
    `consistency_reward` (usual values 1.0 and 0.5; 0.0, correctness alone, is the default).
    Returns: (N, G) floats: 1.0 for a verified answer plus the weighted options.
    Raises: ValueError when the lengths differ.
    """
    if len(completions) != len(answers):
        raise ValueError(f"score: {len(completions)} groups of completions but {len(answers)} answers")

    def one(completion, answer):
        reward = float(verify(completion, answer))
        if format_weight:
            reward += format_weight * format_reward(completion)
        if consistency_weight:
            reward += consistency_weight * consistency_reward(completion)
        return reward

    return [[one(completion, answer) for completion in group] for group, answer in zip(completions, answers)]


def correct(problems, groups):
    return [[float(p["check"](t) if p.get("check") else verify(t, p["answer"])) for t in g] for p, g in zip(problems, groups)]


def form(problems, groups):
    return [[format_reward(t) for t in g] for g in groups]


def consistency(problems, groups):
    return [[consistency_reward(t) for t in g] for g in groups]


REWARDS = {"correct": correct, "format": form, "consistency": consistency}


def weighted(text="", **weights):
    """The reward functions of a run: [(name, weight, function)]; correctness is always among them.

    text: NAME=WEIGHT,NAME=WEIGHT; weights: the same by name. Those of weight 0 are left out. Raises
    ValueError, one line, for a name that is not in REWARDS or a weight that is no number."""
    chosen = {"correct": 1.0, **weights}
    for item in filter(None, text.split(",")):
        name, _, weight = item.partition("=")
        if name not in REWARDS:
            raise ValueError(f"--reward {item}: choose {', '.join(REWARDS)}, each with =WEIGHT")
        try:
            chosen[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"--reward {item}: {weight!r} is not a number") from None

    return [(name, weight, REWARDS[name]) for name, weight in chosen.items()
            if weight or name == "correct"]
