r"""Value of an expression: `value(text)` of a text as latex.clean leaves it, and `same_value`.

A recursive descent parser makes a tree of tuples, and the tree is evaluated twice:
  exactly    modulo a prime of 125 bits, variables at fixed pseudo-random residues: for rational
             functions only. Two different ones of degree d agree with probability d / PRIME
             (Schwartz and Zippel), so (x+1)^500 is not (x+1)^499 (x+1) + 1.
  in floats  complex, variables at POINTS fixed pseudo-random points, two of them in (0, 1).
             Points where both values are real decide; where there is none, all of them do.
Two values are the same when the residues are equal (if both exist) and the floats are near.

The work is bounded by construction: text, nesting, exact exponents and factorials have a limit.
There is no eval and no algebra system. What is no expression, or has no value here, has the value
None. Left out: limits, integrals, products over an index; a sum over an index is a linear operator
with a name. It needs the standard library alone; answers.py and reward.py need it.
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
ROUNDING = 2e-15     # share of the largest term that cancelling leaves in floats
POINTS = 4           # evaluation points for variables
PRIME = 31415926535897932384626433832795029031   # no special form: modulo 2^127 - 1, 2^4950 is 1/8

# ---------------------------------------------------------------------------------- float functions

def _rounding_off(z, size):
    """Return z, or 0 where z is what rounding leaves of numbers of this size: no divisor."""
    return 0.0 if abs(z) <= ROUNDING * size else z


def _sin(z):
    """Return the sine, rounded off for arguments up to 1e5: beyond, any sine would be rounding."""
    return _rounding_off(cmath.sin(z), min(abs(z), 1e5))


def _cos(z):
    """Return the cosine, rounded off as the sine is."""
    return _rounding_off(cmath.cos(z), min(abs(z), 1e5))


_FUNCTIONS = {
    "sin": _sin, "cos": _cos,
    "tan": lambda z: _sin(z) / _cos(z), "cot": lambda z: _cos(z) / _sin(z),
    "sec": lambda z: 1 / _cos(z), "csc": lambda z: 1 / _sin(z),
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan,
    "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh,
    "ln": cmath.log, "log": cmath.log10, "lg": cmath.log10, "exp": cmath.exp,
}
_CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j}

# ------------------------------------------------------------------------------------------ parsing

_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9.]))?"
_TOKEN = re.compile(rf"\s*({_NUMBER}|\\[A-Za-z]+|[A-Za-z]+|\S)")
_GREEK = r"\alpha \beta \gamma \delta \theta \lambda \mu \rho \sigma \phi \omega \ell \Delta"
_GREEK = set(_GREEK.split())
_CLOSERS = {"(": ")", "[": "]", "{": "}", "|": "|", "⌊": "⌋", "⌈": "⌉"}
_AROUND = {"|": "absolute", "⌊": "floor", "⌈": "ceiling"}


def _tokens(text):
    r"""Return the tokens of an expression: numbers, \commands, names and single characters."""
    tokens = []
    for token in _TOKEN.findall(text):
        name = token.lstrip("\\")
        if name in _FUNCTIONS or name == "sqrt":
            tokens.append("\\" + name)
        elif token[0].isupper() and token[1:] in _FUNCTIONS:      # Asin x is A sin x
            tokens += [token[0], "\\" + token[1:]]
        elif len(token) > 1 and token.isalpha() and token.islower():
            if len(token) > 3:
                raise ValueError("a word")
            # xyz is x*y*z; a run with capitals (AB) is one name
            tokens.extend(token)
        else:
            tokens.append(token)
    return tokens


class _Parser:
    """Recursive descent over one expression, to a tree of tuples (kind, *parts).

    Most methods parse what they are named after. They raise ValueError where it is not there."""

    def __init__(self, text):
        self.tokens = _tokens(text)
        self.position = 0
        self.depth = 0
        self.in_bars = False        # inside |...|, where the next bar closes
        self.names = set()          # of variables

    def peek(self):
        """Return the next token, "" at the end."""
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, *expected):
        """Return the next token and go on; ValueError where it is none of those expected."""
        token = self.peek()
        if not token or expected and token not in expected:
            raise ValueError(f"unexpected {token!r}")
        self.position += 1
        return token

    def parse(self):
        """Parse the whole text."""
        tree = self.sum()
        if self.peek():
            raise ValueError("text after the expression")
        return tree

    def sum(self):
        """Parse terms with + and - between them."""
        terms = [self.product()]
        while self.peek() in ("+", "-"):
            sign = self.take()
            terms.append(self.product() if sign == "+" else ("negative", self.product()))
        return ("sum", *terms) if len(terms) > 1 else terms[0]

    def product(self):
        """Parse factors with a sign between them or none; a ratio a:b, of two, is a quotient."""
        factors = [self.signed()]
        signs = "*/:"
        while self.peek() and self.peek() in signs or self.starts_factor():
            sign = self.take() if self.peek() in signs else "*"
            signs = "*/" if sign == ":" else signs
            factors.append(self.signed() if sign == "*" else ("inverse", self.signed()))
        return ("product", *factors) if len(factors) > 1 else factors[0]

    def starts_factor(self):
        """Return whether a factor may follow without a sign. A number may not: `5 6` is not 30."""
        token = self.peek()
        if token == "|":
            return not self.in_bars
        begins_name = token[:1].isalpha() or token[:1] == "\\"
        return begins_name or token in ("(", "[", "⌊", "⌈", "∞", "…")

    def signed(self):
        """Parse a power behind any number of signs."""
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        return ("negative", self.power()) if negative else self.power()

    def power(self):
        """Parse a primary with its exponents and factorial signs, three of them at most."""
        tree = self.primary()
        for _ in range(3):
            if self.peek() == "!" and tree[0] != "factorial":
                self.take()
                tree = ("factorial", tree)
            elif self.peek() == "^":
                self.take()
                tower = self.tokens[self.position + 1:self.position + 2] == ["^"]   # 2^3^2 is 2^9
                exponent = self.signed() if tower or self.peek() == "-" else self.primary()
                tree = ("power", tree, exponent)
        return tree

    def digit(self):
        r"""Parse an argument of \frac, which without braces is one digit: \frac12 is 1/2."""
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.position:self.position + 1] = [token[0], token[1:]]
        return self.primary()

    def primary(self):
        """Parse an atom, no deeper than MAX_DEPTH."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        tree = self.atom(self.take())
        self.depth -= 1
        return tree

    def atom(self, token):
        """Parse what begins with `token`: a number, bracket, command, function or name."""
        if token[0] in "0123456789" or token[0] == "." and len(token) > 1:
            return self.number(token)
        if token in _CLOSERS:
            return self.bracket(token)

        if token == "\\frac":
            return ("product", self.digit(), ("inverse", self.digit()))
        if token == "\\binom":
            return ("binomial", self.digit(), self.digit())
        if token == "\\sqrt":
            degree = self.bracket(self.take()) if self.peek() == "[" else ("number", 2, 1)
            return ("root", self.digit(), degree)
        if token[1:] in _FUNCTIONS:
            return self.function(token[1:])

        if token.isascii() and token.isalpha() or token in _GREEK or token in ("π", "∞", "…"):
            return self.symbol(token)
        if token == "\\sum":
            return self.symbol(token + self.limits())
        raise ValueError(f"unexpected {token!r}")

    def number(self, token):
        """Parse a number as a fraction of integers, with a fraction behind it as a mixed number."""
        if self.peek() == "_":
            return self.symbol(token.lstrip("0"))       # 12_5 is a name, equal to itself only
        digits, _, ten = token.lower().partition("e")
        whole, _, decimals = digits.partition(".")
        power = int(ten or 0) - len(decimals)
        number = ("number", int(whole + decimals) * 10 ** max(0, power), 10 ** max(0, -power))

        if token.isdigit() and self.peek() == "\\frac":
            ahead = "".join(self.tokens[self.position:self.position + 7])
            if re.match(r"\\frac(?:[0-9]|\{[0-9]+\}){2}", ahead):
                return ("sum", number, self.primary())
        return number

    def symbol(self, name):
        """Parse a name with its subscript and primes."""
        if self.peek() == "_":
            self.take()
            name += "_" + self.group()
        while self.peek() == "'":
            name += self.take()
        if name not in _CONSTANTS:
            self.names.add(name)
        return ("name", name)

    def group(self):
        """Return the text of a subscript: one token, or what braces enclose."""
        name = self.take()
        if name == "{":
            name = ""
            while self.peek() != "}":
                name += self.take()
            self.take("}")
        return name

    def limits(self):
        r"""Return the limits of \sum as text: sums over the same range are one linear operator."""
        limits = ""
        for _ in range(2):
            if self.peek() in ("_", "^"):
                limits += self.take() + "{" + self.group() + "}"
        return limits

    def bracket(self, opener):
        """Parse what a bracket encloses, with its absolute value or rounding."""
        outer = self.in_bars
        self.in_bars = opener == "|"
        tree = self.sum()
        self.take(_CLOSERS[opener])
        self.in_bars = outer
        return (_AROUND[opener], tree) if opener in _AROUND else tree

    def function(self, name):
        r"""Parse \sin x, \sin^2 x, \sin^{-1} x, \sin(x) y, \sin 2x, \log_2 x."""
        base = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.digit()

        exponent = None
        if self.peek() == "^":
            self.take()
            exponent = self.signed() if self.peek() == "-" else self.digit()
            if exponent == ("negative", ("number", 1, 1)) and "arc" + name in _FUNCTIONS:
                name = "arc" + name
                exponent = None

        tree = (name, self.argument())
        if base:
            tree = ("product", tree, ("inverse", ("log", base)))
        return ("power", tree, exponent) if exponent else tree

    def argument(self):
        """Parse the argument of a function: a bracket, or factors up to the next function."""
        if self.peek() in ("(", "{", "["):
            return self.primary()
        factors = [self.power()]
        while self.starts_factor() and self.peek()[1:] not in _FUNCTIONS:
            factors.append(self.power())
        return ("product", *factors)


