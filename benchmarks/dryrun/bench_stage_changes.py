"""python -m benchmarks stage_changes: a pipeline stage of Llama 3.1 405B with and without each change to the model path, as predicted.

Each row rehearses the stage's real code on meta tensors (engine/dryrun). "Without" puts back what a change replaced: the code of then, here
below, in the place of what is there now.
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
CEILINGS = (0.59, 0.65, 0.71)  # of products, which a run may find: hardware.toml has less
CASES = (
    ("none", 8192),
    ("swiglu", 8192),
    ("selective", 8192),
    ("none", 2048),
)  # what is recomputed, tokens of a microbatch
COLUMNS = ("cumulative", "forward, ms", "backward, ms", "other traffic, GB", "kernels", "held, MB", "peak, MB")


class Change(NamedTuple):
    """What the stage has from this row on, and how it is without."""

    name: str
    without: Callable[[], AbstractContextManager[Any]]


def repeated(query: Tensor, key: Tensor, value: Tensor, packed_forward: attention.PackedForward) -> Tensor:
    """Attention that is given as many heads of keys and values as of queries."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return attention._attention(query, key, value, list(packed_forward.lengths))[0]


def in_two_passes(*arguments: Any, **options: Any) -> Any:
    """The config of a model whose weight gradients are products first, and then added."""
    config = BUILT(*arguments, **options)
    config.gradient_accumulation_fusion = False
    return config


BUILT = model.transformer_config


def add_then_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    """rmsnorm, an addition before it made apart."""
    if residual is None:
        return rmsnorm(x, weight, eps)
    total = x + residual
    return rmsnorm(total, weight, eps), total


def taken_apart(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rope_qkv as torch's split, two launches and a copy of the values."""
    query, key, value = (part.flatten(1, 2) for part in qkv.split([qkv.shape[2] - 2, 1, 1], 2))
    return rope(query, cos, sin), rope(key, cos, sin), value.contiguous()


CHANGES = (
    Change("keys and values not repeated", lambda: mock.patch.object(attention, "attend_by_sequence", repeated)),
    Change("weight gradients added by the product", lambda: mock.patch.object(model, "transformer_config", in_two_passes)),
    Change("residuals added within the norms", lambda: mock.patch.object(layer, "rmsnorm", add_then_norm)),
    Change("one launch splits and turns the product", lambda: mock.patch.object(attention, "rope_qkv", taken_apart)),
    Change("tensor-parallel communication beside products", lambda: mock.patch.object(overlap, "LEAST_ROWS", 1 << 40)),
)


@dataclass(frozen=True)
class Row:
    """A stage with the first changes and without the others."""

    name: str
    stage: Stage
    parallel: Parallel

    def seconds(self, ceiling: float) -> tuple[float, float]:
        """Forward and backward of one microbatch, where products reach `ceiling` of the device's peak."""
        hardware = Hardware.load(DEVICE)
        clock = CostModel(replace(hardware, gemm=replace(hardware.gemm, ceiling=ceiling)), self.parallel, GPUS)
        return clock.seconds(self.stage.forward), clock.seconds(self.stage.backward)

    def mfu(self, ceiling: float, attention: bool) -> float:
        """Of three forwards' products, with those of causal attention or without, over what the device's peak does in that time."""
        flops = self.stage.inference.flops - (0 if attention else self.stage.inference.attention)
        return 3 * flops / Hardware.load(DEVICE).peak / sum(self.seconds(ceiling))


def rows(recompute: Any, tokens: int, changes: Sequence[Change] = CHANGES) -> list[Row]:
    """Without any change, and then with one more each."""
    parallel = replace(GRID, recompute=recompute)
    found = []
    for count in range(len(changes) + 1):
        with ExitStack() as stack:
            for change in changes[count:]:
                stack.enter_context(change.without())
            stage = simulate_stages(SHAPES[MODEL], parallel, GPUS, (tokens,), optim=Optim(lr=1e-5))[1]
        found.append(Row(f"+ {changes[count - 1].name}" if count else "before", stage, parallel))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument("--json", type=Path, help="the same for machines")


def main(arguments: argparse.Namespace) -> int:
    """Rehearse every case and print the page."""
    cases = {case: rows(*case) for case in CASES}
    text = page(cases)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    facts = {f"{recompute} {tokens}": [as_facts(row) for row in found] for (recompute, tokens), found in cases.items()}
    as_file(arguments.json, {"versions": versions(), "device": DEVICE, "cases": facts})
    print(text)
    return 0


def as_facts(row: Row) -> dict[str, Any]:
    """Seconds, bytes and shares."""
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
        "engine/dryrun/hardware.toml, not measured: no GPU has run this. Each row has the changes of the rows above it too.",
        "",
        "MFU: of the products with weights, and in brackets with those of causal attention too, by the share of the device's peak that",
        "products are assumed to reach. Times are at 0.59. Other traffic: all bytes but those of products and attention. Held: from a",
        "microbatch's forward to its backward; the first stage holds 16 microbatches. Before: with torch's attention, for flash-attn's",
        "never had keys and values repeated. The last row is parallel.tp_comm_overlap=true, which is off by default. hardware.toml",
        "has 0.57 for products, fitted to a published run; the columns show what higher shares would give.",
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
