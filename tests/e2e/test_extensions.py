"""CONTRIBUTING's extension costs, proved by adding a recipe, a verifier and a rollout engine, and for kernels by their files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.commands.recipe import load_recipe
from engine.config import override
from engine.rollout import engine as rollout_engine
from engine.rollout.config import RolloutConfig
from engine.verify import VERIFIERS, verifier

ROOT = Path(__file__).parents[2]


def test_a_recipe_is_one_file(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text((ROOT / "recipes/tiny_sft.py").read_text())
    assert override(load_recipe(str(recipe)), ["optim.lr=0.5"]).optim.lr == 0.5


def test_a_verifier_is_a_file_and_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_verifier.py").write_text("from engine.verify.exact import EXACT\n\nMINE = EXACT\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(VERIFIERS, "mine", "my_verifier:MINE")
    assert verifier("mine").verify("yes", "yes").correct
    assert not verifier("mine").verify("no", "yes").correct


def test_a_rollout_engine_is_a_file_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_engine.py").write_text("class Mine:\n    def __init__(self, policy, rollout):\n        self.rollout = rollout\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(rollout_engine.ENGINES, "mine", "my_engine:Mine")
    policy = cast(Any, SimpleNamespace(world=SimpleNamespace(parent=None)))
    started = rollout_engine.start_engine(policy, RolloutConfig(engine="mine"))
    assert type(started).__name__ == "Mine"


@pytest.mark.parametrize("kernel", ["ppo", "swiglu"])
def test_a_kernel_is_four_files(kernel: str) -> None:
    paths = [
        f"triton_kernels/{kernel}.py",
        f"tests/kernels/test_{kernel}.py",
        "benchmarks/kernels/floors.py",
        "benchmarks/kernels/operations.py",
    ]
    assert all((ROOT / path).exists() for path in paths)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(path.replace(f"{kernel}.py", "x.py") in text for path in paths)
