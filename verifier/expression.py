r"""The value of an expression: `value(text)`, for text as latex.clean leaves it, and `same_value`.

A recursive descent parser makes a tree of tuples, and the tree is evaluated twice:
  exactly     modulo a prime of 125 bits, variables at fixed pseudo-random residues: rational functions only. Two
              different ones of degree d agree with probability d / PRIME, so (x+1)^500 is not (x+1)^499 (x+1) + 1.
  in floats   complex, variables at POINTS fixed pseudo-random points, two of them in (0, 1). Points where both
              values are real decide; where there is none, all of them do.
Two values are the same when the residues are equal (if both exist) and the floats are near.

Bounded by construction: length of the text, nesting, exponents of the exact arithmetic, size of factorials. There
is no eval and no algebra system; an expression that has no value here, or is none, has the value None.

Left out: limits, integrals, products over an index; a sum over an index is a linear operator with a name.
"""

import cmath
import functools
import hashlib
import math
import operator
import re
from collections import namedtuple

MAX_TEXT = 1300      # characters of one expression
MAX_DEPTH = 60       # nesting inside one expression
MAX_POWER = 10**6    # largest exponent in the exact arithmetic
MAX_FACTORIAL = 170  # largest argument of ! and of binomials
ROUNDING = 2e-15     # of the largest term: what cancelling leaves in floats
POINTS = 4           # evaluation points for variables
PRIME = 31415926535897932384626433832795029031   # no special form: modulo 2^127 - 1, 2^4950 would be 1/8

# ------------------------------------------------------------------------------------ parsing

_TOKEN = re.compile(r"\s*((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9.]))?|\\[A-Za-z]+|[A-Za-z]+|\S)")
_GREEK = set(r"\alpha \beta \gamma \delta \theta \lambda \mu \rho \sigma \phi \omega \ell \Delta".split())


def _rounding_off(z, size):
    """z, or 0 where it is what rounding leaves of numbers of this size: nothing to divide by."""
    return 0.0 if abs(z) <= ROUNDING * size else z


def _sin(z):
    return _rounding_off(cmath.sin(z), min(abs(z), 1e5))        # larger ones: else any sine would be rounding


def _cos(z):
    return _rounding_off(cmath.cos(z), min(abs(z), 1e5))


_FUNCTIONS = {"sin": _sin, "cos": _cos, "tan": lambda z: _sin(z) / _cos(z), "cot": lambda z: _cos(z) / _sin(z),
              "sec": lambda z: 1 / _cos(z), "csc": lambda z: 1 / _sin(z), "arcsin": cmath.asin,
              "arccos": cmath.acos, "arctan": cmath.atan, "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh,
              "ln": cmath.log, "log": cmath.log10, "lg": cmath.log10, "exp": cmath.exp}
_CLOSERS = {"(": ")", "[": "]", "{": "}", "|": "|", "⌊": "⌋", "⌈": "⌉"}
_AROUND = {"|": "absolute", "⌊": "floor", "⌈": "ceiling"}
_TWO = ("number", 2, 1)


