"""Times every operation of benchmarks/kernels/operations.py on this GPU: ours, the peers, and the lower bound measured in the same run."""

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
OF_FLOOR = (  # (operation, shape, target for our time divided by the lower bound)
    ("logprob forward", "8b-tp1", 1.15),
    ("logprob forward and backward", "8b-tp1", 1.25),
    (OUTPUT_LAYER, "8b-tp1", 1.12),
    (OUTPUT_LAYER, "405b-tp8", 1.06),
)
FASTER = ((OUTPUT_LAYER, "Liger", 3.0), (OUTPUT_LAYER, "F.linear_cross_entropy", 1.0))  # (operation, peer, target speedup)

Peers = Mapping[str, Mapping[str, Contender]]
Row = dict[str, Any]
Save = Callable[[dict[str, Any]], None]

PROTOCOL = (
    "One process, one GPU. Each contender gets new inputs from the same seed. After a warm-up, every run is timed with device events. A",
    "read of 256 MB before it empties the L2 cache, and a sleep hides the host's work. Times are median (min..max) of 5 to 100 runs. *back",
    "to back* is the host time per call of consecutive calls. Memory is the peak in addition to the inputs. Inputs, weights and",
    "activations are bfloat16, per-token columns float32. Log-probs are computed for all rows, gradients for all trained inputs. Floors",
    "are lower bounds measured on this GPU in this run: bytes over the rate of a copy, matrix products with torch.matmul at this shape,",
    "timed right before and right after. If a floor is below a launch (3 µs), the ratio is to 3 µs. Launches are kernels, copies and",
    "fills. The clock is that of the SMs in MHz after the runs.",
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
    """Times all contenders, except the rows in `known`, from an earlier run. After `seconds`, the others are listed as not measured. `save`
    is called with the copy rate and with each row as soon as it is measured. Launches are counted in a last pass."""
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
    """The result of `measure`, reconstructed from the facts that it saved."""
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
    """Timing and floor. For an output layer, its matrix products are timed before and after, because a GPU's clock falls as it warms up."""
    if "linear" not in name:
        return _floor(name, shape, Chip(shape.name, memory, math.inf)) | _timed(OPERATIONS[name], contender, shape, device, clock)
    size = (shape.tokens, shape.hidden, shape.vocab // shape.tp)
    before = product_seconds(device, clock, *size)
    timing = _timed(OPERATIONS[name], contender, shape, device, clock)
    after = product_seconds(device, clock, *size)
    rate = 2 * 3 * 2 * math.prod(size) / (sum(before) + sum(after))
    return {"products": [before, after]} | _floor(name, shape, Chip(shape.name, memory, rate)) | timing


def _turns(shapes: Sequence[Shape], peers: Peers) -> list[tuple[Shape, str, str, Contender]]:
    """All contenders in order of priority: those with a target, ours, torch's, then packages, which may crash the device, and torch.compile
    last, because it is the slowest."""
    every = [
        (shape, name, who, contender)
        for shape in shapes
        for name, operation in OPERATIONS.items()
        for who, contender in {**operation.ours, **peers.get(name, {})}.items()
    ]
    return sorted(every, key=lambda turn: _priority(turn[0].name, turn[1], turn[2]))


def _priority(shape: str, name: str, who: str) -> int:
    has_target = (name, shape) in {target[:2] for target in OF_FLOOR}
    if has_target and who == OURS:
        return 0
    if has_target and any((name, who) == target[:2] for target in FASTER):
        return 1
    return 5 if who == COMPILED else 2 if who == OURS else 3 if who.startswith((OURS, "torch", "F.")) else 4


def _copied(device: torch.device) -> int:
    """Bytes to copy: enough to saturate the GPU, and at most an eighth of its memory."""
    if device.type != "cuda":
        return 1 << 20
    return min(2 << 30, torch.cuda.get_device_properties(device).total_memory // 8)


def _floor(name: str, shape: Shape, chip: Chip) -> Row:
    work = WORK[name](shape)
    return {"bytes": work.bytes, "flops": work.flops, "floor_s": work.floor(chip), "bound": work.bound(chip)}


def _timed(operation: Operation, contender: Contender, shape: Shape, device: torch.device, clock: Clock) -> Row:
    """The timing, or the error in one line, so that the failure of a peer does not stop the run."""
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # memory of earlier contenders
        torch.manual_seed(0)
        timing = clock(timed(operation, contender, operation.draw(shape, device)))
    except Exception as error:
        return {"error": why(error)}
    return {"timing": asdict(timing)}


def page(results: Mapping[str, Any], shapes: Sequence[Shape]) -> list[str]:
    """The measurements as Markdown."""
    rate = results["copy_bytes_per_s"] / 1e12
    lines = [*PROTOCOL, "", f"A copy moves {rate:.2f} TB/s, counting reads and writes.", "", *_verdicts(results["rows"])]
    for shape in shapes:
        rows = [row for row in results["rows"] if row["shape"] == shape.name]
        lines += ["", f"### {shape.name}, {shape.tokens} tokens", "", *_products(shape, rows), *_table(rows), *_absent(rows)]
    return lines


def _products(shape: Shape, rows: Sequence[Row]) -> list[str]:
    """The speed of the three matrix products, over all their timings."""
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
    """A line per target whose contenders were measured."""
    measured = {(row["operation"], row["shape"], row["contender"]): row for row in rows if "timing" in row}
    lines = []
    for operation, shape, limit in OF_FLOOR:
        if row := measured.get((operation, shape, OURS)):
            lines.append(_verdict(f"{operation}, {shape}", "of the floor", _of_floor(row), limit, _of_floor(row) <= limit))
    for (operation, shape, who), row in measured.items():
        for target_operation, peer, speedup in FASTER:
            ours = measured.get((operation, shape, OURS))
            if ours and (operation, who) == (target_operation, peer):
                ratio = _seconds(row) / _seconds(ours)
                lines.append(_verdict(f"{operation}, {shape}", f"faster than {peer}", ratio, speedup, ratio >= speedup))
    return ["Targets:", "", *lines] if lines else []


def _verdict(what: str, unit: str, value: float, target: float, met: bool) -> str:
    return f"- {what}: {value:.2f}x {unit}, target {target:g}x: {'met' if met else 'MISSED'}"


def _seconds(row: Row) -> float:
    return row["timing"]["seconds"]["median"]


def _of_floor(row: Row) -> float:
    return _seconds(row) / max(row["floor_s"], LAUNCH)


HEADER = ("operation", "who", "µs", "rate", "of floor", "ours is faster", "peak MiB", "back to back µs", "launches", "SM clock")


def _launches(operation: Operation, contender: Contender, shape: Shape, device: torch.device, clock: Clock) -> int | None:
    try:
        return clock.launches(timed(operation, contender, operation.draw(shape, device)))
    except Exception:  # errors are reported by the timing
        return None


def _table(rows: Sequence[Row]) -> list[str]:
    """Rows in the order of OPERATIONS, ours first."""
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
    """MHz, and the reasons for throttling."""
    return f"{gpu['sm_mhz']} {', '.join(gpu['throttled'])}".strip() if "sm_mhz" in gpu else ""


def _absent(rows: Sequence[Row]) -> list[str]:
    """Contenders that were not measured: a line for each contender and reason."""
    operations: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "error" in row:
            operations.setdefault((row["contender"], row["error"]), []).append(row["operation"])
    lines = [f"- {who}: {reason} ({', '.join(names)})" for (who, reason), names in operations.items()]
    return ["", "Not measured:", "", *lines] if lines else []
