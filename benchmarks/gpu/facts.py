"""Facts as they are measured: JSON lines, each on the disk before the next measurement starts, so that a run that is killed keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Fact = dict[str, Any]


class Facts:
    """Appends to `path`, or writes nowhere if that is None."""

    def __init__(self, path: Path | None):
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, fact: Mapping[str, Any]) -> None:
        """Write one fact, and wait until it is on the disk."""
        if self.path is None:
            return
        line = json.dumps(fact, default=str) + "\n"
        with self.path.open("a+b") as file:
            # A line that a kill cut short must not swallow this one.
            torn = file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
            file.write((b"\n" if torn else b"") + line.encode())
            file.flush()
            os.fsync(file.fileno())


def read(path: Path | None) -> list[Fact]:
    """Every whole line of `path`; none where there is no such file."""
    if path is None or not path.exists():
        return []
    facts = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            facts.append(json.loads(line))
        except ValueError:  # cut short by a kill
            continue
    return [fact for fact in facts if isinstance(fact, dict)]
