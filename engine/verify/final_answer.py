r"""The final answer of a mathematical text: which of its parts it commits to. Linear time for any text.

Candidates are the last \boxed{} and the last "final answer is", whichever comes later. Without either, it is the last $…$, else what
follows the last "answer is", else the whole text. Tülu 3's verifier accepts a match in any of these; here only one counts, so that a
response cannot offer several answers.

Only what holds an answer is a candidate: \boxed{}, \boxed{\text{ }}, \boxed{\quad}, \boxed{?} and "\boxed ." do not hide an earlier one.
After a box, "the final answer is …" must begin with mathematics: in "\boxed{5}. I hope my final answer is correct." the box counts.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from engine.verify.numbers import ascii_signs

BRACES = re.compile(
    r"""\\(?:boxed|fbox)\s*(?P<box>\{)
      | \\(?:boxed|fbox)(?![a-zA-Z])\s*(?!\\(?:boxed|fbox))
        (?=[-+.\d\\(\[]|[a-zA-Z](?![a-zA-Z]))(?P<bare>(?:[^\s{}$]|\{[^{}]*\})+)  # \boxed 5, but not "the \boxed command"
      | \\[{}]
      | (?P<brace>[{}])""",
    re.VERBOSE,
)
FINAL = re.compile(r"final answer(?:\*\*)?(?: is\b:?|:)", re.IGNORECASE)
ANSWER = re.compile(r"(?:final )?answer(?:\*\*)?(?: is\b:?|:)", re.IGNORECASE)
HOPE = re.compile(r"I hope it is correct", re.IGNORECASE)
MATH_MARK = re.compile(r"(?<!\\)\$\$?|\\[()\[\]]")
BEGINS_WITH_MATH = re.compile(r"[(\[{|]*[-+]?(?:[\d$\\.√π∞]|(?![aAI]\s)[a-zA-Z](?![a-zA-Z]))")
SENTENCE_END = re.compile(r"[.;](?=\s|$)|,\s(?=[a-zA-Z]{2})")
NUMBER_END = re.compile(rf"{SENTENCE_END.pattern}|\s(?:of|as|for|because|since|from|when|where|which|that|with)\s")
INVISIBLE = re.compile(  # commands that show nothing by themselves, and placeholders
    r"""\\(?:[hv]?phantom|[hv]space\*?|(?:text)?color)\s*\{[^{}]*\}
      | \\(?:boxed|fbox|text[a-z]*|math[a-z]+|mbox|operatorname|boldsymbol|bm|emph|underline|overline|displaystyle|left|right
            |q?quad|enspace|thinspace|hfill|strut|null|[lc]?dots)(?![a-zA-Z])
      | \\[,;:!>\\/ _$%]""",
    re.VERBOSE,
)
VISIBLE = re.compile(r"[^\s{}()\[\]$.,;:?_~*&…\u200b-\u200d\u2060\ufeff]+")


class Span(NamedTuple):
    """A part of the text: text[start:end]."""

    start: int
    end: int


class _Text:
    """A text, and where it holds something visible."""

    def __init__(self, text: str):
        self.text = text
        shown = INVISIBLE.sub(lambda match: " " * len(match[0]), text)
        self.visible = [(match.end(), match.start()) for match in VISIBLE.finditer(shown)]

    def holds_answer(self, span: Span) -> bool:
        index = bisect_left(self.visible, (span.start + 1, 0))  # the first visible part that ends after the span's start
        return index < len(self.visible) and self.visible[index][1] < span.end


def final_answer(text: str) -> str:
    """The final answer of `text` without surrounding markup; may be empty."""
    parts = _Text(text)
    box = max(filter(parts.holds_answer, _boxes(text)), default=None)
    said = next(filter(parts.holds_answer, _statements(text, FINAL, after=box.start if box else -1)), None)
    others = chain(_formulas(text), _statements(text, ANSWER), [Span(0, len(text))])
    answer = said or box or next(filter(parts.holds_answer, others), None)
    return _bare(text[answer.start : answer.end]) if answer else ""


def _boxes(text: str) -> Iterator[Span]:
    r"""The content of every closed \boxed{}; also of "\boxed 5" and \fbox{}."""
    open_boxes: list[int] = []  # for each open brace, where the content of its box starts, or -1
    for mark in BRACES.finditer(text):
        if mark["bare"] is not None:
            yield Span(*mark.span("bare"))
        elif mark["box"] is not None:
            open_boxes.append(mark.end())
        elif mark["brace"] == "{":
            open_boxes.append(-1)
        elif mark["brace"] == "}" and open_boxes and (start := open_boxes.pop()) >= 0:
            yield Span(start, mark.start())


def _statements(text: str, statement: re.Pattern[str], after: int = -1) -> Iterator[Span]:
    """What follows each match of `statement`, the last one first; `after` a box at this place, only if it is mathematics."""
    end = len(text)
    for mark in reversed(list(statement.finditer(text))):
        if mark.start() < after:
            return
        stated = text[mark.end() : end]
        kept = stated.strip().strip("*").lstrip()
        start = mark.end() + stated.index(kept) if kept else end
        if after < 0 or (BEGINS_WITH_MATH.match(ascii_signs(kept[:9])) and "boxed" not in stated):  # an unclosed box is cut off
            yield _stated(text, Span(start, end))
        end = mark.start()


def _stated(text: str, span: Span) -> Span:
    """The answer at the start of `span`: the last formula of its first line or of a displayed one, else its first sentence."""
    start = span.start
    shown = MATH_MARK.match(text, start, span.end)
    if shown and shown[0] in ("$$", r"\[") and (closing := MATH_MARK.search(text, shown.end(), span.end)):
        return Span(shown.end(), closing.start())
    line = Span(start, end if (end := text.find("\n", start, span.end)) >= 0 else span.end)
    hope = HOPE.search(text, *line)
    line = Span(start, hope.start() if hope else line.end)
    bare = _begins_bare(text, line)
    formula = None if bare else next(_formulas(text, line), None)
    sentence = (NUMBER_END if bare else SENTENCE_END).search(text, *line)
    return formula or Span(start, sentence.start() if sentence else line.end)


def _begins_bare(text: str, line: Span) -> bool:
    """Whether a line begins with a number that is not in a formula."""
    return re.match(r"[-+]?[\d.]", ascii_signs(text[line.start : min(line.end, line.start + 2)])) is not None


def _formulas(text: str, part: Span | None = None) -> Iterator[Span]:
    """What is between math marks, from the last pair to the first."""
    marks = [match.span() for match in MATH_MARK.finditer(text, *(part or (0, len(text))))]
    for right in range(len(marks) - 1, 0, -2):
        yield Span(marks[right - 1][1], marks[right][0])


def _bare(answer: str) -> str:
    answer = ascii_signs(answer).strip()
    left, right = 0, len(answer)
    while right - left > 1 and answer[left] == answer[right - 1] == "$":
        left, right = left + 1, right - 1
    return answer[left:right].strip().removesuffix(".").rstrip()
