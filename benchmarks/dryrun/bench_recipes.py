"""python -m benchmarks dryrun_recipes: Predict time and memory of every Tülu 3 recipe, and compare with the best layout of the search."""

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
STEP = ("recipe", "GPUs", "layout", "s per step", "tokens/s per GPU", "MFU", "idle", "steps", "GPU-hours")
MEMORY = ("recipe", "GB", "phase", "GB, longest sequences", "best layout of the search", "s per step", "GB", "recipe / best")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipes", nargs="*", type=Path, default=RECIPES, help="recipes to predict; others keep their results (default: all)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="F", help="the page to write")
    parser.add_argument("--json", type=Path, required=True, metavar="F", help="JSON file with all results, which is updated")


def main(arguments: argparse.Namespace) -> int:
    """Predict each recipe and write the page after each. Returns 1 if a recipe does not fit."""
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
    """The prediction of a recipe on Run.gpus GPUs."""
    run, hardware = load_recipe(str(path)), Hardware.load(DEVICE)
    gpus = run.gpus
    predicted, longest_prediction = (forecast(run, gpus, hardware, given=given, seek=False) for given in ([], longest(run)))
    best = search(run, gpus, hardware, confirm=1)[0]
    confirmed = best.confirmed
    assert confirmed is not None
    return {
        "gpus": gpus,
        "layout": layout(run, gpus),
        "step_seconds": predicted.step_seconds,
        "tokens_per_second_per_gpu": predicted.tokens_per_second / gpus,
        "mfu": predicted.mfu,
        "bubble": predicted.bubble,
        "steps": predicted.steps,
        "gpu_hours": predicted.gpu_hours,
        "peak_bytes": predicted.fullest.peak_bytes,
        "moment": predicted.fullest.moment,
        "most_bytes": longest_prediction.fullest.peak_bytes,
        "fits": predicted.fits and longest_prediction.fits,
        "warnings": predicted.warnings,
        "best": {
            "layout": layout(confirmed.simulation.run, gpus),
            "settings": best.settings,
            "step_seconds": best.step_seconds,
            "peak_bytes": best.peak_bytes,
        },
    }


def longest(run: Run) -> list[tuple[int, int]]:
    """[(prompt tokens, response tokens)] of the longest sequence that the recipe allows."""
    algorithm = run.algorithm
    return [(algorithm.max_prompt_tokens, algorithm.max_response_tokens) if isinstance(algorithm, RLVR) else (0, algorithm.max_length)]


def layout(run: Run, gpus: int) -> str:
    """The parallel layout, recomputation and tokens per microbatch."""
    grid = run.parallel
    virtual = f" x {grid.vpp}" if grid.vpp > 1 else ""
    return f"tp{grid.tp} pp{grid.pp}{virtual} dp{gpus // grid.model_ranks}, {grid.recompute}, {run.tokens_per_microbatch}"


def page(facts: dict[str, dict[str, Any]]) -> str:
    command = "python -m benchmarks dryrun_recipes --out PAGE --json FACTS"
    lines = heading("The Tülu 3 recipes, predicted by the dry run", versions(), command)
    lines += [
        "On H100s with 80 GB, 8 per node. These are predictions, not measurements: none of the recipes has run on a GPU. The assumptions",
        "about hardware are in engine/dryrun/hardware.toml, those about sequence lengths in engine/dryrun/lengths.py.",
        "",
        *table(STEP, [_step(name, fact) for name, fact in facts.items()]),
        "",
        "Layout: tensor parallel size, pipeline stages (x virtual stages), replicas; recomputation; maximum tokens per microbatch.",
        "MFU: of the whole step, counting the model's own operations without recomputation. Idle: the share of an optimizer step in which",
        "pipeline stages wait. GPU-hours: of the whole recipe, without evaluation and checkpoints.",
        "",
        *table(MEMORY, [_memory(name, fact) for name, fact in facts.items()]),
        "",
        "GB: peak memory of the fullest GPU, including 4 GB for CUDA, NCCL and fragmentation. Longest sequences: the same if every",
        "sequence has the maximum length. The search (`--search`) considers layouts on the same GPUs that fill at most",
        f"{ROOM:.0%} of the 80 GB.",
    ]
    return "\n".join(lines) + "\n"


def _step(name: str, fact: dict[str, Any]) -> list[str]:
    shares = (f"{fact['mfu']:.1%}", f"{fact['bubble']:.1%}")
    speed = (f"{fact['step_seconds']:.2f}", f"{fact['tokens_per_second_per_gpu']:,.0f}")
    return [name, f"{fact['gpus']}", fact["layout"], *speed, *shares, f"{fact['steps']:,}", f"{fact['gpu_hours']:,.0f}"]


def _memory(name: str, fact: dict[str, Any]) -> list[str]:
    best = fact["best"]
    numbers = (f"{best['step_seconds']:.2f}", f"{best['peak_bytes'] / 1e9:.1f}", f"{fact['step_seconds'] / best['step_seconds']:.2f}")
    return [name, f"{fact['peak_bytes'] / 1e9:.1f}", fact["moment"], f"{fact['most_bytes'] / 1e9:.1f}", best["layout"], *numbers]
