"""python -m benchmarks host_cost: what one call of each kernel's function costs the host, with the launches left out.

Runs anywhere, on CPU tensors: everything up to a launch is Python and torch's own, and the launch itself is replaced by nothing. A GPU's
allocator may cost more or less than the CPU's.
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
    parser.add_argument("--json", type=Path, metavar="F", help="also write everything to this file")
    parser.add_argument("--before", type=Path, metavar="F", help="what --json wrote at another commit, to be shown beside")


def main(arguments: argparse.Namespace) -> int:
    """Prints the table as Markdown."""
    torch.set_num_threads(1)
    with launches_left_out():
        found = {name: costs(operation) for name, operation in OPERATIONS.items() if "linear" not in name and operation.which != "backward"}
    as_file(arguments.json, {"versions": versions(), "seconds": found})
    print(page(found, json.loads(arguments.before.read_text()) if arguments.before else None))
    return 0


@contextmanager
def launches_left_out() -> Iterator[None]:
    """Every function of triton_kernels takes the way of a GPU, and launches nothing. Targets are not looked at, as they are not there."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("triton_kernels.") and name != "triton_kernels.launch":
                for function, instead in (("launch", _nothing), ("by_kernel", _always)):
                    if hasattr(module, function):
                        stack.enter_context(mock.patch.object(module, function, instead))
        stack.enter_context(mock.patch.object(Shard, "check", _nothing))
        yield


def costs(operation: Operation) -> dict[str, float]:
    """Seconds of a call: under no_grad; where the operation is trained, also with gradients wanted, and forward with backward."""
    call = operation.ours[OURS](tensors := operation.draw(SMALL, torch.device("cpu")))
    with torch.no_grad():
        found = {"no_grad": _seconds(call)}
    if operation.trained:
        leaves = [tensors[name].requires_grad_() for name in operation.trained]
        found["forward"] = _seconds(call)
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.ones_like(output) for output in outputs]
        found["forward and backward"] = _seconds(lambda: torch.autograd.grad(call(), leaves, upstream))
    return found


def _seconds(call: Callable[[], Any]) -> float:
    """Of processor time, in the fastest round: other processes only add to it."""
    call()
    return min(_round(call) for _ in range(ROUNDS))


def _round(call: Callable[[], Any]) -> float:
    began = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - began) / CALLS


def page(found: Costs, before: dict[str, Any] | None) -> str:
    """The table, with the target of a call without gradient; `before`: the facts of another commit."""
    over = [name for name, seconds in found.items() if seconds["no_grad"] > TARGET]
    verdict = f"above it: {', '.join(over)}" if over else "all within it"
    lines = [
        f"Microseconds of processor time for one call, its launches replaced by nothing; the fastest of {ROUNDS} rounds of {CALLS} calls.",
        f"`rope` is two calls, of query and of key. Target: {TARGET * 1e6:.0f} µs under no_grad; {verdict}.",
    ]
    rows = _rows(found)
    if before is not None:
        lines.append(f"In parentheses: the same at commit {before['versions']['commit']}.")
        rows = [[name, *map(_beside, row, other)] for (name, *row), (_, *other) in zip(rows, _rows(before["seconds"]), strict=True)]
    title = heading("Host cost of a call", versions(), "python -m benchmarks host_cost")
    return "\n".join([*title, *lines, "", *table(["operation", *WAYS], rows)])


def _rows(found: Costs) -> list[list[str]]:
    return [[name, *(f"{seconds[way] * 1e6:.1f}" if way in seconds else "" for way in WAYS)] for name, seconds in found.items()]


def _beside(now: str, before: str) -> str:
    return f"{now} ({before})" if now else ""


def _nothing(*_: Any, **__: Any) -> None:
    """A launch; a mock would cost more than one."""


def _always(_: torch.Tensor) -> bool:
    return True
