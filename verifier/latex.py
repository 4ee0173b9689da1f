r"""One spelling for the many of LaTeX, Unicode and prose: `clean`, the first half of a comparison.

Signs and structural commands become one character each. Sizes, styles, dollar signs and degrees go
away. A matrix is written with brackets of its own: \begin{pmatrix} a & b \\ c & d \end{pmatrix} is
⟦⟦a,b⟧,⟦c,d⟧⟧. Thousands separators and units in words after a value are dropped, "and" and "or" are
commas. A word that units.txt does not know may change the value ("5 tenths"). It stays, so that the
text is then no expression.

Every pattern is linear or bounded. This file needs the standard library alone; answers.py and
reward.py need it.
"""

import functools
import re
from pathlib import Path

# A line is a sign and the commands that are written as this sign; answers.py splits at characters.
_SIGNS = r"""
    π pi; ∞ infty; * cdot times ast; / div; ± pm; ∓ mp; ≤ le leq leqslant; ≥ ge geq geqslant; < lt;
    > gt; ≠ ne neq; ≈ approx; ∈ in; ∪ cup; ∖ setminus backslash; ⦃ lbrace; ⦄ rbrace;
    | mid vert lvert rvert; ° circ degree textcirc; ⌊ lfloor; ⌋ rfloor; ⌈ lceil; ⌉ rceil; ∀ forall;
    ∅ emptyset varnothing; : colon; … ldots cdots dots; \frac dfrac tfrac cfrac nicefrac sfrac;
    \binom dbinom tbinom"""
_COMMANDS = {name: sign for sign, *names in map(str.split, _SIGNS.split(";")) for name in names}
_SIZES = "left right big Big bigg Bigg bigl bigr displaystyle boxed angle underline num"
_COMMANDS |= dict.fromkeys(_SIZES.split(), "") | dict.fromkeys(("quad", "qquad"), " ")
_ESCAPES = {"\\{": "⦃", "\\}": "⦄", "\\%": "%", "\\!": "", "\\\\": "\\\\"}   # others: a space
_DOUBLED = set(_COMMANDS) | {"frac", "sqrt", "text", "begin", "end"}    # may follow \\ for one \

_CHARACTERS = {0xFF01 + i: 0x21 + i for i in range(94)}                 # full-width forms
_CHARACTERS |= dict.fromkeys((0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0xAD))    # zero width: gone
_CHARACTERS |= str.maketrans("−–×·⋅÷⁄∕∶º～’′、，€£₹", "--***///:° '',,   ")
_CHARACTERS |= str.maketrans({"√": "\\sqrt ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"})
_SCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
_MISREAD = {"\f": r"\f", "\b": r"\b", "\t": r"\t", "\r": r"\r"}   # "\frac" read as form feed + rac
_TAGS = {"p": "^", "b": "_"}                                       # <sup> and <sub>
_SETS = {"R": "(-∞,∞)", "Z": "ℤ", "N": "ℕ"}                        # behind \mathbb

