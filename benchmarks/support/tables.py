"""What all reports share: Markdown tables, files, and which versions made them."""

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
    """Lines of a Markdown table; what follows the first column is flush right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def heading(title: str, made_by: Mapping[str, str], command: str) -> list[str]:
    """The first lines of a page: what it is, which versions made it, and how to make it again."""
    packages = ", ".join(f"{name} {version}" for name, version in made_by.items())
    return [f"# {title}", "", f"{packages}. Made by `{command}`.", ""]


def as_file(path: Path | None, facts: Mapping[str, Any]) -> None:
    """Write `facts` as JSON, where a file is wanted."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """What a reader needs to do the same again."""
    packages = {name: metadata.version(name) for name in ("torch", "triton")}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"commit": _commit(), "python": platform.python_version(), **packages, **gpu}


def _commit() -> str:
    try:
        told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return told.stdout.strip() or "unknown"