# ------------------------------------------------------------------------------------------- values

def _sum(*terms):
    """Add floats. Whole numbers that they hold lose nothing; else cancelling leaves rounding."""
    exact = all(abs(x) < 2 ** 53 and x == round(complex(x).real) for x in terms)
    return sum(terms) if exact else _rounding_off(sum(terms), max(map(abs, terms)))


def _power(a, b):
    """Return a^b; ArithmeticError where it is too small for a float."""
    result = complex(a) ** complex(b)
    if result == 0 != a:
        raise ArithmeticError("too small")
    return result


def _root(a, n):
    """Return the n-th root of a: of a negative number the real one if n is odd."""
    n = complex(n)
    if complex(a).imag == n.imag == 0 and a.real < 0 and n.real % 2 == 1:
        return -_power(-a, 1 / n)
    return _power(a, 1 / n)


def _factorial(a):
    """Return a!, by the gamma function also for fractions."""
    if abs(a) > MAX_FACTORIAL or complex(a).imag:
        raise ValueError("no factorial")
    return math.gamma(a.real + 1)


def _rounded(towards):
    """Return math.floor or math.ceil for floats that are real, and whole, but for rounding."""
    return lambda a: float(towards(round(a.real, 9))) if abs(complex(a).imag) < 1e-12 else math.nan


