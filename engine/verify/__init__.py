"""Verifiers: (response, truth) -> Verdict. Pure, fast; they cannot hang and cannot be escaped."""
