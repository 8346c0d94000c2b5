"""python -m benchmarks stage_changes: Predict time and memory of a Llama 3.1 405B pipeline stage with and without each optimization.

Each row simulates the stage's real code on meta tensors (engine/dryrun). To measure the stage without a change, the code that the change
replaced is patched in; it is below.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from benchmarks.support.tables import as_file, heading, table, versions
from engine.config import Optim, Parallel
from engine.dryrun.clock import CostModel
from engine.dryrun.hardware import Hardware
from engine.dryrun.model_shapes import SHAPES
from engine.dryrun.stages import simulate_stages
from engine.dryrun.types import Stage
from engine.megatron import attention, layer, model, overlap
from triton_kernels import rmsnorm, rope

MODEL, DEVICE, GPUS = "405b", "h100", 128
GRID = Parallel(8, 16, count_embedding=True, count_loss=True, tp_comm_overlap=True)
CEILINGS = (0.59, 0.65, 0.71)  # assumed share of the peak rate for matrix products; hardware.toml has 0.57
CASES = (
    ("none", 8192),
    ("swiglu", 8192),
    ("selective", 8192),
    ("none", 2048),
)  # recomputation, tokens per microbatch
COLUMNS = ("cumulative", "forward, ms", "backward, ms", "other traffic, GB", "kernels", "held, MB", "peak, MB")


class Change(NamedTuple):
    """A change that applies from its row on, and a context in which it is undone."""

    name: str
    without: Callable[[], AbstractContextManager[Any]]


def repeated(query: Tensor, key: Tensor, value: Tensor, packed_forward: attention.PackedForward) -> Tensor:
    """Attention with keys and values repeated to the number of query heads."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return attention._attention(query, key, value, list(packed_forward.lengths))[0]


def in_two_passes(*arguments: Any, **options: Any) -> Any:
    """The model config without fused accumulation: weight gradients are computed, then added."""
    config = BUILT(*arguments, **options)
    config.gradient_accumulation_fusion = False
    return config


BUILT = model.transformer_config


def add_then_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    """rmsnorm with a separate residual addition."""
    if residual is None:
        return rmsnorm(x, weight, eps)
    total = x + residual
    return rmsnorm(total, weight, eps), total


def separate_split_and_rope(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rope_qkv as a split in torch, two launches of rope and a copy of the values."""
    query, key, value = (part.flatten(1, 2) for part in qkv.split([qkv.shape[2] - 2, 1, 1], 2))
    return rope(query, cos, sin), rope(key, cos, sin), value.contiguous()


CHANGES = (
    Change("keys and values not repeated", lambda: mock.patch.object(attention, "attend_by_sequence", repeated)),
    Change("weight gradients accumulated in the GEMM", lambda: mock.patch.object(model, "transformer_config", in_two_passes)),
    Change("residual addition fused into the norms", lambda: mock.patch.object(layer, "rmsnorm", add_then_norm)),
    Change("QKV split and rope fused in one kernel", lambda: mock.patch.object(attention, "rope_qkv", separate_split_and_rope)),
    Change("tensor-parallel communication overlapped with GEMMs", lambda: mock.patch.object(overlap, "LEAST_ROWS", 1 << 40)),
)


@dataclass(frozen=True)
class Row:
    """A stage with the first changes applied and the others undone."""

    name: str
    stage: Stage
    parallel: Parallel

    def seconds(self, ceiling: float) -> tuple[float, float]:
        """Seconds of forward and backward of one microbatch if matrix products reach `ceiling` of the device's peak rate."""
        hardware = Hardware.load(DEVICE)
        clock = CostModel(replace(hardware, gemm=replace(hardware.gemm, ceiling=ceiling)), self.parallel, GPUS)
        return clock.seconds(self.stage.forward), clock.seconds(self.stage.backward)

    def mfu(self, ceiling: float, attention: bool) -> float:
        """FLOPs of three forward passes, with or without causal attention, over the FLOPs of the device's peak rate in that time."""
        flops = self.stage.inference.flops - (0 if attention else self.stage.inference.attention)
        return 3 * flops / Hardware.load(DEVICE).peak / sum(self.seconds(ceiling))


def rows(recompute: Any, tokens: int, changes: Sequence[Change] = CHANGES) -> list[Row]:
    """A row without any change, then a row for each additional change."""
    parallel = replace(GRID, recompute=recompute)
    result = []
    for count in range(len(changes) + 1):
        with ExitStack() as stack:
            for change in changes[count:]:
                stack.enter_context(change.without())
            stage = simulate_stages(SHAPES[MODEL], parallel, GPUS, (tokens,), optim=Optim(lr=1e-5))[1]
        result.append(Row(f"+ {changes[count - 1].name}" if count else "before", stage, parallel))
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="F", help="also write the page to this file")
    parser.add_argument("--json", type=Path, metavar="F", help="also write all results to this JSON file")


