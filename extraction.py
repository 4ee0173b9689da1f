r"""Extraction: find the final answer in the text of a completion. reward.py compares it.

What is read is what thoughts.py leaves: no thought, and nothing behind the end of the text. Four
kinds of mark announce a final answer:
  box        \boxed{x}, \fbox{x}, \boxed 2        (with balanced braces; an unclosed or empty box is
                                                 no answer)
  tag        <answer>x</answer>
  hashes     #### x to the end of the line        (GSM8K; the heading "#### Step 2" is no answer)
  statement  "the final answer is x.", "**Answer:** x", "A: x" to the end of the sentence, and
             "### Final Answer" as a line of its own, above the value
The last mark wins, whatever its kind, and so does a mark inside a tag. A statement behind another
kind of mark must say a value: after "\boxed{8}", "the answer is odd" says none, "Answer: D" does.
If it is a sentence ("Final answer: She has 7 apples."), it counts when its numbers are all other
ones. Ticks, code fences and bold type around an answer are taken away.

A mark that the text denies is no answer: "is not \boxed{5}", "cannot be 5", "x \neq \boxed{5}",
"\boxed{5} is wrong". The negation has to stand directly before the mark, with nothing between but
words such as "equal to" or "that the answer is". An answer that is struck out, or only asked ("Is
it \boxed{5}?"), is denied too. So "Those that do not fit are \boxed{5}" denies nothing. An earlier
mark with the value that a later one denies is no answer either.

What is attached to a mark belongs to the answer: -\boxed{5} is -5, "\boxed{5} million" is not 5.
Units and ordinary words are not attached, nor are "at least" and "dozens of".

Marks of one kind that directly follow each other (\boxed{3} or \boxed{4}) are one answer, the list
"3, 4". It is right when the gold answer is that list, and a hedge and wrong when the gold answer is
one value. Text without any mark has an answer only as a worked conclusion: the last sentence is
complete and gives one number, and the text has computed this number ("88 - 36 = 52. She bought 52
more tins."). lenient=True falls back to the last number in the text instead. It is for a second
column in an evaluation, never for a reward.

Every pattern is linear or reads a window, so the work grows with the text at most. This file needs
thoughts.py and verifier/ alone; reward.py, data.py and puzzles/ need it.
"""

import re
from collections import namedtuple

from thoughts import TAIL, ended, tail
from verifier.answers import MAX_ANSWER, MAX_ITEMS, equal

MAX_PLACES = 50      # places of the word "answer", from the end, where a statement is looked for

# -------------------------------------------------------------------------------------------- marks

