r"""Comparison of two answers: `equal(given, gold)`. The rules are written down in reward.py.

An answer is compared by its form, the outermost first: a list or set, a union, a relation, a tuple
or matrix, a leaf. A leaf is words, or an expression that is compared by its value (expression.py).
The text is cut outside all brackets. The parts and the depth are capped, so the work is bounded.

Most rules are symmetric. The others forgive the given answer its form where the gold answer fixes
what is meant: x + y = 5 for a gold 5, and an expression in x for a gold equation linear in y.

Read it from the end: `equal` tries the readings of two answers, `_same` goes through the forms.
Both are cleaned by latex.py: ⦃1,2⦄ is a set, and ⟦⟦1,2⟧,⟦3,4⟧⟧ is a matrix with two rows.
"""

import itertools
import re

from verifier.expression import near, same_value, value
from verifier.latex import clean

MAX_ANSWER = 600     # characters; a longer answer is only compared as a string
MAX_ITEMS = 40       # entries of a list, tuple or matrix
MAX_DEPTH = 8        # forms inside forms

# -------------------------------------------------------------------------------------------- parts

_CLOSERS = ")]}⦄⟧"      # an interval closes with either bracket, so all of them count alike
_DEPTH = dict.fromkeys("([{⦃⟦", 1) | dict.fromkeys(_CLOSERS, -1)
_RELATIONS = "=≈≠<>≤≥∈"
_SEPARATORS = (",;", ";", "∪", "∖", ":", _RELATIONS)
_BRACKETS_AND = {signs: re.compile("[][(){}⦃⦄⟦⟧" + signs + "]") for signs in _SEPARATORS}


def _split(s, separators):
    """Split `s` at separators outside all brackets: (parts, the separators between them)."""
    if not any(c in s for c in separators):
        return [s], []

    parts = []
    found = []
    depth = 0
    begin = 0
    for match in _BRACKETS_AND[separators].finditer(s):
        sign = match[0]
        if sign in _DEPTH:
            depth += _DEPTH[sign]
        elif depth == 0:
            parts.append(s[begin:match.start()])
            found.append(sign)
            begin = match.end()

    parts.append(s[begin:])
    return parts, found


def _parts(s, separators):
    """Split `s` at separators outside all brackets and return the parts alone."""
    parts, _ = _split(s, separators)
    return parts


def _inside(s, openers):
    """Return what one pair of brackets around all of `s` encloses, or None without such a pair."""
    if len(s) < 2 or s[0] not in openers or s[-1] not in _CLOSERS:
        return None

    depth = 0
    for match in _BRACKETS_AND[";"].finditer(s):
        depth += _DEPTH.get(match[0], 0)
        if depth == 0:
            return s[1:-1] if match.end() == len(s) else None


def _both_signs(s):
    """Return the expressions that `s` stands for: two if it has a ±, else one."""
    if "±" not in s:
        return [s]
    return [s.replace("±", "+").replace("∓", "-"), s.replace("±", "-").replace("∓", "+")]


def _without_plus_minus(part):
    """Return the items that `part` stands for: (±1, ±2) is four pairs, 1 ± 2 is two numbers."""
    entries = _parts(_inside(part, "(") or "", ",;")
    if 1 < len(entries) < 6 and "∓" not in part:
        choices = itertools.product(*map(_both_signs, entries))
        return [f"({','.join(choice)})" for choice in choices]
    return _both_signs(part)


def _items(s):
    """Return the elements of a list or set; anything else is one element."""
    if "∈" in s:
        s = re.sub(r"^\w∈(?=[{⦃])", "", s)                                  # x ∈ {1, 2} is the set
    inside = _inside(s, "{⦃")
    while inside is not None:
        s = re.sub(r"^\w(?:[|:]|∈[^|:]*[|:])(?=.*[<>≤≥])", "", inside)     # {x | x < 3} is x < 3
        inside = _inside(s, "{⦃")

    parts = _parts(s, ",;")
    if ";" in s:
        groups = _parts(s, ";")
        if 1 < len(groups) < len(parts):                    # p=5, q=2; p=7, q=2 is a list of tuples
            parts = [_as_tuple(_parts(group, ",;")) or group for group in groups]

    if "±" not in s:
        return parts
    return [item for part in parts for item in _without_plus_minus(part)]


def _as_tuple(items):
    """Return `p = 5, q = 2` as (5,2) and a single item as it is; None for other lists."""
    if len(items) == 1:
        return items[0]

    values = []
    for item in items:
        sides, signs = _split(item, _RELATIONS)
        name, *named = sides
        if signs != ["="] or not NAME.fullmatch(name):
            return None
        values += named
    return f"({','.join(values)})"


