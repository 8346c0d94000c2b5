"""Lower bounds ("floors") of kernel times: the minimum of bytes moved and of FLOPs, divided by the sustained rates of a chip.

Counted for one rank: activations, logits and weights in bfloat16, statistics and per-token columns in float32; every tensor is read or
written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ROWS = 256  # sequences decoded at a time
REACH = 2048  # context length of the longest of them; the others are spaced evenly below it
LAUNCH = 3e-6  # seconds; a launch takes 3 to 5 microseconds, so a lower floor cannot be reached


@dataclass(frozen=True)
class Chip:
    """Sustained bytes/s of device memory and dense bfloat16 FLOP/s. `of` derives them from a data sheet."""

    name: str
    memory: float
    matrix: float

    @staticmethod
    def of(name: str, memory: float, matrix: float) -> Chip:
        """Data-sheet rates times the efficiency measured on an H200: 4.3 of 4.8 TB/s (a copy) and 790 of 989 TFLOP/s."""
        return Chip(name, memory * 4.3 / 4.8, matrix * 790 / 989)


CHIPS = (Chip.of("H100", 3.35e12, 989e12), Chip.of("H200", 4.8e12, 989e12), Chip.of("B200", 8.0e12, 2250e12))


@dataclass(frozen=True)
class Shape:
    """A model, its tensor-parallel size `tp`, and the tokens of a microbatch. Widths are those of the whole model."""

    name: str
    hidden: int
    ffn: int
    heads: int
    tp: int
    kv_heads: int = 8
    head_size: int = 128
    vocab: int = 128256
    tokens: int = 8192


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("8b-tp1", hidden=4096, ffn=14336, heads=32, tp=1),
        Shape("70b-tp8", hidden=8192, ffn=28672, heads=64, tp=8),
        Shape("405b-tp8", hidden=16384, ffn=53248, heads=128, tp=8),
    )
}


@dataclass(frozen=True)
class Work:
    """Bytes moved, and FLOPs of matrix products."""

    bytes: float
    flops: float = 0.0

    def floor(self, chip: Chip) -> float:
        """Seconds on `chip`."""
        return max(self.bytes / chip.memory, self.flops / chip.matrix)

    def bound(self, chip: Chip) -> str:
        """What limits the time on `chip`: "launch", "compute" or "memory"."""
        if self.floor(chip) < LAUNCH:
            return "launch"
        return "compute" if self.flops / chip.matrix > self.bytes / chip.memory else "memory"


def _norm(shape: Shape) -> Work:
    """Four tensors in each direction: x, residual, total and y forward; grad, grad of total, total and out backward. Each rank has a share
    of the tokens (sequence parallel)."""
    tokens = shape.tokens // shape.tp
    return Work(4 * tokens * shape.hidden * 2 + tokens * 4 + shape.hidden * 2)


def _swiglu(widths: int) -> Callable[[Shape], Work]:
    return lambda shape: Work(widths * shape.tokens * shape.ffn // shape.tp * 2)


def _rope(shape: Shape) -> Work:
    """Queries and keys, each with its cos and sin."""
    rotated = shape.tokens * (shape.heads + shape.kv_heads) // shape.tp * shape.head_size
    return Work(2 * rotated * 2 + 2 * shape.tokens * shape.head_size * 2)


def _rope_qkv(shape: Shape) -> Work:
    """Queries, keys and values, with cos and sin, from the output of the QKV product, or into its gradient."""
    heads = (shape.heads + 2 * shape.kv_heads) // shape.tp
    return Work(2 * shape.tokens * heads * shape.head_size * 2 + shape.tokens * shape.head_size * 2)


def _logprob(passes: int) -> Callable[[Shape], Work]:
    """`passes` over the logits, and per row a target and three float32 results."""
    return lambda shape: Work(shape.tokens * (passes * shape.vocab // shape.tp * 2 + 8 + 12))


def _draw(shape: Shape) -> Work:
    """ROWS rows of float32 logits, read once; per row a key is read and a token written."""
    return Work(ROWS * (shape.vocab // shape.tp * 4 + 8 + 8))


def reaches() -> list[int]:
    """The context length of each sequence decoded at a time."""
    return [REACH * (row + 1) // ROWS for row in range(ROWS)]


def _decode_attention(shape: Shape) -> Work:
    """Cached keys and values are read, as well as queries; results are written. Two products per query head and position."""
    positions, heads = sum(reaches()), shape.heads // shape.tp
    cached = 2 * positions * shape.kv_heads // shape.tp * shape.head_size * 2
    return Work(cached + 2 * ROWS * heads * shape.head_size * 2, 4 * positions * heads * shape.head_size)


def _linear_logprob(products: int) -> Callable[[Shape], Work]:
    """`products` of [tokens, hidden] by [hidden, vocab]. Operands are read forward and backward, gradients are written, logits are not."""

    def work(shape: Shape) -> Work:
        vocab = shape.vocab // shape.tp
        operands = (shape.tokens + vocab) * shape.hidden * 2
        return Work(operands * (1 if products == 1 else 3), 2 * products * shape.tokens * shape.hidden * vocab)

    return work


def _per_token(size: int) -> Callable[[Shape], Work]:
    return lambda shape: Work(size * shape.tokens)


OPERATIONS: dict[str, Callable[[Shape], Work]] = {
    "rmsnorm forward fused": _norm,
    "rmsnorm backward fused": _norm,
    "swiglu forward": _swiglu(3),
    "swiglu backward": _swiglu(5),
    "rope": _rope,
    "rope_qkv forward": _rope_qkv,
    "rope_qkv backward": _rope_qkv,
    "logprob forward": _logprob(1),
    "logprob backward": _logprob(2),
    "logprob forward and backward": _logprob(3),
    "draw": _draw,
    "decode_attention": _decode_attention,
    "linear_logprob forward": _linear_logprob(1),
    "linear_logprob forward and backward": _linear_logprob(3),
    "linear_logprob forward and backward, recomputed": _linear_logprob(4),
    "dpo_norm": _per_token(13),  # log-prob, reference, a byte of mask; the gradient
    "ppo_loss": _per_token(24),  # five columns in, one gradient out
    "gae": _per_token(17),  # reward, value, a byte of mask; advantage, return
}
