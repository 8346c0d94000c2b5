"""The output of a run: printed lines, a progress bar, and metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn

from engine.config import Run
from engine.reporting.trackers import Tracker, open_trackers

RECENT = 20  # steps whose median time gives the ETA: neither a slow first step nor one slow step changes it
EVALUATED = ("policy/", "reward/")  # groups of the metrics of a printed evaluation line; all metrics are in metrics.jsonl


@dataclass(frozen=True)
class Chips:
    """The devices of a launch: their number, and the FLOP/s of one at its matrix peak, if known."""

    count: int
    peak: float | None = None


@dataclass(frozen=True)
class StepCost:
    """What a step took: tokens without padding and the model's FLOPs, of all devices; seconds; and peak GiB of this device."""

    tokens: int
    seconds: float
    flops: float
    memory_gb: float

    def metrics(self, chips: Chips) -> dict[str, float]:
        """As recorded. mfu: the model's FLOP/s over the whole step, as a share of the peak; absent if the peak is unknown."""
        rate, flops = self.tokens / self.seconds, self.flops / self.seconds / chips.count
        return {
            "tokens": self.tokens,
            "memory_gb": self.memory_gb,
            "time/step": self.seconds,
            "time/tokens_per_second": rate,
            "time/tokens_per_second_per_device": rate / chips.count,
            "time/tflops_per_device": flops / 1e12,
            **({"time/mfu": flops / chips.peak} if chips.peak else {}),
        }


class Report:
    """Reports a run from step `start` on, to the terminal and into the folder `out`. Only the writer rank prints or writes files.

    `step` counts from 0: a step's record is of update number `step`, an evaluation's of the weights before that update, so that repeating
    everything from `start` on repeats every record an earlier attempt left there. Those are dropped on entry: the file tells one story.
    """

    def __init__(self, run: Run, out: Path, chips: Chips, headline: Sequence[str], *, is_writer: bool, start: int = 0) -> None:
        self._run, self._out, self._start = run, out, start
        self._chips, self._headline, self._is_writer = chips, headline, is_writer
        self._open = ExitStack()
        self._bar: Progress | None = None
        self._trackers: list[Tracker] = []
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._printed = -math.inf  # when a step was last printed

    def __enter__(self) -> Self:
        """Open files and trackers. Raises ValueError if logging.wandb_project is set and wandb is not installed."""
        if not self._is_writer:
            return self
        self._out.mkdir(parents=True, exist_ok=True)
        self._trackers = open_trackers(self._run, self._out, self._start, self._open)
        _drop_records(self._out, self._start)
        self._file = self._open.enter_context((self._out / "metrics.jsonl").open("a", encoding="utf-8"))
        if sys.stdout.isatty():
            self._bar = self._open.enter_context(Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True))
            self._task: TaskID = self._bar.add_task("steps", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def step(self, step: int, steps: int, metrics: dict[str, float], cost: StepCost) -> None:
        """Report update `step` of `steps`: record everything, and print a line with the headline every `logging.every` seconds."""
        if not self._is_writer:
            return
        self._seconds.append(cost.seconds)
        costs = cost.metrics(self._chips)
        self._record("step", step, metrics, costs)
        if self._bar:
            self._bar.update(self._task, total=steps, completed=step + 1)
        now = time.monotonic()
        if now - self._printed < self._run.logging.every and step + 1 < steps:
            return
        self._printed = now
        left = timedelta(seconds=round((steps - step - 1) * statistics.median(self._seconds)))
        columns = [
            f"step {step + 1:>{len(str(steps))}}/{steps}",
            *(f"{_label(name)} {_number(metrics[name]):<9}" for name in self._headline if name in metrics),
            f"{costs['time/tokens_per_second_per_device']:>9,.0f} tok/s/device",
            f"mfu {costs['time/mfu']:>6.1%}" if "time/mfu" in costs else f"{costs['time/tflops_per_device']:>6.3g} TFLOP/s/device",
            f"{cost.seconds:>7.2f} s",
            f"{cost.memory_gb:>6.1f} GB",
            f"eta {left}",
        ]
        self._print("  ".join(columns))

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Report metrics on held-out data, of the weights after `step` updates."""
        if not self._is_writer:
            return
        self._record("evaluation", step, metrics, {})
        columns = (f"held-out {_label(name)} {_number(value)}" for name, value in metrics.items() if name.startswith(EVALUATED))
        self._print("  ".join([f"after step {step}", *columns]))

    def note(self, text: str) -> None:
        """Print one line without recording it, such as "resumed from step 20"."""
        if self._is_writer:
            self._print(text)

    def _record(self, kind: str, step: int, metrics: dict[str, float], cost: dict[str, float]) -> None:
        head = {"kind": kind, "step": step, "time": round(time.time(), 3)}
        taken = metrics.keys() & (head | cost).keys()
        assert not taken, f"metrics may not be called {', '.join(sorted(taken))}: the record has a field of that name"
        values = metrics | cost
        # JSON has no NaN; null keeps the record readable for every other tool.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(head | finite, allow_nan=False) + "\n")
        self._file.flush()
        for track in self._trackers:
            track({f"{kind}/{name}": value for name, value in values.items()}, step)

    def _print(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of out/metrics.jsonl in order; a value that was not finite is None. Without the file there are none.

    An incomplete last line, as a crash leaves it, is skipped; any other line that cannot be read raises ValueError.
    """
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError
            records.append(record)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise ValueError(f"{path} line {number} is not a JSON record; remove that line or move the file away") from None
    return records


def _drop_records(out: Path, start: int) -> None:
    kept = [record for record in read_metrics(out) if record["step"] < start]
    path = out / "metrics.jsonl"
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _label(name: str) -> str:
    """policy/grad_norm -> grad_norm; metrics of other groups keep the group: critic/loss."""
    return name.removeprefix("policy/")


def _number(value: float) -> str:
    plain = value == 0 or 1e-3 <= abs(value) < 1e4
    return f"{value:.4f}" if plain else f"{value:.3e}"