_TEXT = (r"\\(?:text|mbox|hbox|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|rm|bf"
         r"|texttt|mathsf|boldsymbol)"
         r"\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_TEXT_BOX = re.compile(_TEXT)
_AND_TEXT = re.compile(r",?\s*" + _TEXT)
_STYLE = re.compile(
    r"\\(?:(?:bf|rm|it|large|Large)\b(?!\s*\{)|(?:text)?color\s*\{\w*\}|hspace\s*\{[^{}]*\})")
_MATRIX = re.compile(                                       # with the brackets around it alone
    r"([(\[]\s*)?\\begin\{((?:[pbB]|small)?matrix|array)\}(?:\{[^{}]*\})?"
    r"((?:(?!\\(?:begin|end)\b).)*)\\end\{\2\}(?(1)\s*(?:\\(?:right|[Bb]igg?r))?\s*[)\]])", re.S)
_QUANTIFIED = (                                             # behind "for all"
    r"(?:\([^()]*\)|\\[A-Za-z]+|\b(?:(?:positive|negative|real|natural) |numbers?\b|"
    r"integers?\b|reals?\b|values? of\b|[A-Za-z]\b)|[^A-Za-z,;])*")

# A unit stands behind a value and at the end of an answer or of one of its entries.
_EXPONENT = r"(?: ?\^ ?\{?-?[0-9]\}?)?"
_END = r"(?=[ .]*(?:$|[,;)\]}⦄]))"
_TEXT_UNIT = re.compile(                                                 # cm, m/s, m s^{-1}
    rf"(?<=[0-9A-Za-z}})π!%'|])(?: ?[/*]? ?{_TEXT}{_EXPONENT}"
    rf"| ?\\frac\{{{_TEXT}{_EXPONENT}\}}\{{{_TEXT}{_EXPONENT}\}}){{1,4}}{_END}")
_WORDS = r"(?<=[0-9})π%])((?: |(?=(?:cm|mm|km|kg|ft|th|st|nd|rd)\b))[A-Za-z][A-Za-z'/. -]*)"
_WORD_UNIT = re.compile(_WORDS + _EXPONENT + _END)

_UNITS = {}          # {word: its kind}, of units.txt
for _line in Path(__file__).with_name("units.txt").read_text(encoding="utf-8").splitlines():
    _kind, _, _words_of_kind = _line.partition(": ")
    _UNITS |= dict.fromkeys(_words_of_kind.split(), _kind)


def _matrix(match):
    """Write a matrix environment with the brackets ⟦⟧ around it and around each row."""
    rows = [row.replace("&", ",") for row in match[3].split("\\\\") if row.strip()]
    return "⟦" + ",".join(f"⟦{row}⟧" for row in rows) + "⟧"


def _is_unit(phrase):
    """Return whether all words of `phrase` are known to leave a number's value as it is."""
    kinds = []
    for word in re.split(r"[\s/~*]+", re.sub(r"\^ ?\{?-?[0-9]\}?", "", phrase.strip(" .,~/"))):
        forms = [word]
        if len(word) > 1:
            forms = [word.strip(".'").lower()]
        if len(word) > 3:
            forms += [forms[0].removesuffix("s"), forms[0].removesuffix("es")]
        kinds.append(next((_UNITS[form] for form in forms if form in _UNITS), None))
    if len(kinds) > 1 and kinds[-1] == "after":
        kinds.pop()                                                     # feet long, units squared
    return None not in kinds and kinds[-1] not in ("describing", "after")


def _without_unit(match):
    r"""Drop `\text{ square cm}` after a value."""
    return "" if _is_unit(" ".join(_TEXT_BOX.findall(match[0]))) else match[0]


def _without_words(match):
    """Drop plain words after a value, unless they may be a product of variables: 5 m, 5 m/s."""
    return "" if re.search("[A-Za-z]{2}", match[1]) and _is_unit(match[1]) else match[0]


def _unicode(s):
    """Write full-width forms, superscripts and signs in ASCII or LaTeX."""
    s = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^{" + match[0].translate(_SCRIPTS) + "}", s)
    s = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda match: "_{" + match[0].translate(_SCRIPTS) + "}", s)
    return s.translate(_CHARACTERS)


def _command(match):
    r"""Return what stands for one \command, or for a backslash and any other character."""
    name = match[1]
    return _COMMANDS.get(name, match[0]) if name[0].isalpha() else _ESCAPES.get(match[0], " ")


def _commands(s):
    """Write LaTeX commands as signs and matrices with brackets; drop styles and sizes."""
    if "\\\\" in s:
        # \\frac is \frac, but \\ before any other word is a new line
        s = re.sub(r"(?<!\\)\\\\([A-Za-z]{2,})", lambda match: match[0][match[1] in _DOUBLED:], s)
    s = re.sub(r"(?<=[0-9])(?:,?\s*\\[!,:;]\s*|\\ )(?=[0-9]{3}(?![0-9]))", "", s)          # 1,\!000
    s = s.replace("\\$", " ")
    s = _MATRIX.sub(_matrix, s) if "\\begin" in s else s
    s = _STYLE.sub("", s)

    s = re.sub(r"\\(?:left|right)\s*\.", "", s) if "." in s else s
    if "mathbb" in s:
        s = re.sub(r"\\mathbb\s*\{?([A-Z])\}?", lambda match: _SETS.get(match[1], match[0]), s)
    return re.sub(r"\\([A-Za-z]+|.)", _command, s)


