r"""Numbers in text: the only place that reads them, for all verifiers and evaluations.

A numeral is decimal digits of any script, with these parts around it:
- thousands separators, which are removed: 1,000 · 1{,}000 · 1\,000 · 1,\!000, and the spaces that typography uses (no-break, thin,
  figure). A group has three digits. An ordinary space separates numbers, and so does a comma that is followed by one: "7, 512" is two.
- a sign before the digits or their currency: "-5", "-$5", "$-5". Every dash that keyboards and typography use for minus is one (U+002D,
  U+2010 to U+2013, U+2212, U+FE63, U+FF0D). It is not a sign after a word or a number: "5–10", "5%–10%" and "12-5" end in 10, 10 and 5.
- decimals (.5, 2.50), a decimal exponent (1e3), and a denominator (1/2), which is kept: 1/2 is not 2. Powers are not computed.
Currency, percent signs, units and full stops around it are not part of it.
"""

from __future__ import annotations

import re
from decimal import Decimal

DASHES = "\u2010\u2011\u2012\u2013\u2212\ufe63"  # read as a minus sign, like U+FF0D, which is one of the full-width characters
ASCII_TABLE = (
    {0xFEE0 + code: code for code in range(0x21, 0x7F)}  # full-width characters
    | dict.fromkeys(map(ord, DASHES), "-")
    | {ord("⁄"): "/", ord("٫"): ".", ord("٬"): ","}
)
SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|\\,|,\s?\\!\s?|[\u00a0\u2007\u2009\u202f])(?=\d{3}(?!\d))")
LAST_DIGIT = re.compile(r"\d\D*\Z")
NUMBER = re.compile(
    r"""(?:(?<![\w.,)\]}%])(?<!\d[$€£¥₹¢°'"′″])                 # after these, a minus separates
           (?P<sign>[-+])(?:\\?[$€£¥₹])?)?                      # a sign, maybe before a currency
        (?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?   # 1,000.50
                   |(?<![\w.])\.\d+)                            # .5, but not the 5 of No.5
        (?P<exponent>[eE][-+]?\d{1,9}(?!\w))?
        (?P<over>/\d+)?                                         # 1/2 is not 2""",
    re.VERBOSE,
)


def ascii_signs(text: str) -> str:
    """`text` with ASCII minus signs, separators and full-width characters. Its length stays the same."""
    return text if text.isascii() else text.translate(ASCII_TABLE)


def comma_separators(text: str) -> str:
    """`text` with a comma for every thousands separator."""
    return SEPARATOR.sub(",", text)


def last_number(text: str) -> str | None:
    """The last number in `text`, without separators and currency, as Decimal accepts it or as "1/2"; None if there is none. Linear time."""
    text = comma_separators(ascii_signs(text))
    end = LAST_DIGIT.search(text)
    if end is None:
        return None
    word = text[: end.start() + 1].rsplit(None, 1)[-1]  # a numeral has no white space in it
    last = None
    for last in NUMBER.finditer(word):  # noqa: B007
        pass
    assert last is not None
    sign = "-" if last["sign"] == "-" else ""
    return f"{sign}{last['digits'].replace(',', '')}{last['exponent'] or ''}{last['over'] or ''}"


def same_number(a: str, b: str) -> bool:
    """Whether two results of `last_number` are the same: exactly, and without arithmetic. Fractions are compared as they are written."""
    if a == b or "/" in a or "/" in b:
        return a == b
    return Decimal(a) == Decimal(b)
