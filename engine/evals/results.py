"""Output of an evaluation: a console table, results.json, and all responses with their verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from engine.config import to_dict
from engine.evals.evaluate import Answer, Result
from engine.evals.exam import EvalConfig
from engine.verify import Verdict


def table(results: Sequence[Result]) -> Table:
    """A table with one row per metric, in per cent."""
    shown = Table("suite", "metric", "%", "± standard error", "95 % interval", "items")
    for result in results:
        for name, estimate in result.metrics.items():
            low, high = estimate.interval()
            items = f"{estimate.items}" + (f" ({result.dropped} not judged)" if result.dropped else "")
            values = [f"{100 * estimate.value:.2f}", f"{100 * estimate.error:.2f}", f"{100 * low:.2f} to {100 * high:.2f}"]
            shown.add_row(result.exam.suite.name, name, *values, items)
    return shown


def write(results: Sequence[Result], settings: EvalConfig, out: Path) -> None:
    """Write results.json, and SUITE.jsonl with one line per item, to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for result in results:
        with (out / f"{result.exam.suite.name}.jsonl").open("w", encoding="utf-8") as file:
            for i, answer in enumerate(result.answers):
                file.write(json.dumps(_line(result, i, answer), ensure_ascii=False) + "\n")
    body = {"settings": to_dict(settings), "suites": {result.exam.suite.name: _summary(result) for result in results}}
    (out / "results.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _line(result: Result, number: int, answer: Answer) -> dict[str, Any]:
    exam = result.exam
    responses = [
        response._asdict() | {"verdicts": [v._asdict() if isinstance(v, Verdict) else {"unjudged": str(v)} for v in verdicts]}
        for response, verdicts in zip(answer.responses, answer.verdicts, strict=True)
    ]
    return {
        "where": exam.where[number],
        "prompt": exam.prompt_text(number),
        "truth": exam.items[number].truth,
        "responses": responses,
        "scores": answer.scores,
    }


def _summary(result: Result) -> dict[str, Any]:
    exam = result.exam
    metrics = {
        name: {"value": estimate.value, "standard_error": estimate.error, "interval_95": estimate.interval(), "items": estimate.items}
        for name, estimate in result.metrics.items()
    }
    decoding = to_dict(exam.decoding) if exam.decoding else None
    facts = {"data": exam.source.path, "chat": exam.chat, "decoding": decoding, "not_judged": result.dropped}
    return facts | {"metrics": metrics}