def _entries(s):
    """Return (both brackets, entries) of a tuple, interval or matrix; ("", [s]) for the rest."""
    inside = _inside(s, "([⟦")
    return ("", [s]) if inside is None else (s[0] + s[-1], _parts(inside, ",;"))


# ---------------------------------------------------------------------------------------- relations

# The name left of "=" is no part of the answer: x, x_1, \theta, f', f(x), T(10), |AB|, (p,q), Area.
_LETTER = (r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|theta|lambda|mu|rho|omega|ell))"
           r"(?:_(?:\{[\\\w+, -]+\}|\w))?'*(?:\^\{-1\})?(?:\((?:[\w,]|\([\w,]*\))*\))?")
NAME = re.compile(rf"{_LETTER}(?::{_LETTER})*|\|?[A-Z]{{2,3}}\|?|[A-Z]{{2}}(?::[A-Z]{{2}})+"
                   rf"|(?!not)[A-Za-z]{{3,12}}|\({_LETTER}(?:,{_LETTER})+\)")
_ASKED = re.compile(rf"{_LETTER}(?:[-+*]?{_LETTER})+")                # a+d+e+f = 2k for a gold 2k
# what a gold answer asks for beside names: \frac{NO}{BO}, \sin A, AB^2, x_1+x_2, but not x+y
_QUANTITY = re.compile(
    r"\\?(?:sin|cos|tan|cot|sec|csc|log|ln|max|min|lim|gcd|lcm|det|sum|prod|int|dim)(?![a-z]).+"
    r"|\\frac\{[a-z]\}\{[a-z]\}"
    r"|(?=.*(?:[A-Z]{2}|[_(]))(?:[-+*/:|{}]|\\(?:frac|overline|triangle|vec)|\^(?:[0-9]|\{[0-9]\})"
    r"|[A-Za-z](?:_(?:\{[^{}]*\}|\w))?'*\([^()]*\)|[A-Za-z]_(?:\{[^{}]*\}|\w)|[A-Z])+")
_MIRROR = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}


def _interval(sides, signs):
    """Return the interval that an inequality in one name describes, as text, or None."""
    if len(sides) == 2:
        negative = [s[:1] == "-" and bool(NAME.fullmatch(s[1:])) for s in sides]
        if any(negative):                                                  # -x > -1 is x < 1
            sides = [s[1:] if minus else f"-({s})" for s, minus in zip(sides, negative)]
            signs = [_MIRROR.get(signs[0], signs[0])]

    # the smallest side stands first from here on: 5 > x is x < 5
    if set(signs) <= {">", "≥"}:
        sides = sides[::-1]
        signs = [_MIRROR[sign] for sign in signs[::-1]]
    if not set(signs) <= {"<", "≤"} or len(sides) > 3:
        return None

    opener = "[" if signs[0] == "≤" else "("
    closer = "]" if signs[-1] == "≤" else ")"
    if len(sides) == 3:
        low, name, high = sides
        return f"{opener}{low},{high}{closer}" if NAME.fullmatch(name) else None
    left, right = sides
    if NAME.fullmatch(left):
        return f"(-∞,{right}{closer}"
    return f"{opener}{left},∞)" if NAME.fullmatch(right) else None


def _union(s):
    """Return the parts of a union; x ≠ 3, x ∈ A ∪ B and A ∖ {3} are unions too."""
    sides, signs = _split(s, _RELATIONS)
    if signs in (["≠"], ["∈"]):
        s = _unnamed(sides, signs, 0) or s

    whole, *removed = _parts(s.replace("-⦃", "∖⦃"), "∖")
    remaining = _punctured(whole, sum(map(_items, removed), [])) if removed else None
    return remaining or _parts(s, "∪")


def _punctured(whole, points):
    """Return the parts of an interval without points inside it, or None for anything else."""
    sides, signs = _split(_items(whole)[0], _RELATIONS)
    interval = (_unnamed(sides, signs, 0) or "") if signs else whole
    brackets, ends = _entries(interval)
    values = [value(point) for point in points]
    if len(ends) != 2 or any(v is None or v.floats[0] is None for v in values):
        return None

    # cut at the points from left to right
    cuts = sorted({complex(v.floats[0]).real: point for v, point in zip(values, points)}.items())
    opener, closer = brackets
    low, high = ends
    starts = [opener + low] + ["(" + point for _, point in cuts]
    stops = [point + ")" for _, point in cuts] + [high + closer]
    return [f"{start},{stop}" for start, stop in zip(starts, stops)]


