"""A value in an error message: one short line for any JSON value, however long or deeply nested."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

CHARACTERS = 60
_REPR = Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring, _REPR.maxother = 3, 4, 4, CHARACTERS, CHARACTERS


def shown(value: Any) -> str:
    """`repr(value)` in at most about `CHARACTERS` characters. Never raises."""
    try:
        text = _REPR.repr(value)
    except Exception:  # Python refuses to print integers of more than 4,300 digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= CHARACTERS + 2 else f"{text[:CHARACTERS]}…"
