"""The order in which megatron-core's schedules run a pipeline's microbatches, and when each piece starts and ends.

One forward, one backward (1F1B; arXiv 2104.04473, section 2.2), its interleaved form with several virtual stages a rank (the same paper,
section 2.3), and forward only. A rank does its pieces in order, each as soon as what it needs has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward"]


class PipelineOp(NamedTuple):
    """One microbatch through one virtual stage (a chunk) of one pipeline rank, one way."""

    kind: Kind
    microbatch: int
    chunk: int


class TimedOp(NamedTuple):
    """A piece in time, in seconds from the start of the pipeline."""

    piece: PipelineOp
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What every pipeline rank does when: `ranks[pp]` in order of time."""

    ranks: tuple[tuple[TimedOp, ...], ...]

    @property
    def seconds(self) -> float:
        """Until the last rank is done."""
        return max(ops[-1].end for ops in self.ranks)

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds that each rank computes."""
        return tuple(sum(op.end - op.start for op in ops) for ops in self.ranks)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they wait."""
        return 1 - sum(self.busy) / (len(self.ranks) * self.seconds)

    def most_held(self, rank: int, held: Sequence[float], peak: Sequence[float] | None = None) -> float:
        """The most that `rank` holds at once, where a microbatch of chunk c leaves held[c] behind from its forward to its backward. With
        peak[c], what a forward or a backward of chunk c needs while it runs, its own held[c] included, counts too."""
        worst = now = 0.0
        for (kind, _, chunk), _, _ in self.ranks[rank]:
            others = now if kind == "forward" else now - held[chunk]
            worst = max(worst, others + held[chunk] if peak is None else others + peak[chunk])
            now = others + held[chunk] if kind == "forward" else others
        return worst


def order(pp: int, vpp: int, microbatches: int, rank: int, *, forward_only: bool = False) -> list[PipelineOp]:
    """What `rank` of `pp` does, in megatron-core's order: forwards to warm up, then one forward and one backward by turns, then the
    backwards that are left.

    Raises ValueError for virtual stages and a number of microbatches that is no multiple of pp.
    """
    check(pp, vpp, microbatches)
    # Virtual stages take turns by groups of pp microbatches: the first of a group comes round just as the last has left.
    group = pp if vpp > 1 else microbatches
    table = [
        (microbatch, chunk) for first in range(0, microbatches, group) for chunk in range(vpp) for microbatch in range(first, first + group)
    ]
    forwards = [PipelineOp("forward", *entry) for entry in table]
    if forward_only:
        return forwards
    backwards = [PipelineOp("backward", microbatch, vpp - 1 - chunk) for microbatch, chunk in table]
    warmup = min(len(table), 2 * (pp - 1 - rank) + (vpp - 1) * pp if vpp > 1 else pp - 1 - rank)
    steady = [piece for pair in zip(forwards[warmup:], backwards, strict=False) for piece in pair]
    return forwards[:warmup] + steady + backwards[len(table) - warmup :]


def check(pp: int, vpp: int, microbatches: int) -> None:
    """Raise ValueError unless `microbatches` can be run on pp stages of vpp virtual ones."""
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches} must be at least 1")
    if vpp > 1 and microbatches % pp:
        near = " or ".join(str(n) for n in (microbatches // pp * pp, -(-microbatches // pp) * pp) if n)
        raise ValueError(
            f"microbatches={microbatches} must be a multiple of parallel.pp={pp} with parallel.vpp={vpp}; use {near} microbatches, or vpp=1"
        )


def simulate(
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    microbatches: int,
    hop: float = 0.0,
    *,
    gather: Sequence[Sequence[float]] | None = None,
    forward_only: bool = False,
) -> Timeline:
    """The timeline of a pipeline whose rank r takes forward[r][c] and backward[r][c] seconds for a microbatch of chunk c, and whose
    messages between ranks take `hop` seconds, during which both compute. The first forward of a chunk waits until its weights have come:
    gather[r][c] seconds from when they are asked for, one chunk at a time.

    Where all pieces take equally long and hop is 0, the bubble is (pp - 1) / (vpp * microbatches + pp - 1). Raises ValueError as `order`.
    """
    pp, vpp = len(forward), len(forward[0])
    seconds = [{"forward": forward[rank], "backward": backward[rank]} for rank in range(pp)]
    todo = [order(pp, vpp, microbatches, rank, forward_only=forward_only) for rank in range(pp)]
    ranks: list[list[TimedOp]] = [[] for _ in range(pp)]
    ended: dict[tuple[int, PipelineOp], float] = {}
    come = [0.0] * pp  # when the weights that each rank asked for last are there
    ready = list(range(pp))
    while ready:
        rank = ready.pop()
        ops, before = ranks[rank], len(ranks[rank])
        now = ops[-1].end if ops else 0.0
        while len(ops) < len(todo[rank]):
            piece = todo[rank][len(ops)]
            if (need := _needs(rank, piece, pp, vpp)) is not None:
                if need not in ended:
                    break
                now = max(now, ended[need] + (hop if need[0] != rank else 0.0))
            if gather is not None and piece.kind == "forward" and piece.microbatch == 0:
                come[rank] = max(come[rank], _asked(ops, rank, piece.chunk, pp)) + gather[rank][piece.chunk]
                now = max(now, come[rank])
            start, now = now, now + seconds[rank][piece.kind][piece.chunk]
            ended[rank, piece] = now
            ops.append(TimedOp(piece, start, now))
        if len(ops) > before:
            ready = [*{*ready, (rank + 1) % pp, (rank - 1) % pp} - {rank}]
    assert all(len(ops) == len(pieces) for ops, pieces in zip(ranks, todo, strict=True)), "the schedule waits for itself"
    return Timeline(tuple(tuple(ops) for ops in ranks))


def _asked(ops: list[TimedOp], rank: int, chunk: int, pp: int) -> float:
    """When a rank asks for the weights of `chunk`, as megatron-core does: of the first two at the start, of another when the pipeline's
    last rank takes its first microbatch of the chunk before, which is that many microbatches earlier on the others."""
    return 0.0 if chunk < 2 else ops[(chunk - 1) * pp - rank].start


def _needs(rank: int, piece: PipelineOp, pp: int, vpp: int) -> tuple[int, PipelineOp] | None:
    """Which piece of which rank must have ended before `piece` can start; None for what needs nobody."""
    kind, microbatch, chunk = piece
    stage = chunk * pp + rank
    if kind == "backward" and stage == pp * vpp - 1:
        return rank, PipelineOp("forward", microbatch, chunk)
    before = stage - 1 if kind == "forward" else stage + 1
    return None if before < 0 else (before % pp, PipelineOp(kind, microbatch, before // pp))