def main(arguments: argparse.Namespace) -> int:
    """Simulate every case and print the page."""
    cases = {case: rows(*case) for case in CASES}
    text = page(cases)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    facts = {f"{recompute} {tokens}": [as_facts(row) for row in found] for (recompute, tokens), found in cases.items()}
    as_file(arguments.json, {"versions": versions(), "device": DEVICE, "cases": facts})
    print(text)
    return 0


def as_facts(row: Row) -> dict[str, Any]:
    """Seconds, bytes and MFU."""
    stage, work = row.stage, row.stage.forward + row.stage.backward
    return {
        "name": row.name,
        "seconds": {ceiling: row.seconds(ceiling) for ceiling in CEILINGS},
        "mfu_products": {ceiling: row.mfu(ceiling, attention=False) for ceiling in CEILINGS},
        "mfu": {ceiling: row.mfu(ceiling, attention=True) for ceiling in CEILINGS},
        "traffic_bytes": work.traffic,
        "kernels": work.kernels,
        "held_bytes": stage.held,
        "peak_bytes": stage.peak,
    }


def page(cases: dict[tuple[str, int], list[Row]]) -> str:
    """Both tables of every case."""
    lines = heading("A stage of Llama 3.1 405B, change by change", versions(), "python -m benchmarks stage_changes --out PAGE --json FACTS")
    lines += [
        f"TP8, PP16, eight layers, one microbatch of one sequence, on {DEVICE.upper()}s. Predicted by the dry run from the numbers in",
        "engine/dryrun/hardware.toml; not measured on a GPU. Each row includes the changes of the rows above it.",
        "",
        "MFU: counting the products with weights only, and in brackets also causal attention, for three assumed shares of the peak rate",
        "that products reach. Times assume 0.59. Other traffic: all bytes except those of products and attention. Held: memory kept from a",
        "microbatch's forward to its backward; the first stage holds 16 microbatches. The first row uses torch's attention, because",
        "flash-attn never repeats keys and values. The last row is parallel.tp_comm_overlap=true, which is off by default. hardware.toml",
        "has a share of 0.57, fitted to a published run; the columns show the effect of higher shares.",
        "",
    ]
    for (recompute, tokens), found in cases.items():
        lines += [f"## {tokens} tokens, recomputed: {recompute}", "", *table(_header(), [_cells(row) for row in found]), ""]
    return "\n".join(lines)


def _header() -> tuple[str, ...]:
    return *COLUMNS, *(f"MFU at {ceiling}" for ceiling in CEILINGS)


def _cells(row: Row) -> list[str]:
    forward, backward = row.seconds(CEILINGS[0])
    work = row.stage.forward + row.stage.backward
    shares = [f"{row.mfu(ceiling, attention=False):.1%} ({row.mfu(ceiling, attention=True):.1%})" for ceiling in CEILINGS]
    sizes = (f"{row.stage.held / 1e6:,.0f}", f"{row.stage.peak / 1e6:,.0f}")
    return [row.name, f"{forward * 1e3:.1f}", f"{backward * 1e3:.1f}", f"{work.traffic / 1e9:.1f}", f"{work.kernels}", *sizes, *shares]