_FLOAT = {
    "sum": _sum, "product": lambda *xs: math.prod(xs),
    "negative": operator.neg, "inverse": lambda x: 1 / x,
    "power": _power, "root": _root, "factorial": _factorial,
    "binomial": lambda n, k: _factorial(n) / (_factorial(k) * _factorial(n - k)),
    "absolute": abs, "floor": _rounded(math.floor), "ceiling": _rounded(math.ceil),
    **_FUNCTIONS,
}
_EXACT = {
    "sum": lambda *xs: sum(xs) % PRIME,
    "product": lambda *xs: functools.reduce(lambda x, y: x * y % PRIME, xs),
    "negative": lambda x: -x % PRIME, "inverse": lambda x: pow(x, -1, PRIME),
}
_WHOLE = {"factorial": math.factorial, "binomial": math.comb}       # of whole numbers only

# residue: an int or None; floats (POINTS,): a number or None each; names: the variables
Value = namedtuple("Value", "residue floats names")


@functools.lru_cache(maxsize=4096)
def _sample(name):
    """Return a variable's Value, a hash of its name: in (0, 1) twice, in (0.3, 9), in (-9, 9)."""
    digest = hashlib.blake2b(name.encode(errors="replace"), digest_size=32).digest()
    u = [int.from_bytes(digest[i:i + 4], "big") / 2**32 for i in range(0, 16, 4)]
    floats = (u[0], u[1], 0.3 + 8.7 * u[2], 18 * u[3] - 9)
    return Value(int.from_bytes(digest[16:], "big") % PRIME, floats, frozenset([name]))