Mark = namedtuple("Mark", "start end content")      # of one answer in a text

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s{0,9}(?:\{([^{}\\]*)\}|(\{)|([^\s{}$.,\\]+))")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_TAG = re.compile(r"<(/?)answer>", re.I)
_HEADING_WORDS = r"[ \t]*(?:[A-Za-z]{2}|[A-Za-z][ \t]+[A-Za-z]|[A-Za-z0-9]+[.)][ \t])"
_HASHES = re.compile(rf"####(?!{_HEADING_WORDS})([^\n#<]+(?:<(?!/)[^\n#<]*)*)")

# "the final answer to the question is", "Answer:" at the start of a line or of a sentence, "answer"
# as a line of its own; and "A:", but not before an option "B:"
_IS_NOT = (r"(?P<denied>\bisn['’]t\b|\bcan(?:not|['’]t| not| never) be\b|≠"
           r"|\b(?:should|would|could|must|will)(?:n['’]t| not| never) be\b)")
_IS = (r"(?:\bis\b(?!n['’]t)|[:=—–]|\b(?:should|would|must|will|has to|ought to) be\b"
       r"|\b(?:equals?|becomes|was|(?:comes|works|turns) (?:out )?(?:to|as)(?: be)?)\b)")
_SAID = re.compile(
    r"\b(?:the|correct|my|final)[ \t]+(?:(?:correct|final)[ \t]+)?answer[*_]*"
    rf"(?:[ \t]+(?:to|for)\b[^.\n:=]{{0,60}}?)?[ \t]*(?:{_IS}|{_IS_NOT})"
    r"|^[ \t#*_>-]*(?:answer|ans)[*_]*[ \t]*(?:[:=—–]|(?=\$|\\\())"
    r"|^[ \t#*_>-]*final answer[*_]*[ \t]+(?=[-$\\0-9]|[A-J]\W*$)"
    r"|\bcorrect[ \t]+(?:option|choice)[ \t]+is\b"
    r"|(?:(?<=[.!?}$)] )|\*\*|__)[*_]*answer[*_]*[ \t]*:", re.I | re.M)
_ANNOUNCING = ("ns:", "NS:", "ption is", "hoice is")    # looked for where there is no "answer"
_HEADING = re.compile(
    r"(?P<heading>^[ \t#*_]*(?:the )?(?:(?:final|correct) )?answer[ \t#*_\r]*$)", re.I | re.M)
_OPTIONS = re.compile(r"A:[^\n]*\n[ \t]*B:")
_GAP = re.compile(
    r"(?:[\s*:`]|(?<=```)[a-z]{1,12}\n|(?<=\n)>"
    r"|(?:therefore|thus|hence|then|simply|indeed|clearly|option|choice|actually|exactly"
    r"|precisely|really|just|in fact|the (?:number|value)|be|equal to|given by)\b,?"
    r"|_(?=[_ ]))*", re.I)
_SENTENCE = re.compile(r"(?:\\\[|\$\$)(.*?)(?:\\\]|\$\$)|(.*?)(?=\.(?:[\s*$]|$)|\n|</|$)", re.S)
_CLAUSE = re.compile(
    r"(?:The|the) (?:[A-Za-z ]|\$[^$0-9]{1,40}\$)+ (?:is|are|equals) (?=[-$\\0-9(])")

# what a value begins with: 7, $x$, (D), option D, -x, Friday, yes
_VALUE = re.compile(
    r"[-+±(\[{|\s*\"'“]*"
    r"(?:[$\\0-9√π∞∅]|\.[0-9]|[AI](?![A-Za-z'])(?!\s[a-z])|[B-HJ-Z](?![A-Za-z'])"
    r"|[a-z](?=\W*$|[-+*/^=_(])|[A-Z][a-z]+(?: [A-Z][a-z]+){0,3}\W*$"
    r"|(?:yes|no|true|false|none)\W*$)")

# a negation, and the words that may stand between it and the mark that it denies
_DENIALS = frozenset(b"""
    not cannot never nor no hardly except but rather other instead longer unlikely impossible fail
    fails different far false wrong incorrect untrue mistake trap doubt deny ne neq lnot neg sout st
    cancel xcancel bcancel del strike nope invalid rejected eliminated ruled error""".split())
_LETTERS = bytes(c if 97 <= c < 123 else c + 32 if 65 <= c < 91 else 32 for c in range(256))
_NEGATION = (
    r"(?:\b(?=[acdefhinoruw])(?:(?:(?:not|never|nor|cannot|can['’]t)"
    r"(?<!or not)(?<!if not)(?<!why not)|hardly|no (?:longer|means|way)"
    r"|doubt(?<!no doubt)(?<!any doubt)(?<!without doubt)"
    r"(?<!without a doubt)(?<!beyond doubt)(?<!not doubt)(?<!n['’]t doubt)|deny(?<!not deny)"
    r"(?<!n['’]t deny)|far from|(?:anything|everything|all|any \w{1,9}) (?:but|except)|other than"
    r"|rather than|instead of|different from|fails? to)\b(?! is\b)|(?:unlikely|false"
    r"|impossible|wrong|incorrect|untrue) (?:that|to|answer|value|result)\b"
    r"|(?:wrong|incorrect|false|rejected)(?=:)(?<![a-z] wrong)"
    r"(?<![a-z] incorrect)(?<![a-z] false)(?<![a-z] rejected))"
    r"|\b(?:mistake|trap) (?:is|would be|that|to)\b"
    r"|n['’]t\b(?! is\b)|≠|!=(?<=[\sa-jlo-qs-z]!=)|<>(?<=[\s\w)}]<>)|\\(?:neq?|l?not|neg)\b"
    r"|\\(?:sout|st|[bx]?cancel)(?=\{)|<(?:del|s|strike)>)"
    r"(?:[-–— \t$*`:({\[=~_\"'“”‘’,;)]|\n(?=\s*(?:\\\[|\$\$))|\\[(\[,;:! {]"
    r"|</?[a-z]{1,8}>|\\(?:text|textbf|mathrm|quad)\b|[A-Za-z]\b"
    r"|\b(?:be|been|equals?|to|the|an|my|our|final|correct|right|true|answer|value|result|solution"
    r"|number|that|it|this|is|case|think|believe|say|mean|claim|sure|certain|simply|just|actually"
    r"|really|exactly|always|only|even|quite"
    r"|possibly|necessarily|in fact|at all|close|near|anywhere|remotely)\b)*")
_DENIED_BEFORE = re.compile(_NEGATION + r"\Z")
_NONE = re.compile(r"\b(?:no|none|nothing|nobody|only)\b[^.?!\n]*\Z", re.I)   # none other than 5
_DENIES = re.compile(
    r"(?:[a-z]{2,12}ly\s+|\$\s*|\\\(\s*)?" + _NEGATION + r"(?=[-0-9$\\<#*]|[A-Z]\b|\Z)", re.I)
_STRUCK = re.compile(r"[\s$*]*(?:~~|<(?:del|s|strike)>|\\(?:sout|st|[bx]?cancel)\{)")
_ASKS = re.compile(
    r"\b(?:is|are|was|could|can|might|may|should|does|maybe|perhaps)\b[^.?!\n]{0,40}\Z", re.I)

_BUT_NOT = re.compile(
    r",? (?:and |but )?(?:not|rather than|instead of) (?=[-0-9$\\]|[A-Z]\b)")       # 7, not 5

# "is not the answer", "? No", "That is wrong", "(wrong)", "doesn't work", behind a mark
_WRONG = r"(?:wrong|incorrect|false|invalid|rejected|ruled out|eliminated|an? (?:mistake|error))\b"
_RIGHT = r"(?:answer|solution|result|right|correct|true|valid|it|possible)\b"
_DENIED_BEHIND = re.compile(
    r"(?:[\s$*`)\]}.,;\"'”]|\\[\])]|[—–:(-]\s*(?=[a-z]))*"
    r"(?:\?[\s*$)]*(?:(?:hmm+|well|oh)[\s,.…]+)?(?:no|not|nope|never|wrong|incorrect)\b"
    r"|(?:(?:but|and|no|so|wait|hmm+|oh|well|actually|however|sorry)[\s,.…]+){0,3}"
    r"(?:(?:that|this|it|which|(?:the|this|that|my) answer)\s*)?"
    r"(?:(?:is|was|['’]s|can|could)\s*(?:(?:not|n['’]t|['’]t|never)(?:\s+be)?\s+(?:quite\s+)?"
    r"(?:(?:the|my|our|an?)\s+)?(?:(?:final|correct|right|valid|true)\s+)?" + _RIGHT +
    r"|(?:clearly\s+|obviously\s+)?" + _WRONG + r")(?!\s+(?:that|to)\b)"
    r"|cannot\s+be\s+(?:the\s+)?(?:correct\s+)?" + _RIGHT +
    r"|(?:wrong|incorrect|false|invalid|rejected)\s*(?:[).!,;]|\Z)"
    r"|(?:must|has to|seems|looks)\s+(?:be\s+)?" + _WRONG +
    r"|(?:does|do|did|wo|would)(?:\s+not|n['’]t)\s+(?:work|fit|hold|make sense|satisfy)\b))",
    re.I)
_QUESTION = re.compile(
    r"[\s$*)\]}\\]*\?(?![\s*]*(?:yes|yep|indeed|it is|correct|right|sure)\b)", re.I)

# what changes an answer and stands directly around its mark: -[5], 1/[5], \sqrt{[5]}, [5] million;
# not "at least [5]" or "5 dozens of eggs", which good solutions say of the number asked for
_ATTACHED_BEFORE = re.compile(
    r"(?:(?<![\w)}\]-])[-−](?=\S|\Z)|(?<==)\s?[-−]|(?<=[\w)}])[ ]?/|\\(?:pm|div)"
    r"|\\[dtc]?frac\s*(?:\{[^{}]*\}\s*|[0-9]\s*)?\{|\\sqrt(?:\[[^\[\]]*\])?\s*\{?"
    r"|\\(?:sin|cos|tan|log|ln|exp)\s*[({]?|\\[lg]t|(?:[\w)}]\s+|(?<![\w</])[A-Za-z0-9])[<>](?!=)"
    r"|\b(?:less|more|greater|fewer|larger|smaller|higher|lower) than)"
    r"(?:[ ]|\$|\\\(){0,3}\Z", re.I)
_LAST_LETTERS = frozenset(r"han \lt \gt \pm div qrt sin cos tan log \ln exp".split())
_FIRST_LETTERS = frozenset("""
    hun tho mil bil tri doz lak cro ten thi hal squ cub fac per deg bel tim cdo div sqr fra tex
    mat pi pm or""".split())
_ATTACHED_BEHIND = re.compile(
    r"(?:[ ]|\\[ ,;:!)\]]|~|\$|\*\*|\\text\{|\\(?:mathrm|quad)\b\{?)*(?:"
    r"(?:hundred|thousand|[mbtr]+illion|dozen|lakh|crore|(?:ten|hundred|thousand)th|third)s?"
    r"\b(?!(?<=s) of\b)|(?:half|halves|squared|cubed|factorial|percentile|(?:degrees )?below zero"
    r"|or (?:more|less|fewer))\b|\^\s*(?:\{[^{}]*\}|[0-9A-Za-z])|!(?=[ ]*(?:\$|\\[\])]))"
    r"|\\(?:pi|sqrt|frac)\b|π"
    r"|(?:\\(?:times|cdot|pm|div)|[×·±/])\s*(?=[-0-9\\({])[^\s=,.;$]{1,30}(?![^$\n]{0,40}=))",
    re.I)

# what may stand between two marks of one answer, and what makes a sentence no worked conclusion
_CONNECTOR = re.compile(
    r"(?:\\(?:text|quad)|\b(?:and|or)\b|\b[A-Za-z]\s*=|[\s$,;.*{}()\[\]\\])*", re.I)
_HEDGE = re.compile(
    r"\b(?:not|or|either|neither|maybe|perhaps|if|never|wrong|about)\b|n't|[?<>]|\\[a-z]", re.I)
_SCALED = re.compile(
    r"[0-9] ?(?:[A-Za-z]\b|%|per ?cent|hundred|thousand|[mb]illion|dozen)", re.I)
_NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z)}])-[ ]?)?\$?(?:\\[dt]?frac\{[0-9]+\}\{[0-9]+\}|\.[0-9]+"
    r"|[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:/[0-9]+)?)")


