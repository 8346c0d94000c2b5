"""python -m engine dryrun: simulate a launch, search for the fastest layouts, or calibrate a device."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.commands.arguments import add_settings, examples
from engine.commands.recipe import load_recipe
from engine.config import Run, override

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 160  # columns of the output if it is not a terminal
DOES_NOT_FIT = 3  # exit code; argparse's own is 2


@dataclass(frozen=True)
class DryRunOptions:
    """The arguments of `dryrun`."""

    recipe: Path
    run: Run
    gpus: int | None
    device: str
    lengths: str | None
    json: str | None
    png: str | None

    @property
    def world(self) -> int:
        """Number of GPUs: --gpus, else Run.gpus, else one replica."""
        if self.gpus is not None:
            return self.gpus
        return self.run.gpus or self.run.parallel.model_ranks

    @property
    def given_lengths(self) -> Sequence[tuple[int, int]]:
        from engine.dryrun import lengths

        return lengths.read(self.lengths) if self.lengths else ()

    def check(self) -> None:
        """Raise ValueError if an output file cannot be written or plotted, before anything is computed."""
        for option, path in (("--json", self.json), ("--png", self.png)):
            if path and not Path(path).absolute().parent.is_dir():
                raise ValueError(f"{option} {path}: its folder does not exist; create it first")
        if self.png and find_spec("matplotlib") is None:
            raise ValueError(f"--png {self.png} needs the package matplotlib; pip install matplotlib, or leave it out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a Python file that defines run = Run(...), such as recipes/tulu3_405b_rlvr.py")
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs (default: Run.gpus of the recipe)")
    parser.add_argument(
        "--device", default="h100", metavar="NAME", help="a100, h100, h200, b200, or a .toml file written by --calibrate (default: h100)"
    )
    parser.add_argument(
        "--lengths", metavar="F", help='a .jsonl file of representative sequence lengths: {"prompt": tokens, "response": tokens}'
    )
    parser.add_argument("--json", metavar="F", help="also write the results as JSON")
    parser.add_argument("--png", metavar="F", help="also plot the pipeline schedule of one optimizer step")
    parser.add_argument(
        "--search", action="store_true", help="search for the fastest layouts that fit, instead of simulating the recipe's own"
    )
    parser.add_argument("--calibrate", metavar="OUT", help="measure this machine and write a .toml file for --device; takes no recipe")
    add_settings(parser, "parallel.vpp=2 parallel.recompute=full tokens_per_microbatch=8192")
    code = f"Exit code: 0 the run fits, 1 it cannot start, {DOES_NOT_FIT} it can start but does not fit."
    parser.epilog = examples(
        "dryrun recipes/tulu3_405b_rlvr.py",
        "dryrun recipes/tulu3_70b_sft.py --gpus 64 --device h200 --search",
        "dryrun --calibrate machine.toml",
        torchrun=False,
        note=f"{code} Nothing is downloaded or launched.",
    )


def main(arguments: argparse.Namespace) -> int:
    if bool(arguments.recipe) == bool(arguments.calibrate):
        raise ValueError("dryrun takes either a recipe, such as recipes/tulu3_405b_rlvr.py, or --calibrate OUT.toml")
    if arguments.calibrate:
        calibrate(Path(arguments.calibrate))
        return 0
    options = DryRunOptions(
        recipe=Path(arguments.recipe),
        run=override(load_recipe(arguments.recipe), arguments.overrides),
        gpus=arguments.gpus,
        device=arguments.device,
        lengths=arguments.lengths,
        json=arguments.json,
        png=arguments.png,
    )
    fits = search(options) if arguments.search else forecast(options)
    return 0 if fits else DOES_NOT_FIT


def forecast(options: DryRunOptions) -> bool:
    """Print the predictions for the launch and return whether it fits. Raises ValueError if it cannot start."""
    options.check()
    from engine.dryrun import forecast as forecasting
    from engine.dryrun import report
    from engine.dryrun.hardware import Hardware

    prediction = forecasting.forecast(options.run, options.world, Hardware.load(options.device), given=options.given_lengths)
    report.print_report(prediction, _console())
    _write(options.json, report.as_json(prediction))
    if options.png:
        report.draw_pipeline(prediction, Path(options.png))
    return prediction.fits


def search(options: DryRunOptions) -> bool:
    """Print the fastest layouts and return whether any fits."""
    options.check()
    from engine.dryrun import report
    from engine.dryrun import search as searching
    from engine.dryrun.hardware import Hardware

    layouts = searching.search(options.run, options.world, Hardware.load(options.device), given=options.given_lengths)
    console = _console()
    console.print(searching.table(layouts, options.run))
    if not layouts:
        console.print("none of the layouts tried fits; use more GPUs, or a device with more memory", style="bold red")
    for rank, layout in enumerate(layouts[:3], start=1):
        console.print(f"{rank}: {options.recipe} {' '.join(layout.settings)}", markup=False, highlight=False, soft_wrap=True)
    _write(options.json, {"ranks": options.world, "device": options.device, "layouts": searching.as_json(layouts)})
    if options.png and layouts and layouts[0].confirmed:
        report.draw_pipeline(layouts[0].confirmed, Path(options.png))
    return bool(layouts)


def calibrate(path: Path) -> None:
    """Measure the machine of this process, or of all processes of torchrun, and write the results to `path`."""
    from engine.distributed.world import World
    from engine.dryrun import calibrate as measuring

    with closing(World.start()) as world:
        hardware = measuring.calibrate(world)
        if world.rank == 0:
            measuring.save(hardware, path)
            print(f"measured on {world.size} {'process' if world.size == 1 else 'processes'} -> {path}")


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH)


def _write(path: str | None, facts: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
