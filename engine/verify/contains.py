"""One of the known answers stands in the response: for open questions, whose answers have many names (PopQA, arXiv 2212.10511).

Texts are compared as SQuAD compares them (Rajpurkar et al., arXiv 1606.05250): in lower case, without punctuation and articles, white space
as one blank. Whole words must match: "Oman" does not stand in "a woman".
"""

from __future__ import annotations

import re
import string
from typing import Any

from engine.verify.verdict import Verdict, Verifier

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def verify(response: str, truth: list[str]) -> Verdict:
    """Whether any of the answers `truth` stands in `response`."""
    text = f" {plain(response)} "
    found = next((answer for answer in truth if f" {plain(answer)} " in text), None)
    return Verdict(found is not None, "none of the answers stands in it" if found is None else f"{found[:40]!r} stands in it")


def plain(text: str) -> str:
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def check(truth: Any) -> None:
    """Raises ValueError unless `truth` is a list of texts that are not blank: a blank one stands in everything."""
    if not isinstance(truth, list) or not truth or not all(isinstance(answer, str) and plain(answer) for answer in truth):
        raise ValueError(f"truth={truth!r:.60} must be a list of answers, none of them blank, such as ['Paris', 'the city of Paris']")


CONTAINS = Verifier("contains", verify, check, judge=verify, inline=True)
