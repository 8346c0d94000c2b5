"""python -m benchmarks dryrun_tulu: Predict the training phase of Tülu 3 405B's RLVR step and compare it with the reported 1,500 s.

1,856 rollouts with prompts of 150 or 750 tokens and responses of about 400, trained for one or four epochs. The recipe of this repository
is simulated on 240 GPUs that only train, as in the paper, and on 256 GPUs that also generate.
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
REPORTED = 1500.0  # training seconds per step, arXiv 2411.15124; generation on 16 other GPUs takes about 550 s
GENERATES = {"prefill", "decoding", "verification"}
TIMES = ("log-probs and values, s", "updates, s", "training, s")
HEADER = ("GPUs", "layout", "prompt tokens", "epochs", *TIMES, "reported / predicted", "MFU", "GB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="F", help="the page to write")
    parser.add_argument("--json", type=Path, metavar="F", help="also write all results to this JSON file")


def main(arguments: argparse.Namespace) -> int:
    """Write the page. Returns 1 if a layout does not fit."""
    facts = list(_facts())
    arguments.out.write_text(page(facts), encoding="utf-8")
    as_file(arguments.json, {"versions": versions(), "reported_seconds": REPORTED, "steps": facts})
    print(page(facts))
    return int(not all(fact["fits"] for fact in facts))


def _facts() -> Iterator[dict[str, Any]]:
    recipe = load_recipe(RECIPE)
    for gpus, run in ((240, _on_240(recipe)), (256, recipe)):
        for prompt in (150, 750):
            for epochs in (1, 4):
                yield fact_of(forecast(_with_epochs(run, epochs), gpus, Hardware.load("h100"), given=_rollouts(prompt), seek=False))


def _on_240(recipe: Run) -> Run:
    """The paper's 30 nodes, with 15 pipeline stages. The critic has the same stages with equally many layers each: 30 of its 32 layers."""
    critic = recipe.algorithm.critic
    critic = replace(critic, model=Model(init=replace(model_shapes.shape_of(critic.model), layers=30)))
    layers = model_shapes.shape_of(recipe.model).layers
    parallel = Parallel(tp=8, pp=15, stages=tuple(even_split(layers, 15)), recompute="selective")
    return replace(recipe, parallel=parallel, algorithm=replace(recipe.algorithm, critic=critic))


def _with_epochs(run: Run, epochs: int) -> Run:
    return replace(run, algorithm=replace(run.algorithm, epochs=epochs))


def _rollouts(prompt: int) -> list[tuple[int, int]]:
    """(prompt tokens, response tokens) of each rollout of a step."""
    responses = RESPONSE.draw(1856, 1024, np.random.default_rng(0))
    return [(prompt, int(response)) for response in responses]


def fact_of(predicted: Forecast) -> dict[str, Any]:
    """The numbers of one prediction."""
    simulation = predicted.simulation
    grid, training_phases = simulation.run.parallel, [phase for phase in predicted.phases if phase.name not in GENERATES]
    seconds = sum(phase.seconds for phase in training_phases)
    virtual = f"x{grid.vpp}" if grid.vpp > 1 else ""
    return {
        "gpus": simulation.gpus,
        "layout": f"TP{grid.tp} PP{grid.pp}{virtual} DP{simulation.dp}, {grid.recompute}, {simulation.run.tokens_per_microbatch} tokens",
        "prompt": int(simulation.sequences.prompt_N.mean()),
        "passes": simulation.run.algorithm.epochs,
        "updates": sum(phase.seconds for phase in training_phases if phase.name.startswith("updates")),
        "training": seconds,
        "ratio": REPORTED / seconds,
        "mfu": sum(phase.flops for phase in training_phases) / (seconds * simulation.gpus * simulation.hardware.peak),
        "peak_gb": max(rank.peak_bytes for rank in predicted.stages) / 1e9,
        "fits": predicted.fits,
        "phases": {phase.name: phase.seconds for phase in predicted.phases},
        "assumptions": predicted.assumptions,
    }


def page(facts: list[dict[str, Any]]) -> str:
    command = "python -m benchmarks dryrun_tulu --out PAGE --json FACTS"
    lines = heading("Tülu 3 405B's RLVR step: the training phase, predicted by the dry run", versions(), command)
    lines += [
        f"The paper reports about {REPORTED:,.0f} s of training per step on 240 H100s (arXiv 2411.15124). The seconds below are predicted",
        "for this engine, which has not run on these GPUs. The ratio therefore compares a prediction with a measurement.",
        "",
        *table(HEADER, [_row(fact) for fact in facts]),
        "",
        "Training is everything but generation and verification: log-probs of policy and reference, values of the critic, and all",
        "updates of both. On 240 GPUs the critic has 30 of its 32 layers, so that each of 15 stages has two. The 16 other GPUs, which",
        "generate, are not counted. MFU: the model's own FLOPs, without recomputation, over the FLOPs of the GPUs' peak rate in that time.",
        "",
        "The speed of matrix products is fitted to another published run (dryrun_published_2026-11-26.md). Further assumptions:",
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
