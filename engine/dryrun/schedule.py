"""Simulate megatron-core's pipeline schedules: the order of operations on each rank, and when each starts and ends.

The schedules are 1F1B (one forward, one backward; arXiv 2104.04473, section 2.2), interleaved 1F1B with several virtual stages per rank
(section 2.3), and forward only. A rank executes its operations in order, each as soon as its input has arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward"]


class PipelineOp(NamedTuple):
    """The forward or the backward of one microbatch in one virtual stage (chunk) of a pipeline rank."""

    kind: Kind
    microbatch: int
    chunk: int


class TimedOp(NamedTuple):
    """A pipeline operation with its start and end, in seconds from the start of the pipeline."""

    piece: PipelineOp
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Timed operations of all pipeline ranks: ranks[pp], in order of time."""

    ranks: tuple[tuple[TimedOp, ...], ...]

    @property
    def seconds(self) -> float:
        """Seconds until the last rank has finished."""
        return max(ops[-1].end for ops in self.ranks)

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds of computation of each rank."""
        return tuple(sum(op.end - op.start for op in ops) for ops in self.ranks)

    @property
    def bubble(self) -> float:
        """Share of the ranks' total time in which they are idle, in [0, 1]."""
        return 1 - sum(self.busy) / (len(self.ranks) * self.seconds)

    def most_held(self, rank: int, held: Sequence[float], peak: Sequence[float] | None = None) -> float:
        """Peak memory of `rank`, in the units of `held`.

        held    held[c]: kept from the forward to the backward of a microbatch in chunk c
        peak    peak[c]: used while a forward or backward of chunk c runs, its own held[c] included; default: held[c]
        """
        most = now = 0.0
        for (kind, _, chunk), _, _ in self.ranks[rank]:
            others = now if kind == "forward" else now - held[chunk]
            most = max(most, others + held[chunk] if peak is None else others + peak[chunk])
            now = others + held[chunk] if kind == "forward" else others
        return most


def order(pp: int, vpp: int, microbatches: int, rank: int, *, forward_only: bool = False) -> list[PipelineOp]:
    """Return the operations of `rank` in megatron-core's order: warm-up forwards, then alternating forwards and backwards, then the
    remaining backwards.

    Raises ValueError if vpp > 1 and `microbatches` is not a multiple of pp.
    """
    check(pp, vpp, microbatches)
    # Virtual stages alternate in groups of pp microbatches: the first of a group arrives for the next chunk just as the last has left.
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
    """Raise ValueError unless `microbatches` can run on pp pipeline ranks with vpp virtual stages each."""
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
    """Simulate a pipeline and return its timeline. All times are in seconds.

    forward, backward  [rank][chunk]: of one microbatch
    hop                of a message between ranks; both ranks can compute meanwhile
    gather             [rank][chunk]: of the all-gather of a chunk's weights, which its first forward waits for; one chunk at a time

    If all operations take the same time and hop is 0, the bubble is (pp - 1) / (vpp * microbatches + pp - 1). Raises ValueError as `order`
    does.
    """
    pp, vpp = len(forward), len(forward[0])
    seconds = [{"forward": forward[rank], "backward": backward[rank]} for rank in range(pp)]
    todo = [order(pp, vpp, microbatches, rank, forward_only=forward_only) for rank in range(pp)]
    ranks: list[list[TimedOp]] = [[] for _ in range(pp)]
    ended: dict[tuple[int, PipelineOp], float] = {}
    gathered = [0.0] * pp  # when the last all-gather of each rank has finished
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
                gathered[rank] = max(gathered[rank], _gather_start(ops, rank, piece.chunk, pp)) + gather[rank][piece.chunk]
                now = max(now, gathered[rank])
            start, now = now, now + seconds[rank][piece.kind][piece.chunk]
            ended[rank, piece] = now
            ops.append(TimedOp(piece, start, now))
        if len(ops) > before:
            ready = [*{*ready, (rank + 1) % pp, (rank - 1) % pp} - {rank}]
    assert all(len(ops) == len(pieces) for ops, pieces in zip(ranks, todo, strict=True)), "the schedule has a deadlock"
    return Timeline(tuple(tuple(ops) for ops in ranks))


def _gather_start(ops: list[TimedOp], rank: int, chunk: int, pp: int) -> float:
    """Time at which a rank starts to gather the weights of `chunk`, as in megatron-core: 0 for the first two chunks; for a later chunk,
    `rank` operations before the first microbatch of the chunk before, which is at about the same time on all ranks."""
    return 0.0 if chunk < 2 else ops[(chunk - 1) * pp - rank].start


def _needs(rank: int, piece: PipelineOp, pp: int, vpp: int) -> tuple[int, PipelineOp] | None:
    """(rank, operation) that must end before `piece` can start; None if there is none."""
    kind, microbatch, chunk = piece
    stage = chunk * pp + rank
    if kind == "backward" and stage == pp * vpp - 1:
        return rank, PipelineOp("forward", microbatch, chunk)
    before = stage - 1 if kind == "forward" else stage + 1
    return None if before < 0 else (before % pp, PipelineOp(kind, microbatch, before // pp))
