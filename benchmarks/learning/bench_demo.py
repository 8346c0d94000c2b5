"""python -m benchmarks demo: Train a small model with SFT, DPO and RLVR on two CPU processes, and evaluate it after each stage.

A Llama with 0.4M parameters, trained from scratch, learns word problems. Then SmolLM2-135M answers a question.

    python -m benchmarks demo [--seeds 0 1 2] [--save]        --save writes the table and the curves into benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from contextlib import closing
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.learning.chain import TEMPERATURES, Measured, answers, exported, run_chain
from benchmarks.support.tables import table
from benchmarks.support.timing import RESULTS, environment
from engine.commands.generate import GenerateConfig, answer
from engine.config import Model
from engine.data.wordproblems import LONG, tasks
from engine.distributed.world import World
from engine.models.hub import SMOLLM2
from engine.reporting.console import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot

Results = dict[str, dict[str, Measured]]  # by stage, by temperature
MEANING = """\
SFT imitates its training data. More than half of it shows no work, so the model's most likely answer is a guess, but the problems are too
long to guess. DPO on pairs of the model's own right and wrong answers shifts it towards showing work. In RLVR the verifier checks only the
last number, and the model learns to show its work for every problem. RLVR selects and amplifies what SFT has taught; it teaches no new
arithmetic. On easier problems the same training amplifies guessing. On a task this small, ratios rarely reach the clip range and the critic
explains little variance; both are covered by tests, not by this demo."""
CLIMB = {"greedy": 0.30, "T=1": 0.15}  # smallest accepted increase of the solve rate from SFT to RLVR
RIGHT = 0.75  # smallest accepted share of right answers among those with work, greedy, after RLVR


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="train once per seed (default: 0)")
    parser.add_argument("--save", action="store_true", help="write the page and the curves into benchmarks/results")


def main(arguments: argparse.Namespace) -> None:
    """Train for each seed and print the table. Exits with an error if the targets of learning are not met."""
    began = time.monotonic()
    torch.set_num_threads(1)
    results: dict[int, Results] = {}
    with closing(World.start("cpu")) as world:
        for seed in arguments.seeds:
            started = time.monotonic()
            results[seed] = run_chain(seed, world)
            print(f"\nseed {seed}, {time.monotonic() - started:.0f} s\n" + "\n".join(lines(results[seed])), flush=True)
        row = tasks(1, seed=7, held_out=True, kind=LONG)[0]
        response = answers(exported("rlvr"), [row], world, temperature=0.0)[0][0][0]
        print(f"\n{row['prompt']}\n  small model:     {response}   (right: {row['truth']})")
        reply = answer(GenerateConfig(Model(SMOLLM2), temperature=0.0, max_tokens=48), "What is the capital of France?", world)[0]
        print(f"What is the capital of France?\n  SmolLM2-135M:    {reply}")
    curves = draw(RESULTS if arguments.save else Path("runs"))
    print(f"\n{MEANING}\n\nCurves: {curves}. Models: {', '.join(str(exported(s)) for s in ('sft', 'reward', 'dpo', 'rlvr'))}.")
    print(f"Total time: {time.monotonic() - began:.0f} s.")
    if arguments.save:
        save(results, curves.stem, time.monotonic() - began)
    if failed := [f"seed {seed}: {what}" for seed, each in results.items() for what in shortfalls(each)]:
        sys.exit("\n".join(failed))


def shortfalls(results: Results) -> list[str]:
    """The targets that one seed missed, a line each."""
    short = []
    for name, smallest in CLIMB.items():
        sft, dpo, rlvr = (results[stage][name] for stage in ("SFT", "DPO", "RLVR"))
        if rlvr.solved - sft.solved < smallest:
            short.append(
                f"RLVR solves {100 * (rlvr.solved - sft.solved):.1f} points more than SFT ({name}), fewer than {100 * smallest:.0f}"
            )
        if sft.solved - dpo.solved > 2 * math.hypot(sft.error, dpo.error):
            short.append(f"DPO solves {100 * (sft.solved - dpo.solved):.1f} points less than SFT ({name}), more than two standard errors")
    worked = results["RLVR"]["greedy"]
    if worked.right_when_worked < RIGHT:
        short.append(f"after RLVR {worked.right_when_worked:.0%} of worked answers are right, fewer than {RIGHT:.0%}")
    return short


def lines(results: Results) -> list[str]:
    """The table of one seed as Markdown."""
    header = ["held-out problems, %", *(f"{name} {what}" for name in TEMPERATURES for what in ("solved", "worked", "tokens"))]
    rows = []
    for stage, by_temperature in results.items():
        cells = []
        for name in TEMPERATURES:
            m = by_temperature[name]
            cells += [f"{100 * m.solved:.1f} ± {100 * m.error:.1f}", f"{100 * m.worked:.0f}", f"{m.length:.1f}"]
        rows.append([stage, *cells])
    return table(header, rows)


def draw(folder: Path) -> Path:
    """Plot the learning curves of the last seed's stages."""
    metrics_of = {
        "sft": ("policy/loss",),
        "reward": ("reward/accuracy",),
        "dpo": ("reward/accuracy",),
        "rlvr": ("reward/solve_rate", "policy/kl"),
    }
    figure, axes = pyplot.subplots(1, 5, figsize=(17, 3), layout="constrained")
    panels = [(stage, metric) for stage, metrics in metrics_of.items() for metric in metrics]
    for axis, (stage, metric) in zip(axes, panels, strict=True):
        records = [record for record in read_metrics(Path(f"runs/chain_{stage}")) if record["kind"] == "step"]
        axis.plot([r["step"] for r in records], [r[metric] for r in records])
        axis.set(title=f"{stage}: {metric.replace('_', ' ')}", xlabel="step")
        axis.grid(alpha=0.3)
    path = folder / (f"chain_{date.today().isoformat()}.png" if folder == RESULTS else "chain.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def save(results: dict[int, Results], stem: str, seconds: float) -> None:
    """Write the page and its numbers next to the curves."""
    facts: dict[str, Any] = environment() | {"command": " ".join(sys.orig_argv[1:]), "seconds": round(seconds)}
    page = ["# SFT, DPO and RLVR of a small model", "", f"![curves of the last seed]({stem}.png)", ""]
    for seed, each in results.items():
        page += [f"## Seed {seed}", "", *lines(each), ""]
    page += [MEANING, "", "## Environment", "", *(f"- {key}: {value}" for key, value in facts.items())]
    (RESULTS / f"{stem}.md").write_text("\n".join(page) + "\n")
    numbers = {seed: {s: {t: asdict(m) for t, m in each[s].items()} for s in each} for seed, each in results.items()}
    (RESULTS / f"{stem}.json").write_text(json.dumps({"where": facts, "found": numbers}, indent=1) + "\n")
