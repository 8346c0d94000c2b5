"""python -m benchmarks demo: the whole chain in small on two CPU processes.

A Llama of 0.4M parameters, trained from scratch, learns word problems by SFT, DPO and RLVR; then SmolLM2-135M answers a question.

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

Found = dict[str, dict[str, Measured]]
MEANING = """\
Imitation copies its teachers: more than half of them show no work, and so the model's likeliest answer is a guess, at problems too long to
guess. Preference pairs of its own right and wrong answers lean it towards work. The verifier sees only the last number; under it the model
learns to work every problem out. That is selection and sharpening of what imitation had put there, not new arithmetic: where problems are
easy enough to do in the head, the same training sharpens the guess instead. The policy hardly leaves the clip and the critic explains
little on a task this small; both are proven by tests, not by this demo."""
CLIMB = {"greedy": 0.30, "T=1": 0.15}  # from SFT to RLVR, at least, of held-out problems solved
RIGHT = 0.75  # of worked answers, greedily, after RLVR, at least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--save", action="store_true")


def main(arguments: argparse.Namespace) -> None:
    """Run the chain for each seed, print the table; exit with an error when the last stage did not learn."""
    began = time.monotonic()
    torch.set_num_threads(1)
    found: dict[int, Found] = {}
    with closing(World.start("cpu")) as world:
        for seed in arguments.seeds:
            started = time.monotonic()
            found[seed] = run_chain(seed, world)
            print(f"\nseed {seed}, {time.monotonic() - started:.0f} s\n" + "\n".join(lines(found[seed])), flush=True)
        row = tasks(1, seed=7, held_out=True, kind=LONG)[0]
        said = answers(exported("rlvr"), [row], world, temperature=0.0)[0][0][0]
        print(f"\n{row['prompt']}\n  the small model: {said}   (right: {row['truth']})")
        reply = answer(GenerateConfig(Model(SMOLLM2), temperature=0.0, max_tokens=48), "What is the capital of France?", world)[0]
        print(f"What is the capital of France?\n  SmolLM2-135M:    {reply}")
    curves = draw(RESULTS if arguments.save else Path("runs"))
    print(f"\n{MEANING}\n\nCurves: {curves}. The models: {', '.join(str(exported(s)) for s in ('sft', 'reward', 'dpo', 'rlvr'))}.")
    print(f"{time.monotonic() - began:.0f} s in all.")
    if arguments.save:
        save(found, curves.stem, time.monotonic() - began)
    if failed := [f"seed {seed}: {what}" for seed, each in found.items() for what in shortfalls(each)]:
        sys.exit("\n".join(failed))


def shortfalls(found: Found) -> list[str]:
    """What one seed fell short of, a line each."""
    short = []
    for name, least in CLIMB.items():
        sft, dpo, rlvr = (found[stage][name] for stage in ("SFT", "DPO", "RLVR"))
        if rlvr.solved - sft.solved < least:
            short.append(f"RLVR solves {100 * (rlvr.solved - sft.solved):.1f} points more than SFT ({name}), fewer than {100 * least:.0f}")
        if sft.solved - dpo.solved > 2 * math.hypot(sft.error, dpo.error):
            short.append(f"DPO solves {100 * (sft.solved - dpo.solved):.1f} points less than SFT ({name}), more than two standard errors")
    worked = found["RLVR"]["greedy"]
    if worked.right_when_worked < RIGHT:
        short.append(f"after RLVR {worked.right_when_worked:.0%} of worked answers are right, fewer than {RIGHT:.0%}")
    return short


def lines(found: Found) -> list[str]:
    """The table of one seed as Markdown."""
    header = ["held-out problems, %", *(f"{name} {what}" for name in TEMPERATURES for what in ("solved", "worked", "tokens"))]
    rows = []
    for stage, by_temperature in found.items():
        cells = []
        for name in TEMPERATURES:
            m = by_temperature[name]
            cells += [f"{100 * m.solved:.1f} ± {100 * m.error:.1f}", f"{100 * m.worked:.0f}", f"{m.length:.1f}"]
        rows.append([stage, *cells])
    return table(header, rows)


def draw(folder: Path) -> Path:
    """The curves of the last run's stages."""
    drawn = {
        "sft": ("policy/loss",),
        "reward": ("reward/accuracy",),
        "dpo": ("reward/accuracy",),
        "rlvr": ("reward/solve_rate", "policy/kl"),
    }
    figure, axes = pyplot.subplots(1, 5, figsize=(17, 3), layout="constrained")
    panels = [(stage, metric) for stage, metrics in drawn.items() for metric in metrics]
    for axis, (stage, metric) in zip(axes, panels, strict=True):
        told = [record for record in read_metrics(Path(f"runs/chain_{stage}")) if record["kind"] == "step"]
        axis.plot([r["step"] for r in told], [r[metric] for r in told])
        axis.set(title=f"{stage}: {metric.replace('_', ' ')}", xlabel="step")
        axis.grid(alpha=0.3)
    path = folder / (f"chain_{date.today().isoformat()}.png" if folder == RESULTS else "chain.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def save(found: dict[int, Found], stem: str, seconds: float) -> None:
    """The page and its numbers, beside the curves."""
    facts: dict[str, Any] = environment() | {"command": " ".join(sys.orig_argv[1:]), "seconds": round(seconds)}
    page = ["# The chain in small", "", f"![curves of the last seed]({stem}.png)", ""]
    for seed, each in found.items():
        page += [f"## Seed {seed}", "", *lines(each), ""]
    page += [MEANING, "", "## Where", "", *(f"- {key}: {value}" for key, value in facts.items())]
    (RESULTS / f"{stem}.md").write_text("\n".join(page) + "\n")
    numbers = {seed: {s: {t: asdict(m) for t, m in each[s].items()} for s in each} for seed, each in found.items()}
    (RESULTS / f"{stem}.json").write_text(json.dumps({"where": facts, "found": numbers}, indent=1) + "\n")
