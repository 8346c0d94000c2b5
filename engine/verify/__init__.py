"""Verifiers: (response, truth) -> Verdict. Pure, fast; they cannot hang and cannot be escaped.

To add one, write its file and name it here.
"""

from __future__ import annotations

from pkgutil import resolve_name

from engine.verify.verdict import Unjudged, Verdict, Verifier

__all__ = ["VERIFIERS", "Unjudged", "Verdict", "Verifier", "verifier"]

# Where each is defined; imported when it is asked for, because some bring large libraries.
VERIFIERS = {
    "code": "engine.verify.code:CODE",
    "contains": "engine.verify.contains:CONTAINS",
    "exact": "engine.verify.exact:EXACT",
    "gsm8k": "engine.verify.gsm8k:GSM8K",
    "ifeval": "engine.verify.ifeval:IFEVAL",
    "ifeval_loose": "engine.verify.ifeval:IFEVAL_LOOSE",
    "math": "engine.verify.math:MATH",
    "regex": "engine.verify.regex:REGEX",
}


def verifier(name: str) -> Verifier:
    """The verifier of that name. Raises ValueError, listing all names, when there is none: ask at start-up."""
    if name not in VERIFIERS:
        raise ValueError(f"verifier={name!r} is unknown; use one of {', '.join(sorted(VERIFIERS))}")
    return resolve_name(VERIFIERS[name])