class _Parser:
    """Recursive descent over one expression to a tree of tuples (kind, *parts); raises what `value` catches."""

    def __init__(self, text):
        self.tokens, self.i, self.depth, self.in_bars, self.names = [], 0, 0, False, set()
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
        tree = self.sum()
        if self.peek():
            raise ValueError("text after the expression")
        return tree

    def sum(self):
        terms = [self.product()]
        while self.peek() in ("+", "-"):
            sign = self.take()
            terms.append(self.product() if sign == "+" else ("negative", self.product()))
        return ("sum", *terms) if len(terms) > 1 else terms[0]

    def product(self):
        factors = [self.signed()]
        while self.peek() in ("*", "/", ":") or self.starts_factor():
            sign = self.take() if self.peek() in ("*", "/", ":") else "*"
            factors.append(self.signed() if sign == "*" else ("inverse", self.signed()))
        return ("product", *factors) if len(factors) > 1 else factors[0]

    def starts_factor(self):
        """Whether a factor may follow without a sign. A number may not: `5 6` is not 30."""
        t = self.peek()
        if t == "|":
            return not self.in_bars
        return t[:1].isalpha() or t[:1] == "\\" or t in ("(", "[", "⌊", "⌈", "∞", "…")

    def signed(self):
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        return ("negative", self.power()) if negative else self.power()

    def power(self):
        tree = self.primary()
        for _ in range(3):
            if self.peek() == "!" and tree[0] != "factorial":
                self.take()
                tree = ("factorial", tree)
            elif self.peek() == "^":
                self.take()
                tree = ("power", tree, self.signed() if self.peek() == "-" else self.primary())
        return tree

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
        tree = self.atom(self.take())
        self.depth -= 1
        return tree

    def atom(self, token):
        if token[0] in "0123456789" or token[0] == "." and len(token) > 1:
            return self.number(token)
        if token in _CLOSERS:
            return self.bracket(token)
        if token == "\\frac":
            return ("product", self.digit(), ("inverse", self.digit()))
        if token == "\\binom":
            return ("binomial", self.digit(), self.digit())
        if token == "\\sqrt":
            degree = self.bracket(self.take()) if self.peek() == "[" else _TWO
            return ("root", self.digit(), degree)
        if token[1:] in _FUNCTIONS:
            return self.function(token[1:])
        if token.isascii() and token.isalpha() or token in _GREEK or token in ("π", "∞", "…"):
            return self.symbol(token)
        if token == "\\sum":
            return self.symbol(token + self.scripts())
        raise ValueError(f"unexpected {token!r}")

    def number(self, token):
        if self.peek() == "_":
            return self.symbol(token.lstrip("0"))           # 12_5 is a name of its own, equal to itself only
        digits, _, ten = token.lower().partition("e")
        whole, _, decimals = digits.partition(".")
        power = int(ten or 0) - len(decimals)
        number = ("number", int(whole + decimals) * 10 ** max(0, power), 10 ** max(0, -power))
        if token.isdigit() and self.peek() == "\\frac":
            if re.match(r"\\frac(?:[0-9]|\{[0-9]+\}){2}", "".join(self.tokens[self.i:self.i + 7])):
                return ("sum", number, self.primary())                                        # a mixed number
        return number

    def symbol(self, name):
        if self.peek() == "_":
            self.take()
            name += "_" + self.group()
        while self.peek() == "'":
            name += self.take()
        if name not in _CONSTANTS:
            self.names.add(name)
        return ("name", name)

    def group(self):
        """The text of a subscript: one token, or what braces enclose."""
        name = self.take()
        if name == "{":
            name = ""
            while self.peek() != "}":
                name += self.take()
            self.take("}")
        return name

    def scripts(self):
        r"""The limits of \sum as written: sums over the same index range are one linear operator."""
        limits = ""
        for _ in range(2):
            if self.peek() in ("_", "^"):
                limits += self.take() + "{" + self.group() + "}"
        return limits

    def bracket(self, opener):
        outer, self.in_bars = self.in_bars, opener == "|"
        tree = self.sum()
        self.take(_CLOSERS[opener])
        self.in_bars = outer
        return (_AROUND[opener], tree) if opener in _AROUND else tree

    def function(self, name):
        r"""\sin x, \sin^2 x, \sin^{-1} x, \sin(x) y, \sin 2x, \log_2 x."""
        base = exponent = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.digit()
        if self.peek() == "^":
            self.take()
            exponent = self.signed() if self.peek() == "-" else self.digit()
            if exponent == ("negative", ("number", 1, 1)) and "arc" + name in _FUNCTIONS:
                name, exponent = "arc" + name, None
        tree = (name, self.argument())
        if base:
            tree = ("product", tree, ("inverse", ("log", base)))
        return ("power", tree, exponent) if exponent else tree

    def argument(self):
        if self.peek() in ("(", "{", "["):
            return self.primary()
        factors = [self.power()]
        while self.starts_factor() and self.peek()[1:] not in _FUNCTIONS:
            factors.append(self.power())
        return ("product", *factors)


# ------------------------------------------------------------------------------------ values

_CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j}


def _sum(*terms):
    """Whole numbers that floats hold lose nothing; of others, what is left when they cancel is rounding."""
    exact = all(abs(x) < 2 ** 53 and x == round(complex(x).real) for x in terms)
    return sum(terms) if exact else _rounding_off(sum(terms), max(map(abs, terms)))


def _power(a, b):
    result = complex(a) ** complex(b)
    if result == 0 != a:
        raise ArithmeticError("too small")
    return result


def _root(a, n):
    n = complex(n)
    if complex(a).imag == n.imag == 0 and a.real < 0 and n.real % 2 == 1:
        return -_power(-a, 1 / n)                           # the real odd root of a negative number
    return _power(a, 1 / n)


def _factorial(a):
    if abs(a) > MAX_FACTORIAL or complex(a).imag:
        raise ValueError("no factorial")
    return math.gamma(a.real + 1)


def _rounded(towards):
    return lambda a: float(towards(round(a.real, 9))) if abs(complex(a).imag) < 1e-12 else math.nan


_FLOAT = {"sum": _sum, "product": lambda *xs: math.prod(xs), "inverse": lambda x: 1 / x,
          "negative": operator.neg, "power": _power, "root": _root, "factorial": _factorial, "absolute": abs,
          "binomial": lambda n, k: _factorial(n) / (_factorial(k) * _factorial(n - k)),
          "floor": _rounded(math.floor), "ceiling": _rounded(math.ceil), **_FUNCTIONS}
