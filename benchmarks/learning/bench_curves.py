"""python -m benchmarks curves: the learning curves of preference runs, or of RLVR runs, side by side.

Draws what was found on held-out data over steps into results/<dpo|rlvr>_curves_cpu<cores>_<date>.png, and writes the page beside it.
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
Story = list[Record]  # what metrics.jsonl holds


@dataclass(frozen=True)
class Kind:
    """What is shown of a kind of runs. A solve rate is shown and drawn with its standard error."""

    stem: str
    title: str
    drawn: tuple[str, ...]  # held out
    told: tuple[str, ...]
    on_the_way: tuple[str, ...] = ()  # of the training steps between two evaluations, their mean; the first is drawn too
    note: str = ""


HEADLINE = ("reward/accuracy", "policy/loss", "reward/margin")
PREFERENCES = Kind(
    stem="dpo",
    title="Preference runs, on held-out pairs",
    drawn=(*HEADLINE, "reward/length_bias"),
    told=(*HEADLINE, "reward/length_bias", "reward/chosen", "reward/rejected", "logps/chosen", "logps/rejected"),
    note="While the policy still is the reference (step 0), margins are rounding errors, and accuracy and length_bias are of those.",
)
RLVR = Kind(
    stem="rlvr",
    title="Rewarded for right answers, on held-out problems",
    drawn=("reward/solve_rate", "reward/solve_rate_greedy"),
    told=("reward/solve_rate", "reward/solve_rate_greedy", "rollout/length", "rollout/length_greedy"),
    on_the_way=(
        "reward/solve_rate",
        "reward/zero_std_frac",
        "rollout/no_stop",
        "rollout/length",
        "policy/entropy",
        "rollout/logprob_diff_max",
        "policy/clip_fraction",
        "time/step",
    ),
    note="solve_rate is at the sampling temperature, ± binomial standard errors; a change's is that of two independent shares, though the"
    " same problems are asked before and after. Numbers of training steps are means over all responses drawn.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs (their out=)")


def main(arguments: argparse.Namespace) -> None:
    """Read the runs' metrics, draw, write and print."""
    stories = {run.name: read_metrics(run) for run in arguments.runs}
    for name, story in stories.items():
        if not _evaluations(story):
            raise ValueError(f"{name} has no evaluation yet; it needs algorithm.held_out, and a finished step")
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = environment() | {
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks curves {' '.join(map(str, arguments.runs))}",
    }
    settings = {run.name: json.loads((run / "run.json").read_text())["run"] for run in arguments.runs}
    kinds = {RLVR if setting["algorithm"]["is"] == "RLVR" else PREFERENCES for setting in settings.values()}
    if len(kinds) > 1:
        raise ValueError("these runs are of several kinds; give preference runs, or RLVR runs")
    (kind,) = kinds
    stem = f"{kind.stem}_curves_cpu{facts['cores']}_{facts['date']}"
    _draw(kind, stories, RESULTS / f"{stem}.png")
    text = page(kind, stories, settings, facts, stem)
    (RESULTS / f"{stem}.md").write_text(text, encoding="utf-8")
    print(text)


def page(kind: Kind, stories: dict[str, Story], settings: dict[str, Record], facts: Record, stem: str) -> str:
    """The Markdown page of runs: name -> records of metrics.jsonl, and name -> run.json; `facts` say where, `stem` names the picture."""
    blocks = [f"# {kind.title}\n\n![curves]({stem}.png)"]
    for name, story in stories.items():
        told = _evaluations(story)
        minutes = (story[-1]["time"] - story[0]["time"]) / 60
        passed = ", ".join(f"{(record['time'] - story[0]['time']) / 60:.1f}" for record in told)
        said = f"{_said(settings[name])}. {minutes:.1f} minutes from the first evaluation to the last ({passed})."
        blocks += [f"## {name}\n\n{said}", _table("after step", kind.told, told)]
        blocks += [_risen(metric, told[0], told[-1]) for metric in kind.told if _error(told[0], metric) is not None]
        if kind.on_the_way:
            blocks.append(_table("training steps up to", kind.on_the_way, _on_the_way(kind, story)))
    blocks += [kind.note, "\n".join(["## Where\n", *(f"- {key}: {value}" for key, value in facts.items())])]
    return "\n\n".join(blocks) + "\n"


def _said(settings: Record) -> str:
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
    """The standard error of a solve rate, as RLVR calls it: of solve_rate_greedy it is solve_rate_se_greedy."""
    return record.get(name.replace("solve_rate", "solve_rate_se")) if name.startswith("reward/solve_rate") else None


def _risen(metric: str, first: Record, last: Record) -> str:
    """How far a share with a standard error has come, in units of that of the difference."""
    risen, error = last[metric] - first[metric], math.hypot(_error(first, metric) or 0.0, _error(last, metric) or 0.0)
    in_errors = f", {risen / error:.1f} standard errors" if error else ""
    return f"{metric}: {first[metric]:.3f} -> {last[metric]:.3f}, a change of {risen:+.3f} ± {error:.3f}{in_errors}."


def _on_the_way(kind: Kind, story: Story) -> list[Record]:
    """The mean of each metric over the training steps from one evaluation to the next."""
    ends = [record["step"] for record in _evaluations(story)]
    found = []
    for start, end in pairwise(ends):
        steps = [r for r in _steps(story) if start <= r["step"] < end]
        found.append({"step": end} | {name: _mean(r.get(name) for r in steps) for name in kind.on_the_way})
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _evaluations(story: Story) -> Story:
    return [record for record in story if record["kind"] == "evaluation"]


def _steps(story: Story) -> Story:
    return [record for record in story if record["kind"] == "step"]


def _draw(kind: Kind, stories: dict[str, Story], path: Path) -> None:
    drawn = [(f"held-out {metric}", _evaluations, metric) for metric in kind.drawn]
    drawn += [(f"{metric} while training", _steps, metric) for metric in kind.on_the_way[:1]]
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(4 * len(drawn), 3.2), layout="constrained")
    for axis, (title, chosen, metric) in zip(axes, drawn, strict=True):
        for name, story in stories.items():
            told = [record for record in chosen(story) if record[metric] is not None]
            errors = [_error(record, metric) or 0.0 for record in told]
            axis.errorbar([r["step"] for r in told], [r[metric] for r in told], yerr=errors, marker=".", capsize=3, label=name)
        axis.set(xlabel="steps", title=title.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
