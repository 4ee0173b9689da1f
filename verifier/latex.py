r"""One spelling for the many of LaTeX, Unicode and prose: `clean`, the first half of comparing two answers.

Signs and structural commands become one character each; sizes, styles, dollar signs and degrees go away; a matrix is
written with brackets of its own, \begin{pmatrix} a & b \\ c & d \end{pmatrix} as ⟦⟦a,b⟧,⟦c,d⟧⟧; thousands separators and
units in words after a value are dropped, "and" and "or" are commas. Words that would change the value stay, so that
the text is then no expression. Every pattern is linear or bounded.
"""

import functools
import re

# Each sign and each structural command becomes one character or nothing; the code below splits on characters.
_SIGNS = r"""
    π pi; ∞ infty; * cdot times ast; / div; ± pm; ∓ mp; ≤ le leq leqslant; ≥ ge geq geqslant; < lt; > gt; ≠ ne neq;
    ≈ approx; ∈ in; ∪ cup; ∖ setminus backslash; ⦃ lbrace; ⦄ rbrace; | mid vert lvert rvert; ° circ degree textcirc;
    ⌊ lfloor; ⌋ rfloor; ⌈ lceil; ⌉ rceil; ∀ forall; ∅ emptyset varnothing; : colon; … ldots cdots dots;
    \frac dfrac tfrac cfrac; \binom dbinom tbinom"""
_COMMANDS = {name: line.split()[0] for line in _SIGNS.split(";") for name in line.split()[1:]}
_COMMANDS |= dict.fromkeys("left right big Big bigg Bigg bigl bigr displaystyle boxed angle".split(), "")
_COMMANDS |= dict.fromkeys("quad qquad".split(), " ")
_DOUBLED = set(_COMMANDS) | {"frac", "sqrt", "text", "begin", "end"}
_ESCAPES = {"\\{": "⦃", "\\}": "⦄", "\\%": "%", "\\!": "", "\\\\": "\\\\"}          # others: a space
_CHARACTERS = {0xFF01 + i: 0x21 + i for i in range(94)}                             # full-width forms
_CHARACTERS |= dict.fromkeys((0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0xAD))        # zero width: dropped
_CHARACTERS |= str.maketrans("−–×·⋅÷⁄º～’′、，€£", "--***//° '',,  ")
_CHARACTERS |= str.maketrans({"√": "\\sqrt ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"})
_SCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
_MISREAD = {"\f": r"\f", "\b": r"\b", "\t": r"\t", "\r": r"\r"}                      # "\frac" read as form feed + rac
_TEXT = r"\\(?:text|mbox|hbox|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|rm|bf)\s*\{([^{}]*)\}"
_TEXT_RE = re.compile(_TEXT)
_AND_TEXT = re.compile(r",?\s*" + _TEXT)
_EXPONENT = r"(?: ?\^ ?\{?-?[0-9]\}?)?"
_END = r"(?=[ .]*(?:$|[,;)\]}⦄]))"
_TEXT_UNIT = re.compile(rf"(?<=[0-9A-Za-z}})π!%'|])(?: ?[/*]? ?{_TEXT}{_EXPONENT}){{1,4}}{_END}")     # cm, m/s, m s^{-1}
_WORD_UNIT = re.compile(r"(?<=[0-9})π%])((?: |(?=(?:cm|mm|km|kg|ft|th|st|nd|rd)\b))[A-Za-z][A-Za-z'/. -]*)"
                        + _EXPONENT + _END)
_SHORT_UNITS = set("cm mm km kg gm ft in mi lb lbs oz hr hrs min sec mph day per men egg th st nd rd".split())
_NO_UNITS = set("e i x y n pi or and not no never hundred thousand million billion trillion dozen half double twice times "
                "plus minus over squared cubed factorial mod to between more less than least most if when where for but "
                "is are was isn't wrong false incorrect except sqrt sin cos tan cot csc log ln exp am pm a.m. p.m. union "
                "undefined none".split())
_STYLE = re.compile(r"\\(?:(?:bf|rm|it|large|Large)\b(?!\s*\{)|(?:text)?color\s*\{\w*\})")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[^{}]*\})?(.*?)\\end\{\1\}", re.S)


def _matrix(m):
    rows = [row.replace("&", ",") for row in m[2].split("\\\\") if row.strip()]
    return "⟦" + ",".join(f"⟦{row}⟧" for row in rows) + "⟧"


def _without_unit(m):
    r"""Drop `\text{ square cm}` after a value, unless a word in it could change the value."""
    words = " ".join(_TEXT_RE.findall(m[0]))
    keep = _NO_UNITS.intersection(words.lower().split()) or re.search(r"[^A-Za-z'/.\s-]", words)
    return m[0] if keep else ""


def _without_words(m):
    """Drop plain words after a value if they look like words, not like a product of variables."""
    words = m[1].lower().split()
    first = words[0].strip(".")
    return "" if (len(first) > 3 or first in _SHORT_UNITS) and not _NO_UNITS.intersection(words) else m[0]


