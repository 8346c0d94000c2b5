"""Helpers of all reports: Markdown tables, JSON files, and the versions that produced them."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table. All columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def heading(title: str, made_by: Mapping[str, str], command: str) -> list[str]:
    """The first lines of a page: title, versions, and the command that reproduces it."""
    packages = ", ".join(f"{name} {version}" for name, version in made_by.items())
    return [f"# {title}", "", f"{packages}. Made by `{command}`.", ""]


def as_file(path: Path | None, facts: Mapping[str, Any]) -> None:
    """Write `facts` as JSON, unless `path` is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Commit, versions and GPU, which a reader needs to reproduce the numbers."""
    packages = {name: metadata.version(name) for name in ("torch", "triton")}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"commit": _commit(), "python": platform.python_version(), **packages, **gpu}


def _commit() -> str:
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # git is not installed
        return "unknown"
    return result.stdout.strip() or "unknown"
