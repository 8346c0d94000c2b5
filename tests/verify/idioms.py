"""Everyday programs with tests that any Python programmer would write: idioms.txt, and idioms_unsupported.txt, which are judged wrong.

Each is a line "### name", the program, a line "---", and the tests.
"""

from __future__ import annotations

from pathlib import Path


def _read(name: str) -> dict[str, tuple[str, str]]:
    """name -> (program, tests)."""
    blocks = (Path(__file__).parent / name).read_text().removeprefix("### ").split("\n### ")
    parts = [(block.split("\n", 1)[0], *block.split("\n", 1)[1].split("\n---\n")) for block in blocks]
    assert len({title for title, _, _ in parts}) == len(parts)
    return {title: (program, tests) for title, program, tests in parts}


IDIOMS = _read("idioms.txt")
UNSUPPORTED = _read("idioms_unsupported.txt")