def _unicode(s):
    """Full-width forms, superscripts and signs as ASCII or LaTeX."""
    s = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^{" + m[0].translate(_SCRIPTS) + "}", s)
    s = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SCRIPTS) + "}", s)
    return s.translate(_CHARACTERS)


def _commands(s):
    """LaTeX commands as signs, and no text boxes."""
    if "\\\\" in s:
        s = re.sub(r"(?<!\\)\\\\([A-Za-z]{2,})", lambda m: m[0][m[1] in _DOUBLED:], s)     # \\frac for \frac
    s = re.sub(r"(?<=[0-9])(?:,?\s*\\[!,:;]\s*|\\ )(?=[0-9]{3}(?![0-9]))", "", s)          # 1,\!000
    s = _MATRIX.sub(_matrix, s.replace("\\$", " ")) if "\\begin" in s else s.replace("\\$", " ")
    s = _STYLE.sub("", s)
    s = re.sub(r"\\(?:left|right)\s*\.", "", s) if "." in s else s
    if "mathbb" in s:
        s = re.sub(r"\\mathbb\s*\{?([A-Z])\}?", lambda m: {"R": "(-∞,∞)", "Z": "ℤ", "N": "ℕ"}.get(m[1], m[0]), s)
    s = re.sub(r"\\([A-Za-z]+|.)", lambda m: _COMMANDS.get(m[1], m[0]) if m[1][0].isalpha() else _ESCAPES.get(m[0], " "), s)
    return s


def _texts(s):
    r"""The words of \text{...} as plain text: "and" as a comma, units dropped."""
    s = _AND_TEXT.sub(lambda m: "," if m[1].strip(" ,") in ("and", "or") else m[0], s.rstrip(" .,;:"))
    return " ".join(_TEXT_RE.sub(r" \1 ", _TEXT_UNIT.sub(_without_unit, s)).split())


def _words(s):
    """No units, labels and qualifiers in words."""
    s = re.sub(r"\ball real numbers\b", "(-∞,∞)", re.sub(r"(?i)^no (?:real )?solutions?$", "∅", s))
    s = re.sub(r" ?\b(?:percent|per cent|pct)\b", "%", s)
    s = re.sub(r" ?\bfor (?:all|any|every|each|some)\b(?:\([^()]*\)|[^,;])*", "", s)                # f(x) = x for all x
    s = _WORD_UNIT.sub(_without_words, re.sub(r",? ?\b(?:and|or)\b", ",", s))
    s = re.sub(r"^(?:only|(?:[Tt]he |[Ff]inal )*[Aa]nswer(?: is)?)\b", "", s)
    return re.sub(r"(?:^|(?<=,)) ?[A-Z][a-z]+ ?:(?= ?[-0-9\\])", "", s)                             # Tom: 5


def _spaces(s):
    """No spaces but between two words or numbers; none within a number, and 5 1/2 as a sum."""
    s = re.sub(r"(?<![0-9.,/^_])([0-9]{1,3}(?: [0-9]{3})+)(?![0-9./])", lambda m: m[0].replace(" ", ""), s)
    s = re.sub(r"(?<![0-9./^_])([0-9]+) ([0-9]+) ?/ ?([0-9]+)(?![0-9.])", r"(\1+\2/\3)", s)
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", s)


@functools.lru_cache(maxsize=4096)
def clean(s):
    """One spelling for the many of LaTeX, Unicode and prose, without units."""
    if not s.isascii():
        s = _unicode(s)
    if not s.isprintable():
        s = re.sub(r"\f(?=rac)|[\b](?=egin|inom)|\t(?=ext|imes|frac|heta)|\r(?=ight)", lambda m: _MISREAD[m[0]], s)
    s = re.sub(r"(?<=[0-9])\{,\}\s*(?=[0-9]{3}(?![0-9]))", "", s) if "{,}" in s else s              # 1{,}000
    s = _commands(s) if "\\" in s else s
    s = " ".join(s.replace("$", " ").replace("~", " ").split())
    s = s.replace("<=", "≤").replace(">=", "≥").replace("!=", "≠")
    if "<su" in s:
        s = re.sub(r"<su([pb])>([^<>]*)</su\1>", lambda m: "^_"[m[1] == "b"] + "{" + m[2] + "}", s)
    if "°" in s:
        s = re.sub(r" ?\^? ?\{? ?° ?\}?(?:[CF]\b)? ?", " ", s).strip()
    if "\\" in s and "{" in s:
        s = _texts(s)
    if "ℤ" in s or "ℕ" in s:
        s = re.sub(r"[,;(]? ?(?:where )?\b[a-z] ?∈ ?[ℤℕ][^,;]*$", "", s)                             # k π, k ∈ ℤ
    s = s.strip(' "').rstrip(" .,;:")
    if re.search("[a-z]{2}", s):
        s = _words(s)
    s = _spaces(s) if " " in s else s
    return s.rstrip(".\\").replace("⦃⦄", "∅")
