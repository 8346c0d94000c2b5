"""python -m benchmarks host_cost: Measure the host time of a call of each kernel function, without launches.

Runs on any machine, with CPU tensors. The code up to a launch is Python and torch; the launch is replaced by a function that does nothing.
On a GPU, memory allocation may take more or less time than on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.kernels.floors import SHAPES
from benchmarks.kernels.operations import OPERATIONS, OURS, Operation
from benchmarks.support.tables import as_file, heading, table, versions
from triton_kernels.shard import Shard

SMALL = replace(SHAPES["8b-tp1"], tokens=16, hidden=64, ffn=64, vocab=256)
ROUNDS, CALLS = 200, 20
WAYS = ("no_grad", "forward", "forward and backward")
Costs = dict[str, dict[str, float]]  # operation -> way -> seconds
TARGET = 15e-6  # seconds of a call without gradient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="F", help="also write all results to this JSON file")
    parser.add_argument("--before", type=Path, metavar="F", help="the --json file of another commit, to compare with")


def main(arguments: argparse.Namespace) -> int:
    """Print the table as Markdown."""
    torch.set_num_threads(1)
    with without_launches():
        results = {
            name: costs(operation) for name, operation in OPERATIONS.items() if "linear" not in name and operation.which != "backward"
        }
    as_file(arguments.json, {"versions": versions(), "seconds": results})
    print(page(results, json.loads(arguments.before.read_text()) if arguments.before else None))
    return 0


@contextmanager
def without_launches() -> Iterator[None]:
    """Every function of triton_kernels selects its kernel, as on a GPU, but does not launch it. Values of targets are not checked, as on a
    GPU."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("triton_kernels.") and name != "triton_kernels.launch":
                for function, replacement in (("launch", _nothing), ("by_kernel", _always)):
                    if hasattr(module, function):
                        stack.enter_context(mock.patch.object(module, function, replacement))
        stack.enter_context(mock.patch.object(Shard, "check", _nothing))
        yield


def costs(operation: Operation) -> dict[str, float]:
    """Seconds of a call under no_grad, and if the operation has gradients, of forward, and of forward and backward."""
    call = operation.ours[OURS](tensors := operation.draw(SMALL, torch.device("cpu")))
    with torch.no_grad():
        seconds = {"no_grad": _seconds(call)}
    if operation.trained:
        leaves = [tensors[name].requires_grad_() for name in operation.trained]
        seconds["forward"] = _seconds(call)
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.ones_like(output) for output in outputs]
        seconds["forward and backward"] = _seconds(lambda: torch.autograd.grad(call(), leaves, upstream))
    return seconds


def _seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of a call in the fastest round; other processes can only make a round slower."""
    call()
    return min(_round(call) for _ in range(ROUNDS))


def _round(call: Callable[[], Any]) -> float:
    began = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - began) / CALLS


def page(results: Costs, before: dict[str, Any] | None) -> str:
    """The table, and whether calls without gradient meet the target. `before`: results of another commit, shown in parentheses."""
    over = [name for name, seconds in results.items() if seconds["no_grad"] > TARGET]
    verdict = f"above it: {', '.join(over)}" if over else "all are within it"
    lines = [
        f"Microseconds of CPU time per call, without launches, in the fastest of {ROUNDS} rounds of {CALLS} calls. `rope` is two calls,",
        f"for query and key. Target: {TARGET * 1e6:.0f} µs under no_grad; {verdict}.",
    ]
    rows = _rows(results)
    if before is not None:
        lines.append(f"In parentheses: the same at commit {before['versions']['commit']}.")
        rows = [[name, *map(_with_before, row, other)] for (name, *row), (_, *other) in zip(rows, _rows(before["seconds"]), strict=True)]
    title = heading("Host cost of a call", versions(), "python -m benchmarks host_cost")
    return "\n".join([*title, *lines, "", *table(["operation", *WAYS], rows)])


def _rows(results: Costs) -> list[list[str]]:
    return [[name, *(f"{seconds[way] * 1e6:.1f}" if way in seconds else "" for way in WAYS)] for name, seconds in results.items()]


def _with_before(now: str, before: str) -> str:
    return f"{now} ({before})" if now else ""


def _nothing(*_: Any, **__: Any) -> None:
    """Replaces a launch. A mock would take longer than a launch."""


def _always(_: torch.Tensor) -> bool:
    return True