_EXACT = {"sum": lambda *xs: sum(xs) % PRIME, "inverse": lambda x: pow(x, -1, PRIME), "negative": lambda x: -x % PRIME,
          "product": lambda *xs: functools.reduce(lambda x, y: x * y % PRIME, xs)}
_WHOLE = {"factorial": math.factorial, "binomial": math.comb}


@functools.lru_cache(maxsize=4096)
def _sample(name):
    """(residue, floats) of a variable, from a hash of its name: (0, 1) twice, (0.3, 9), (-9, 9)."""
    digest = hashlib.blake2b(name.encode(errors="replace"), digest_size=32).digest()
    u = [int.from_bytes(digest[i:i + 4], "big") / 2**32 for i in range(0, 16, 4)]
    return int.from_bytes(digest[16:], "big") % PRIME, (u[0], u[1], 0.3 + 8.7 * u[2], 18 * u[3] - 9)


def _float(tree, k):
    """The value of a tree at point k."""
    kind = tree[0]
    if kind == "number":
        return tree[1] / tree[2]
    if kind == "name":
        return _CONSTANTS[tree[1]] if tree[1] in _CONSTANTS else _sample(tree[1])[1][k]
    x = _FLOAT[kind](*[_float(part, k) for part in tree[1:]])
    if not cmath.isfinite(x):
        raise OverflowError("too large")
    return x


def _integer(tree, limit):
    """The value of a tree without variables, if it is a whole number of at most `limit` in size."""
    n = _residue(tree, constant=True)
    n = n - PRIME if n > PRIME // 2 else n
    if abs(n) > limit:
        raise ValueError("too large, or no whole number")
    return n


def _residue(tree, constant=False):
    """The value of a rational function modulo PRIME; ValueError or KeyError for anything else."""
    kind = tree[0]
    if kind == "number":
        return tree[1] * pow(tree[2], -1, PRIME) % PRIME if tree[2] > 1 else tree[1] % PRIME
    if kind == "name":
        if constant or tree[1] in _CONSTANTS:
            raise ValueError("not constant, or not rational")
        return _sample(tree[1])[0]
    if kind == "power":
        return pow(_residue(tree[1], constant), _integer(tree[2], MAX_POWER), PRIME)
    if kind in _WHOLE:
        return _WHOLE[kind](*[_integer(part, MAX_FACTORIAL) for part in tree[1:]]) % PRIME
    return _EXACT[kind](*[_residue(part, constant) for part in tree[1:]])


Value = namedtuple("Value", "residue floats names")     # residue an int or None; floats (POINTS,), each a number or None


def _attempt(f, *args):
    """f(*args), or None where it has no value: 1/0, overflow, no rational function."""
    try:
        return f(*args)
    except (ValueError, ArithmeticError, TypeError, KeyError):
        return None


@functools.lru_cache(maxsize=4096)
def value(text):
    """The Value of a cleaned expression, or None when it is no expression or has no value."""
    if "∞" in text and text.strip("+-") != "∞":
        return None                                         # infinity is a name, and no number to count with
    try:
        parser = _Parser(text[:MAX_TEXT + 1])
        tree = parser.parse() if len(text) <= MAX_TEXT else None
    except ValueError:
        return None
    points = POINTS if parser.names else 1
    floats = tuple(_attempt(_float, tree, k) for k in range(points)) * (POINTS // points)
    result = Value(_attempt(_residue, tree), floats, frozenset(parser.names))
    return result if result.residue is not None or any(x is not None for x in floats) else None


def near(x, y, tolerance=1e-9):
    return abs(x - y) <= max(1e-12, tolerance * abs(y))


def _real(x):
    return abs(complex(x).imag) <= 1e-9 * (1 + abs(x))


def same_value(u, v):
    """Whether two Values are the same: by residue where both have one, and by floats, real ones first."""
    if u is None or v is None:
        return False
    exact = u.residue is not None and v.residue is not None
    if exact and u.residue != v.residue:
        return False
    pairs = [(x, y) for x, y in zip(u.floats, v.floats) if x is not None and y is not None]
    if not pairs:                                           # all too large for floats
        return exact and not any(x is not None for x in u.floats + v.floats)
    pairs = [(x, y) for x, y in pairs if _real(x) and _real(y)] or (pairs if len(pairs) == POINTS else [])
    tolerance = 1e-6 if exact else 1e-9 if u.names or v.names else 1e-12
    return bool(pairs) and all(near(x, y, tolerance) for x, y in pairs)