def _closing_braces(text, start):
    """Return {index of an opening brace: index of its closing brace} from `start` on.

    Escaped braces are skipped.
    """
    closing = {}
    opened = []

    for match in _BRACE.finditer(text, start):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def _boxes(text):
    r"""Yield the Mark of each \boxed and \fbox; of a box inside a box only the outer one."""
    closing = None
    end = 0

    for match in _BOX.finditer(text):
        plain, opening, unbraced = match.groups()
        if match.start() < end:
            continue                                        # inside the box before
        if not opening:
            yield Mark(match.start(), match.end(), unbraced or plain)
            continue

        # braces inside: where does it close?
        if closing is None:
            closing = _closing_braces(text, match.start())
        if match.start(2) in closing:
            end = closing[match.start(2)] + 1
            yield Mark(match.start(), end, text[match.end():end - 1])


def _tags(text):
    """Yield the Mark of each <answer>...</answer>; of a tag inside a tag only the inner one."""
    opening = None
    for match in _TAG.finditer(text):
        if not match[1]:
            opening = match
        elif opening:
            yield Mark(opening.start(), match.end(), text[opening.end():match.start()])
            opening = None


def _hashes(text):
    """Yield the Mark of each line of hashes."""
    for match in _HASHES.finditer(text):
        content = match[1]
        if content.count("}") > content.count("{"):
            content = content[:content.rindex("}")]         # \boxed{#### 5}
        yield Mark(match.start(), match.end(), content)


