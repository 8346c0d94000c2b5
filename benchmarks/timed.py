"""Every operation of benchmarks/operations.py timed on this GPU: ours, every peer, and the floor measured in the same run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.clock import Clock, copy_rate, product_seconds
from benchmarks.floors import LAUNCH, Chip, Shape
from benchmarks.floors import OPERATIONS as WORK
from benchmarks.operations import OPERATIONS, OURS, Contender, Operation, timed
from benchmarks.peers import COMPILED, why
from benchmarks.tables import table

OUTPUT_LAYER = "linear_logprob forward and backward"
OF_FLOOR = (  # (operation, shape, the most times the floor that we want to take)
    ("logprob forward", "8b-tp1", 1.15),
    ("logprob forward and backward", "8b-tp1", 1.25),
    (OUTPUT_LAYER, "8b-tp1", 1.12),
    (OUTPUT_LAYER, "405b-tp8", 1.06),
)
FASTER = ((OUTPUT_LAYER, "Liger", 3.0), (OUTPUT_LAYER, "F.linear_cross_entropy", 1.0))  # (operation, peer, at least so many times)

Peers = Mapping[str, Mapping[str, Contender]]
Row = dict[str, Any]
Save = Callable[[dict[str, Any]], None]

PROTOCOL = (
    "One process, one GPU. Inputs are drawn anew, from the same seed, for each contender. After a warm-up, every run is timed by events on",
    "the device, behind a write of 1 GiB that empties the L2 cache and hides the host's launching; 5 to 100 runs, median (min..max).",
    "*back to back* is the time a call takes on the host's clock when calls follow each other. Memory is the peak on top of the inputs.",
    "Inputs, weights and layers are bfloat16, per-token columns float32; log-probs are of every row. Gradients are of all inputs that",
    "are trained. Floors are of this GPU in this run: bytes over the rate of a copy, products by torch.matmul at the same shape;",
    "where the floor is below a launch (3 µs), the ratio is to 3 µs. Launches are the kernels, copies and fills of a call under 10 ms.",
)


def measure(
    shapes: Sequence[Shape], device: torch.device, clock: Clock, peers: Peers, *, seconds: float = math.inf, save: Save = lambda _: None
) -> dict[str, Any]:
    """Times everything; after `seconds` what is left is named and not timed. `save` is handed all there is after every operation."""
    began = time.monotonic()
    memory = copy_rate(device, clock, _copied(device))
    found: dict[str, Any] = {"copy_bytes_per_s": memory, "products": {}, "rows": []}
    chips: dict[str, Chip] = {}
    for shape in shapes:
        vocab = shape.vocab // shape.tp
        found["products"][shape.name] = parts = product_seconds(device, clock, shape.tokens, shape.hidden, vocab)
        chips[shape.name] = Chip(shape.name, memory, 3 * 2 * shape.tokens * shape.hidden * vocab / sum(parts))
    for shape, name, who, contender in _turns(shapes, peers):
        row: Row = {"shape": shape.name, "operation": name, "contender": who}
        if time.monotonic() - began > seconds:
            found["rows"].append(row | {"error": "not measured: out of time"})
            continue
        found["rows"].append(row | _floor(name, shape, chips[shape.name]) | _timed(OPERATIONS[name], contender, shape, device, clock))
        save(found)
    return found


def _turns(shapes: Sequence[Shape], peers: Peers) -> Iterator[tuple[Shape, str, str, Contender]]:
    """Who is measured when: ours and torch's first, then packages, which may take the device down, then torch.compile, the slowest."""
    for turn in range(3):
        for shape in shapes:
            for name, operation in OPERATIONS.items():
                for who, contender in {**operation.ours, **peers.get(name, {})}.items():
                    if _turn(who) == turn:
                        yield shape, name, who, contender


def _turn(who: str) -> int:
    return 2 if who == COMPILED else int(not who.startswith((OURS, "torch", "F.")))


