r"""What is read of a completion: the text behind its thought, up to the first end-of-text token.

A thought stands between marks, which models spell in many ways: <think>, [THINK], ◁think▷, the
analysis channel of gpt-oss. What is inside is not read, and a thought that is still open has no
answer. The work is linear in the text. This file needs the standard library alone; extraction.py
needs it.
"""

import re

TAIL = 20_000        # characters of a completion that are searched, from its end
WINDOW = 4_000       # characters in which the last mark of a thought is looked for at once

# the marks of a thought, in the spellings of the field; a slash or "end" closes it
_THOUGHT = re.compile(
    r"[<◁]\|?\s?(?P<closes>/|end_)?(?:seed:)?(?:think(?:ing)?|thoughts?|(?P<own>reasoning))"
    r"(?:\s[^<>▷]{0,40})?\|?[>▷]|\[(?P<closed>/)?THINK\]"
    r"|<\|(?:begin|(?P<ends>end))_of_thought\|>"
    r"|<\|channel\|>\s?(?:(?P<final>final)|\w{1,20})[^<>]{0,40}<\|message\|>", re.I)
_END = re.compile(
    r"<\|(?:im_end|endoftext|eot(?:_id)?|end_of_text|return|user|im_start\|>\s*user"
    r"|start_header_id\|>\s*user|end\|>(?!<\|start\|>assistant))|</s>|<end_of_turn>"
    r"|\n\nUser:")


def tail(completion):
    """Return what is read: the last TAIL characters, of what follows a thought."""
    return after_thought(ended(completion)).rstrip()[-TAIL:]


def ended(completion):
    """Return what stands before the first end-of-text token."""
    # a look for one character is ten times as fast as a look for a word, here and below
    if ("|" in completion and "<|" in completion or "/" in completion and "</s>" in completion
            or ">" in completion and "_" in completion and "<end_of_turn>" in completion
            or "U" in completion and "\n\nUser:" in completion):
        end = _END.search(completion)
        completion = completion[:end.start()] if end else completion
    return completion


def opened(prompt):
    """Return the mark with which a prompt opens a thought at its end, "" where it opens none."""
    prompt = prompt.rstrip()
    for mark in _THOUGHT.finditer(prompt, max(0, len(prompt) - 120)):
        if mark.end() == len(prompt) and not closes(mark):
            return mark[0]
    return ""


def closes(mark):
    """Return whether a mark of _THOUGHT ends a thought."""
    return bool(mark["closes"] or mark["closed"] or mark["ends"] or mark["final"])


def after_thought(text):
    """Return what follows the last thought: all of a text without one, nothing of an open one.

    In a text with an <answer> the tags <reasoning> are this project's form and no thought.
    """
    if "<" not in text and "[" not in text and "◁" not in text:
        return text
    if not ("hink" in text or "hought" in text or "reasoning>" in text
            or "|" in text and "<|channel" in text or "K" in text and "HINK" in text
            or "G" in text and ("HOUGHT" in text or "REASONING>" in text)):
        return text

    # the last mark is in the last window that has one; windows overlap by the longest mark
    last = None
    own_form = "<answer>" in text.lower()
    for begin in range((len(text) - 1) // WINDOW * WINDOW, -1, -WINDOW):
        for mark in _THOUGHT.finditer(text, begin, begin + WINDOW + 120):
            if not (own_form and mark["own"]):
                last = mark
        if last:
            break
    if last is None:
        return text
    return text[last.end():] if closes(last) else ""
