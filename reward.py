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
"3, 4": right when the gold answer is that list, a hedge and wrong when it is one value. lenient=True falls
back to the last number in the text; it is for a second column in an evaluation, never for a reward.

Equality. Spelling is normalised (LaTeX, Unicode, thousands separators, currency, degrees, units after a
value). Then by form: lists and sets in any order; tuples, intervals and matrices entry by entry; unions;
equations and inequalities. A leaf is an expression: its value is compared exactly (`Fraction`) where it is
rational, to 1e-9 where it is not, with variables at three fixed pseudo-random points. A rounded decimal is
not equal to the exact value. What is no expression is compared as words, without case.
  Names    x = 5 is 5. A chain of equalities must be true: 98765 = 5 is not 5. A \approx B is A if B is near.
  Percent  on one side only: a unit (12% is 12) if the bare number is at least 1, else 1/100 (50% is .5).
  Units    ignored, not converted. Cents are not dollars. Words that change a value (million) are no unit.
  Bases    12_5 is equal to 12_5 alone, not to 12, 12_6 or 7.

Left out: number words, clock times, degrees against radians, ratios as fractions, sums, piecewise
functions.
"""

import cmath
import functools
import math
import operator
import re
import zlib
from fractions import Fraction

TAIL = 20_000        # characters of a completion that are searched, from its end
MAX_ANSWER = 600     # a longer answer is only compared as a string
MAX_ITEMS = 40       # entries of a list, tuple or matrix, marks joined into one answer
MAX_DEPTH = 30       # nesting inside one expression
MAX_BITS = 4096      # size of exact numerators and denominators; beyond it floats, or no value
POINTS = 3           # evaluation points for variables; the last one also takes negative values

# ------------------------------------------------------------------------------------ extraction

_END = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|im_start|>user", "</s>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}(?:(\{)|([^\s{}$.,\\]+))")
_TAG = re.compile(r"<answer>(.{0,%d}?)</answer>" % MAX_ANSWER, re.S | re.I)
_HASHES = re.compile(r"####(?![ \t]*(?:[A-Za-z]|[0-9]+[.)][ \t]))([^\n#]+)")
_STATEMENT = re.compile(
    r"\b(?:the|correct|my|final)[ \t]+(?:(?:correct|final)[ \t]+)?answer\**"
    r"(?:[ \t]+(?:to|for)\b[^.\n:=]{0,60}?)?[ \t]*(?:\bis\b|:|=)"
    r"|^[ \t*]*answer\**[ \t]*[:=]|(?<=[.!?] )\**answer\**[ \t]*:|^[ \t]*A:", re.I | re.M)
_SENTENCE = re.compile(r"(?:\\\[|\$\$)(.*?)(?:\\\]|\$\$)|(.*?)(?=\.(?:[\s*$]|$)|\n|</|$)", re.S)
_CONNECTOR = re.compile(r"(?:\\(?:text|quad)|\b(?:and|or)\b|\b[A-Za-z]\s*=|[\s$,;.*{}()\[\]\\])*", re.I)
_NUMBER = re.compile(r"(?:(?<![0-9A-Za-z)}])-[ ]?)?\$?(?:\\[dt]?frac\{[0-9]+\}\{[0-9]+\}|\.[0-9]+"
                     r"|[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:/[0-9]+)?)")


def _tail(completion):
    """The part that is read: up to the first end-of-text token, and the last TAIL characters of that."""
    ends = [i for i in map(completion.find, _END) if i >= 0]
    return completion[:min(ends, default=len(completion))][-TAIL:]


def _closing_braces(text):
    """{index of an opening brace: index of its closing brace}, escaped braces skipped."""
    closing, stack = {}, []
    for m in re.finditer(r"\\.|[{}]", text, re.S):
        if m[0] == "{":
            stack.append(m.start())
        elif m[0] == "}" and stack:
            closing[stack.pop()] = m.start()
    return closing


def _boxes(text):
    if "\\boxed" not in text and "\\fbox" not in text:
        return
    closing, end = _closing_braces(text), 0
    for m in _BOX.finditer(text):
        if m.start() < end:
            continue                                        # a box inside a box: the outer one is the answer
        if not m[1]:
            yield m.start(), m.end(), m[2]
        elif m.start(1) in closing:
            end = closing[m.start(1)] + 1
            yield m.start(), end, text[m.end():end - 1]


def _statements(text, only_final):
    for m in _STATEMENT.finditer(text):
        if only_final and "final" not in m[0].lower():
            continue
        start = m.end()
        while start < len(text) and text[start] in " \t\n*:":
            start += 1
        sentence = _SENTENCE.match(text, start, start + 2 * MAX_ANSWER)
        if sentence:
            yield m.start(), sentence.end(), sentence[1] or sentence[2] or ""


def _matches(pattern, text):
    return ((m.start(), m.end(), m[1]) for m in pattern.finditer(text))


def _last_group(text, marks):
    """(start, content) of the last of `marks` (start, end, content), joined with those directly before it."""
    marks = [(s, e, c.strip(" \t\n*")) for s, e, c in marks if c.strip(" \t\n*$.{}")]
    if not marks:
        return None
    start, _, content = marks[-1]
    contents = [content]
    for s, e, c in marks[-2:-MAX_ITEMS:-1]:
        if not (e <= start <= e + 40 and _CONNECTOR.fullmatch(text, e, start)):
            break
        start = s
        if not any(equal(c, other) for other in contents):
            contents.append(c)
    return start, ", ".join(reversed(contents))


def _find(text):
    """(start of the final answer's mark, answer), or None."""
    groups = (_boxes(text), _matches(_TAG, text), _matches(_HASHES, text))
    found = [g for g in (_last_group(text, marks) for marks in groups) if g]
    stated = _last_group(text, _statements(text, only_final=bool(found)))
    if stated and (not found or re.search(r"[0-9\\$]", stated[1])):
        found.append(stated)
    return max(found, default=None)


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


# ------------------------------------------------------------------------------------ normalisation

# Each sign and each structural command becomes one character or nothing; the code below splits on characters.
_SIGNS = r"""
    π pi; ∞ infty; * cdot times ast; / div; ± pm; ∓ mp; ≤ le leq leqslant; ≥ ge geq geqslant; < lt; > gt;
    ≠ ne neq; ≈ approx; ∈ in; ∪ cup; ⦃ lbrace; ⦄ rbrace; | mid vert lvert rvert; ° circ degree; ⌊ lfloor;
    ⌋ rfloor; ⌈ lceil; ⌉ rceil; \frac dfrac tfrac cfrac; \binom dbinom tbinom"""
_COMMANDS = {name: line.split()[0] for line in _SIGNS.split(";") for name in line.split()[1:]}
_COMMANDS |= dict.fromkeys("left right big Big bigg Bigg bigl bigr displaystyle boxed".split(), "")
_COMMANDS |= dict.fromkeys("quad qquad".split(), " ")
_ESCAPES = {"\\{": "⦃", "\\}": "⦄", "\\%": "%", "\\!": "", "\\\\": "\\\\"}         # others: a space
_CHARACTERS = {0xFF01 + i: 0x21 + i for i in range(94)}                              # full-width forms
_CHARACTERS |= dict.fromkeys((0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0xAD))         # zero width: dropped
_CHARACTERS |= str.maketrans("−–×·⋅÷⁄º~’′、", "--***//° '',") | str.maketrans("$€£", "   ")
_CHARACTERS |= str.maketrans({"√": "\\sqrt ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"})
_SCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
_TEXT = r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|rm|bf)\s*\{([^{}]*)\}"
_UNIT_END = r"\s*(?:\^\s*\{?[0-9]\}?)?(?=[\s.]*(?:$|[,;)\]}⦄]))"
_TEXT_UNIT = re.compile(r"(?<=[0-9A-Za-z})π!%'|])\s*" + _TEXT + _UNIT_END)
_WORD_UNIT = re.compile(r"(?<=[0-9})π%])((?:\s+|(?=(?:cm|mm|km|kg|ft)\b))[A-Za-z][A-Za-z'/. -]*)" + _UNIT_END)
_SHORT_UNITS = set("cm mm km kg gm ft in mi lb lbs oz hr hrs min sec mph day per men egg".split())
_NO_UNITS = set("e i x y n pi or and not no hundred thousand million billion trillion dozen half times plus "
                "minus over squared cubed factorial mod to between more less than least most if when where "
                "for sqrt sin cos tan cot csc log ln exp am pm a.m. p.m. union undefined none".split())
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[^{}]*\})?(.*?)\\end\{\1\}", re.S)