def _places(text, word, start):
    """Return the indices of a word in text[start:], the last first, MAX_PLACES at most."""
    if word[-1] not in text:
        return []
    places = []
    place = text.rfind(word, start)
    while place >= 0 and len(places) < MAX_PLACES:
        places.append(place)
        place = text.rfind(word, start, place)
    return places


def _announcements(text, start):
    """Return [(start, end, kind)] of "the final answer is", "Answer:" and "A:" from `start` on.

    The kind is "denied" for "isn't" and the like, "heading" for a line of its own, else "".
    Only the text around the last MAX_PLACES places of the word "answer" is read.
    """
    found = []
    for place in _places(text, "A:", start):
        line = text.rfind("\n", start, place) + 1 or start
        if not text[line:place].strip(" \t") and not _OPTIONS.match(text, place):
            found.append((line, place + 2, ""))

    places = _places(text, "nswer", start) + _places(text, "NSWER", start)
    if not (places or found):
        places = [place for word in _ANNOUNCING for place in _places(text, word, start)]
    for place in sorted(places):
        window = max(start, place - 25), place + 80
        said = _SAID.search(text, *window) or _HEADING.search(text, *window)
        if said:
            found.append((*said.span(), said.lastgroup or ""))
            start = said.end()
    return sorted(found)[-MAX_PLACES:]