def _as_union(items):
    """Return `x < 2, x > 5`, or one union, as a list of its parts; None for other lists."""
    if len(items) == 1:
        return _parts(items[0], "∪")

    relations = [_split(item, _RELATIONS) for item in items]
    intervals = [_interval(sides, signs) if signs else None for sides, signs in relations]
    return intervals if all(intervals) else None


def _unnamed(sides, signs, depth):
    """Return what a relation such as `x = v`, `x ∈ v` or `x = v = w` says about x, or None.

    A chain of equalities that is not true says nothing."""
    if signs == ["≠"]:
        name, point = sides
        return f"(-∞,{point})∪({point},∞)" if NAME.fullmatch(name) else None
    if not set(signs) <= set("=≈∈"):
        return _interval(sides, signs)

    # the sides that are no names must all be equal; each has the sign on its left
    signed = zip(sides, ["="] + signs)
    rest = [(side, sign) for side, sign in signed if not NAME.fullmatch(side)]
    if not rest:
        return sides[-1]
    first, _ = rest[0]
    for side, sign in rest[1:]:
        if not (sign == "≈" and _roughly(first, side) or _same(first, side, depth)):
            return None
    return first


def _roughly(a, b):
    """Return whether the values of two expressions differ by at most 1 %."""
    u, v = value(a), value(b)
    if u is None or v is None or None in u.floats + v.floats:
        return False
    return all(near(x, y, 1e-2) for x, y in zip(u.floats, v.floats))


def _same_relation(given, gold, depth):
    """Return whether two answers are equal of which at least one is a relation."""
    given_sides, given_signs = _split(given, _RELATIONS)
    gold_sides, gold_signs = _split(gold, _RELATIONS)
    if given_signs == gold_signs == ["="] and _same_equation(*given_sides, *gold_sides):
        return True
    if gold_signs == ["="] and not given_signs and _solves(given, *gold_sides):
        return True

    # what each side says without its name: x = 5 is 5
    given_plain = _unnamed(given_sides, given_signs, depth) if given_signs else given
    gold_plain = _unnamed(gold_sides, gold_signs, depth) if gold_signs else gold
    if given_signs == ["="] and not gold_signs and given_plain is None:
        asked, said = given_sides
        if _ASKED.fullmatch(asked) or _QUANTITY.fullmatch(asked):
            given_plain = said                                          # x + y = 5 for a gold 5
    elif gold_signs[:1] == ["="] and gold_plain is None and _QUANTITY.fullmatch(gold_sides[0]):
        gold_plain = _unnamed(["x", *gold_sides[1:]], gold_signs, depth)
    if given_plain and gold_plain:
        named = [sides[0] for sides in (given_sides, gold_sides) if len(sides) > 1]
        letters = {name for name in named if len(name) == 1 and name.isalpha()}
        return len(letters) < 2 and _same(given_plain, gold_plain, depth)   # x = 5 is not y = 5

    same_signs = given_signs == gold_signs != []
    return same_signs and all(_same(x, y, depth) for x, y in zip(given_sides, gold_sides))


def _same_equation(given_left, given_right, gold_left, gold_right):
    """Return whether left - right of one equation is a constant multiple of the other's.

    Not so where the gold equation is solved for a name: 2x + 1 = 11 does not answer x = 5.
    """
    solution = value(gold_right)
    if solution and not solution.names and NAME.fullmatch(gold_left):
        return False

    u = value(f"({given_left})-({given_right})")
    v = value(f"({gold_left})-({gold_right})")
    if u is None or v is None or not all(u.floats + v.floats):
        return False

    # compared with the first of the points; an equation between constants says nothing
    if all(near(x, u.floats[0]) for x in u.floats):
        return False
    return all(near(x * v.floats[0], u.floats[0] * y) for x, y in zip(u.floats, v.floats))


def _solves(given, left, right):
    """Return whether `given` is what a gold equation, linear in one more name, says of it."""
    equation = f"({left})-({right})"
    u, v = value(given), value(equation)
    names = v.names - u.names if u and v else ()
    if len(names) != 1:
        return False
    [name] = names
    if not re.fullmatch(r"[A-Za-z]|\\[a-z]+", name):
        return False

    # at given + 0, 1 and 2 a linear left - right that `given` solves is 0, r and 2r
    at = [value(replaced(equation, name, f"({given}+{k})")) for k in range(3)]
    if any(v is None or None in v.floats for v in at):
        return False
    zero, once, twice = (v.floats for v in at)
    return all(abs(x) < 1e-9 < abs(y) and near(2 * y, z) for x, y, z in zip(zero, once, twice))


