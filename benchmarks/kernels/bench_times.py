"""Every operation of benchmarks/kernels/operations.py timed on this GPU: ours, every peer, and the floor measured in the same run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.clock import Clock, copy_rate, product_seconds
from benchmarks.kernels.floors import LAUNCH, Chip, Shape
from benchmarks.kernels.floors import OPERATIONS as WORK
from benchmarks.kernels.kernels_baselines import COMPILED, why
from benchmarks.kernels.operations import OPERATIONS, OURS, Contender, Operation, timed
from benchmarks.support.tables import table

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
    "the device, behind a read of 256 MB that empties the L2 cache and a sleep that hides the host's work; 5 to 100 runs, median",
    "(min..max).",
    "*back to back* is the time a call takes on the host's clock when calls follow each other. Memory is the peak on top of the inputs.",
    "Inputs, weights and layers are bfloat16, per-token columns float32; log-probs are of every row. Gradients are of all inputs that",
    "are trained. Floors are of this GPU in this run: bytes over the rate of a copy, products by torch.matmul at the same shape, timed",
    "right before and right after;",
    "where the floor is below a launch (3 µs), the ratio is to 3 µs. Launches are kernels, copies and fills; the clock is the SMs' in MHz",
    "after the runs.",
)


def measure(
    shapes: Sequence[Shape],
    device: torch.device,
    clock: Clock,
    peers: Peers,
    *,
    seconds: float = math.inf,
    save: Save = lambda _: None,
    known: Sequence[Row] = (),
) -> dict[str, Any]:
    """Times everything but what is `known` from an earlier run; after `seconds` what is left is named and not timed. `save` is handed each
    row, and the rate of a copy, as soon as they are there. Launches are counted in a last pass."""
    began = time.monotonic()
    memory = copy_rate(device, clock, _copied(device))
    save({"copy_bytes_per_s": memory})
    rows = [row for row in known if "timing" in row]
    done = {_key(row) for row in rows}
    turns = [turn for turn in _turns(shapes, peers) if (turn[1], turn[0].name, turn[2]) not in done]
    for shape, name, who, contender in turns:
        row: Row = {"shape": shape.name, "operation": name, "contender": who}
        if time.monotonic() - began > seconds:
            rows.append(row | {"error": "not measured: out of time"})
        else:
            rows.append(row | _row(name, contender, shape, device, clock, memory))
        save(rows[-1])
    for shape, name, who, contender in turns:
        if who == OURS and time.monotonic() - began <= seconds:
            row = {"shape": shape.name, "operation": name, "contender": who}
            save(row | {"launches": _launches(OPERATIONS[name], contender, shape, device, clock)})
    return {"copy_bytes_per_s": memory, "rows": rows}


def assembled(facts: Iterable[Row]) -> dict[str, Any]:
    """What `measure` returns, from the facts that it saved."""
    copied, rows = math.nan, dict[tuple[str, ...], Row]()
    for fact in facts:
        if "copy_bytes_per_s" in fact:
            copied = fact["copy_bytes_per_s"]
        elif "contender" in fact:
            key = _key(fact)
            rows[key] = (rows.get(key, {}) if "launches" in fact else {}) | fact
    return {"copy_bytes_per_s": copied, "rows": list(rows.values())}


def _key(row: Row) -> tuple[str, ...]:
    return row["operation"], row["shape"], row["contender"]


def _row(name: str, contender: Contender, shape: Shape, device: torch.device, clock: Clock, memory: float) -> Row:
    """The timing beside the floor. The products of an output layer are timed before and after it: a GPU's clock falls as it warms up."""
    if "linear" not in name:
        return _floor(name, shape, Chip(shape.name, memory, math.inf)) | _timed(OPERATIONS[name], contender, shape, device, clock)
    size = (shape.tokens, shape.hidden, shape.vocab // shape.tp)
    before = product_seconds(device, clock, *size)
    timing = _timed(OPERATIONS[name], contender, shape, device, clock)
    after = product_seconds(device, clock, *size)
    rate = 2 * 3 * 2 * math.prod(size) / (sum(before) + sum(after))
    return {"products": [before, after]} | _floor(name, shape, Chip(shape.name, memory, rate)) | timing


def _turns(shapes: Sequence[Shape], peers: Peers) -> list[tuple[Shape, str, str, Contender]]:
    """Who is measured, in order of worth: what a target speaks of, then ours, torch's, packages, which may take the device down, and last
    torch.compile, the slowest."""
    every = [
        (shape, name, who, contender)
        for shape in shapes
        for name, operation in OPERATIONS.items()
        for who, contender in {**operation.ours, **peers.get(name, {})}.items()
    ]
    return sorted(every, key=lambda turn: _worth(turn[0].name, turn[1], turn[2]))


def _worth(shape: str, name: str, who: str) -> int:
    judged = (name, shape) in {target[:2] for target in OF_FLOOR}
    if judged and who == OURS:
        return 0
    if judged and any((name, who) == target[:2] for target in FASTER):
        return 1
    return 5 if who == COMPILED else 2 if who == OURS else 3 if who.startswith((OURS, "torch", "F.")) else 4


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
        rows = [row for row in found["rows"] if row["shape"] == shape.name]
        lines += ["", f"### {shape.name}, {shape.tokens} tokens", "", *_products(shape, rows), *_table(rows), *_absent(rows)]
    return lines


def _products(shape: Shape, rows: Sequence[Row]) -> list[str]:
    """How fast the three products were, over all times that they were timed."""
    taken = [parts for row in rows for parts in row.get("products", ())]
    if not taken:
        return []
    rates = [6 * shape.tokens * shape.hidden * (shape.vocab // shape.tp) / sum(parts) / 1e12 for parts in taken]
    took = " + ".join(f"{median(part) * 1e3:.2f}" for part in zip(*taken, strict=True))
    return [
        f"The three products of the output layer take {took} ms by torch.matmul, {min(rates):.0f} to {max(rates):.0f} TFLOP/s.",
        "",
    ]


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


HEADER = ("operation", "who", "µs", "rate", "of floor", "ours is faster", "peak MiB", "back to back µs", "launches", "SM clock")


def _launches(operation: Operation, contender: Contender, shape: Shape, device: torch.device, clock: Clock) -> int | None:
    try:
        return clock.launches(timed(operation, contender, operation.draw(shape, device)))
    except Exception:  # it was timed, or why not was said
        return None


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
    return [
        row["operation"],
        row["contender"],
        *device,
        f"{timing['issued'] * 1e6:.0f}",
        str(row.get("launches") or ""),
        _clock(timing["gpu"]),
    ]


def _clock(gpu: Mapping[str, Any]) -> str:
    """MHz, and what held it down."""
    return f"{gpu['sm_mhz']} {', '.join(gpu['throttled'])}".strip() if "sm_mhz" in gpu else ""


def _absent(rows: Sequence[Row]) -> list[str]:
    """Who was not measured, and why; one line for those of one name and one reason."""
    operations: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "error" in row:
            operations.setdefault((row["contender"], row["error"]), []).append(row["operation"])
    lines = [f"- {who}: {reason} ({', '.join(names)})" for (who, reason), names in operations.items()]
    return ["", "Not measured:", "", *lines] if lines else []
