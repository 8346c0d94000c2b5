"""The code layout: imports follow the layers, only one package imports megatron, files and functions are short, and names are standard."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# A module may import from its own floor (layer) or a lower one. The longest matching name decides.
FLOORS = {
    "engine": 0,
    "engine.types": 0,
    "engine.config": 0,
    "engine.distributed": 0,
    "engine.check_install": 0,
    "engine.files": 0,
    "engine._C": 0,
    "engine.verify.sandbox.inside": 0,
    "triton_kernels": 0,
    "engine.config.checks": 1,
    "engine.models": 1,
    "engine.data": 1,
    "engine.batching": 1,
    "engine.losses": 1,
    "engine.advantages": 1,
    "engine.verify": 1,
    "engine.megatron": 2,
    "engine.rollout": 3,
    "engine.algorithms": 4,
    "engine.evals": 5,
    "engine.train": 5,
    "engine.reporting": 5,
    "engine.dryrun": 5,
    "engine.commands": 6,
    "engine.__main__": 6,
    "recipes": 6,
    "benchmarks": 6,
}
SAYS_CUDA = {
    "engine/distributed/world.py",
    "engine/megatron/backend.py",
    "engine/megatron/graphs.py",
    "triton_kernels/launch.py",
    "triton_kernels/aot.py",
}
LONG_FUNCTIONS: dict[str, str] = {}  # "file:function" -> why it is over 60 lines
LONG_FILES: dict[str, str] = {}  # file -> why it is over 400 lines

SOURCES = sorted(p for room in ("engine", "triton_kernels", "recipes", "benchmarks") for p in (ROOT / room).rglob("*.py"))
ALL = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), ROOT / "setup.py"]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor_of(module: str) -> int | None:
    """None for modules of other packages."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:length])) in FLOORS:
            if prefix == "engine" and length < len(parts):
                raise AssertionError(f"{module} has no floor; give it one here and in the README")
            return FLOORS[prefix]
    return None


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module with its line, including imports inside functions."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}:{node.lineno}: import *"
            assert node.module is not None
            # `from engine import _C` imports engine._C; `from engine.config import Run` imports engine.config.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name if name in FLOORS else node.module, node.lineno) for name in inner)


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=by_name)
def test_imports_go_to_the_same_floor_or_lower(path: Path) -> None:
    importer = name_of(path)
    floor = floor_of(importer)
    assert floor is not None
    for module, line in imports(path):
        imported = floor_of(module)
        assert imported is None or imported <= floor, f"{path}:{line}: {importer} (floor {floor}) imports {module} (floor {imported})"


@pytest.mark.parametrize("path", SOURCES, ids=by_name)
def test_packages_import_only_what_they_may(path: Path) -> None:
    importer = name_of(path)
    for module, line in imports(path):
        top = module.split(".")[0]
        where = f"{path}:{line}: {importer} imports {module}"
        assert top != "megatron" or importer.startswith("engine.megatron"), where
        assert top != "triton" or importer.startswith("triton_kernels"), where
        assert not (importer.startswith("triton_kernels") and top == "engine"), where
        assert not (floor_of(importer) == 1 and module.startswith("torch.distributed")), where
        if importer.startswith("engine.algorithms.") and module.startswith("engine.algorithms."):
            assert module.split(".")[2] in (importer.split(".")[2], "supervised", "workload"), where


def strings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Strings that are not docstrings, and attributes."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=by_name)
def test_only_backends_name_cuda(path: Path) -> None:
    if by_name(path) in SAYS_CUDA or "benchmarks" in path.parts:
        return
    for text, line in strings(tree_of(path)):
        assert "cuda" not in text.replace("cuda_graphs", ""), f"{path}:{line} says {text!r}; ask world.on_gpu or world.device"


@pytest.mark.parametrize("path", ALL, ids=by_name)
def test_files_and_functions_are_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 400 or by_name(path) in LONG_FILES, f"{path} has {lines} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60 or f"{by_name(path)}:{node.name}" in LONG_FUNCTIONS, f"{path}:{node.lineno}: {node.name} has {length} lines"


# Names of earlier versions, replaced by standard terms: docs/architecture.md and CHANGELOG.md.
GONE = {
    *("Line", "Apart", "Ask", "Asked", "Demands", "Drawn", "Parting", "Slotting", "Flight", "Landing", "Wave", "Ring", "Passage"),
    *("seat", "imagined", "parted", "speaks", "agree", "tell", "say", "described", "settle", "bridge", "scene", "telling", "passage"),
    *("jail", "walls", "guest", "shadow", "surprise", "agreeing", "sampler_gap", "max_weight", "cache_gb"),
}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("engine", "recipes")], ids=by_name)
def test_former_names_are_not_used(path: Path) -> None:
    assert not GONE & set(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(tree_of(path)):
        names = {getattr(node, field, None) for field in ("name", "id", "attr", "arg") if isinstance(getattr(node, field, None), str)}
        assert not GONE & names, f"{path}:{getattr(node, 'lineno', 0)}: {names & GONE}"


def test_class_names_are_unique() -> None:
    """A class name has one meaning in the engine."""
    sources = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("engine", "triton_kernels")]
    names = [node.name for path in sources for node in tree_of(path).body if isinstance(node, ast.ClassDef)]
    assert {name for name in names if names.count(name) > 1} == set()


def test_the_dry_run_knows_no_algorithm() -> None:
    """It only uses the algorithm's workload()."""
    for path in sorted((ROOT / "engine/dryrun").glob("*.py")):
        for module, line in imports(path):
            assert not module.startswith("engine.algorithms.") or module == "engine.algorithms.workload", f"{path}:{line}"


def test_the_median_function_is_short() -> None:
    nodes = [node for path in SOURCES for node in ast.walk(tree_of(path))]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes if isinstance(node, ast.FunctionDef)]
    assert statistics.median(lengths) <= 10


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=by_name)
def test_recipes_fit_a_screen_and_load(path: Path) -> None:
    from engine.commands.recipe import load_recipe

    assert len(path.read_text().splitlines()) <= 40
    assert load_recipe(str(path)).out == f"runs/{path.stem}"


def test_the_architecture_page_lists_every_file() -> None:
    readme = (ROOT / "docs/architecture.md").read_text()
    for path in (*SOURCES, *sorted((ROOT / "csrc").iterdir())):
        if path.name != "__init__.py":
            assert path.name in readme or path.stem in readme, f"docs/architecture.md does not mention {by_name(path)}"


def test_no_file_contains_a_path_of_one_machine() -> None:
    homes = tuple(f"/{name}/" for name in ("home", "root", "work", "mnt"))
    for path in ALL:
        for text, line in strings(tree_of(path)):
            assert not text.startswith(homes), f"{path}:{line}: {text!r} is a path of one machine"