def _statements(text, start=0, other=None):
    """Yield the Mark of each statement from `start` on.

    Behind a mark of another kind, `other`, a statement has to say a value. A sentence that does not
    begin with one ("Final answer: She has 7 apples.") counts there if it has other numbers alone.
    """
    for begin, end, kind in _announcements(text, start):
        after = _GAP.match(text, end).end()
        sentence = _SENTENCE.match(text, after, after + 2 * MAX_ANSWER)
        if not sentence:
            continue

        # Final answer: The area of $ABC$ is 12; a denied answer begins behind its negation
        at, stop = sentence.span(2 if sentence[1] is None else 1)
        if not text[at:at + 1].isdigit():
            clause = _CLAUSE.match(text, at, stop)
            if clause and not _HEDGE.search(clause[0]):
                at = clause.end()
            negation = _DENIES.match(text, at, stop)
            if negation:
                at = negation.end()
                but = text.find(" but ", at, stop)          # not 5 but 7: it denies 5
                stop = but if but >= 0 else stop
                kind = "denied"
        if kind == "denied":
            begin = at

        content = _BUT_NOT.split(text[at:stop])[0]
        if other or kind == "heading":
            is_value = "?" not in content and _VALUE.match(content)
            if not is_value and not (other and _disagrees(text[begin:end], content, other)):
                continue
        yield Mark(begin, sentence.end(), content)


def _disagrees(announced, content, other):
    """Return whether a sentence that is announced as the answer has other numbers alone."""
    if "?" in content or not ("final" in announced.lower() or announced.rstrip(" *").endswith(":")):
        return False
    numbers = _NUMBER.findall(content)
    if not 0 < len(numbers) < 6 or len(other.content) > 60:      # bounded, and no plain statement
        return False
    return not any(equal(number, other.content) for number in numbers)


# --------------------------------------------------------------------------------------- extraction

