"""What `python -m engine dryrun` does: forecast or search, and tell of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.config import Run
from engine.distributed.world import World
from engine.dryrun import forecast as forecasting
from engine.dryrun import lengths, report
from engine.dryrun import search as searching
from engine.dryrun.hardware import Hardware

WIDTH = 160  # columns, where there is no terminal to ask


@dataclass(frozen=True)
class DryRunOptions:
    """The words of the command line."""

    recipe: Path
    run: Run
    gpus: int | None
    device: str
    lengths: str | None
    json: str | None
    png: str | None

    @property
    def world(self) -> int:
        """How many GPUs."""
        return self.gpus or self.run.gpus or self.run.parallel.model_ranks

    @property
    def given_lengths(self) -> Sequence[tuple[int, int]]:
        return lengths.read(self.lengths) if self.lengths else ()

    def check(self) -> None:
        """Raise ValueError for files that could not be written or drawn, before anything is computed."""
        for option, path in (("--json", self.json), ("--png", self.png)):
            if path and not Path(path).absolute().parent.is_dir():
                raise ValueError(f"{option} {path}: its folder does not exist; make it first")
        if self.png and find_spec("matplotlib") is None:
            raise ValueError(f"--png {self.png} needs the package matplotlib; pip install matplotlib, or leave it out")


def forecast(asked: DryRunOptions) -> bool:
    """Tell what the launch will be like; whether it fits. Raises ValueError for one that cannot start."""
    asked.check()
    found = forecasting.forecast(asked.run, asked.world, Hardware.load(asked.device), given=asked.given_lengths)
    report.print_report(found, _console())
    _write(asked.json, report.as_json(found))
    if asked.png:
        report.draw_pipeline(found, Path(asked.png))
    return found.fits


def search(asked: DryRunOptions) -> bool:
    """Tell the fastest layouts; whether any fits."""
    asked.check()
    found = searching.search(asked.run, asked.world, Hardware.load(asked.device), given=asked.given_lengths)
    console = _console()
    console.print(searching.table(found, asked.run))
    if not found:
        console.print("no layout that was tried fits; more GPUs, or a device with more memory, would", style="bold red")
    for place, layout in enumerate(found[:3], start=1):
        console.print(f"{place}: {asked.recipe} {' '.join(layout.settings)}", markup=False, highlight=False, soft_wrap=True)
    _write(asked.json, {"ranks": asked.world, "device": asked.device, "layouts": searching.as_json(found)})
    if asked.png and found and found[0].confirmed:
        report.draw_pipeline(found[0].confirmed, Path(asked.png))
    return bool(found)


def calibrate(path: Path) -> None:
    """Measure the machine of this process, or of all that torchrun started."""
    from engine.dryrun import calibrate as measuring

    with closing(World.start()) as world:
        found = measuring.calibrate(world)
        if world.rank == 0:
            measuring.save(found, path)
            print(f"what {world.size} {'process' if world.size == 1 else 'processes'} measured -> {path}")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def _write(path: str | None, facts: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
