"""Recipes: Python files that define `run = Run(...)`."""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path

from engine.config import Run


def load_recipe(path: str) -> Run:
    """Execute a recipe and return its `run`. Raises ValueError if the file is missing (the message names similar ones) or has no `run`."""
    if not Path(path).is_file():
        raise ValueError(f"recipe {path!r} is not a file; {_similar(Path(path))}")
    run = runpy.run_path(path).get("run")
    if not isinstance(run, Run):
        raise ValueError(f"recipe {path!r} does not define run = Run(...)")
    return run


def _similar(path: Path) -> str:
    recipes = {recipe.stem: recipe for folder in (Path("recipes"), path.parent) for recipe in sorted(folder.glob("*.py"))}
    names = difflib.get_close_matches(path.stem, recipes, n=3)
    return f"nearest: {', '.join(str(recipes[name]) for name in names)}" if names else "see recipes/"