def _matrix(m):
    rows = [row.replace("&", ",") for row in m[2].split("\\\\") if row.strip()]
    return "⟦" + ",".join(f"⟦{row}⟧" for row in rows) + "⟧"


def _without_unit(m):
    r"""Drop `\text{ square cm}` after a value, unless a word in it could change the value."""
    keep = _NO_UNITS.intersection(m[1].lower().split()) or re.search(r"[^A-Za-z'/.\s-]", m[1])
    return m[0] if keep else ""


def _without_words(m):
    """Drop plain words after a value if they look like words, not like a product of variables."""
    words = m[1].lower().split()
    first = words[0].strip(".")
    return "" if (len(first) > 3 or first in _SHORT_UNITS) and not _NO_UNITS.intersection(words) else m[0]


def _clean(s):
    """One spelling for the many of LaTeX, Unicode and prose, without units."""
    s = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^{" + m[0].translate(_SCRIPTS) + "}", s)
    s = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SCRIPTS) + "}", s)
    s = re.sub(r"(?<!\\)\\\\([A-Za-z]{2,})", lambda m: m[0][m[1] in _DOUBLED:], s)    # \\frac for \frac
    s = re.sub(r"(?<=[0-9])(?:,?\s*\\[!,:;]\s*|\{,\}\s*|\\ )(?=[0-9]{3}(?![0-9]))", "", s)   # 1,\!000
    s = _MATRIX.sub(_matrix, s.replace("\\$", " ").translate(_CHARACTERS))
    s = re.sub(r"\\(?:left|right)\s*\.", "", s)
    s = re.sub(r"\\[^A-Za-z]", lambda m: _ESCAPES.get(m[0], " "), s)
    s = re.sub(r"\\([A-Za-z]+)", lambda m: _COMMANDS.get(m[1], m[0]), s)
    s = s.replace("<=", "≤").replace(">=", "≥").replace("!=", "≠")
    s = re.sub(r"\^?\s*\{?\s*°\s*\}?", " ", s).strip().rstrip(" .,;:")
    s = re.sub(r",?\s*" + _TEXT, lambda m: "," if m[1].strip(" ,") in ("and", "or") else m[0], s)
    s = re.sub(_TEXT, r" \1 ", _TEXT_UNIT.sub(_without_unit, s))
    s = re.sub(r"\s*\b(?:percent|per cent|pct)\b", "%", s)
    s = _WORD_UNIT.sub(_without_words, re.sub(r",?\s*\b(?:and|or)\b", ",", s))
    s = re.sub(r"(?<![0-9.,/^_])([0-9]{1,3}(?: [0-9]{3})+)(?![0-9./])", lambda m: m[0].replace(" ", ""), s)
    s = re.sub(r"(?<![0-9./^_])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9.])", r"(\1+\2/\3)", s)   # 5 1/2
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", " ".join(s.split())).rstrip(".\\")


