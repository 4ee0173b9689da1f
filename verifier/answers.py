r"""Whether two answers are equal: `equal(given, gold)`. The rules are written down in reward.py.

An answer is compared by its form, outermost first: a list or set, a union, a relation, a tuple or matrix, a leaf. A leaf
is an expression, compared by its value (expression.py), or words. The text is cut into parts outside all brackets; the
number of parts and the depth are capped, so the work is bounded.

Most rules are symmetric. Those that are not forgive the given answer its form where the gold answer fixes what is
meant: x + y = 5 for a gold 5, and an expression in x for a gold equation that is linear in y.
"""

import itertools
import re

from verifier.expression import near, same_value, value
from verifier.latex import clean

MAX_ANSWER = 600     # a longer answer is only compared as a string
MAX_ITEMS = 40       # entries of a list, tuple or matrix
MAX_DEPTH = 8        # forms inside forms

# ------------------------------------------------------------------------------------ parts

_RELATIONS = "=≈≠<>≤≥∈"
_MIRROR = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
_BRACKETS = {s: re.compile("[][(){}⦃⦄⟦⟧" + s + "]") for s in (",;", ";", "∪", "∖", ":", _RELATIONS)}


def _split(s, separators):
    """Split `s` at separators outside all brackets: (parts, the separators between them)."""
    if not any(c in s for c in separators):
        return [s], []
    depth, begin, parts, found = 0, 0, [], []
    for m in _BRACKETS[separators].finditer(s):
        if m[0] in "([{⦃⟦":
            depth += 1
        elif m[0] in ")]}⦄⟧":                              # an interval closes with either bracket: all count alike
            depth -= 1
        elif depth == 0:
            parts.append(s[begin:m.start()])
            found.append(m[0])
            begin = m.end()
    return parts + [s[begin:]], found


def _inside(s, openers):
    """What a pair of brackets around all of `s` encloses, or None."""
    if len(s) < 2 or s[0] not in openers or s[-1] not in ")]}⦄⟧":
        return None
    depth = 0
    for m in _BRACKETS[";"].finditer(s):
        depth += (m[0] in "([{⦃⟦") - (m[0] in ")]}⦄⟧")
        if depth == 0:
            return s[1:-1] if m.end() == len(s) else None


def _signs(s):
    """An expression with ± is two."""
    if "±" not in s:
        return [s]
    return [s.replace("±", "+").replace("∓", "-"), s.replace("±", "-").replace("∓", "+")]


def _items(s):
    """The elements of a list or set (one element: anything else)."""
    s = re.sub(r"^\w∈(?=[{⦃])", "", s) if "∈" in s else s
    while (inside := _inside(s, "{⦃")) is not None:
        s = re.sub(r"^\w(?:[|:]|∈[^|:]*[|:])(?=.*[<>≤≥])", "", inside)     # {x | 2 < x < 3} is the interval
    parts = _split(s, ",;")[0]
    if ";" in s and 1 < len(groups := _split(s, ";")[0]) < len(parts):         # p=5, q=2; p=7, q=2
        parts = [_as_tuple(_split(group, ",;")[0]) or group for group in groups]
    if "±" not in s:
        return parts
    items = []
    for part in parts:
        entries = _split(_inside(part, "(") or "", ",;")[0]
        if 1 < len(entries) < 6 and "∓" not in part:                       # (±1, ±2) is four pairs
            items += [f"({','.join(entry)})" for entry in itertools.product(*map(_signs, entries))]
        else:
            items += _signs(part)
    return items


def _as_tuple(items):
    """`p = 5, q = 2` as (5,2), or None."""
    sides = [_split(item, _RELATIONS) for item in items]
    if len(items) > 1 and all(signs == ["="] and _NAME.fullmatch(parts[0]) for parts, signs in sides):
        return f"({','.join(parts[1] for parts, _ in sides)})"


def _entries(s):
    """(brackets, entries) of a tuple, interval or matrix."""
    inside = _inside(s, "([⟦")
    return ("", [s]) if inside is None else (s[0] + s[-1], _split(inside, ",;")[0])


# ------------------------------------------------------------------------------------ relations

# What may stand left of "=" without being part of the answer: x, x_1, \theta, f', f(x), T(10), |AB|, (p,q), Area.
_LETTER = (r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|theta|lambda|mu|rho|omega|ell))(?:_(?:\{[\w+-]+\}|\w))?'*(?:\^\{-1\})?"
           r"(?:\((?:[\w,]|\([\w,]*\))*\))?")
_NAME = re.compile(rf"{_LETTER}(?::{_LETTER})?|\|?[A-Z]{{2,3}}\|?|[A-Z]{{2}}:[A-Z]{{2}}|(?!not)[A-Za-z]{{3,12}}"
                   rf"|\({_LETTER}(?:,{_LETTER})+\)")
