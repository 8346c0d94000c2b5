"""The documentation: sizes, links, and examples that parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import COMMANDS
from engine.__main__ import _parsed
from engine.commands.recipe import load_recipe
from engine.config import override
from tests.support.paths import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def examples(page: Path) -> list[list[str]]:
    """The commands in fenced blocks, as lists of arguments that start with `engine`, `trivet` or `benchmarks`."""
    results = []
    for block in re.findall(r"^```(?:bash)?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            if match := re.match(r"(?:(?:python3?|torchrun) (?:.* )?-m (engine|benchmarks)|(trivet)) (.*)", line):
                words = shlex.split(re.split(r"\s[<>&|]|&&", match[3])[0], comments=True)
                results.append([match[1] or match[2], *words])
    return results


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_parse(page: Path) -> None:
    for program, *words in examples(page):
        if program == "benchmarks":
            assert words[0] in COMMANDS or words[0].isupper(), words
            continue
        if words[0].isupper() or "..." in words:
            continue
        arguments = _parsed(words)
        recipe = getattr(arguments, "recipe", None)
        if recipe and "/" in recipe and "$" not in recipe:
            override(load_recipe(str(ROOT / recipe)), arguments.overrides)


def test_examples_are_found() -> None:
    """Otherwise a change of the pages' format could leave test_examples_parse without examples."""
    counts = {page.name: len(examples(page)) for page in PAGES}
    assert counts["README.md"] >= 3
    assert counts["usage.md"] >= 6


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {target for group in targets for target in group.split()}
    for page in PAGES:
        for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)", page.read_text(), re.MULTILINE):
            assert (target[0] or target[1]) in known, f"{page.name}: make {target[0] or target[1]}"


def test_usage_names_every_recipe() -> None:
    usage = (ROOT / "docs/usage.md").read_text()
    assert [path.name for path in sorted((ROOT / "recipes").glob("*.py")) if f"recipes/{path.name}" not in usage] == []


def test_the_slurm_script_is_bash() -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts/launch.slurm")], check=False).returncode == 0


def test_the_benchmarks_page_names_every_benchmark() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert [name for name in COMMANDS if f"`{name}`" not in page] == []


def test_files_named_in_the_architecture_page_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text().split("## Files")[0]
    for name in re.findall(r"`((?:engine|triton_kernels|tests|recipes|scripts)/[\w/.]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_trivet_is_the_command_line() -> None:
    assert 'trivet = "engine.__main__:' in (ROOT / "pyproject.toml").read_text()
    done = subprocess.run([sys.executable, "-m", "engine", "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "dryrun" in done.stdout