_DOUBLED = set(_COMMANDS) | {"frac", "sqrt", "text", "begin", "end"}

# ------------------------------------------------------------------------------------ values

_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+|\\[A-Za-z]+|[A-Za-z]+|\S)")
_GREEK = set(r"\alpha \beta \gamma \delta \theta \lambda \mu \rho \sigma \phi \omega \ell \Delta".split())
_FUNCTIONS = {"sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "cot": lambda z: 1 / cmath.tan(z),
              "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z), "arcsin": cmath.asin,
              "arccos": cmath.acos, "arctan": cmath.atan, "ln": cmath.log, "log": cmath.log10,
              "exp": cmath.exp}
_CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j}
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_CLOSERS = {"(": ")", "[": "]", "{": "}", "|": "|", "⌊": "⌋", "⌈": "⌉"}
_AROUND = {"|": abs, "⌊": lambda x: Fraction(math.floor(x)), "⌈": lambda x: Fraction(math.ceil(x))}


def _each(f, *values):
    """Apply `f` point by point. A value is a tuple of POINTS numbers, each a Fraction or a complex."""
    numbers = [f(*point) for point in zip(*values)]
    return tuple(complex(x) if isinstance(x, Fraction) and _bits(x) > MAX_BITS else x for x in numbers)


def _bits(x):
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def _variable(name):
    """Fixed pseudo-random values for a name, 0.3 to 9.2 in size; some are negative at the last point."""
    seeds = [zlib.crc32(f"{name}{k}".encode(errors="replace")) for k in range(POINTS)]
    values = [Fraction(seed % 9001 + 300, 1009) for seed in seeds]
    return (*values[:-1], -values[-1] if seeds[0] % 2 else values[-1])