_ASKED = re.compile(rf"{_LETTER}(?:[-+*]?{_LETTER})+")      # a+d+e+f = 2k for a gold 2k


def _interval(sides, signs):
    """The interval that an inequality in one name describes, as text, or None."""
    negative = [s[:1] == "-" and bool(_NAME.fullmatch(s[1:])) for s in sides]
    if len(sides) == 2 and any(negative):                                  # -x > -1 is x < 1
        sides = [s[1:] if minus else f"-({s})" for s, minus in zip(sides, negative)]
        signs = [_MIRROR.get(signs[0], signs[0])]
    if set(signs) <= {">", "≥"}:
        sides, signs = sides[::-1], [_MIRROR[c] for c in signs[::-1]]
    if not set(signs) <= {"<", "≤"} or len(sides) > 3:
        return None
    opener, closer = ("[" if signs[0] == "≤" else "("), ("]" if signs[-1] == "≤" else ")")
    if len(sides) == 3:
        return f"{opener}{sides[0]},{sides[2]}{closer}" if _NAME.fullmatch(sides[1]) else None
    if _NAME.fullmatch(sides[0]):
        return f"(-∞,{sides[1]}{closer}"
    return f"{opener}{sides[0]},∞)" if _NAME.fullmatch(sides[1]) else None


def _union(s):
    """The parts of a union; x ≠ 3, x ∈ A ∪ B and A \\ {3} are unions too."""
    parts, signs = _split(s, _RELATIONS)
    s = _unnamed(parts, signs, 0) or s if signs in (["≠"], ["∈"]) else s
    whole, *points = _split(s.replace("-⦃", "∖⦃"), "∖")[0]
    return points and _punctured(whole, _items(points[0])) or _split(s, "∪")[0]


def _punctured(whole, points):
    """The parts of an interval without some points, or None."""
    parts, signs = _split(_items(whole)[0], _RELATIONS)
    around, ends = _entries(_unnamed(parts, signs, 0) or "" if signs else whole)
    places = [value(point) for point in points]
    if len(ends) != 2 or None in places or any(place.floats[0] is None for place in places):
        return None
    cuts = [point for _, point in sorted((place.floats[0].real, point) for place, point in zip(places, points))]
    starts = [around[0] + ends[0]] + ["(" + cut for cut in cuts]
    stops = [cut + ")" for cut in cuts] + [ends[1] + around[1]]
    return [f"{start},{stop}" for start, stop in zip(starts, stops)]


def _intervals(items):
    """`x < 2, x > 5` as the parts of a union, or None."""
    parts = [_split(item, _RELATIONS) for item in items]
    parts = [_interval(*part) if part[1] else None for part in parts]
    return parts if all(parts) else None


def _unnamed(sides, signs, depth):
    """What `x = v`, `x in v` or `x = v = w` says about x, or None. A chain that is not true says nothing."""
    if signs == ["≠"]:
        return f"(-∞,{sides[1]})∪({sides[1]},∞)" if _NAME.fullmatch(sides[0]) else None
    if not set(signs) <= set("=≈∈"):
        return _interval(sides, signs)
    rest = [(side, sign) for side, sign in zip(sides, ["="] + signs) if not _NAME.fullmatch(side)]
    first = rest[0][0] if rest else sides[-1]
    for side, sign in rest[1:]:
        if not (sign == "≈" and _roughly(first, side) or _same(first, side, depth)):
            return None
    return first


def _roughly(a, b):
    u, v = value(a), value(b)
    return u is not None and v is not None and None not in u.floats + v.floats and all(
        near(x, y, 1e-2) for x, y in zip(u.floats, v.floats))


def _same_relation(a, b, depth):
    (sides_a, signs_a), (sides_b, signs_b) = _split(a, _RELATIONS), _split(b, _RELATIONS)
    if signs_a == signs_b == ["="] and _same_equation(sides_a, sides_b):
        return True
    if signs_b == ["="] and not signs_a and _solves(a, *sides_b):
        return True
    plain_a = _unnamed(sides_a, signs_a, depth) if signs_a else a
    plain_b = _unnamed(sides_b, signs_b, depth) if signs_b else b
    if signs_a == ["="] and not signs_b and plain_a is None and _ASKED.fullmatch(sides_a[0]):
        plain_a = sides_a[1]
    if plain_a and plain_b:
        names = {s[0] for s in (sides_a, sides_b) if len(s) > 1 and len(s[0]) == 1 and s[0].isalpha()}
        return len(names) < 2 and _same(plain_a, plain_b, depth)           # x = 5 is not y = 5
    return bool(signs_a) and signs_a == signs_b and all(_same(x, y, depth) for x, y in zip(sides_a, sides_b))


