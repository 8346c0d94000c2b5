r"""Whether two LaTeX expressions are equal: by the math-verify library, at any magnitude. It may not terminate; call it in a worker.

The library subtracts the expressions and drops what is below 10^-15, so that it finds 2^{-60} = 2^{-61} = -2^{-60}. Here, what it finds
equal is compared a second time if it has small numbers, with so many digits that none of them is dropped. For the same reason decimals
below 10^-4 are compared to six significant digits, where the library rounds to six decimals.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse
from math_verify import verify as equal_by_library
from sympy.core.random import seed

LATEX_ONLY = (LatexExtractionConfig(),)  # the library's expression parser passes text to eval
DIGITS, DECIMALS = 15, 6  # the library's: differences below 10^-DIGITS are zero; decimals are rounded to DECIMALS
SMALL = 6.0  # digits after the point that all numbers together may have without a second comparison
MOST_DIGITS = 20_000  # bounds the second comparison


def equal(found: str, expected: str) -> bool:
    """Whether `found` equals `expected`. Raises any exception of the library for expressions that it cannot compare."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns about the missing time limit and every failed parse
    ours, theirs = (parse(rf"\boxed{{{answer}}}", LATEX_ONLY, parsing_timeout=0) for answer in (found, expected))  # type: ignore[arg-type]
    if not _equal(ours, theirs, DIGITS, DECIMALS):
        return False
    digits, decimals = _needed([*ours, *theirs])
    return (digits, decimals) == (DIGITS, DECIMALS) or _equal(ours, theirs, digits, decimals)


def _equal(ours: list[Any], theirs: list[Any], digits: int, decimals: int) -> bool:
    seed(0)  # sympy tests for zero at random points
    return equal_by_library(theirs, ours, numeric_precision=digits, float_rounding=decimals, timeout_seconds=0)


def _needed(expressions: list[Any]) -> tuple[int, int]:
    """(digits, decimals) at which no number of these expressions is dropped."""
    numbers = [number for expression in expressions for number in _numbers(expression)]
    decimal = [number for number in numbers if number.has(sympy.Float)]
    zeros = max(map(_places, decimal), default=0.0)
    decimals = DECIMALS if zeros <= 4 else math.ceil(zeros) + 5
    if decimal:  # computed with 16 significant digits, of which the last ones are noise
        return max(DIGITS, 12 + math.ceil(max(map(_places, numbers)))), decimals
    places = sum(max(0.0, _places(part)) for number in numbers for part in sympy.preorder_traversal(number))
    if places > MOST_DIGITS:
        raise ValueError("too small a number")
    return (DIGITS if places <= SMALL else DIGITS + 2 * math.ceil(places)), decimals


def _numbers(expression: Any) -> Iterator[sympy.Expr]:
    """The largest parts of an expression, set, tuple, relation or matrix that have no symbols in them."""
    if isinstance(expression, sympy.Expr) and not expression.free_symbols:
        yield expression
    elif isinstance(expression, sympy.Basic):
        for part in expression.args:
            yield from _numbers(part)
    elif isinstance(expression, sympy.MatrixBase):
        for part in expression:
            yield from _numbers(part)


def _places(number: Any) -> float:
    """Digits after the point that show it: -log10 of its size, or log10 of a fraction's denominator. 0 if it is zero or no number."""
    if isinstance(number, sympy.Rational) and not isinstance(number, sympy.Integer):
        return math.log10(number.q)
    if not isinstance(number, sympy.Expr):
        return 0.0
    try:
        size = abs(number.evalf(5, strict=True))
        return float(-sympy.log(size, 10).evalf(5)) if size.is_finite and size > 0 else 0.0
    except Exception:  # sympy has no value for it, or not enough digits to tell it from zero
        return 0.0
