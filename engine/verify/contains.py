"""`contains`: the response contains one of the accepted answers. For open questions (PopQA, arXiv 2212.10511).

Texts are normalized as in SQuAD (Rajpurkar et al., arXiv 1606.05250): lower case, no punctuation or articles, single blanks. Typographic
dashes, quotation marks and full-width characters count as ASCII ones. Only whole words match: "a woman" does not contain "Oman".
"""

from __future__ import annotations

import re
import string
from typing import Any

from engine.verify.numbers import ascii_signs
from engine.verify.shown import shown
from engine.verify.verdict import Verdict, Verifier

PUNCTUATION = str.maketrans("", "", string.punctuation + "‘’“”")
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def verify(response: str, truth: list[str]) -> Verdict:
    """Whether `response` contains any of the answers in `truth`."""
    text = f" {plain(response)} "
    found = next((answer for answer in truth if f" {plain(answer)} " in text), None)
    return Verdict(found is not None, "contains none of the answers" if found is None else f"contains {found[:40]!r}")


def plain(text: str) -> str:
    return " ".join(ARTICLES.sub(" ", ascii_signs(text).lower().translate(PUNCTUATION)).split())


def check(truth: Any) -> None:
    """Raises ValueError unless `truth` is a list of texts that are not blank; every response contains a blank one."""
    if not isinstance(truth, list) or not truth or not all(isinstance(answer, str) and plain(answer) for answer in truth):
        raise ValueError(f"truth={shown(truth)} must be a list of answers, none of them blank, such as ['Paris', 'the city of Paris']")


CONTAINS = Verifier("contains", verify, check, judge=verify, inline=True)
