"""python -m benchmarks kernels: Time kernels against peers and lower bounds on a GPU; without one, compile them and report registers.

Without a GPU, the exit status is 1 if a kernel fails the checks of triton_kernels/aot.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import CudaClock
from benchmarks.gpu.facts import Facts, read
from benchmarks.kernels import bench_times
from benchmarks.kernels.floors import CHIPS, OPERATIONS, SHAPES, Shape
from benchmarks.kernels.kernels_baselines import PEERS
from benchmarks.support.tables import as_file, heading, table, versions
from triton_kernels import aot

Cell = Callable[[aot.AotReport], str]
COLUMNS: dict[str, Cell] = {
    "registers": lambda report: str(report.registers),
    "spilled bytes": lambda report: str(report.spill_bytes),
    "shared bytes": lambda report: str(report.shared),
    "128-bit loads": lambda report: str(report.vector_loads),
    "asynchronous": lambda report: str(report.async_copies),
    "matrix instructions": lambda report: ", ".join(report.matrix_instructions) or "none",
    "occupancy": lambda report: f"{report.occupancy:.0%}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="model and tensor-parallel size (default: all)")
    parser.add_argument("--json", type=Path, metavar="F", help="without a GPU: also write all results to this JSON file")
    parser.add_argument("--facts", type=Path, metavar="F", help="on a GPU: append results to this file, and skip those that are in it")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="on a GPU: start no measurement after this time (default: no limit)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Print the report as Markdown. Returns 1 if a kernel fails the checks."""
    shapes = [SHAPES[name] for name in arguments.shape]
    if torch.cuda.is_available():
        return _on_gpu(shapes, arguments.seconds, arguments.facts)
    reports = [[aot.compile_case(case, arch) for arch in case.archs] for case in aot.all_cases()]
    as_file(arguments.json, as_json(reports, shapes))
    print(page(reports, shapes))
    return int(any(report.faults for row in reports for report in row))


def _on_gpu(shapes: Sequence[Shape], seconds: float, file: Path | None) -> int:
    device, facts, known = torch.device("cuda"), Facts(file), read(file)
    facts.add({"versions": versions()})
    measured: list[dict[str, Any]] = []

    def save(fact: dict[str, Any]) -> None:
        facts.add(fact)
        measured.append(fact)

    bench_times.measure(shapes, device, CudaClock(device), PEERS, seconds=seconds, save=save, known=known)
    results = bench_times.assembled([*known, *measured])
    print("\n".join([*heading("Kernels on a GPU", versions(), "python -m benchmarks kernels"), *bench_times.page(results, shapes)]))
    return 0


def as_json(reports: Sequence[Sequence[aot.AotReport]], shapes: Iterable[Shape]) -> dict[str, Any]:
    """All numbers of the page. Floors are in seconds."""
    return {
        "versions": versions(),
        "compiled": [compiled(report) for row in reports for report in row],
        "floors": [
            {"shape": shape.name, "operation": name, "bytes": work.bytes, "flops": work.flops}
            | {"floor_s": {chip.name: work.floor(chip) for chip in CHIPS}, "bound": {chip.name: work.bound(chip) for chip in CHIPS}}
            for shape in shapes
            for name, work in ((name, count(shape)) for name, count in OPERATIONS.items())
        ],
    }


def compiled(report: aot.AotReport) -> dict[str, Any]:
    facts = ("arch", "registers", "spill_bytes", "shared", "vector_loads", "async_copies", "matrix_instructions", "occupancy", "faults")
    launch = {"name": report.case.name, "num_warps": report.case.num_warps, "num_stages": report.case.num_stages}
    return launch | {"constexprs": report.case.constexprs} | {fact: getattr(report, fact) for fact in facts}


def page(reports: Sequence[Sequence[aot.AotReport]], shapes: Iterable[Shape]) -> str:
    """The report as Markdown."""
    lines = [
        *heading("Kernels, compiled ahead of time", versions(), "python -m benchmarks kernels"),
        *_gate(reports),
        *_compiled(reports),
        *_sustained(),
    ]
    return "\n".join([*lines, *(line for shape in shapes for line in _floors(shape))])


def _gate(reports: Sequence[Sequence[aot.AotReport]]) -> list[str]:
    faults = [f"- {fault}" for row in reports for report in row for fault in report.faults]
    passed = f"All {sum(map(len, reports))} pass: no spills, shared memory within limits, 128-bit loads where rows are aligned,"
    passed += " asynchronous copies in kernels that prefetch."
    return ["## Checks", "", *(faults or [passed])]


def _compiled(reports: Sequence[Sequence[aot.AotReport]]) -> list[str]:
    archs = " / ".join(f"sm_{arch}" for arch in aot.CHIPS)
    return [
        "",
        "## Compilation",
        "",
        f"{archs}, or one number if all are equal. Registers and spilled bytes are per thread, shared memory per block. Occupancy is the",
        "share of a multiprocessor's warps that can be resident, limited by registers, shared memory and warps per block.",
        "",
        *table(["kernel", "warps", *COLUMNS], map(_compiled_row, reports)),
    ]


def _compiled_row(reports: Sequence[aot.AotReport]) -> list[str]:
    case = reports[0].case
    cells = [list(map(cell, reports)) for cell in COLUMNS.values()]
    return [case.name, str(case.num_warps), *(values[0] if len(set(values)) == 1 else " / ".join(values) for values in cells)]


def _sustained() -> list[str]:
    chips = "; ".join(f"{chip.name} {chip.memory / 1e12:.1f} TB/s, {chip.matrix / 1e12:.0f} TFLOP/s" for chip in CHIPS)
    return [
        "",
        "## Floors",
        "",
        "Lower bounds of the time in microseconds, and what limits it: memory traffic or matrix products, at the sustained rates of a chip",
        f"({chips}). The rates of the H200 are measured; those of the others are their data sheets' times the same efficiency. *launch*:",
        "less time than a launch.",
    ]


def _floors(shape: Shape) -> list[str]:
    rows = []
    for name, count in OPERATIONS.items():
        work = count(shape)
        cells = [f"{_microseconds(work.floor(chip))} {work.bound(chip)}" for chip in CHIPS]
        rows.append([name, f"{work.bytes / 1e6:.1f}", f"{work.flops / 1e9:.0f}", *cells])
    header = ["operation", "MB", "GFLOP", *(chip.name for chip in CHIPS)]
    return ["", f"### {shape.name}, {shape.tokens} tokens", "", *table(header, rows)]


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.2f}" if seconds < 1e-5 else f"{seconds * 1e6:.0f}"