def _power(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1:
        if abs(b) * _bits(a) <= MAX_BITS:
            return a ** int(b)
    return complex(a) ** complex(b)


def _root(a, n):
    if isinstance(a, Fraction) and a < 0 and n % 2 == 1:
        return -_power(-a, 1 / n)                           # the real odd root of a negative number
    return _power(a, 1 / n)


def _factorial(a):
    if isinstance(a, Fraction) and a.denominator == 1 and 0 <= a <= 170:
        return Fraction(math.factorial(int(a)))
    return complex(math.gamma(float(a) + 1))


def _binomial(n, k):
    return _factorial(n) / (_factorial(k) * _factorial(n - k))


class _Parser:
    """Recursive descent over one expression, evaluating as it reads; `_value` catches what it raises."""

    def __init__(self, text):
        self.tokens, self.i, self.depth, self.in_bars = [], 0, 0, False
        for token in _TOKEN.findall(text):
            name = token.lstrip("\\")
            if name in _FUNCTIONS or name == "sqrt":
                self.tokens.append("\\" + name)
            elif len(token) > 1 and token.isalpha() and token.islower():
                if len(token) > 3:
                    raise ValueError("a word")
                self.tokens += token                    # xyz is x*y*z; a run with capitals (AB) is one name
            else:
                self.tokens.append(token)

    def peek(self):
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    def take(self, *expected):
        token = self.peek()
        if not token or expected and token not in expected:
            raise ValueError(f"unexpected {token!r}")
        self.i += 1
        return token

    def parse(self):
        value = self.sum()
        if self.peek():
            raise ValueError("text after the expression")
        return value

    def sum(self):
        value = self.product()
        while self.peek() in ("+", "-"):
            value = _each(_OPERATORS[self.take()], value, self.product())
        return value

    def product(self):
        value = self.signed()
        while self.peek() in ("*", "/") or self.starts_factor():
            sign = self.take() if self.peek() in ("*", "/") else "*"
            value = _each(_OPERATORS[sign], value, self.signed())
        return value

    def starts_factor(self):
        """Whether a factor may follow without a sign. A number may not: `5 6` is not 30."""
        t = self.peek()
        if t == "|":
            return not self.in_bars
        return t[:1].isalpha() or t[:1] == "\\" or t in ("(", "[", "⌊", "⌈", "∞")

    def signed(self):
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        value = self.power()
        return _each(operator.neg, value) if negative else value

    def power(self):
        value = self.primary()
        for _ in range(3):
            if self.peek() == "!":
                self.take()
                value = _each(_factorial, value)
            elif self.peek() == "^":
                self.take()
                value = _each(_power, value, self.signed() if self.peek() == "-" else self.primary())
        return value

    def digit(self):
        r"""An argument of \frac, which without braces is one digit: \frac12 is 1/2."""
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.i:self.i + 1] = [token[0], token[1:]]
        return self.primary()

    def primary(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        value = self.atom(self.take())
        self.depth -= 1
        return value

    def atom(self, token):
        if token[0] in "0123456789" or token[0] == "." and len(token) > 1:
            return self.number(token)
        if token in _CLOSERS:
            return self.bracket(token)
        if token in ("\\frac", "\\binom"):
            return _each(operator.truediv if token == "\\frac" else _binomial, self.digit(), self.digit())
        if token == "\\sqrt":
            degree = self.bracket(self.take()) if self.peek() == "[" else (Fraction(2),) * POINTS
            return _each(_root, self.primary(), degree)
        if token[1:] in _FUNCTIONS:
            return self.function(token[1:])
        if token.isascii() and token.isalpha() or token in _GREEK or token in ("π", "∞"):
            return self.symbol(token)
        raise ValueError(f"unexpected {token!r}")

    def number(self, token):
        if self.peek() == "_":
            return self.symbol(token.lstrip("0"))           # 12_5 is a name of its own, equal to itself only
        value = Fraction(token)
        ahead = "".join(self.tokens[self.i:self.i + 7])
        if value.denominator == 1 and re.match(r"\\frac(?:[0-9]|\{[0-9]+\}){2}", ahead):
            return _each(lambda fraction: value + fraction, self.primary())               # a mixed number
        return (value,) * POINTS

    def symbol(self, name):
        if self.peek() == "_":
            self.take()
            name += "_" + self.subscript()
        while self.peek() == "'":
            name += self.take()
        return (_CONSTANTS[name],) * POINTS if name in _CONSTANTS else _variable(name)

    def subscript(self):
        name = self.take()
        if name == "{":
            name = ""
            while self.peek() != "}":
                name += self.take()
            self.take("}")
        return name

    def bracket(self, opener):
        outer, self.in_bars = self.in_bars, opener == "|"
        value = self.sum()
        self.take(_CLOSERS[opener])
        self.in_bars = outer
        return _each(_AROUND[opener], value) if opener in _AROUND else value

    def function(self, name):
        r"""\sin x, \sin^2 x, \sin(x) y, \sin 2x, \log_2 x."""
        base = exponent = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.digit()
        if self.peek() == "^":
            self.take()
            exponent = self.digit()
        enclosed = self.peek() in ("(", "{", "[")
        value = self.primary() if enclosed else self.power()
        while not enclosed and self.starts_factor() and self.peek()[1:] not in _FUNCTIONS:
            value = _each(operator.mul, value, self.power())
        value = _each(lambda a: _FUNCTIONS[name](complex(a)), value)
        if base:
            value = _each(lambda a, b: a / cmath.log10(complex(b)), value, base)
        return _each(_power, value, exponent) if exponent else value


@functools.lru_cache(maxsize=4096)
def _value(text):
    """The value of an expression at the fixed points, or None when it is no expression or has no value."""
    try:
        return _Parser(text).parse() if len(text) <= 2 * MAX_ANSWER + 10 else None
    except (ValueError, ArithmeticError, TypeError):    # no expression; 1/0, overflow; floor of a complex
        return None


def _close(x, y, tolerance=1e-9):
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return abs(x - y) <= tolerance * abs(y) if tolerance > 1e-9 else x == y
    return abs(x - y) <= max(1e-12, tolerance * abs(y))


def _same_value(a, b):
    """Two expressions with one value; for a percent sign on one side only see the file's docstring."""
    u, v = _value(a.rstrip("%")), _value(b.rstrip("%"))
    if u is None or v is None:
        return False
    if a.endswith("%") and not b.endswith("%") and abs(v[0]) < 1:
        u = _each(lambda x: x / 100, u)
    if b.endswith("%") and not a.endswith("%") and abs(u[0]) < 1:
        v = _each(lambda x: x / 100, v)
    return all(map(_close, u, v))


# ------------------------------------------------------------------------------------ forms

# What may stand left of "=" without being part of the answer: x, x_1, \theta, f', f(x), T(10), |AB|, (p,q).
_NAME = re.compile(r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|theta|lambda|mu|rho|omega|ell))(?:_(?:\{\w+\}|\w))?'*"
                   r"(?:\([\w(),]*\))?|\|?[A-Z]{2,3}\|?|\([A-Za-z](?:_?[0-9])?(?:,[A-Za-z](?:_?[0-9])?)+\)")