def replaced(s, name, other):
    r"""Return `s` with `name`, a letter or \command, replaced; letters inside \commands stay."""
    return re.sub(r"\\[A-Za-z]+|[A-Za-z]", lambda m: other if m[0] == name else m[0], s)


# -------------------------------------------------------------------------------------------- forms

def _same_items(given, gold, depth):
    """Return whether two lists are equal in any order, and lists of tuples as sets."""
    if max(len(given), len(gold)) > MAX_ITEMS:
        return False
    if all(_inside(x, "(") for x in given + gold):
        for x in given:
            if not any(_same(x, y, depth) for y in gold):
                return False
        for y in gold:
            if not any(_same(x, y, depth) for x in given):
                return False
        return True

    # single letters answer a question for an order, so they keep it
    if len(given) != len(gold):
        return False
    if all(len(x) == 1 and x.isalpha() for x in given + gold):
        return given == gold

    # each given item uses up the first gold item that it equals
    rest = list(gold)
    for x in given:
        match = next((i for i, y in enumerate(rest) if _same(x, y, depth)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _same_lists(given, gold, depth):
    """Return whether two lists are equal, also as unions of intervals or as tuples of values."""
    if _same_items(given, gold, depth):
        return True
    if len(given) == len(gold):
        return False

    unions = _as_union(given), _as_union(gold)
    if all(unions) and max(map(len, unions)) > 1:
        return _same_items(*unions, depth)
    tuples = _as_tuple(given), _as_tuple(gold)
    return all(tuples) and _same(*tuples, depth)


def _same_entries(given, gold, depth):
    """Return whether two tuples, intervals or matrices are equal; None when neither is one."""
    given_brackets, given_entries = _entries(given)
    gold_brackets, gold_entries = _entries(gold)
    if len(given_entries) == len(gold_entries) == 1 and "⟦" not in given[:1] + gold[:1]:
        return None

    if given_brackets != gold_brackets:
        # a column vector may be written as a tuple: its rows ⟦1⟧ and ⟦2⟧ are the entries 1 and 2
        vectors = "⟦⟧" in (given_brackets, gold_brackets) and len(given_entries) > 1
        if not (vectors and given_brackets and gold_brackets):
            return False
        given_entries = [_inside(x, "⟦") or x for x in given_entries]
        gold_entries = [_inside(y, "⟦") or y for y in gold_entries]

    if len(given_entries) != len(gold_entries) or len(given_entries) > MAX_ITEMS:
        return False
    return all(_same(x, y, depth) for x, y in zip(given_entries, gold_entries))


_COUNTED = re.compile(r"([^A-Za-z]*[0-9]) ?([A-Za-z][A-Za-z ]+)")
_CLOCK = re.compile(r"([0-9]{1,2}):([0-5][0-9])\s*(?:([ap])\.?m\.?)?", re.I)


def _same_ratio(given, gold):
    """Return whether two clock times are the same time, or two ratios equal up to a factor.

    A ratio of two terms, and only of two, is also their quotient.
    """
    clocks = _CLOCK.fullmatch(given), _CLOCK.fullmatch(gold)
    if all(clocks):
        given_time, gold_time = map(_time, clocks)
        return given_time == gold_time

    given_terms, gold_terms = (_parts(_inside(s, "(") or s, ":") for s in (given, gold))
    if len(given_terms) < 3 and len(gold_terms) < 3:
        quotients = [terms[0] if len(terms) == 1 else "({})/({})".format(*terms)
                     for terms in (given_terms, gold_terms)]
        return _same_value(*quotients)
    if len(given_terms) != len(gold_terms) or len(gold_terms) > MAX_ITEMS:
        return False

    # every term times the other ratio's first term that is not 0
    pairs = list(zip(given_terms, gold_terms))
    first = next((pair for pair in pairs if not _same_value(pair[1], "0")), ("0", "0"))
    if any(_same_value(x, "0") for x in first):
        return False
    given_first, gold_first = first
    return all(_same_value(f"({x})*({gold_first})", f"({y})*({given_first})") for x, y in pairs)


def _time(clock):
    """Return (hour of the day, minute as text) of a match of _CLOCK."""
    hour, minute, half = clock.groups()
    return int(hour) % 12 + 12 * (half in "pP") if half else int(hour), minute


def _same_value(given, gold):
    """Return whether two expressions have the same value."""
    given_number, gold_number = given.rstrip("%"), gold.rstrip("%")
    u, v = value(given_number), value(gold_number)
    if u is None or v is None:
        return False

    # a percent sign on one side only is 1/100 beside a number below 1, else a unit
    if given.endswith("%") and not gold.endswith("%") and _below_one(v):
        u = value(f"({given_number})/100")
    if gold.endswith("%") and not given.endswith("%") and _below_one(u):
        v = value(f"({gold_number})/100")
    return same_value(u, v)


def _below_one(v):
    """Return whether a Value is smaller than 1 in size."""
    return v.floats[0] is not None and abs(v.floats[0]) < 1


def _same_words(given, gold):
    """Return whether two texts are the same words, without case, spaces, quotes and full stops.

    A number before the same words may be written in two ways, as in 5 lakh and 5.0 lakh.
    """
    counted = _COUNTED.fullmatch(given), _COUNTED.fullmatch(gold)
    if all(counted) and counted[0][2] == counted[1][2]:
        return _same_value(counted[0][1], counted[1][1])
    given, gold = (re.sub(r"[\s\"']|\.(?![0-9])", "", s).lower() for s in (given, gold))
    return given == gold and re.search("[a-z]{2}", given) is not None


def _same(given, gold, depth=0):
    """Return whether two cleaned answers are equal, form by form from the outermost."""
    if given == gold:
        return given != ""
    if depth > MAX_DEPTH or not given or not gold:
        return False

    given_items, gold_items = _items(given), _items(gold)
    if len(given_items) > 1 or len(gold_items) > 1:
        return _same_lists(given_items, gold_items, depth + 1)

    # a set of one element is this element from here on
    [given], [gold] = given_items, gold_items
    given_parts, gold_parts = _union(given), _union(gold)
    if len(given_parts) > 1 or len(gold_parts) > 1:
        return _same_items(given_parts, gold_parts, depth + 1)

    if _split(given, _RELATIONS)[1] or _split(gold, _RELATIONS)[1]:
        return _same_relation(given, gold, depth + 1)
    entries = _same_entries(given, gold, depth + 1)
    if entries is not None:
        return entries

    if ":" in given or ":" in gold:
        return _same_ratio(given, gold) or _same_words(given, gold)
    return given == gold != "" or _same_value(given, gold) or _same_words(given, gold)


# ----------------------------------------------------------------------------------------- equality

_PLAIN = re.compile(r"(?:\\?\$)?([+-]?)([0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)?(?:\.([0-9]*))?\$?")
_GROUPED = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_CENTS = re.compile(r"\bcents?\b")


def _plain(s):
    """Return (is negative, digits, decimals) of a number without outer zeros; None for others."""
    match = _PLAIN.fullmatch(s)
    if not match or not (match[2] or match[3]):
        return None
    whole = (match[2] or "").replace(",", "").lstrip("0")
    decimals = (match[3] or "").rstrip("0")
    return match[1] == "-" and bool(whole or decimals), whole, decimals


def _readings(s):
    """Return the cleaned readings of an answer: `100,101` is one number or a list of two."""
    if not _GROUPED.search(s):
        return {clean(s)}
    return {clean(s), clean(_GROUPED.sub(lambda match: match[0].replace(",", ""), s))}


def equal(given: str, gold: str) -> bool:
    """Return whether two answers are equal by their forms; reward.py adds some conventions.

    Args: given and gold, answers as written, in LaTeX or plain text, without the mark around them.
    An empty answer equals none, and one longer than MAX_ANSWER only itself. Never raises.
    """
    if not (isinstance(given, str) and isinstance(gold, str)):
        return False
    given, gold = given.strip(" \n"), gold.strip(" \n")
    if max(len(given), len(gold)) > MAX_ANSWER:
        return given == gold
    if given == gold:
        return given.isdigit() or clean(given) != ""        # most right answers end here

    # two numbers are compared by their digits; with commas in both they may also be lists
    given_number, gold_number = _plain(given), _plain(gold)
    if given_number and gold_number:
        if given_number == gold_number or not ("," in given and "," in gold):
            return given_number == gold_number

    # dollars are not cents
    if "$" in given and _CENTS.search(gold) or "$" in gold and _CENTS.search(given):
        return False

    try:
        for gold_reading in _readings(gold):
            if any(_same(given_reading, gold_reading) for given_reading in _readings(given)):
                return True
    except (ArithmeticError, RecursionError):
        pass                                            # a number too large to compare as a float
    return False