def _copied(device: torch.device) -> int:
    """A size that fills a GPU and fits it."""
    if device.type != "cuda":
        return 1 << 20
    return min(2 << 30, torch.cuda.get_device_properties(device).total_memory // 8)


def _floor(name: str, shape: Shape, chip: Chip) -> Row:
    work = WORK[name](shape)
    return {"bytes": work.bytes, "flops": work.flops, "floor_s": work.floor(chip), "bound": work.bound(chip)}


def _timed(operation: Operation, contender: Contender, shape: Shape, device: torch.device, clock: Clock) -> Row:
    """The timing, or one line why there is none: a peer that fails is no reason to stop."""
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what others left in the allocator
        torch.manual_seed(0)
        timing = clock(timed(operation, contender, operation.draw(shape, device)))
    except Exception as error:
        return {"error": why(error)}
    return {"timing": asdict(timing)}


def page(found: Mapping[str, Any], shapes: Sequence[Shape]) -> list[str]:
    """The measurements as Markdown."""
    lines = [*PROTOCOL, "", f"A copy moves {found['copy_bytes_per_s'] / 1e12:.2f} TB/s, read and written.", "", *_verdicts(found["rows"])]
    for shape in shapes:
        parts = found["products"][shape.name]
        rate = 6 * shape.tokens * shape.hidden * (shape.vocab // shape.tp) / sum(parts)
        took = " + ".join(f"{seconds * 1e3:.2f}" for seconds in parts)
        said = f"The three products of the output layer take {took} ms by torch.matmul, {rate / 1e12:.0f} TFLOP/s."
        rows = [row for row in found["rows"] if row["shape"] == shape.name]
        lines += ["", f"### {shape.name}, {shape.tokens} tokens", "", said, "", *_table(rows), *_absent(rows)]
    return lines


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """How each target came out that this run can judge."""
    taken = {(row["operation"], row["shape"], row["contender"]): row for row in rows if "timing" in row}
    lines = []
    for operation, shape, most in OF_FLOOR:
        if row := taken.get((operation, shape, OURS)):
            lines.append(_verdict(f"{operation}, {shape}", "of the floor", _of_floor(row), most, _of_floor(row) <= most))
    for (operation, shape, who), row in taken.items():
        for judged, peer, least in FASTER:
            ours = taken.get((operation, shape, OURS))
            if ours and (operation, who) == (judged, peer):
                ratio = _seconds(row) / _seconds(ours)
                lines.append(_verdict(f"{operation}, {shape}", f"faster than {peer}", ratio, least, ratio >= least))
    return ["Targets:", "", *lines] if lines else []


def _verdict(what: str, how: str, found: float, wanted: float, met: bool) -> str:
    return f"- {what}: {found:.2f}x {how}, target {wanted:g}x: {'met' if met else 'MISSED'}"


def _seconds(row: Row) -> float:
    return row["timing"]["seconds"]["median"]


def _of_floor(row: Row) -> float:
    return _seconds(row) / max(row["floor_s"], LAUNCH)


HEADER = ("operation", "who", "µs", "rate", "of floor", "ours is faster", "peak MiB", "back to back µs", "launches")


def _table(rows: Sequence[Row]) -> list[str]:
    """By operation, in the order of OPERATIONS; our own first."""
    cells = []
    for name in OPERATIONS:
        measured = [row for row in rows if row["operation"] == name and "timing" in row]
        ours = next((_seconds(row) for row in measured if row["contender"] == OURS), math.nan)
        cells += [_cells(row, ours) for row in measured]
    return table(HEADER, cells)


def _cells(row: Row, ours: float) -> list[str]:
    timing, seconds = row["timing"], row["timing"]["seconds"]
    median, low, high = (seconds[name] * 1e6 for name in ("median", "low", "high"))
    rate = f"{row['flops'] / median / 1e6:.0f} TFLOP/s" if row["bound"] == "compute" else f"{row['bytes'] / median / 1e3:.0f} GB/s"
    faster = "" if row["contender"] == OURS else f"{_seconds(row) / ours:.2f}x"
    times = f"{median:.1f} ({low:.1f}..{high:.1f})"
    device = [times, rate, f"{_of_floor(row):.2f}x", faster, f"{timing['peak_bytes'] / 2**20:.0f}"]
    return [row["operation"], row["contender"], *device, f"{timing['issued'] * 1e6:.0f}", str(timing["launches"] or "")]


def _absent(rows: Sequence[Row]) -> list[str]:
    """Who was not measured, and why; one line for those of one name and one reason."""
    operations: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "error" in row:
            operations.setdefault((row["contender"], row["error"]), []).append(row["operation"])
    lines = [f"- {who}: {reason} ({', '.join(names)})" for (who, reason), names in operations.items()]
    return ["", "Not measured:", "", *lines] if lines else []
