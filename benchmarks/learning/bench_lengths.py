"""python -m benchmarks lengths: Compare the response lengths of several models on the same prompts.

    python -m engine generate MODEL_DIR --prompts P.jsonl --out A.jsonl n=2 max_tokens=256      for each model, on the same prompts
    python -m benchmarks lengths start=A.jsonl dpo=B.jsonl plain=C.jsonl          compares the others with the first

Writes results/lengths_cpu<cores>_<date>.md.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.tables import table
from benchmarks.support.timing import RESULTS, environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("answers", nargs="+", metavar="NAME=FILE", help="outputs of `engine generate --prompts` for the same prompts")


def main(arguments: argparse.Namespace) -> None:
    """Read the responses, and write and print the page."""
    answers = {name: _read(Path(path)) for name, _, path in (given.partition("=") for given in arguments.answers)}
    if len({len(rows) for rows in answers.values()}) > 1:
        raise ValueError(f"{', '.join(answers)} have {[len(rows) for rows in answers.values()]} answers; they must answer the same prompts")
    facts = environment() | {
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks lengths {' '.join(arguments.answers)}",
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = page(answers, facts)
    (RESULTS / f"lengths_cpu{facts['cores']}_{facts['date']}.md").write_text(text, encoding="utf-8")
    print(text)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def page(answers: dict[str, list[dict[str, Any]]], facts: dict[str, Any]) -> str:
    """The Markdown page. answers: model name -> rows of `engine generate`, in the order of the prompts; facts: environment."""
    first, *_ = answers
    base = _tokens(answers[first])
    header = ["model", "answers", "tokens", f"longer than {first}", "cut off"]
    rows = []
    for name, model_rows in answers.items():
        tokens, cut = _tokens(model_rows), np.mean([row["finish_reason"] == "length" for row in model_rows])
        longer = "" if name == first else f"{_mean(tokens - base)} ({100 * (tokens.mean() / base.mean() - 1):+.0f} %)"
        rows.append([name, str(len(model_rows)), _mean(tokens), longer, f"{100 * cut:.0f} %"])
    lines = ["# Response lengths", "", *table(header, rows), ""]
    lines += ["Mean ± standard error over answers. Differences are paired by prompt and sample. Answers that were cut off are included."]
    return "\n".join([*lines, "", "## Environment", "", *(f"- {key}: {value}" for key, value in facts.items())]) + "\n"


def _tokens(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([len(row["logprobs"]) for row in rows], np.float64)


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1) / len(values) ** 0.5:.1f}"
