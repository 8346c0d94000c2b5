"""python -m benchmarks kernel_changes: Count the bytes and FLOPs saved by design changes of the kernels, and print docs/kernels.md.

The counts are made on meta tensors. "After" is counted from the current code, "before" from formulas for the earlier design, in this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels import floors
from benchmarks.kernels.floors import CHIPS, ROWS, SHAPES, Shape, reaches
from benchmarks.support.tables import table
from engine.dryrun.costs import MOVES_NOTHING, Call
from engine.dryrun.meter import Meter
from engine.dryrun.types import Work
from triton_kernels import linear_logprob, linear_policy_loss
from triton_kernels.decode_attention import SPAN
from triton_kernels.linear_logprob import Gradients, chunk_rows

BLOCK_BEFORE = 4096  # rows of every forward product, and of a chunk
SPAN_BEFORE = 256
META = torch.device("meta")
WANTED = 5000  # rows of a microbatch that is not a multiple of the block

PAGE = """# What the kernels move and multiply

Made by `python -m benchmarks kernel_changes`. Everything here is counted, on meta tensors, for one rank and one microbatch;
nothing was timed on a GPU. A floor is what cannot be avoided: the products of the wanted rows, every input read once and every
output written once. What the kernels compile to, their asynchronous copies among it:
[page](../benchmarks/results/kernels_aot_2026-11-26.md).

{table}

- **Output layer, 5,000 wanted rows.** Forward products are padded to whole blocks of one size, so that the log-prob of a row has
  the same bits whatever rows are beside it. A block was 4096 rows and is 1024. Gradients are not padded: the bits of a row's
  gradient may depend on how many rows there are. A chunk, whose statistics and gradients are computed at once, is 8192 rows where
  their fp32 logits take at most 1 GiB, else 4096.
- **Gradient of the output layer's weight.** It was a buffer of zeros, to which each chunk was added in fp32, then rounded to
  bfloat16. The first chunk now overwrites the buffer; if it is the only one, it is written in bfloat16. With an accumulator
  (`weight_grad`), which the engine passes, chunks are added to it as before.
- **Output layer without kept logits.** `linear_policy_loss` computes the gradient in forward, while a chunk's logits are there.
- **Decode attention.** A program that reads a span of keys and values leaves fp32 sums for a second pass; a span was 256 positions
  and is 512.
- **Predicted time.** Products at {matrix:.0f} TFLOP/s, then all bytes outside them at {memory:.1f} TB/s (an H100, see
  benchmarks/kernels/floors.py), without launches. A product is assumed to hide its own reads and writes.
"""


@dataclass(frozen=True)
class Change:
    what: str
    shape: str
    unit: str
    before: float
    after: float
    floor: float

    def cells(self) -> list[str]:
        ratios = (f"{value / self.floor:.3f}" for value in (self.before, self.after))
        return [f"{self.what}, {self.unit}", self.shape, *(f"{value:,.2f}" for value in (self.before, self.after, self.floor)), *ratios]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options."""


def main(arguments: argparse.Namespace) -> int:
    """Print docs/kernels.md."""
    print(page(), end="")
    return 0


def page() -> str:
    h100 = CHIPS[0]
    header = ["counted", "shape", "before", "after", "floor", "before / floor", "after / floor"]
    return PAGE.format(table="\n".join(table(header, (c.cells() for c in changes()))), matrix=h100.matrix / 1e12, memory=h100.memory / 1e12)


def changes() -> Iterator[Change]:
    """In the order of the page, for a whole vocabulary and for an eighth of it where results differ."""
    shapes = SHAPES["8b-tp1"], SHAPES["405b-tp8"]
    ragged = [replace(shape, tokens=WANTED) for shape in shapes]
    yield from (_products(shape, 1, "log-probs of 5,000 rows") for shape in ragged)
    yield from (_products(shape, 3, "log-probs and gradients of 5,000 rows") for shape in ragged)
    yield from (_weight_gradient(shape) for shape in shapes)
    yield _without_logits(shapes[0])
    yield from (_decoding(shape) for shape in shapes)
    yield from (_predicted(shape) for shape in shapes)