def _texts(s):
    r"""Write the words of \text{...} as plain text: "and" as a comma, units dropped."""
    s = s.rstrip(" .,;:")
    s = _AND_TEXT.sub(lambda match: "," if match[1].strip(" ,") in ("and", "or") else match[0], s)
    return " ".join(_TEXT_BOX.sub(r" \1 ", _TEXT_UNIT.sub(_without_unit, s)).split())


def _words(s):
    """Drop units, labels and qualifiers in words."""
    s = re.sub(r"(?i)^no (?:real )?solutions?$", "∅", s)
    s = re.sub(r"\ball real numbers\b", "(-∞,∞)", s)
    s = re.sub(r" ?\b(?:percent|per cent|pct)\b", "%", s)
    # f(x) = x for all real numbers x
    s = re.sub(r" ?\bfor (?:all|any|every|each|some)\b" + _QUANTIFIED, "", s)
    s = _WORD_UNIT.sub(_without_words, re.sub(r",? ?\b(?:and|or)\b", ",", s))
    s = re.sub(r"^(?:only|(?:[Tt]he |[Ff]inal )*[Aa]nswer(?: is)?)\b:?|"
               r"^(?:[Tt]he )?(?:[Cc]orrect )?(?:[Oo]ption|[Cc]hoice)(?= ?\(?[A-J]\b)", "", s)
    labels = r"(?:^|(?<=,)) ?(?!Not|Never|Wrong|False|Incorrect)[A-Z][a-z]+ ?:(?= ?[-0-9\\])"
    return re.sub(labels, "", s)                                                         # Tom: 5


def _spaces(s):
    """Drop spaces but between two words or numbers: 1 000 is one number, and 5 1/2 is a sum."""
    s = re.sub(r"(?<![0-9.,/^_])([0-9]{1,3}(?: [0-9]{3})+)(?![0-9./])",
               lambda match: match[0].replace(" ", ""), s)
    s = re.sub(r"(?<![0-9./^_])([0-9]+) ([0-9]+) ?/ ?([0-9]+)(?![0-9.])", r"(\1+\2/\3)", s)
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", s)


@functools.lru_cache(maxsize=4096)
def clean(s):
    """Return one spelling for the many of LaTeX, Unicode and prose, without units."""
    # characters; most answers are plain, so a look for a sign comes before most patterns
    if not s.isascii():
        s = _unicode(s)
    if not s.isprintable():
        escapes = r"\f(?=rac)|[\b](?=egin|inom)|\t(?=ext|imes|frac|heta)|\r(?=ight)"
        s = re.sub(escapes, lambda match: _MISREAD[match[0]], s)

    # commands and signs
    if "{,}" in s:
        s = re.sub(r"(?<=[0-9])\{,\}\s*(?=[0-9]{3}(?![0-9]))", "", s)                      # 1{,}000
    if "\\" in s:
        s = _commands(s)
    s = " ".join(s.replace("$", " ").replace("~", " ").split())
    s = s.replace("<=", "≤").replace(">=", "≥").replace("!=", "≠")
    if "<su" in s:
        s = re.sub(r"<su([pb])>([^<>]*)</su\1>", lambda m: _TAGS[m[1]] + "{" + m[2] + "}", s)
    if "°" in s:
        s = re.sub(r" ?\^? ?\{? ?° ?\}?(?:[CF]\b)? ?", " ", s).strip()

    # words
    if "\\" in s and "{" in s:
        s = _texts(s)
    if "ℤ" in s or "ℕ" in s:
        s = re.sub(r"[,;(]? ?(?:where )?\b[a-z] ?∈ ?[ℤℕ][^,;]*$", "", s)              # k π, k ∈ ℤ
    s = s.strip(' "“”').rstrip(" .,;:")
    if re.search(r"(?<![A-Za-z\\])[A-Za-z]{2}", s):
        s = _words(s)
    if " " in s:
        s = _spaces(s)
    return s.rstrip(".\\").replace("⦃⦄", "∅")
