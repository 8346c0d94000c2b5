"""Sentences and words as NLTK splits them, which IFEval counts. Its data cannot be installed; the same Punkt model comes with `punkt`.

Sentences: Punkt (Kiss and Strunk, "Unsupervised multilingual sentence boundary detection", 2006), with the punctuation rules of NLTK 3.10.
There the last mark of "What?!" and every dot of ". . ." are sentences of their own. Words: the rules of the Penn Treebank with the
additions of NLTK. They split contractions ("I'll" is "I" and "'ll", "NATO's" is "NATO" and "'s") and keep hyphens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from punkt import LanguageVars, PunktBoundaryDetector, PunktWordTokenizer, annotate_tokens, load_model

RULES = LanguageVars()
NO_RUNS = LanguageVars(multi_char_punct_pattern=r"(?!)")  # every mark of a run such as "..." may end a sentence
CLOSING = re.compile(r"""["')\]}‘’“”«»]+?(?:\s+|(?=--)|$)""", re.MULTILINE)  # belongs to the sentence before it

# Applied to a sentence in this order. Then its words are between blanks.
SPLITS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[«“‘„]|`+", r" \g<0> "),
        (r'\A"', "``"),
        (r"``", " `` "),
        (r'(?<=[ (\[{<])(?:"|\'\')', " `` "),
        (r"(?<!\w)'(?!(?i:re|ve|ll|m|t|s|d|n)\b)(?=\w)", "' "),
        (r"(?<=[^.])\.(?=[\])}>\"' »”’]*+\s*\Z)", " . "),
        (r"([:,])(\D)", r" \1 \2"),
        (r"[:,]\Z", r" \g<0> "),
        (r"\.{2,}|[;@#$%&?!]|[\u2012-\u2015]", r" \g<0> "),
        (r"(?<=[^'])' ", " ' "),
        (r"[*\]\[(){}<>]|--", r" \g<0> "),
        (r"\A|\Z", " "),
        (r"[»”’]|''", r" \g<0> "),
        (r'"', " '' "),
        (r"\s+", " "),
        (r"(?<=[^' ])(?:'[sSmMdD]|') ", r" \g<0>"),
        (r"(?<=[^' ])(?:'ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", r" \g<0>"),
        (r"(?i)\b(can)(not)\b|\b(d)('ye)\b|\b(gim|lem)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(more)('n)\b|\b(wan)(na)(?=\s)", None),
        (r"(?i) ('t)(is)\b", None),
        (r"(?i) ('t)(was)\b", None),
    )
]


def sentences(text: str) -> list[str]:
    """The sentences of `text` by the English model."""
    return [text[start:end] for start, end in _realigned(text, list(_spans(text))) if start < end]


def words(text: str) -> list[str]:
    """The words and punctuation marks of `text`."""
    return [word for sentence in sentences(text) for word in _words(sentence)]


def _words(sentence: str) -> list[str]:
    for pattern, replacement in SPLITS:
        sentence = pattern.sub(replacement or _parted, sentence)
    return sentence.split()


def _parted(match: re.Match[str]) -> str:
    return f" {' '.join(filter(None, match.groups()))} "


def _spans(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for candidate in _detector().detect(text):
        if _ends_sentence(candidate.context):
            yield start, candidate.end
            start = candidate.end if candidate.next_tok_start is None else candidate.next_tok_start
    yield start, len(text.rstrip())


def _ends_sentence(context: str) -> bool:
    """Whether a sentence ends in `context` before its last token."""
    tokens = list(annotate_tokens(_tokenizer().tokenize_annotated(context), load_model("english"), RULES))
    return any(token.sentbreak for token in tokens[:-1])


def _realigned(text: str, spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """`spans` with closing quotation marks and brackets moved to the sentence before them."""
    moved = 0
    for (start, end), (following, until) in zip(spans, [*spans[1:], (0, 0)], strict=True):
        closing = CLOSING.match(text[following:until]) if following < until else None
        yield start + moved, following + len(closing[0].rstrip()) if closing else end
        moved = closing.end() if closing else 0


@cache
def _detector() -> PunktBoundaryDetector:
    return PunktBoundaryDetector(NO_RUNS)


@cache
def _tokenizer() -> PunktWordTokenizer:
    return PunktWordTokenizer(RULES)
