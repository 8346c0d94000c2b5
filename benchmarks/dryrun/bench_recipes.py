"""python -m benchmarks dryrun_recipes: every recipe of Tülu 3 as the dry run foretells it, beside the best layout that its search finds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.support.tables import as_file, heading, table, versions
from engine.algorithms.rlvr import RLVR
from engine.commands.recipe import load_recipe
from engine.config import Run
from engine.dryrun.forecast import forecast
from engine.dryrun.hardware import Hardware
from engine.dryrun.search import ROOM, search

RECIPES = sorted(Path("recipes").glob("tulu3_*.py"))
DEVICE = "h100"
STEP = ("recipe", "GPUs", "layout", "s a step", "tokens/s a GPU", "MFU", "idle", "steps", "GPU-hours")
MEMORY = ("recipe", "GB", "when", "GB, all longest", "the search's best", "s a step", "GB", "shipped / best")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="*", type=Path, default=RECIPES, help="those to look at anew; others stay as --json has them")
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument("--json", type=Path, required=True, help="the same for machines")


def main(arguments: argparse.Namespace) -> int:
    """Look at each recipe and write the page after it; 1 where one does not fit."""
    facts: dict[str, Any] = {}
    for path in arguments.recipes:
        fact = fact_of(path)
        others = json.loads(arguments.json.read_text(encoding="utf-8"))["recipes"] if arguments.json.exists() else {}
        facts = dict(sorted((others | {path.stem: fact}).items()))
        as_file(arguments.json, {"versions": versions(), "device": DEVICE, "room": ROOM, "recipes": facts})
        arguments.out.write_text(page(facts), encoding="utf-8")
    print(page(facts))
    return int(not all(fact["fits"] for fact in facts.values()))


def fact_of(path: Path) -> dict[str, Any]:
    """A recipe on the GPUs of its torchrun line."""
    run, hardware = load_recipe(str(path)), Hardware.load(DEVICE)
    gpus = run.gpus
    found, most = (forecast(run, gpus, hardware, given=given, seek=False) for given in ([], longest(run)))
    best = search(run, gpus, hardware, confirm=1)[0]
    beside = best.confirmed
    assert beside is not None
    return {
        "gpus": gpus,
        "layout": layout(run, gpus),
        "step_seconds": found.step_seconds,
        "tokens_per_second_per_gpu": found.tokens_per_second / gpus,
        "mfu": found.mfu,
        "bubble": found.bubble,
        "steps": found.steps,
        "gpu_hours": found.gpu_hours,
        "peak_bytes": found.fullest.peak_bytes,
        "moment": found.fullest.moment,
        "most_bytes": most.fullest.peak_bytes,
        "fits": found.fits and most.fits,
        "warnings": found.warnings,
        "best": {
            "layout": layout(beside.simulation.run, gpus),
            "settings": best.settings,
            "step_seconds": best.step_seconds,
            "peak_bytes": best.peak_bytes,
        },
    }


def longest(run: Run) -> list[tuple[int, int]]:
    """(tokens of prompt, of response) of sequences of which none may be longer."""
    algorithm = run.algorithm
    return [(algorithm.max_prompt_tokens, algorithm.max_response_tokens) if isinstance(algorithm, RLVR) else (0, algorithm.max_length)]


def layout(run: Run, gpus: int) -> str:
    """The grid, and how microbatches go through it."""
    grid = run.parallel
    virtual = f" x {grid.vpp}" if grid.vpp > 1 else ""
    return f"tp{grid.tp} pp{grid.pp}{virtual} dp{gpus // grid.model_ranks}, {grid.recompute}, {run.tokens_per_microbatch}"


def page(facts: dict[str, dict[str, Any]]) -> str:
    command = "python -m benchmarks dryrun_recipes --out PAGE --json FACTS"
    lines = heading("Tülu 3's recipes, as the dry run foretells them", versions(), command)
    lines += [
        "On H100s of 80 GB, 8 in a node. A forecast, not a measurement: no GPU has run any of these. What is assumed is in",
        "engine/dryrun/hardware.toml, how sequences are as long as they are in engine/dryrun/lengths.py.",
        "",
        *table(STEP, [_step(name, fact) for name, fact in facts.items()]),
        "",
        "Layout: tensor parallel, pipeline stages (x virtual stages of each), replicas; what is recomputed; most tokens of a microbatch.",
        "MFU: of the whole step, by the operations that the model's mathematics asks for. Idle: the share of an optimizer step in which",
        "pipeline stages wait. GPU-hours: of the whole recipe, evaluation and checkpoints left out.",
        "",
        *table(MEMORY, [_memory(name, fact) for name, fact in facts.items()]),
        "",
        "GB: of the fullest GPU, 4 GB for CUDA, NCCL and fragments among them; all longest: were each as long as the recipe lets it.",
        f"The search (`--search`) goes through layouts of the same GPUs that fill at most {ROOM:.0%} of the 80 GB.",
    ]
    return "\n".join(lines) + "\n"


def _step(name: str, fact: dict[str, Any]) -> list[str]:
    shares = (f"{fact['mfu']:.1%}", f"{fact['bubble']:.1%}")
    speed = (f"{fact['step_seconds']:.2f}", f"{fact['tokens_per_second_per_gpu']:,.0f}")
    return [name, f"{fact['gpus']}", fact["layout"], *speed, *shares, f"{fact['steps']:,}", f"{fact['gpu_hours']:,.0f}"]


def _memory(name: str, fact: dict[str, Any]) -> list[str]:
    best = fact["best"]
    beside = (f"{best['step_seconds']:.2f}", f"{best['peak_bytes'] / 1e9:.1f}", f"{fact['step_seconds'] / best['step_seconds']:.2f}")
    return [name, f"{fact['peak_bytes'] / 1e9:.1f}", fact["moment"], f"{fact['most_bytes'] / 1e9:.1f}", best["layout"], *beside]
