"""The output of a run: printed lines, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn

from engine.config import Run, to_dict

RECENT = 20  # steps whose median time gives the ETA: neither a slow first step nor one slow step changes it
PRINTED = 5  # metrics of a printed step line; all are in metrics.jsonl
# Which are printed if there are more, in this order of preference.
HEADLINE = ("loss", "reward", "solve_rate", "accuracy", "margin", "kl", "length", "grad_norm", "lr")

Tracker = Callable[[dict[str, float], int], None]  # (metrics, step)


class Report:
    """Reports a run from step `start` on, to the terminal and into the folder `out`. Only the writer rank prints or writes files.

    `step` counts from 0: a step's record is of update number `step`, an evaluation's of the weights before that update, so that repeating
    everything from `start` on repeats every record an earlier attempt left there. Those are dropped on entry: the file tells one story.
    """

    def __init__(self, run: Run, out: Path, *, is_writer: bool, devices: int, start: int = 0) -> None:
        self._run, self._out, self._start = run, out, start
        self._is_writer, self._devices = is_writer, devices
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
        if self._run.logging.wandb_project:
            self._trackers.append(_wandb(self._run, self._out, self._open))
        if self._run.logging.tensorboard:
            self._trackers += _tensorboard(self._out, self._start, self._open)
        _drop_records(self._out, self._start)
        self._file = self._open.enter_context((self._out / "metrics.jsonl").open("a", encoding="utf-8"))
        if sys.stdout.isatty():
            self._bar = self._open.enter_context(Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True))
            self._task: TaskID = self._bar.add_task("steps", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def step(self, step: int, steps: int, metrics: dict[str, float], *, tokens: int, seconds: float, memory_gb: float) -> None:
        """Report update `step` of `steps`: `tokens` of all devices in `seconds`, with a peak of `memory_gb` on this one.

        Everything is recorded. A line is printed every `logging.every` seconds, with at most PRINTED metrics; those with a slash in their
        names, such as rewards/chosen, are not printed.
        """
        if not self._is_writer:
            return
        self._seconds.append(seconds)
        rate = tokens / seconds
        cost = {"tokens": tokens, "seconds": seconds, "tokens_per_second": rate, "tokens_per_second_per_device": rate / self._devices}
        self._record("step", step, metrics, cost | {"memory_gb": memory_gb})
        if self._bar:
            self._bar.update(self._task, total=steps, completed=step + 1)
        now = time.monotonic()
        if now - self._printed < self._run.logging.every and step + 1 < steps:
            return
        self._printed = now
        left = timedelta(seconds=round((steps - step - 1) * statistics.median(self._seconds)))
        columns = [
            f"step {step + 1:>{len(str(steps))}}/{steps}",
            *(f"{_label(name)} {_number(value):<9}" for name, value in _headline(metrics).items()),
            f"{rate:>9,.0f} tok/s",
            f"{seconds:>7.2f} s",
            f"{memory_gb:>6.1f} GB",
            f"eta {left}",
        ]
        self._print("  ".join(columns))

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Report metrics on held-out data, of the weights after `step` updates."""
        if not self._is_writer:
            return
        self._record("evaluation", step, metrics, {})
        columns = (f"held-out {_label(name)} {_number(value)}" for name, value in metrics.items() if "/" not in name)
        self._print("  ".join([f"after step {step}", *columns]))

    def note(self, text: str) -> None:
        """Print one line that is no measurement, such as "resumed from step 20"."""
        if self._is_writer:
            self._print(text)

    def _record(self, kind: str, step: int, metrics: dict[str, float], cost: dict[str, float]) -> None:
        head = {"kind": kind, "step": step, "time": round(time.time(), 3)}
        taken = metrics.keys() & (head | cost).keys()
        assert not taken, f"metrics may not be called {', '.join(sorted(taken))}: a record says something else by that name"
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

    A last line that a crash cut short is left out; any other line that cannot be read raises ValueError.
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


def _tensorboard(out: Path, start: int, stack: ExitStack) -> list[Tracker]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed; metrics go to metrics.jsonl alone", flush=True)
        return []
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=start)
    stack.callback(writer.close)

    def track(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return [track]


def _wandb(run: Run, out: Path, stack: ExitStack) -> Tracker:
    project = run.logging.wandb_project
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise ValueError(f"logging.wandb_project={project!r} needs the package wandb; pip install wandb, or set it to ''") from None
    logger = wandb.init(project=project, name=out.name, dir=str(out), config=to_dict(run))
    stack.callback(logger.finish)
    return lambda metrics, step: logger.log(metrics, step=step)


def _headline(metrics: dict[str, float]) -> dict[str, float]:
    """At most PRINTED of the metrics, in their own order."""
    plain = [name for name in metrics if "/" not in name]
    if len(plain) > PRINTED:
        chosen = sorted(plain, key=lambda name: HEADLINE.index(name) if name in HEADLINE else len(HEADLINE))[:PRINTED]
        plain = [name for name in plain if name in chosen]
    return {name: metrics[name] for name in plain}


def _label(name: str) -> str:
    return name.replace("_", "-")


def _number(value: float) -> str:
    plain = value == 0 or 1e-3 <= abs(value) < 1e4
    return f"{value:.4f}" if plain else f"{value:.3e}"