def _products(shape: Shape, products: int, what: str) -> Change:
    one = _one_product(shape)
    padded = one / shape.tokens * (-(-shape.tokens // BLOCK_BEFORE) * BLOCK_BEFORE)
    after = metered(shape, _forward if products == 1 else _saved).flops
    return Change(what, shape.name, "TFLOP", (padded + (products - 1) * one) / 1e12, after / 1e12, products * one / 1e12)


def _weight_gradient(shape: Shape) -> Change:
    weights = _weights(shape)
    before = weights * (4 + 8 * -(-shape.tokens // BLOCK_BEFORE) + 4 + 2)
    return Change("gradient of the weight", shape.name, "GB", before / 1e9, weight_gradient_bytes(shape) / 1e9, weights * 2 / 1e9)


def _without_logits(shape: Shape) -> Change:
    before, after = (metered(shape, loss).flops / 1e12 for loss in (_recomputed, _in_forward))
    return Change("loss and gradients, no logits kept", shape.name, "TFLOP", before, after, 3 * _one_product(shape) / 1e12)


def _decoding(shape: Shape) -> Change:
    floor = floors.OPERATIONS["decode_attention"](shape).bytes
    before, after = ((floor + _partial_sums(shape, span)) / 1e6 for span in (SPAN_BEFORE, SPAN))
    return Change(f"decode attention of {ROWS} rows", shape.name, "MB", before, after, floor / 1e6)


def _partial_sums(shape: Shape, span: int) -> int:
    """Bytes of partial results, written and read: per query head and span a sum of values, a maximum and a sum of weights, in fp32."""
    spans = sum(-(-reach // span) for reach in reaches())
    return 2 * spans * shape.heads // shape.tp * (shape.head_size + 2) * 4


def _predicted(shape: Shape) -> Change:
    h100, weights = CHIPS[0], _weights(shape)
    floor = 3 * _one_product(shape) / h100.matrix
    into_accumulator, after = metered(shape, _accumulated), metered(shape, _saved)
    before = into_accumulator.traffic + weights * (4 + 4 + 2)  # zero-filling and rounding
    seconds = [after.flops / h100.matrix + outside / h100.memory for outside in (before, after.traffic)]
    return Change("predicted time, 8192 rows", shape.name, "ms", *(1e3 * each for each in (*seconds, floor)))


def metered(shape: Shape, compute: Callable[[Tensor, Tensor, Tensor], Any]) -> Work:
    """The work of `compute` on hidden [tokens, D], weight [V, D] and targets, forward and backward."""
    hidden, weight = (_empty(rows, shape.hidden).requires_grad_() for rows in (shape.tokens, shape.vocab // shape.tp))
    with Meter(META, {}) as meter:
        out = compute(hidden, weight, torch.empty(shape.tokens, dtype=torch.int64, device=META))
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    return meter.taken()


def _forward(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, target, mode="nograd")[0]


def _saved(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, target)[0]


def _recomputed(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, target, mode="recompute")[0]


def _accumulated(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, target, weight_grad=_empty(*weight.shape, dtype=torch.float32))[0]


def _in_forward(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_policy_loss(hidden, weight, target, _empty(len(target), dtype=torch.float32))[0]


def weight_gradient_bytes(shape: Shape) -> int:
    """Bytes read and written of the gradient of the output layer's weight, until it is complete in the weight's dtype. Operands of the
    products are not counted."""
    hidden, weight = _empty(shape.tokens, shape.hidden), _empty(shape.vocab // shape.tp, shape.hidden)
    chunk = chunk_rows(len(weight))
    with Touched(weight.shape) as touched:
        gradients = Gradients(hidden, weight, None, False, True, chunk)
        for start in range(0, shape.tokens, chunk):
            part = slice(start, min(start + chunk, shape.tokens))
            gradients.add(part, _empty(part.stop - part.start, len(weight)))
        gradients.new_weight_grad()
    return touched.bytes


class Touched(TorchDispatchMode):
    """Counts bytes of tensors of one shape: when they are written, and when they are read for accumulation or conversion."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.bytes = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        call = Call.of(function, args, kwargs or {}, out, {})
        if not call.is_view and call.name not in MOVES_NOTHING:
            tensors = [*args[: call.name in ("addmm", "_to_copy")], out]
            self.bytes += sum(each.nbytes for each in tensors if each.shape == self.shape)
        return out


def _empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device=META)


def _weights(shape: Shape) -> int:
    return shape.vocab // shape.tp * shape.hidden


def _one_product(shape: Shape) -> int:
    return 2 * shape.tokens * _weights(shape)