def _bare(content):
    """Return the content of a mark without ticks, fences and bold type."""
    if "`" in content:
        content = re.sub(r"```(?:[a-z]{1,12}\n)?|`", "", content)
    if "**" in content:
        bold = r"(?<![\w)])\*\*([^\s*](?:[^*]*[^\s*])?)\*\*|(?<=[\w)}$%])\*\*(?=[\s,.])"
        content = re.sub(bold, r"\1", content)
    content = content.strip(" \t\n*")
    return content.strip("'") if content[:1] == "'" else content


def _is_denied(text, mark):
    r"""Return whether the text says that a mark is not the answer: "It is not \boxed{5}."."""
    start, end, content = mark
    before = text[max(0, start - 50):start]
    behind = text[end:end + 50]
    if content[:1] in "~<\\$* " and _STRUCK.match(content):
        return True
    if "?" in behind and _QUESTION.match(behind) and _ASKS.search(before):
        return True
    if "~~" in behind and before.rstrip("$* (\\[").endswith("~~"):
        return True

    # most texts hold no word of this kind, and need no look at a pattern
    both = before + " " + behind
    if (both.isascii() and "'t" not in both and "'T" not in both
            and "!=" not in before and "<>" not in before):
        if _DENIALS.isdisjoint(both.encode().translate(_LETTERS).split()):
            return False
    negation = _DENIED_BEFORE.search(before.lower())
    if negation and not ("ther than" in negation[0] and _NONE.search(before)):
        return True
    if _DENIED_BEHIND.match(behind):
        return True

    # the value may be said again: "5 is wrong"
    said = behind.lstrip(" \n$*`)]}.,\\") if content in behind else ""
    return said.startswith(content) and _DENIED_BEHIND.match(said, len(content)) is not None


def _attached(text, mark):
    r"""Return the content of a mark with what stands directly around it: -\boxed{5} is -5."""
    content = _bare(mark.content)
    if text[mark.end - 1] not in "}>":
        return content                                      # hashes and statements end a line

    # a look at a few characters is faster than a look for a pattern
    before = behind = None
    start, end = mark.start, mark.end
    near = text[start - 9 if start > 9 else 0:start].rstrip(" $\\(")
    if near and near[-1] in "-−/<>{" or near[-3:] in _LAST_LETTERS:
        before = _ATTACHED_BEFORE.search(text, max(0, start - 40), start)
    near = text[end:end + 9].lstrip(" $*~)\\]{")
    if near and near[0] not in ".,\n" and (near[:3].lower() in _FIRST_LETTERS
                                           or near[0] in "^!π×·±/" or near[:2] in _FIRST_LETTERS):
        behind = _ATTACHED_BEHIND.match(text, end, end + 60)
    if not (behind or before):
        return content

    if not content.isalnum():
        content = "{" + content + "}"
    if before:
        content = before[0].replace("$", "") + content
    if behind:
        content += behind[0].replace("$", "")
    return content + "}" * (content.count("{") - content.count("}"))


def _is_joined(text, mark, following):
    """Return whether two marks are parts of one answer, with nothing but a connector between."""
    return (mark.end <= following.start <= mark.end + 40
            and _CONNECTOR.fullmatch(text, mark.end, following.start) is not None)


def _last_group(text, marks, denied):
    """Return the last of `marks`, joined with those directly before it, as one Mark, or None.

    Groups that the text denies are passed over, MAX_PLACES marks at most, and added to `denied`.
    """
    marks = [mark for mark in marks if mark.content.strip(" \t\n*`$.{}")]
    while marks and len(denied) < MAX_PLACES:
        group = [marks.pop()]
        if not marks and not _is_denied(text, group[0]):        # most texts have one mark
            return Mark(group[0].start, group[0].end, _attached(text, group[0]))
        length = len(group[0].content)
        while marks and length <= MAX_ANSWER and _is_joined(text, marks[-1], group[-1]):
            group.append(marks.pop())
            length += len(group[-1].content)
            if len(group) == MAX_ITEMS:
                break

        if not any([_is_denied(text, mark) for mark in group]):
            return Mark(group[-1].start, group[0].end, _joined(text, group))
        denied += group
    return None


