"""The curves of preference runs, side by side: python -m benchmarks.curves runs/gsm8k_dpo runs/gsm8k_dpo_plain

Draws held-out accuracy, loss and length bias over steps into results/dpo_curves_cpu<cores>_<date>.png, and writes the page beside it.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.timing import RESULTS, environment
from engine.report import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot

DRAWN = ("accuracy", "loss", "margin", "length_bias")
TOLD = ("accuracy", "loss", "margin", "length_bias", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


def main() -> None:
    """Read the runs' metrics, draw, write and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs (their out=)")
    arguments = parser.parse_args()
    stories = {run.name: read_metrics(run) for run in arguments.runs}
    for name, story in stories.items():
        if not any(record["kind"] == "evaluation" for record in story):
            parser.error(f"{name} has no evaluation yet; it needs algorithm.held_out, and a finished step")
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = environment() | {
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks.curves {' '.join(map(str, arguments.runs))}",
    }
    stem = f"dpo_curves_cpu{facts['cores']}_{facts['date']}"
    _draw(stories, RESULTS / f"{stem}.png")
    settings = {run.name: json.loads((run / "run.json").read_text())["run"] for run in arguments.runs}
    text = page(stories, settings, facts, stem)
    (RESULTS / f"{stem}.md").write_text(text, encoding="utf-8")
    print(text)


def page(stories: dict[str, list[dict[str, Any]]], settings: dict[str, dict[str, Any]], facts: dict[str, Any], stem: str) -> str:
    """The Markdown page of runs: name -> records of metrics.jsonl, and name -> run.json; `facts` say where, `stem` names the picture."""
    blocks = [f"# Preference runs, on held-out pairs\n\n![curves]({stem}.png)"]
    for name, story in stories.items():
        algorithm = {k: v for k, v in settings[name]["algorithm"].items() if not isinstance(v, list | dict)}
        said = ", ".join(f"{key}={value}" for key, value in {"lr": settings[name]["optim"]["lr"], **algorithm}.items() if value != "")
        head = f"| after step | {' | '.join(TOLD)} |\n{'|---' * (len(TOLD) + 1)}|"
        told = [record for record in story if record["kind"] == "evaluation"]
        rows = [f"| {r['step']} | {' | '.join(_number(r[key]) for key in TOLD)} |" for r in told]
        minutes = (story[-1]["time"] - story[0]["time"]) / 60
        blocks.append("\n".join([f"## {name}\n\n{said}. {minutes:.1f} minutes from the first evaluation to the last.\n", head, *rows]))
    blocks.append(
        "While the policy still is the reference (step 0), margins are rounding errors, and accuracy and length_bias are of those."
    )
    blocks.append("\n".join(["## Where\n", *(f"- {key}: {value}" for key, value in facts.items())]))
    return "\n\n".join(blocks) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _draw(stories: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, axes = pyplot.subplots(1, len(DRAWN), figsize=(4 * len(DRAWN), 3.2), layout="constrained")
    for axis, metric in zip(axes, DRAWN, strict=True):
        for name, story in stories.items():
            told = [record for record in story if record["kind"] == "evaluation" and record[metric] is not None]
            axis.plot([r["step"] for r in told], [r[metric] for r in told], marker="o", label=name)
        axis.set(xlabel="steps", title=f"held-out {metric.replace('_', ' ')}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