def _same_equation(a, b):
    """left - right of the one is a constant multiple of left - right of the other, and b is not solved for a name."""
    right = value(b[1])
    if right and not right.names and _NAME.fullmatch(b[0]):
        return False                                                       # 2x + 1 = 11 does not answer x = 5
    u, v = value(f"({a[0]})-({a[1]})"), value(f"({b[0]})-({b[1]})")
    if u is None or v is None or not all(u.floats + v.floats) or all(near(x, u.floats[0]) for x in u.floats):
        return False
    return all(near(x * v.floats[0], u.floats[0] * y) for x, y in zip(u.floats, v.floats))


def _solves(a, left, right):
    """The expression `a` is what the gold equation left = right, linear in one more name, says about that name."""
    u, equation = value(a), value(f"({left})-({right})")
    names = equation.names - u.names if u and equation else ()
    if len(names) != 1 or not re.fullmatch(r"[A-Za-z]|\\[a-z]+", name := [*names][0]):
        return False
    at = [value(_replaced(f"({left})-({right})", name, f"({a}+{k})")) for k in range(3)]       # 0, r, 2r if linear
    if any(v is None or None in v.floats for v in at):
        return False
    zero, once, twice = (v.floats for v in at)
    return all(abs(x) < 1e-9 < abs(y) and near(2 * y, z) for x, y, z in zip(zero, once, twice))


def _replaced(s, name, other):
    r"""`s` with a one-letter name replaced; the letters of \commands are left alone."""
    return re.sub(r"\\[A-Za-z]+|[A-Za-z]", lambda m: other if m[0] == name else m[0], s)


# ------------------------------------------------------------------------------------ forms