_RELATIONS = "=≈≠<>≤≥∈"
_MIRROR = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}


def _depths(s):
    """Bracket depth after each character. Intervals close with either bracket, so all kinds count alike."""
    depth = 0
    for c in s:
        depth += (c in "([{⦃⟦") - (c in ")]}⦄⟧")
        yield depth


def _split(s, separators):
    """Split `s` at separators outside all brackets: (parts, the separators between them)."""
    cuts = [i for i, depth in enumerate(_depths(s)) if depth == 0 and s[i] in separators]
    parts = [s[i + 1:j] for i, j in zip([-1] + cuts, cuts + [len(s)])]
    return parts, [s[i] for i in cuts]


def _inside(s, openers):
    """What a pair of brackets around all of `s` encloses, or None."""
    if s[:1] and s[0] in openers and s[-1] in ")]}⦄⟧" and 0 not in list(_depths(s))[:-1]:
        return s[1:-1]


def _items(s):
    """The elements of a list or set (one element: anything else); an element with ± is two."""
    while (inside := _inside(s, "{⦃")) is not None:
        s = re.sub(r"^\w[|:](?=.*[<>≤≥])", "", inside)      # {x | 2 < x < 3} is the interval
    items = []
    for part in _split(s, ",;")[0]:
        items.append(part.replace("±", "+").replace("∓", "-"))
        if "±" in part:
            items.append(part.replace("±", "-").replace("∓", "+"))
    return items


def _same_items(xs, ys, depth):
    """Equal as multisets; single letters, which answer a question for an order, in their order."""
    if len(xs) != len(ys) or len(xs) > MAX_ITEMS:
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


