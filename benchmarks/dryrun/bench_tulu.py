"""python -m benchmarks dryrun_tulu: the training phase of Tülu 3 405B's own RLVR step, told by the dry run beside the 1,500 s they report.

1,856 rollouts, prompts of 150 or 750 tokens, responses of about 400, one or four passes; the recipe of this repository on their 240 GPUs
for training, and on 256 that also generate.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.tables import as_file, heading, table, versions
from engine.commands.recipe import load_recipe
from engine.config import Model, Parallel, Run, even_split
from engine.dryrun import model_shapes
from engine.dryrun.forecast import Forecast, forecast
from engine.dryrun.hardware import Hardware
from engine.dryrun.lengths import RESPONSE

RECIPE = "recipes/tulu3_405b_rlvr.py"
REPORTED = 1500.0  # seconds of training a step, arXiv 2411.15124; their 16 other GPUs generate in about 550
GENERATES = {"prefill", "decoding", "verification"}
HEADER = ("GPUs", "layout", "prompt", "passes", "log-probs and values, s", "updates, s", "training, s", "reported / this", "MFU", "GB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument("--json", type=Path, help="the same for machines")


def main(arguments: argparse.Namespace) -> int:
    """Write the page; 1 where a layout does not fit."""
    facts = list(_facts())
    arguments.out.write_text(page(facts), encoding="utf-8")
    as_file(arguments.json, {"versions": versions(), "reported_seconds": REPORTED, "steps": facts})
    print(page(facts))
    return int(not all(fact["fits"] for fact in facts))


def _facts() -> Iterator[dict[str, Any]]:
    recipe = load_recipe(RECIPE)
    for gpus, run in ((240, _on_240(recipe)), (256, recipe)):
        for prompt in (150, 750):
            for passes in (1, 4):
                yield fact_of(forecast(_asked(run, passes), gpus, Hardware.load("h100"), given=_rollouts(prompt), seek=False))


def _on_240(recipe: Run) -> Run:
    """Their 30 nodes: 15 stages, dealt by hand. The critic is on the same grid, whose stages want equally many of its layers: 30 of 32."""
    asked = recipe.algorithm.critic
    shape = model_shapes.shape_of(asked.model)
    critic = replace(asked, model=Model(init=replace(shape, layers=30)))
    layers = model_shapes.shape_of(recipe.model).layers
    parallel = Parallel(tp=8, pp=15, stages=tuple(even_split(layers, 15)), recompute="selective")
    return replace(recipe, parallel=parallel, algorithm=replace(recipe.algorithm, critic=critic))


def _asked(run: Run, passes: int) -> Run:
    return replace(run, algorithm=replace(run.algorithm, epochs=passes))


def _rollouts(prompt: int) -> list[tuple[int, int]]:
    """Tokens of a step's prompts and responses."""
    responses = RESPONSE.draw(1856, 1024, np.random.default_rng(0))
    return [(prompt, int(response)) for response in responses]


def fact_of(found: Forecast) -> dict[str, Any]:
    """What the page says of one forecast."""
    simulation = found.simulation
    grid, trained = simulation.run.parallel, [phase for phase in found.phases if phase.name not in GENERATES]
    seconds = sum(phase.seconds for phase in trained)
    virtual = f"x{grid.vpp}" if grid.vpp > 1 else ""
    return {
        "gpus": simulation.gpus,
        "layout": f"TP{grid.tp} PP{grid.pp}{virtual} DP{simulation.dp}, {grid.recompute}, {simulation.run.tokens_per_microbatch} tokens",
        "prompt": int(simulation.sequences.prompt_N.mean()),
        "passes": simulation.run.algorithm.epochs,
        "updates": sum(phase.seconds for phase in trained if phase.name.startswith("updates")),
        "training": seconds,
        "ratio": REPORTED / seconds,
        "mfu": sum(phase.flops for phase in trained) / (seconds * simulation.gpus * simulation.hardware.peak),
        "peak_gb": max(rank.peak_bytes for rank in found.stages) / 1e9,
        "fits": found.fits,
        "phases": {phase.name: phase.seconds for phase in found.phases},
        "assumptions": found.assumptions,
    }


def page(facts: list[dict[str, Any]]) -> str:
    command = "python -m benchmarks dryrun_tulu --out PAGE --json FACTS"
    lines = heading("Tülu 3 405B's RLVR step: the training phase, as the dry run tells it", versions(), command)
    lines += [
        f"They report about {REPORTED:,.0f} s of training a step on 240 H100s (arXiv 2411.15124). The seconds below are a forecast of this",
        "engine, not a measurement: no GPU has run it. The ratio therefore compares a model with a measurement.",
        "",
        *table(HEADER, [_row(fact) for fact in facts]),
        "",
        "Training is everything but generation and verification: log-probs of policy and reference, values of the critic, and all",
        "updates of both. On 240 GPUs the critic has 30 of its 32 layers, so that 15 stages hold two each; the 16 other GPUs, which",
        "generate there, are not counted. MFU: operations that the model's mathematics asks for, over what the GPUs could do in that time.",
        "",
        "The speed of matrix products is fitted to another published run (dryrun_published_2026-11-26.md). Assumed besides:",
        "",
        *(f"- {line}" for line in facts[0]["assumptions"]),
    ]
    return "\n".join(lines) + "\n"


def _row(fact: dict[str, Any]) -> list[str]:
    numbers = [f"{fact['training'] - fact['updates']:.0f}", f"{fact['updates']:.0f}", f"{fact['training']:.0f}", f"{fact['ratio']:.0f}x"]
    fits = "" if fact["fits"] else " (does not fit)"
    return [
        f"{fact['gpus']}",
        fact["layout"],
        f"{fact['prompt']}",
        f"{fact['passes']}",
        *numbers,
        f"{fact['mfu']:.0%}",
        f"{fact['peak_gb']:.0f}{fits}",
    ]
