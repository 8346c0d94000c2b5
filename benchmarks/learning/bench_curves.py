"""python -m benchmarks curves: Plot the learning curves of preference runs, or of RLVR runs, and write a page that compares them.

Plots held-out metrics over steps into results/<dpo|rlvr>_curves_cpu<cores>_<date>.png and writes the page <same name>.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.support.timing import RESULTS, environment
from engine.reporting.console import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot

Record = dict[str, Any]
Records = list[Record]  # the lines of a metrics.jsonl


@dataclass(frozen=True)
class Kind:
    """The metrics shown for a kind of run. Solve rates are shown with their standard errors."""

    stem: str
    title: str
    plotted: tuple[str, ...]  # held-out metrics in the plot
    listed: tuple[str, ...]  # held-out metrics in the table
    training: tuple[str, ...] = ()  # training metrics, averaged between two evaluations; the first is plotted too
    note: str = ""


HEADLINE = ("reward/accuracy", "policy/loss", "reward/margin")
PREFERENCES = Kind(
    stem="dpo",
    title="Preference runs, on held-out pairs",
    plotted=(*HEADLINE, "reward/length_bias"),
    listed=(*HEADLINE, "reward/length_bias", "reward/chosen", "reward/rejected", "logps/chosen", "logps/rejected"),
    note="At step 0 the policy equals the reference, so margins are rounding errors; accuracy and length_bias are computed from these.",
)
RLVR = Kind(
    stem="rlvr",
    title="RLVR runs, on held-out problems",
    plotted=("reward/solve_rate", "reward/solve_rate_greedy"),
    listed=("reward/solve_rate", "reward/solve_rate_greedy", "rollout/length", "rollout/length_greedy"),
    training=(
        "reward/solve_rate",
        "reward/zero_std_frac",
        "rollout/no_stop",
        "rollout/length",
        "policy/entropy",
        "rollout/logprob_diff_max",
        "policy/clip_fraction",
        "time/step",
    ),
    note="solve_rate is at the sampling temperature, ± binomial standard error. The error of a change is that of two independent shares,"
    " although the same problems are used before and after. Numbers of training steps are means over all sampled responses.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs (out=)")


def main(arguments: argparse.Namespace) -> None:
    """Read the metrics of the runs, plot them, and write and print the page."""
    metrics = {run.name: read_metrics(run) for run in arguments.runs}
    for name, records in metrics.items():
        if not _evaluations(records):
            raise ValueError(f"{name} has no evaluation; set algorithm.held_out in its recipe and run at least one step")
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = environment() | {
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks curves {' '.join(map(str, arguments.runs))}",
    }
    settings = {run.name: json.loads((run / "run.json").read_text())["run"] for run in arguments.runs}
    kinds = {RLVR if setting["algorithm"]["is"] == "RLVR" else PREFERENCES for setting in settings.values()}
    if len(kinds) > 1:
        raise ValueError("the runs are of several kinds; give only preference runs, or only RLVR runs")
    (kind,) = kinds
    stem = f"{kind.stem}_curves_cpu{facts['cores']}_{facts['date']}"
    _plot(kind, metrics, RESULTS / f"{stem}.png")
    text = page(kind, metrics, settings, facts, stem)
    (RESULTS / f"{stem}.md").write_text(text, encoding="utf-8")
    print(text)


def page(kind: Kind, metrics: dict[str, Records], settings: dict[str, Record], facts: Record, stem: str) -> str:
    """The Markdown page. metrics: run -> records of metrics.jsonl; settings: run -> run.json; stem: file name of the plot."""
    blocks = [f"# {kind.title}\n\n![curves]({stem}.png)"]
    for name, records in metrics.items():
        evaluations = _evaluations(records)
        minutes = (records[-1]["time"] - records[0]["time"]) / 60
        passed = ", ".join(f"{(record['time'] - records[0]['time']) / 60:.1f}" for record in evaluations)
        summary = f"{_settings(settings[name])}. {minutes:.1f} minutes from the first evaluation to the last ({passed})."
        blocks += [f"## {name}\n\n{summary}", _table("after step", kind.listed, evaluations)]
        blocks += [_change(metric, evaluations[0], evaluations[-1]) for metric in kind.listed if _error(evaluations[0], metric) is not None]
        if kind.training:
            blocks.append(_table("training steps up to", kind.training, _training(kind, records)))
    blocks += [kind.note, "\n".join(["## Environment\n", *(f"- {key}: {value}" for key, value in facts.items())])]
    return "\n\n".join(blocks) + "\n"


def _settings(settings: Record) -> str:
    algorithm = {k: v for k, v in settings["algorithm"].items() if not isinstance(v, list | dict)}
    return ", ".join(f"{key}={value}" for key, value in {"lr": settings["optim"]["lr"], **algorithm}.items() if value != "")


def _table(first: str, columns: Sequence[str], records: Iterable[Record]) -> str:
    head = f"| {first} | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|"
    return "\n".join([head, *(f"| {r['step']} | {' | '.join(_number(r, key) for key in columns)} |" for r in records)])


def _number(record: Record, name: str) -> str:
    value, error = record.get(name), _error(record, name)
    if value is None:
        return "-"
    shown = f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:.4f}"
    return shown if error is None else f"{shown} ± {error:.4f}"


def _error(record: Record, name: str) -> float | None:
    """The standard error of a solve rate. That of solve_rate_greedy is named solve_rate_se_greedy."""
    return record.get(name.replace("solve_rate", "solve_rate_se")) if name.startswith("reward/solve_rate") else None


def _change(metric: str, first: Record, last: Record) -> str:
    """The change of a share, with its standard error."""
    change, error = last[metric] - first[metric], math.hypot(_error(first, metric) or 0.0, _error(last, metric) or 0.0)
    in_errors = f", {change / error:.1f} standard errors" if error else ""
    return f"{metric}: {first[metric]:.3f} -> {last[metric]:.3f}, a change of {change:+.3f} ± {error:.3f}{in_errors}."


def _training(kind: Kind, records: Records) -> list[Record]:
    """The mean of each metric over the training steps from one evaluation to the next."""
    ends = [record["step"] for record in _evaluations(records)]
    means = []
    for start, end in pairwise(ends):
        steps = [r for r in _steps(records) if start <= r["step"] < end]
        means.append({"step": end} | {name: _mean(r.get(name) for r in steps) for name in kind.training})
    return means


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _evaluations(records: Records) -> Records:
    return [record for record in records if record["kind"] == "evaluation"]


def _steps(records: Records) -> Records:
    return [record for record in records if record["kind"] == "step"]


def _plot(kind: Kind, metrics: dict[str, Records], path: Path) -> None:
    panels = [(f"held-out {metric}", _evaluations, metric) for metric in kind.plotted]
    panels += [(f"{metric} while training", _steps, metric) for metric in kind.training[:1]]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (title, select, metric) in zip(axes, panels, strict=True):
        for name, records in metrics.items():
            points = [record for record in select(records) if record[metric] is not None]
            errors = [_error(record, metric) or 0.0 for record in points]
            axis.errorbar([r["step"] for r in points], [r[metric] for r in points], yerr=errors, marker=".", capsize=3, label=name)
        axis.set(xlabel="steps", title=title.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
