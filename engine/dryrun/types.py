"""Types of the simulator: compute and communication of one rank (Work), memory and cost of one pipeline stage (Stage)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Matmul(NamedTuple):
    """[m, k] @ [k, n], 2 m k n FLOPs."""

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

    matmul: Matmul  # of all blocks
    size: int  # bytes of the whole message


@dataclass
class Work:
    """Compute and communication of one rank in one part of a step. Works can be added."""

    matmuls: Counter[Matmul] = field(default_factory=Counter)
    attention: float = 0.0  # FLOPs of attention kernels, causal: masked pairs are not counted
    traffic: float = 0.0  # bytes read and written by all other kernels
    kernels: int = 0  # launched
    collectives: Counter[Collective] = field(default_factory=Counter)
    overlapped: Counter[Overlapped] = field(default_factory=Counter)  # products that are not in `matmuls`

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
    """One virtual stage of a pipeline rank, of one microbatch. Bytes are of one GPU."""

    pp: int  # pipeline rank
    chunk: int  # virtual stage of that rank
    layers: int
    parameters: int  # of this rank's shard
    weights: int  # bytes
    gradients: int
    optimizer: int  # master weights and moments, this replica's share
    forward: Work
    backward: Work  # recomputation included
    inference: Work  # a forward that keeps nothing
    held: int  # bytes kept from the forward to the backward of one microbatch
    peak: int  # bytes above what is held by earlier microbatches, at the worst moment of forward and backward; at least `held`
    inference_peak: int
