"""docs/launch.md: every command parses, every recipe and setting exists, and no launch is refused on its GPUs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed.run import get_args_parser

from engine.__main__ import _parsed
from engine.commands.export import ExportConfig
from engine.commands.recipe import load_recipe
from engine.config import override
from engine.config.checks import problems
from engine.dryrun.model_shapes import shape_of
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "launch.md").read_text()


def blocks(language: str) -> list[str]:
    """The contents of the page's fenced blocks."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    """A torchrun command: its number of processes, and the arguments of the engine."""

    line: str
    processes: int
    words: list[str]


def commands() -> list[Command]:
    """All torchrun commands of the page."""
    results = []
    for line in (line for block in blocks("bash") for line in block.splitlines() if "torchrun" in line):
        words = shlex.split(line[line.index("torchrun") :].split("&&")[0])[1:]
        asked = get_args_parser().parse_args(words)
        assert asked.module
        assert asked.training_script == "engine"
        results.append(Command(line, int(asked.nnodes.split(":")[-1]) * int(asked.nproc_per_node), asked.training_script_args))
    return results


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command.words[:2]))
def test_a_command_starts(command: Command) -> None:
    assert ("--nnodes" in command.line) == ("--rdzv-endpoint $HEAD:29500" in command.line)
    arguments = _parsed(command.words)
    if command.words[0] == "export":
        model = shape_of(override(load_recipe(str(ROOT / "recipes/tulu3_8b_sft.py")), [f"model.path={arguments.out_dir}"]).model)
        override(ExportConfig(), arguments.overrides).parallel.check(model, command.processes)
        return
    run = override(load_recipe(str(ROOT / arguments.recipe)), arguments.overrides)
    assert problems(run, shape_of, command.processes) == []
    assert run.model.path.startswith("/shared/models/")
    assert command.processes == {"8b": 8, "70b": 64, "405b": 256}[Path(arguments.recipe).stem.split("_")[1]]


def test_every_stage_starts_from_the_output_of_another() -> None:
    """A folder that a command reads is written by an earlier command on the page."""
    written, read = set(), set()
    for command in commands():
        words = " ".join(command.words)
        read |= set(re.findall(r"path=(/shared/models/tulu3-405B\S+)", words))
        written |= {command.words[2]} if command.words[0] == "export" else set()
        assert read <= written
    assert read == {"/shared/models/tulu3-405B-SFT", "/shared/models/tulu3-405B-DPO"}


def test_settings_and_recipes_of_the_page_exist() -> None:
    run = load_recipe(str(ROOT / "recipes/tulu3_405b_rlvr.py"))
    for name in sorted(set(re.findall(r"`((?:parallel|algorithm|optim)\.[\w.]+)", PAGE)) - {"algorithm.batch_size", "algorithm.sources"}):
        value = run
        for part in name.split("."):
            value = getattr(value, part)
    for recipe in re.findall(r"`(tulu3_\w+)`", PAGE):
        assert (ROOT / f"recipes/{recipe}.py").exists()
    (rows,) = re.findall(r"`algorithm\.sources=(.*?)`", PAGE)
    (source,) = override(run, [f"algorithm.sources={rows}"]).algorithm.sources
    assert (source.path, source.weight) == ("/shared/rows.jsonl", 2.0)


def test_the_slurm_script_is_shell() -> None:
    (script,) = [block for block in blocks("bash") if block.startswith("#!/bin/bash")]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=True).stderr == ""
    nodes = int(re.findall(r"--nodes=(\d+)", script)[0])
    gpus = int(re.findall(r"--gpus-per-node=(\d+)", script)[0])
    assert [command.processes for command in commands() if command.line in script] == [nodes * gpus]


def test_the_pages_program_prepares_the_rows_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On small recipes: a run that starts afterwards finds the prepared files."""
    (program,) = blocks("python")
    small = program.replace("tulu3_405b_", "tiny_").replace("/shared/models/Llama-3.1-405B", "bytes")
    assert small.count("recipes/tiny_{name}") == 1
    assert '"bytes"' in small
    monkeypatch.setenv("TRIVET_CACHE", str(tmp_path))
    monkeypatch.chdir(ROOT)
    for _ in range(2):
        exec(compile(small, "docs/launch.md", "exec"), {})
        message = capsys.readouterr().out
        for line in ("2000 rows, 0 truncated", "1000 rows, 0 truncated", "tasks.jsonl: 64 prompts"):
            assert line in message
        assert len(list((tmp_path / "corpora").iterdir())) == 2


def test_the_small_launch_of_the_page_exists() -> None:
    assert "python -m tests.support.launch_405b" in PAGE
    assert (ROOT / "tests/support/launch_405b.py").exists()
    assert "launch:" in (ROOT / "Makefile").read_text()
    assert sys.version_info >= (3, 11)
