"""Types of the simulator: compute and communication of one rank (Work), memory and cost of one pipeline stage (Stage)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Matmul(NamedTuple):
    """Matrix product [m, k] @ [k, n], 2 m k n FLOPs."""

    m: int
    k: int
    n: int
    accumulates: bool = False  # accumulates into an fp32 output instead of writing the inputs' dtype


class Collective(NamedTuple):
    """One collective over the ranks of an axis. `size`: bytes of the full, unsharded tensor."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast"]
    axis: Literal["tp", "pp", "dp"]
    size: int
    waits: bool  # False: overlapped with computation


class Overlapped(NamedTuple):
    """A product overlapped with the all-gather of its rows or the reduce-scatter of its sums over tensor-parallel ranks, in one block per
    rank; see megatron/overlap.py."""

    matmul: Matmul  # shape of the unsplit product
    size: int  # bytes of the full message


@dataclass
class Work:
    """Compute and communication of one rank in one part of a step. Supports `+`."""

    matmuls: Counter[Matmul] = field(default_factory=Counter)
    attention: float = 0.0  # FLOPs of causal attention; masked pairs are not counted
    traffic: float = 0.0  # bytes read and written by all other kernels
    kernels: int = 0  # kernel launches
    collectives: Counter[Collective] = field(default_factory=Counter)
    overlapped: Counter[Overlapped] = field(default_factory=Counter)  # not included in `matmuls`

    @property
    def flops(self) -> float:
        """FLOPs of matrix products and attention."""
        products = [*self.matmuls.items(), *((each.matmul, times) for each, times in self.overlapped.items())]
        return self.attention + sum(2.0 * m * k * n * times for (m, k, n, _), times in products)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.matmuls + other.matmuls,
            self.attention + other.attention,
            self.traffic + other.traffic,
            self.kernels + other.kernels,
            self.collectives + other.collectives,
            self.overlapped + other.overlapped,
        )


@dataclass(frozen=True)
class Stage:
    """Memory and cost of one virtual stage of a pipeline rank for one microbatch, on one GPU."""

    pp: int  # pipeline rank
    chunk: int  # virtual stage of that rank
    layers: int
    parameters: int  # of this rank's shard
    weights: int  # bytes
    gradients: int
    optimizer: int  # master weights and moments, this replica's share
    forward: Work
    backward: Work  # recomputation included
    inference: Work  # a forward without gradients
    held: int  # bytes of activations kept from the forward to the backward of a microbatch
    peak: int  # largest bytes during forward or backward, without what earlier microbatches hold; at least `held`
    inference_peak: int  # largest bytes during inference