def _same_items(xs, ys, depth):
    """Equal as multisets, tuples as sets; single letters, which answer a question for an order, in their order."""
    if max(len(xs), len(ys)) > MAX_ITEMS:
        return False
    if all(_inside(x, "(") for x in xs + ys):
        return (all(any(_same(x, y, depth) for y in ys) for x in xs) and
                all(any(_same(x, y, depth) for x in xs) for y in ys))
    if len(xs) != len(ys):
        return False
    if all(len(x) == 1 and x.isalpha() for x in xs + ys):
        return xs == ys
    rest = list(ys)
    for x in xs:
        match = next((i for i, y in enumerate(rest) if _same(x, y, depth)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _same_lists(xs, ys, depth):
    """Two lists of which at least one has several items: also inequalities as a union, named values as a tuple."""
    if _same_items(xs, ys, depth):
        return True
    if len(xs) == len(ys):
        return False
    unions = [_intervals(items) if len(items) > 1 else _split(items[0], "∪")[0] for items in (xs, ys)]
    if all(unions) and max(map(len, unions)) > 1:
        return _same_items(*unions, depth)
    tuples = [_as_tuple(items) if len(items) > 1 else items[0] for items in (xs, ys)]
    return all(tuples) and _same(*tuples, depth)


def _same_entries(a, b, depth):
    """Tuples, intervals and matrices, entry by entry and with the same brackets; None when neither is one."""
    (around_a, xs), (around_b, ys) = _entries(a), _entries(b)
    if len(xs) == len(ys) == 1 and "⟦" not in a[:1] + b[:1]:
        return None
    if around_a != around_b and "⟦⟧" in (around_a, around_b):               # a column vector written as a tuple
        xs, ys = ([_inside(x, "⟦") or x for x in entries] for entries in (xs, ys))
        around_a = around_b if around_a and around_b and len(xs) > 1 else "different"
    if around_a != around_b or len(xs) != len(ys) or len(xs) > MAX_ITEMS:
        return False
    return all(_same(x, y, depth) for x, y in zip(xs, ys))


_CLOCK = re.compile(r"([0-9]{1,2}):([0-5][0-9])\s*(?:([ap])\.?m\.?)?", re.I)


def _same_ratio(a, b):
    """Clock times as times; other ratios as quotients."""
    times = [_CLOCK.fullmatch(s) for s in (a, b)]
    if all(times):
        hours = [int(t[1]) % 12 + 12 * (t[3] in "pP") if t[3] else int(t[1]) for t in times]
        return (hours[0], times[0][2]) == (hours[1], times[1][2])
    return _same_value(*("/".join(f"({part})" for part in _split(s, ":")[0]) if ":" in s else s for s in (a, b)))


def _same_value(a, b):
    """Two expressions with one value; for a percent sign on one side only see reward.py."""
    u, v = value(a.rstrip("%")), value(b.rstrip("%"))
    if u is None or v is None:
        return False
    if a.endswith("%") and not b.endswith("%") and _below_one(v):
        u = value(f"({a.rstrip('%')})/100")
    if b.endswith("%") and not a.endswith("%") and _below_one(u):
        v = value(f"({b.rstrip('%')})/100")
    return same_value(u, v)


def _below_one(v):
    return v.floats[0] is not None and abs(v.floats[0]) < 1


def _same_words(a, b):
    a, b = (re.sub(r"[\s\"']|\.(?![0-9])", "", s).lower() for s in (a, b))
    return a == b and re.search("[a-z]{2}", a) is not None


def _same(a, b, depth=0):
    """Compare two cleaned answers form by form."""
    if a == b or depth > MAX_DEPTH or not a or not b:
        return a == b != ""
    xs, ys = _items(a), _items(b)
    if len(xs) > 1 or len(ys) > 1:
        return _same_lists(xs, ys, depth + 1)
    a, b = xs[0], ys[0]
    xs, ys = _union(a), _union(b)
    if len(xs) > 1 or len(ys) > 1:
        return _same_items(xs, ys, depth + 1)
    if _split(a, _RELATIONS)[1] or _split(b, _RELATIONS)[1]:
        return _same_relation(a, b, depth + 1)
    entries = _same_entries(a, b, depth + 1)
    if entries is not None:
        return entries
    if ":" in a or ":" in b:
        return _same_ratio(a, b) or _same_words(a, b)
    return a == b != "" or _same_value(a, b) or _same_words(a, b)


# ------------------------------------------------------------------------------------ equality

_PLAIN = re.compile(r"(?:\\?\$)?([+-]?)([0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)?(?:\.([0-9]*))?\$?")
_GROUPED = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_DEGREES = re.compile(r"\\circ|\\degree|°|\bdegrees?\b")
_ARGUMENT = re.compile(r"[A-Za-z]\(([A-Za-z])\)=")


def _plain(s):
    """(sign, digits, decimals) of a number without leading and trailing zeros; None for anything else."""
    m = _PLAIN.fullmatch(s)
    if not m or not (m[2] or m[3]):
        return None
    whole, decimals = (m[2] or "").replace(",", "").lstrip("0"), (m[3] or "").rstrip("0")
    return m[1] == "-" and bool(whole or decimals), whole, decimals


def _readings(s):
    """`100,101` is a number with a thousands separator or a list of two: both readings, cleaned."""
    return {clean(s), clean(_GROUPED.sub(lambda m: m[0].replace(",", ""), s))} if _GROUPED.search(s) else {clean(s)}


def _same_angle(given, gold):
    """135^\circ is 3π/4: degrees on one side, π without degrees on the other."""
    degrees = [bool(_DEGREES.search(s)) for s in (given, gold)]
    a, b = clean(given), clean(gold)
    if degrees[0] == degrees[1] or "π" not in (b if degrees[0] else a):
        return False
    a, b = (f"({s})*π/180" if in_degrees else s for s, in_degrees in zip((a, b), degrees))
    return same_value(value(a), value(b))


def _same_renamed(given, gold):
    r"""f(x) = x and f(z) = z: the argument has any name; k \pi and n \pi: and so has a parameter that is an integer."""
    a, b = clean(given), clean(gold)
    arguments = [m[1] for m in map(_ARGUMENT.match, (a, b)) if m]
    if len(arguments) < 2:
        if not any("integer" in s or "π" in s or r"\mathbb" in s for s in (given, gold, a, b)):
            return False
        a, b = (right if _NAME.fullmatch(left) else s for s, (left, _, right) in ((s, s.partition("=")) for s in (a, b)))
    x, y = ({t for t in re.findall(r"\\[A-Za-z]+|[A-Za-z]", s) if len(t) == 1} for s in (a, b))
    if len(x - y) != 1 or len(y - x) != 1:
        return False
    (p,), (q,) = x - y, y - x
    if not (arguments == [p, q] or len(arguments) < 2 and {p, q} & set("jklmnpqrst")):
        return False
    return _same(_replaced(a, p, q), b)


def equal(given: str, gold: str) -> bool:
    """Whether two answers are equal by the rules in reward.py.

    Args: given and gold, answers as written, in LaTeX or plain text, without the mark around them.
    Returns: a bool; False when either is empty, or longer than MAX_ANSWER and not identical. Never raises.
    """
    if not (isinstance(given, str) and isinstance(gold, str)):
        return False
    given, gold = given.strip(" \n"), gold.strip(" \n")
    if max(len(given), len(gold)) > MAX_ANSWER:
        return given == gold
    if given == gold:
        return given.isdigit() or clean(given) != ""        # most right answers
    numbers = _plain(given), _plain(gold)
    if all(numbers) and (numbers[0] == numbers[1] or not ("," in given and "," in gold)):
        return numbers[0] == numbers[1]
    if any("$" in a and re.search(r"\bcents?\b", b) for a, b in ((given, gold), (gold, given))):
        return False
    try:
        same = any(_same(x, y) for y in _readings(gold) for x in _readings(given))
        return same or _same_angle(given, gold) or _same_renamed(given, gold)
    except (ArithmeticError, RecursionError):               # a number too large to compare as a float
        return False
