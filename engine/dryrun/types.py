"""The nouns of the dry run: what a rank computes and says (Work), and what a piece of a pipeline holds and costs (Stage)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Matmul(NamedTuple):
    """[m, k] @ [k, n], 2 m k n FLOPs."""

    m: int
    k: int
    n: int
    accumulates: bool = False  # adds to fp32 numbers that are there, instead of writing in the matrices' type


class Collective(NamedTuple):
    """One call to the other ranks of an axis. `size`: bytes of the whole message, as the rank that has all of it holds it."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast"]
    axis: Literal["tp", "pp", "dp"]
    size: int
    waits: bool  # False: computation goes on beside it


class Overlapped(NamedTuple):
    """A product overlapped with the all-gather of its rows or the reduce-scatter of its sums over tensor-parallel ranks, in one block per
    rank; see megatron/overlap.py."""

    matmul: Matmul  # of all blocks
    size: int  # bytes of the whole message


@dataclass
class Work:
    """What one rank does in one piece of a step. Sums of works are works."""

    matmuls: Counter[Matmul] = field(default_factory=Counter)
    attention: float = 0.0  # FLOPs of attention kernels, causal: pairs that are masked cost nothing
    traffic: float = 0.0  # bytes that everything which is no matrix product or attention reads and writes
    kernels: int = 0  # launched
    collectives: Counter[Collective] = field(default_factory=Counter)
    overlapped: Counter[Overlapped] = field(default_factory=Counter)  # products that are not in `matmuls`

    @property
    def flops(self) -> float:
        """Of matrix products and attention."""
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
