"""The least time a kernel's work can take: the bytes it cannot avoid moving and the products it cannot avoid, over what a chip sustains.

Counted for one rank: activations, logits and weights in bfloat16, statistics and per-token columns in float32, every tensor read or
written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ROWS = 256  # sequences sampled at a time
REACH = 2048  # positions that the longest of them looks back over; the others spread evenly below it
LAUNCH = 3e-6  # seconds; one launch takes 3 to 5 microseconds, so a shorter floor is not to be reached


@dataclass(frozen=True)
class Chip:
    """Bytes/s of device memory and dense bfloat16 FLOP/s: what is sustained, where `of` turns a data sheet's into that."""

    name: str
    memory: float
    matrix: float

    @staticmethod
    def of(name: str, memory: float, matrix: float) -> Chip:
        """From the data sheet, less what an H200 was measured to lose: 4.3 of its 4.8 TB/s (a copy) and 790 of its 989 TFLOP/s."""
        return Chip(name, memory * 4.3 / 4.8, matrix * 790 / 989)


CHIPS = (Chip.of("H100", 3.35e12, 989e12), Chip.of("H200", 4.8e12, 989e12), Chip.of("B200", 8.0e12, 2250e12))


@dataclass(frozen=True)
class Shape:
    """A model as one of `tp` tensor-parallel ranks sees it, and the tokens of a microbatch. Widths are the whole model's."""

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
    """Bytes moved and floating-point operations of matrix products."""

    bytes: float
    flops: float = 0.0

    def floor(self, chip: Chip) -> float:
        """Seconds on `chip`."""
        return max(self.bytes / chip.memory, self.flops / chip.matrix)

    def bound(self, chip: Chip) -> str:
        """What the time goes to on `chip`."""
        if self.floor(chip) < LAUNCH:
            return "launch"
        return "compute" if self.flops / chip.matrix > self.bytes / chip.memory else "memory"


def _norm(shape: Shape) -> Work:
    """Four tensors each way: x, residual, total and y; grad, grad of total, total and out. Ranks share the tokens (sequence parallel)."""
    tokens = shape.tokens // shape.tp
    return Work(4 * tokens * shape.hidden * 2 + tokens * 4 + shape.hidden * 2)


def _swiglu(widths: int) -> Callable[[Shape], Work]:
    return lambda shape: Work(widths * shape.tokens * shape.ffn // shape.tp * 2)


def _rope(shape: Shape) -> Work:
    """Queries and keys, each with its cos and sin."""
    turned = shape.tokens * (shape.heads + shape.kv_heads) // shape.tp * shape.head_size
    return Work(2 * turned * 2 + 2 * shape.tokens * shape.head_size * 2)


def _rope_qkv(shape: Shape) -> Work:
    """Queries, keys and values, each with its cos and sin: out of one product, or into its gradient."""
    heads = (shape.heads + 2 * shape.kv_heads) // shape.tp
    return Work(2 * shape.tokens * heads * shape.head_size * 2 + shape.tokens * shape.head_size * 2)


def _logprob(passes: int) -> Callable[[Shape], Work]:
    """`passes` over the logits, a target and three float32 results a row."""
    return lambda shape: Work(shape.tokens * (passes * shape.vocab // shape.tp * 2 + 8 + 12))


def _draw(shape: Shape) -> Work:
    """Float32 logits read once, for as many rows as sequences are sampled at a time; a key in, a token out."""
    return Work(ROWS * (shape.vocab // shape.tp * 4 + 8 + 8))


def reaches() -> list[int]:
    """Positions that each of the sequences sampled at a time looks back over."""
    return [REACH * (row + 1) // ROWS for row in range(ROWS)]


def _decode_attention(shape: Shape) -> Work:
    """The keys and values that are looked at; a query in and a result out. Two products of each pair of a query head and a position."""
    seen, heads = sum(reaches()), shape.heads // shape.tp
    cached = 2 * seen * shape.kv_heads // shape.tp * shape.head_size * 2
    return Work(cached + 2 * ROWS * heads * shape.head_size * 2, 4 * seen * heads * shape.head_size)


def _linear_logprob(products: int) -> Callable[[Shape], Work]:
    """`products` of [tokens, hidden] by [hidden, vocab]: operands read each way, gradients written, and no logits."""

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
