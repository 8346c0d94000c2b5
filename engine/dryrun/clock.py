"""Predict seconds on given hardware: of a rank's compute, a collective, a pipeline pass and an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from engine.config import Parallel
from engine.dryrun.hardware import Hardware
from engine.dryrun.schedule import Timeline, simulate
from engine.dryrun.types import Collective, Matmul, Overlapped, Stage, Work
from engine.megatron.optimizers import step_bytes

Axis = Literal["tp", "pp", "dp"]

# Collectives of a few bytes per step: token count (two), gradient norm (one), metrics (two, and a broadcast to all stages).
SMALL_COLLECTIVES = 6
ACCUMULATED = 8  # bytes per element: an fp32 sum is read and written
BUCKET = 40_000_000  # megatron-core's default gradient bucket in parameters; at least a million per replica


class Parts(NamedTuple):
    """Predicted seconds of a Work by cause. The causes add up to `seconds`, except for overlapped time."""

    products: float
    attention: float
    traffic: float
    launches: float
    waits: float  # blocking collectives
    concurrent: float  # collectives that overlap with computation
    dispatch: float  # host time to launch all kernels
    seconds: float  # total


@dataclass(frozen=True)
class Update:
    """One optimizer step, in seconds: the pipeline, the part of the gradient reduction that is not overlapped with it, the optimizer."""

    timeline: Timeline
    reduction: float
    optimizer: float

    @property
    def seconds(self) -> float:
        return self.timeline.seconds + self.reduction + self.optimizer


@dataclass(frozen=True)
class CostModel:
    """Predicts the time of work on `hardware` and a grid of `world_size` ranks. Rank order is megatron-core's: consecutive ranks are tensor
    parallel, then data parallel, then pipeline stages."""

    hardware: Hardware
    parallel: Parallel
    world_size: int

    @cached_property
    def dp(self) -> int:
        return self.world_size // self.parallel.model_ranks

    def seconds(self, work: Work) -> float:
        """Seconds of `work` on one rank, its collectives included."""
        return self.parts(work).seconds

    def parts(self, work: Work, host: float | None = None) -> Parts:
        """Predict `work` by cause. The total is the device's time (computation, blocking collectives, and the part of the other collectives
        that computation does not hide), or the host's time if that is longer.

        host    host seconds; default: hardware.dispatch per kernel
        """
        hardware = self.hardware
        overlapped = [(times, self.product(each.matmul), self.overlapped(each)) for each, times in work.overlapped.items()]
        products = sum(times * self.product(matmul) for matmul, times in work.matmuls.items())
        products += sum(times * product for times, product, _ in overlapped)
        attention = work.attention / (hardware.peak * hardware.attention)
        traffic = work.traffic / (hardware.bandwidth * hardware.streaming)
        launches, dispatch = work.kernels * hardware.launch, work.kernels * hardware.dispatch if host is None else host
        waits = sum(times * self.collective(c) for c, times in work.collectives.items() if c.waits)
        waits += sum(times * (together - product) for times, product, together in overlapped)
        concurrent = sum(times * self.collective(c) for c, times in work.collectives.items() if not c.waits)
        computed = products + attention + traffic + launches
        device = computed + waits + max(0.0, concurrent - hardware.overlap * computed)
        return Parts(products, attention, traffic, launches, waits, concurrent, dispatch, max(device, dispatch))

    def product(self, matmul: Matmul) -> float:
        """Seconds of one matrix product, without its launch; the formula is in hardware.toml. Output that is accumulated into is read and
        written while other tiles are multiplied, so it costs time only if the product is bound by memory."""
        hardware, (m, k, n, _) = self.hardware, matmul
        if not m * k * n:
            return 0.0
        flops = 2 * m * k * n / (hardware.peak * hardware.gemm.ceiling)
        shaped = flops * (1 + hardware.gemm.wave / (m * n)) * (1 + hardware.gemm.fill / k)
        return max(shaped, self._moved(matmul))

    def _moved(self, matmul: Matmul) -> float:
        """Seconds to read both inputs of a product and write its output."""
        hardware, (m, k, n, accumulates) = self.hardware, matmul
        moved = hardware.width * (m * k + k * n) + (ACCUMULATED if accumulates else hardware.width) * m * n
        return moved / (hardware.bandwidth * hardware.streaming)

    def overlapped(self, each: Overlapped) -> float:
        """Seconds of a product split into one block per rank; all but one block are transferred while another is multiplied. PyTorch
        alternates blocks between two streams, so the next block fills the last wave of this one: one wave is lost, as in an unsplit
        product. Barriers cost a collective's latency and two steps per block."""
        ranks, _ = self._axis("tp")
        steps, bandwidth, latency = self._ring("tp")
        block = max(self.product(each.matmul) / ranks, self._moved(each.matmul._replace(m=each.matmul.m // ranks)))
        message = each.size / ranks / bandwidth
        return latency + 2 * steps + block + (ranks - 1) * max(block, message)

    def collective(self, collective: Collective) -> float:
        """Seconds of a ring collective: each of n ranks sends (n - 1) / n of the message in n - 1 steps; an all_reduce doubles both."""
        ranks, _ = self._axis(collective.axis)
        if ranks == 1:
            return 0.0
        rounds = 2 if collective.kind == "all_reduce" else 1
        steps, bandwidth, latency = self._ring(collective.axis)
        return latency + rounds * (steps + (ranks - 1) / ranks * collective.size / bandwidth)

    def weight_sync(self, size: float, listeners: int, apart: bool) -> float:
        """Seconds to send `size` bytes from each rank of one replica to the rank with the same tp and pp position in each of `listeners`
        replicas.

        Each rank uses its own network adapter if the receivers are in other nodes (`apart`). Packing and unpacking the bucket reads and
        writes memory twice.
        """
        link = self.hardware.across if apart else self.hardware.inside
        copied = 4 * size / (self.hardware.bandwidth * self.hardware.streaming)
        return link.latency + listeners * link.step + size / link.bandwidth + copied

    def hop(self, size: float) -> float:
        """Seconds to send `size` bytes to the next pipeline stage: over the network, unless all stages are in one node."""
        ranks, stride = self._axis("pp")
        link = self.hardware.inside if ranks * stride <= self.hardware.node else self.hardware.across
        return link.message + size / link.bandwidth if ranks > 1 else 0.0

    def crosses_nodes(self, axis: Axis) -> bool:
        """Whether the ranks of `axis` are in different nodes."""
        ranks, stride = self._axis(axis)
        return ranks > 1 and ranks * stride > self.hardware.node

    def _axis(self, axis: Axis) -> tuple[int, int]:
        """(number of ranks, stride between their global ranks)."""
        tp, pp = self.parallel.tp, self.parallel.pp
        return {"tp": (tp, 1), "dp": (self.dp, tp), "pp": (pp, tp * self.dp)}[axis]

    def _ring(self, axis: Axis) -> tuple[float, float, float]:
        """(seconds of one round's steps, bytes/s of a rank, latency in seconds). Each rank of a node sends through its own adapter."""
        ranks, stride = self._axis(axis)
        inside, across = self.hardware.inside, self.hardware.across
        if not self.crosses_nodes(axis):
            return (ranks - 1) * inside.step, inside.bandwidth, inside.latency
        together = min(ranks, max(1, self.hardware.node // stride))
        nodes = -(-ranks // together)
        steps = (nodes - 1) * across.step + (ranks - nodes) * inside.step
        return steps, min(inside.bandwidth, together * across.bandwidth), across.latency

    def forward(self, stages: Sequence[Stage], microbatches: int, message: float) -> Timeline:
        """Timeline of a forward pass of all microbatches without gradients. `message`: bytes sent between stages."""
        works = [[self.seconds(stage.inference) for stage in rank] for rank in by_rank(stages)]
        return simulate(works, works, microbatches, self.hop(message), forward_only=True)

    def update(self, stages: Sequence[Stage], microbatches: int, message: float) -> Update:
        """One optimizer step of `microbatches` per replica. `message`: bytes sent between stages. Raises ValueError if virtual stages are
        used and `microbatches` is not a multiple of pp."""
        ranks = by_rank(stages)
        forward = [[self.seconds(stage.forward) for stage in rank] for rank in ranks]
        backward = [[self.seconds(stage.backward) for stage in rank] for rank in ranks]
        gather = [[self._gather(stage, time) for stage, time in zip(*pair, strict=True)] for pair in zip(ranks, forward, strict=True)]
        timeline = simulate(forward, backward, microbatches, self.hop(message), gather=gather)
        reduced = max(self._reduced(rank, timeline, microbatches) for rank in ranks)
        return Update(timeline, max(0.0, reduced - timeline.seconds), self._optimizer(ranks))

    def _gather(self, stage: Stage, forward: float) -> float:
        """Seconds that a stage's first forward waits for the all-gather of its parameters (distributed optimizer).

        The first stage waits for one bucket; its other buckets overlap with the forward. megatron-core uses one bucket on all other stages.
        """
        if not self.parallel.distributed_optimizer or self.dp == 1:
            return 0.0
        total = self.collective(Collective("all_gather", "dp", stage.weights, True))
        if (stage.pp, stage.chunk) != (0, 0) or stage.parameters <= self._bucket:
            return total
        bucket = total * self._bucket / stage.parameters
        return bucket + max(0.0, total - bucket - self.hardware.overlap * forward)

    @property
    def _bucket(self) -> int:
        return max(BUCKET, 1_000_000 * self.dp)

    def _reduced(self, stages: Sequence[Stage], timeline: Timeline, microbatches: int) -> float:
        """Time at which the gradients of a pipeline rank are reduced over replicas. The reduction overlaps with the last backward on the
        first rank; elsewhere it follows the last backward of each chunk, one chunk at a time."""
        rank, done = stages[0].pp, 0.0
        for (kind, microbatch, chunk), start, end in timeline.ranks[rank]:
            if kind != "backward" or microbatch != microbatches - 1:
                continue
            kind = "reduce_scatter" if self.parallel.distributed_optimizer else "all_reduce"
            remaining = self.collective(Collective(kind, "dp", stages[chunk].gradients, True))
            if rank == 0 and len(stages) == 1:
                remaining = max(0.0, remaining - self.hardware.overlap * (end - start))
            done = max(done, end) + remaining
        return done

    def _optimizer(self, ranks: Sequence[Sequence[Stage]]) -> float:
        """Seconds of the optimizer, which is bound by memory bandwidth (optimizers.step_bytes), and of the step's small collectives."""
        shares = self.dp if self.parallel.distributed_optimizer else 1
        moved = [sum(step_bytes(s.gradients, s.optimizer, s.weights, shares) for s in rank) for rank in ranks]
        small = max(self.collective(Collective("all_reduce", axis, 8, True)) for axis in ("tp", "pp", "dp"))
        return max(moved) / (self.hardware.bandwidth * self.hardware.streaming) + SMALL_COLLECTIVES * small


def by_rank(stages: Sequence[Stage]) -> list[list[Stage]]:
    """[pipeline rank][chunk]."""
    ranks = [sorted((s for s in stages if s.pp == rank), key=lambda s: s.chunk) for rank in range(1 + max(s.pp for s in stages))]
    assert len({len(rank) for rank in ranks}) == 1, "all pipeline ranks have the same number of virtual stages"
    return ranks