def _interval(sides, signs):
    """The interval that an inequality in one name describes, as text, or None."""
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


def _unnamed(sides, signs, depth):
    """What `x = v`, `x in v` or `x = v = w` says about x, or None. A chain that is not true says nothing."""
    if not set(signs) <= set("=≈∈"):
        return _interval(sides, signs)
    rest = [(side, sign) for side, sign in zip(sides, ["="] + signs) if not _NAME.fullmatch(side)]
    first = rest[0][0] if rest else sides[-1]
    for side, sign in rest[1:]:
        u, v = _value(first), _value(side)
        near = sign == "≈" and u and v and all(_close(x, y, tolerance=1e-2) for x, y in zip(u, v))
        if not (near or _same(first, side, depth)):
            return None
    return first


def _same_relation(a, b, depth):
    (sides_a, signs_a), (sides_b, signs_b) = _split(a, _RELATIONS), _split(b, _RELATIONS)
    if signs_a == signs_b == ["="] and _same_equation(sides_a, sides_b):
        return True
    plain_a = _unnamed(sides_a, signs_a, depth) if signs_a else a
    plain_b = _unnamed(sides_b, signs_b, depth) if signs_b else b
    if plain_a and plain_b:
        names = {s[0] for s in (sides_a, sides_b) if len(s) > 1 and len(s[0]) == 1 and s[0].isalpha()}
        return len(names) < 2 and _same(plain_a, plain_b, depth)           # x = 5 is not y = 5
    return bool(signs_a) and signs_a == signs_b and all(_same(x, y, depth) for x, y in zip(sides_a, sides_b))


def _same_equation(a, b):
    """left - right of the one is a constant multiple of left - right of the other."""
    u, v = _value(f"({a[0]})-({a[1]})"), _value(f"({b[0]})-({b[1]})")
    if u is None or v is None or not all(u + v) or all(_close(x, u[0]) for x in u):
        return False
    return all(_close(x * v[0], u[0] * y) for x, y in zip(u, v))


def _same_words(a, b):
    a, b = (re.sub(r"[\s\"']|\.(?![0-9])", "", s).lower() for s in (a, b))
    return a == b and re.search("[a-z]{2}", a) is not None


def _same(a, b, depth=0):
    """Compare two cleaned answers form by form."""
    if a == b or depth > 8 or not a or not b:
        return a == b != ""
    xs, ys = _items(a), _items(b)
    if len(xs) > 1 or len(ys) > 1:
        return _same_items(xs, ys, depth + 1)
    a, b = xs[0], ys[0]
    xs, ys = _split(a, "∪")[0], _split(b, "∪")[0]
    if len(xs) > 1 or len(ys) > 1:
        return _same_items(xs, ys, depth + 1)
    if _split(a, _RELATIONS)[1] or _split(b, _RELATIONS)[1]:
        return _same_relation(a, b, depth + 1)
    xs, ys = (_split(_inside(s, "([⟦") or s, ",;")[0] for s in (a, b))
    if len(xs) > 1 or len(ys) > 1 or "⟦" in a[:1] + b[:1]:
        shape = len(xs) == len(ys) <= MAX_ITEMS and (a[:1], a[-1:]) == (b[:1], b[-1:])
        return shape and all(_same(x, y, depth + 1) for x, y in zip(xs, ys))
    return a == b != "" or _same_value(a, b) or _same_words(a, b)


_GROUPED = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")


def _readings(s):
    """`100,101` is a number with a thousands separator or a list of two: both readings, cleaned."""
    return {_clean(s), _clean(_GROUPED.sub(lambda m: m[0].replace(",", ""), s))}


def equal(given: str, gold: str) -> bool:
    """Whether two answers are equal by the rules in this file's docstring.

    Args: given and gold, answers as written, in LaTeX or plain text, without the mark around them.
    Returns: a bool; False when either is empty, or longer than MAX_ANSWER and not identical. Never raises.
    """
    if not (isinstance(given, str) and isinstance(gold, str)):
        return False
    given, gold = given.strip(), gold.strip()
    if max(len(given), len(gold)) > MAX_ANSWER:
        return given == gold
    if any("$" in a and re.search(r"\bcents?\b", b) for a, b in ((given, gold), (gold, given))):
        return False
    try:
        return any(_same(x, y) for y in _readings(gold) for x in _readings(given))
    except ArithmeticError:                                 # a number too large to compare as a float
        return False


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