def _joined(text, group):
    """Return the different contents of a group of marks, from its last to its first, as a list."""
    contents = [_attached(text, group[0])]
    for mark in group[1:]:
        content = _attached(text, mark)
        if not any(equal(content, other) for other in contents):
            contents.append(content)
    return ", ".join(reversed(contents))


def _conclusion(text):
    """Return the one number of a complete last sentence as a Mark if the text has computed it."""
    text = text.rstrip()
    begin = max(text.rfind("\n"), *(text.rfind(end, 0, -1) for end in (". ", "! ", "? "))) + 1
    sentence = text[begin:begin + MAX_ANSWER]
    before, equals, after = sentence.rpartition("=")
    numbers = list(_NUMBER.finditer(after))
    if len(numbers) != 1 or not text.endswith(".") or _SCALED.search(after):
        return None

    [number] = numbers
    answer = number[0].lstrip("$")
    if _HEDGE.search(before) or _HEDGE.search(after[:number.end() + 25]):
        return None

    # it is the right side of an equation here, or a result before this sentence
    result = r"(?:=|\bis)\s*\$?" + re.escape(answer) + r"(?![0-9]|[.,][0-9])"
    computed = equals or re.search(result, text[:begin])
    return Mark(begin, len(text), answer) if computed else None


def _find(text):
    """Return the Mark of the final answer or None, and the marks behind it that the text denies."""
    kinds = []
    if "\\" in text and "box" in text:
        kinds.append(_boxes(text))
    if ">" in text and ("nswer>" in text or "R" in text and "NSWER>" in text):
        kinds.append(_tags(text))
    if "#" in text and "####" in text:
        kinds.append(_hashes(text))

    # of the kinds that occur, the mark that starts last is the answer
    found = None
    denied = []
    for marks in kinds:
        mark = _last_group(text, marks, denied)
        if mark and found and text[mark.end - 1] == ">" and mark.start < found.start < mark.end:
            # behind a mark in a tag nothing may be said: <answer>\boxed{5} or 7</answer>
            if _NUMBER.search(text, found.end, mark.end):
                found = mark
        if mark and (found is None or mark.start > found.start):
            found = mark

    # a statement may stand behind it, or in a tag
    start = 0
    if found:
        start = found.start if text[found.start] == "<" else found.end
    rest = text[start:] if start else "A:"
    if ("nswer" in rest or "NSWER" in rest or "A:" in rest
            or "ns:" in rest or "ption is" in rest or "hoice is" in rest):
        found = _last_group(text, _statements(text, start, found), denied) or found
    if found is None:
        return (None if denied else _conclusion(text)), denied

    # an answer that the text denies behind it is none
    later = [mark for mark in denied if mark.start > found.start]
    if any(equal(_bare(mark.content), found.content) for mark in later[-10:]):
        found = None
    return found, later


def extract_answer(completion: str, lenient: bool = False) -> str | None:
    """Return the final answer of `completion` by the rules in this file's docstring.

    Args: completion, the model's text; lenient, whether to fall back to the last number in it.
    Returns: the answer as written (several adjacent ones joined by ", "), or None. Never raises.
    """
    text = tail(completion) if isinstance(completion, str) else ""
    found, denied = _find(text)
    if found:
        return found.content
    numbers = _NUMBER.findall(text) if lenient and not denied else []
    return numbers[-1] if numbers else None


def answer_and_number_before(completion):
    """Return (final answer, the last number before its mark), each None where there is none.

    The number may stand in the thought.
    """
    text = tail(completion)
    found, _ = _find(text)
    if not found:
        return None, None

    whole = ended(completion).rstrip()
    mark = len(whole) - len(text) + found.start
    numbers = _NUMBER.findall(whole[max(0, mark - TAIL):mark])
    return found.content, numbers[-1] if numbers else None
