"""Measured facts as JSON lines. Each is on disk before the next measurement starts, so that an interrupted run keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Fact = dict[str, Any]


class Facts:
    """Appends to `path`. Writes nothing if `path` is None."""

    def __init__(self, path: Path | None):
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, fact: Mapping[str, Any]) -> None:
        """Write one fact and wait until it is on disk."""
        if self.path is None:
            return
        line = json.dumps(fact, default=str) + "\n"
        with self.path.open("a+b") as file:
            # If the process was killed while writing a line, start a new line.
            torn = file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
            file.write((b"\n" if torn else b"") + line.encode())
            file.flush()
            os.fsync(file.fileno())


def read(path: Path | None) -> list[Fact]:
    """All complete lines of `path`. Empty if the file does not exist."""
    if path is None or not path.exists():
        return []
    facts = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            facts.append(json.loads(line))
        except ValueError:  # incomplete, because the process was killed while writing it
            continue
    return [fact for fact in facts if isinstance(fact, dict)]
