"""Seconds on a machine: of a rank's work, of a collective, of a pipeline, of an optimizer step."""

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

# What a step says in a few bytes: how many tokens were counted (twice), the gradient's norm, metrics (twice, and to every stage).
SMALL_COLLECTIVES = 6
ACCUMULATED = 8  # bytes: an fp32 sum read and written
BUCKET = 40_000_000  # parameters of a bucket of gradients: megatron-core's, or a million a replica where that is more


class Parts(NamedTuple):
    """Where the seconds of a work go. They add up to `seconds` but for what is hidden."""

    products: float
    attention: float
    traffic: float
    launches: float
    waits: float  # collectives that computation waits for
    beside: float  # collectives that it does not
    dispatch: float  # what the host needs to launch it all
    seconds: float


@dataclass(frozen=True)
class Update:
    """One optimizer step, in seconds: the pipeline, what of the gradients' reduction goes on behind it, the optimizer itself."""

    timeline: Timeline
    reduction: float
    optimizer: float

    @property
    def seconds(self) -> float:
        return self.timeline.seconds + self.reduction + self.optimizer


@dataclass(frozen=True)
class CostModel:
    """Tells the time of works on `hardware`, on a grid of `world_size` ranks: tensor parallel ranks side by side, then data parallel ones,
    pipeline stages apart, as megatron-core places them."""

    hardware: Hardware
    parallel: Parallel
    world_size: int

    @cached_property
    def dp(self) -> int:
        return self.world_size // self.parallel.model_ranks

    def seconds(self, work: Work) -> float:
        """Of one rank, the work's collectives included."""
        return self.parts(work).seconds

    def parts(self, work: Work, host: float | None = None) -> Parts:
        """Computation, then what it waits for, then what of the collectives beside it was longer; or the host, where that is slower: `host`
        seconds, by default a dispatch a kernel."""
        hardware = self.hardware
        overlapped = [(times, self.product(each.matmul), self.overlapped(each)) for each, times in work.overlapped.items()]
        products = sum(times * self.product(matmul) for matmul, times in work.matmuls.items())
        products += sum(times * product for times, product, _ in overlapped)
        attention = work.attention / (hardware.peak * hardware.attention)
        traffic = work.traffic / (hardware.bandwidth * hardware.streaming)
        launches, dispatch = work.kernels * hardware.launch, work.kernels * hardware.dispatch if host is None else host
        waits = sum(times * self.collective(c) for c, times in work.collectives.items() if c.waits)
        waits += sum(times * (whole - product) for times, product, whole in overlapped)
        beside = sum(times * self.collective(c) for c, times in work.collectives.items() if not c.waits)
        computed = products + attention + traffic + launches
        device = computed + waits + max(0.0, beside - hardware.overlap * computed)
        return Parts(products, attention, traffic, launches, waits, beside, dispatch, max(device, dispatch))

    def product(self, matmul: Matmul) -> float:
        """Of one matrix product by its shape; hardware.toml says the formula and why. Its launch is not in it. Sums that it adds to are
        read and written while other tiles are multiplied: they cost time only where all its bytes take longer than its FLOPs."""
        hardware, (m, k, n, _) = self.hardware, matmul
        if not m * k * n:
            return 0.0
        flops = 2 * m * k * n / (hardware.peak * hardware.gemm.ceiling)
        shaped = flops * (1 + hardware.gemm.wave / (m * n)) * (1 + hardware.gemm.fill / k)
        return max(shaped, self._moved(matmul))

    def _moved(self, matmul: Matmul) -> float:
        """Of reading both matrices of a product and writing the third."""
        hardware, (m, k, n, accumulates) = self.hardware, matmul
        moved = hardware.width * (m * k + k * n) + (ACCUMULATED if accumulates else hardware.width) * m * n
        return moved / (hardware.bandwidth * hardware.streaming)

    def overlapped(self, each: Overlapped) -> float:
        """Of a product in one block per rank; all but one block are transferred while another is multiplied. PyTorch alternates blocks
        between two streams, so the next block fills the last wave of this one: one wave is lost, as in a whole product. Barriers cost a
        collective's latency and two steps per block."""
        ranks, _ = self._axis("tp")
        steps, bandwidth, latency = self._ring("tp")
        block = max(self.product(each.matmul) / ranks, self._moved(each.matmul._replace(m=each.matmul.m // ranks)))
        message = each.size / ranks / bandwidth
        return latency + 2 * steps + block + (ranks - 1) * max(block, message)

    def collective(self, collective: Collective) -> float:
        """Of a ring: every rank sends (n - 1) / n of the message, in n - 1 steps; twice as much and as many for an all_reduce."""
        ranks, _ = self._axis(collective.axis)
        if ranks == 1:
            return 0.0
        rounds = 2 if collective.kind == "all_reduce" else 1
        steps, bandwidth, latency = self._ring(collective.axis)
        return latency + rounds * (steps + (ranks - 1) / ranks * collective.size / bandwidth)

    def weight_sync(self, size: float, listeners: int, apart: bool) -> float:
        """Of `size` bytes that each rank of a replica tells as many `listeners` at its own place of theirs, which are in other nodes where
        `apart`: over its own adapter, and through memory as it is made one piece and taken to pieces again."""
        link = self.hardware.across if apart else self.hardware.inside
        copied = 4 * size / (self.hardware.bandwidth * self.hardware.streaming)
        return link.latency + listeners * link.step + size / link.bandwidth + copied

    def hop(self, size: float) -> float:
        """Of `size` bytes from a pipeline stage to the next: over the network, unless all stages are in one node."""
        ranks, stride = self._axis("pp")
        link = self.hardware.inside if ranks * stride <= self.hardware.node else self.hardware.across
        return link.message + size / link.bandwidth if ranks > 1 else 0.0

    def crosses_nodes(self, axis: Axis) -> bool:
        """Whether ranks that talk along `axis` are in different nodes."""
        ranks, stride = self._axis(axis)
        return ranks > 1 and ranks * stride > self.hardware.node

    def _axis(self, axis: Axis) -> tuple[int, int]:
        """How many ranks the axis has, and how far apart they are."""
        tp, pp = self.parallel.tp, self.parallel.pp
        return {"tp": (tp, 1), "dp": (self.dp, tp), "pp": (pp, tp * self.dp)}[axis]

    def _ring(self, axis: Axis) -> tuple[float, float, float]:
        """(seconds of one round's steps, bytes/s of a rank, latency). Ranks of one node leave it by as many adapters as they are."""
        ranks, stride = self._axis(axis)
        inside, across = self.hardware.inside, self.hardware.across
        if not self.crosses_nodes(axis):
            return (ranks - 1) * inside.step, inside.bandwidth, inside.latency
        together = min(ranks, max(1, self.hardware.node // stride))
        nodes = -(-ranks // together)
        steps = (nodes - 1) * across.step + (ranks - nodes) * inside.step
        return steps, min(inside.bandwidth, together * across.bandwidth), across.latency

    def forward(self, stages: Sequence[Stage], microbatches: int, message: float) -> Timeline:
        """Every microbatch forward through the pipeline, nothing kept. `message`: bytes between stages."""
        works = [[self.seconds(stage.inference) for stage in rank] for rank in by_rank(stages)]
        return simulate(works, works, microbatches, self.hop(message), forward_only=True)

    def update(self, stages: Sequence[Stage], microbatches: int, message: float) -> Update:
        """One optimizer step of `microbatches` a replica. Raises ValueError for virtual stages and microbatches that do not come round."""
        ranks = by_rank(stages)
        forward = [[self.seconds(stage.forward) for stage in rank] for rank in ranks]
        backward = [[self.seconds(stage.backward) for stage in rank] for rank in ranks]
        gather = [[self._gather(stage, time) for stage, time in zip(*pair, strict=True)] for pair in zip(ranks, forward, strict=True)]
        timeline = simulate(forward, backward, microbatches, self.hop(message), gather=gather)
        reduced = max(self._reduced(rank, timeline, microbatches) for rank in ranks)
        return Update(timeline, max(0.0, reduced - timeline.seconds), self._optimizer(ranks))

    def _gather(self, stage: Stage, forward: float) -> float:
        """How long the first forward waits for a sharded optimizer's parameters once they are asked for: for one bucket on the very first
        stage, whose others are hidden beside it as far as it goes; elsewhere megatron-core has but one bucket."""
        if not self.parallel.distributed_optimizer or self.dp == 1:
            return 0.0
        whole = self.collective(Collective("all_gather", "dp", stage.weights, True))
        if (stage.pp, stage.chunk) != (0, 0) or stage.parameters <= self._bucket:
            return whole
        bucket = whole * self._bucket / stage.parameters
        return bucket + max(0.0, whole - bucket - self.hardware.overlap * forward)

    @property
    def _bucket(self) -> int:
        return max(BUCKET, 1_000_000 * self.dp)

    def _reduced(self, stages: Sequence[Stage], timeline: Timeline, microbatches: int) -> float:
        """When a pipeline rank's gradients are summed over replicas: beside the very last backward on the first rank, behind each chunk's
        last elsewhere, one chunk at a time."""
        rank, done = stages[0].pp, 0.0
        for (kind, microbatch, chunk), start, end in timeline.ranks[rank]:
            if kind != "backward" or microbatch != microbatches - 1:
                continue
            kind = "reduce_scatter" if self.parallel.distributed_optimizer else "all_reduce"
            left = self.collective(Collective(kind, "dp", stages[chunk].gradients, True))
            if rank == 0 and len(stages) == 1:
                left = max(0.0, left - self.hardware.overlap * (end - start))
            done = max(done, end) + left
        return done

    def _optimizer(self, ranks: Sequence[Sequence[Stage]]) -> float:
        """One optimizer step, bound by memory bandwidth (optimizers.step_bytes), and its small collectives."""
        shares = self.dp if self.parallel.distributed_optimizer else 1
        moved = [sum(step_bytes(s.gradients, s.optimizer, s.weights, shares) for s in rank) for rank in ranks]
        told = max(self.collective(Collective("all_reduce", axis, 8, True)) for axis in ("tp", "pp", "dp"))
        return max(moved) / (self.hardware.bandwidth * self.hardware.streaming) + SMALL_COLLECTIVES * told


def by_rank(stages: Sequence[Stage]) -> list[list[Stage]]:
    """[pipeline rank][chunk]."""
    ranks = [sorted((s for s in stages if s.pp == rank), key=lambda s: s.chunk) for rank in range(1 + max(s.pp for s in stages))]
    assert len({len(rank) for rank in ranks}) == 1, "every pipeline rank has as many virtual stages as the others"
    return ranks