def _float(tree, point):
    """Return the value of a tree at a point, a number from 0 to POINTS - 1."""
    kind = tree[0]
    if kind == "number":
        _, numerator, denominator = tree
        return numerator / denominator
    if kind == "name":
        _, name = tree
        return _CONSTANTS[name] if name in _CONSTANTS else _sample(name).floats[point]

    x = _FLOAT[kind](*[_float(part, point) for part in tree[1:]])
    if not cmath.isfinite(x):
        raise OverflowError("too large")
    return x


def _residue(tree, constant=False):
    """Return the value of a rational function modulo PRIME; `constant` forbids variables.

    Raises ValueError or KeyError for any other tree."""
    kind = tree[0]
    if kind == "number":
        _, numerator, denominator = tree
        inverse = pow(denominator, -1, PRIME) if denominator > 1 else 1
        return numerator * inverse % PRIME
    if kind == "name":
        _, name = tree
        if constant or name in _CONSTANTS:
            raise ValueError("not constant, or not rational")
        return _sample(name).residue

    if kind == "power":
        _, base, exponent = tree
        return pow(_residue(base, constant), _integer(exponent, MAX_POWER), PRIME)
    if kind in _WHOLE:
        return _WHOLE[kind](*[_integer(part, MAX_FACTORIAL) for part in tree[1:]]) % PRIME
    return _EXACT[kind](*[_residue(part, constant) for part in tree[1:]])


def _integer(tree, limit):
    """Return the whole number that a tree without variables is; ValueError above `limit`."""
    n = _residue(tree, constant=True)
    n = n - PRIME if n > PRIME // 2 else n
    if abs(n) > limit:
        raise ValueError("too large, or no whole number")
    return n


def _attempt(f, *args):
    """Return f(*args), or None where it has no value: 1/0, overflow, no rational function."""
    try:
        return f(*args)
    except (ValueError, ArithmeticError, TypeError, KeyError):
        return None


@functools.lru_cache(maxsize=4096)
def value(text):
    """Return the Value of a cleaned text, or None where it is no expression or has no value."""
    # infinity is a name, and no number to count with
    if len(text) > MAX_TEXT or "∞" in text and text.strip("+-") != "∞":
        return None
    try:
        parser = _Parser(text)
        tree = parser.parse()
    except ValueError:
        return None

    # without variables all points are the same
    points = POINTS if parser.names else 1
    floats = tuple(_attempt(_float, tree, point) for point in range(points)) * (POINTS // points)
    residue = _attempt(_residue, tree)
    if residue is None and all(x is None for x in floats):
        return None
    return Value(residue, floats, frozenset(parser.names))


def near(x, y, tolerance=1e-9):
    """Return whether x and y differ by at most this share of y, or by at most 1e-12."""
    return abs(x - y) <= max(1e-12, tolerance * abs(y))


def _real(x):
    """Return whether a number is real but for rounding."""
    return abs(complex(x).imag) <= 1e-9 * (1 + abs(x))


def same_value(u, v):
    """Return whether two Values are the same: by residues where both have one, and by floats."""
    if u is None or v is None:
        return False
    exact = u.residue is not None and v.residue is not None
    if exact and u.residue != v.residue:
        return False

    # of the floats the points where both are real decide, else all points together
    pairs = [(x, y) for x, y in zip(u.floats, v.floats) if x is not None and y is not None]
    if not pairs:                           # all are too large for floats
        return exact and not any(x is not None for x in u.floats + v.floats)
    real = [(x, y) for x, y in pairs if _real(x) and _real(y)]
    if not real and len(pairs) < POINTS:
        return False

    tolerance = 1e-9 if u.names or v.names else 1e-12
    if exact:
        tolerance = 1e-6                    # the residues have decided; only the size is left
    return all(near(x, y, tolerance) for x, y in real or pairs)
