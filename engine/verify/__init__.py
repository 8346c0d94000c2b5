"""Verifiers: (response, truth) -> Verdict. Deterministic, limited in time, and safe for untrusted responses.

To add one, write its file and list it in VERIFIERS.
"""

from __future__ import annotations

from pkgutil import resolve_name

from engine.verify.verdict import Unjudged, Verdict, Verifier

__all__ = ["VERIFIERS", "Unjudged", "Verdict", "Verifier", "verifier"]

# name -> module:object. Imported on first use, because some need large libraries.
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
    """The verifier of that name. Raises ValueError, which lists all names, if there is none. Call it at start-up."""
    if name not in VERIFIERS:
        raise ValueError(f"verifier={name!r} is unknown; use one of {', '.join(sorted(VERIFIERS))}")
    return resolve_name(VERIFIERS[name])
