"""python -m benchmarks host_cost: what one call of each kernel's function costs the host, with the launches left out.

Runs anywhere, on CPU tensors: everything up to a launch is Python and torch's own, and the launch itself is replaced by nothing. A GPU's
allocator may cost more or less than the CPU's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from benchmarks.floors import SHAPES
from benchmarks.operations import OPERATIONS, OURS, Operation
from benchmarks.tables import as_file, heading, table, versions

SMALL = replace(SHAPES["8b-tp1"], tokens=16, hidden=64, ffn=64, vocab=256)
ROUNDS, CALLS = 7, 300
TARGET = 15e-6  # seconds of a call without gradient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="F", help="also write everything to this file")


def main(arguments: argparse.Namespace) -> int:
    """Prints the table as Markdown."""
    torch.set_num_threads(1)
    with launches_left_out():
        found = {name: costs(operation) for name, operation in OPERATIONS.items() if "linear" not in name and operation.which != "backward"}
    as_file(arguments.json, {"versions": versions(), "seconds": found})
    print(page(found))
    return 0


@contextmanager
def launches_left_out() -> Iterator[None]:
    """Every function of triton_kernels takes the way of a GPU, and launches nothing."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("triton_kernels.") and hasattr(module, "launch") and name != "triton_kernels.launch":
                stack.enter_context(mock.patch.object(module, "launch", _nothing))
                if hasattr(module, "by_kernel"):
                    stack.enter_context(mock.patch.object(module, "by_kernel", _always))
        yield


def costs(operation: Operation) -> dict[str, float]:
    """Median seconds of a call: under no_grad; where the operation is trained, also with gradients wanted, and forward with backward."""
    call = operation.ours[OURS](tensors := operation.draw(SMALL, torch.device("cpu")))
    found = {"no_grad": _seconds(torch.no_grad()(call))}
    if operation.trained:
        leaves = [tensors[name].requires_grad_() for name in operation.trained]
        found["forward"] = _seconds(call)
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.ones_like(output) for output in outputs]
        found["forward and backward"] = _seconds(lambda: torch.autograd.grad(call(), leaves, upstream))
    return found


def _seconds(call: Callable[[], Any]) -> float:
    call()
    return median(_round(call) for _ in range(ROUNDS))


def _round(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS


def page(found: dict[str, dict[str, float]]) -> str:
    """The table, with the target of a call without gradient."""
    ways = ("no_grad", "forward", "forward and backward")
    rows = [[name, *(f"{seconds[way] * 1e6:.1f}" if way in seconds else "" for way in ways)] for name, seconds in found.items()]
    over = [name for name, seconds in found.items() if seconds["no_grad"] > TARGET]
    verdict = f"above the target of {TARGET * 1e6:.0f} µs without gradient: {', '.join(over)}" if over else "all within the target"
    lines = [
        f"Microseconds of the host for one call, its launches replaced by nothing; median of {ROUNDS} rounds of {CALLS} calls, one thread.",
        f"`rope` is two calls, of query and of key. Target: {TARGET * 1e6:.0f} µs under no_grad; {verdict}.",
    ]
    return "\n".join(
        [*heading("Host cost of a call", versions(), "python -m benchmarks host_cost"), *lines, "", *table(["operation", *ways], rows)]
    )


def _nothing(*_: Any, **__: Any) -> None:
    """A launch; a mock would cost more than one."""


def _always(_: torch.Tensor) -> bool:
    return True
