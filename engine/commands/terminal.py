"""Text of models and files, made safe to print on a terminal."""

from __future__ import annotations

import re

# Control characters but newline and tab, lone surrogates, and the marks that reorder text (Unicode bidirectional controls).
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""`text` with every character that a terminal would obey written as an escape, such as \x1b; newlines and tabs stay."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
