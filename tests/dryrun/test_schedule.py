"""The simulated schedules equal megatron-core's, and satisfy known formulas."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from engine.dryrun.schedule import PipelineOp, Timeline, order, simulate

GRIDS = [(1, 1, 4), (4, 1, 4), (16, 1, 32), (4, 2, 8), (8, 2, 8), (16, 8, 16), (2, 4, 6)]


def uniform(pp: int, vpp: int, microbatches: int, hop: float = 0.0, **options: Any) -> Timeline:
    return simulate([[1 / vpp] * vpp] * pp, [[2 / vpp] * vpp] * pp, microbatches, hop, **options)


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), GRIDS)
def test_the_bubble_of_equal_stages_equals_the_formula(pp: int, vpp: int, microbatches: int) -> None:
    timeline = uniform(pp, vpp, microbatches)
    assert timeline.bubble == pytest.approx((pp - 1) / (vpp * microbatches + pp - 1), abs=1e-12)
    assert timeline.busy == pytest.approx([3 * microbatches] * pp, abs=1e-9)


@pytest.mark.parametrize(("pp", "microbatches"), [(1, 3), (4, 8), (16, 64)])
def test_forward_only_takes_m_plus_p_minus_1(pp: int, microbatches: int) -> None:
    assert uniform(pp, 1, microbatches, forward_only=True).seconds == pytest.approx(microbatches + pp - 1, abs=1e-12)


def test_forward_only_of_virtual_stages_takes_m_plus_a_part_of_p_minus_1() -> None:
    assert uniform(4, 2, 8, forward_only=True).seconds == pytest.approx(8 + 3 / 2, abs=1e-12)


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), GRIDS)
@pytest.mark.parametrize("forward_only", [False, True])
def test_the_order_equals_megatrons(pp: int, vpp: int, microbatches: int, forward_only: bool) -> None:
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    table = schedules.get_schedule_table(microbatches, vpp, pp if vpp > 1 else microbatches)
    for rank in range(pp):
        group = SimpleNamespace(size=lambda: pp, rank=lambda rank=rank: rank)
        peers = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None)
        total, _, warmup, left = schedules.get_pp_rank_microbatches(microbatches, vpp, pp, forward_only, p2p_communicator=peers)
        pieces = order(pp, vpp, microbatches, rank, forward_only=forward_only)
        forwards = [(p.microbatch, p.chunk) for p in pieces if p.kind == "forward"]
        backwards = [(p.microbatch, p.chunk) for p in pieces if p.kind == "backward"]
        assert forwards == table
        assert len(table) == total
        assert backwards == ([] if forward_only else [(m, vpp - 1 - c) for m, c in table])
        kinds = "".join(p.kind[0] for p in pieces)
        assert kinds == "f" * warmup + "fb" * left + ("" if forward_only else "b" * warmup)


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), GRIDS)
def test_operations_start_after_their_dependencies(pp: int, vpp: int, microbatches: int) -> None:
    hop = 0.25
    timeline = simulate([[1.0 + r + c for c in range(vpp)] for r in range(pp)], [[2.0] * vpp] * pp, microbatches, hop)
    ops = {(rank, op.piece): op for rank, done in enumerate(timeline.ranks) for op in done}
    assert len(ops) == 2 * pp * vpp * microbatches
    for (rank, (kind, microbatch, chunk)), op in ops.items():
        stage, step = chunk * pp + rank, -1 if kind == "forward" else 1
        if 0 <= stage + step < pp * vpp:
            before = ops[(stage + step) % pp, PipelineOp(kind, microbatch, (stage + step) // pp)]
            assert op.start >= before.end + (hop if pp > 1 else 0) - 1e-12
    for done in timeline.ranks:
        assert all(a.end <= b.start + 1e-12 for a, b in pairwise(done))


def test_a_slow_stage_paces_the_pipeline() -> None:
    slow = simulate([[1.0], [1.5], [1.0]], [[2.0], [3.0], [2.0]], 100)
    assert slow.seconds == pytest.approx(1 + 100 * 4.5 + 1.5 + 2, abs=1e-9)  # one forward, one wait for the last rank, one backward
    assert uniform(4, 1, 8, hop=0.1).seconds > uniform(4, 1, 8).seconds + 6 * 0.1 - 1e-12  # at least the messages forward and backward


def test_microbatches_held_by_each_rank() -> None:
    assert [uniform(4, 1, 8).most_held(rank, [1.0]) for rank in range(4)] == [4, 3, 2, 1]
    assert uniform(4, 1, 2).most_held(0, [1.0]) == 2  # not more than there are microbatches
    interleaved = uniform(4, 2, 8)
    assert interleaved.most_held(0, [1.0, 1.0]) == 2 * 3 + 4 + 1  # warm-up forwards and one more
    assert interleaved.most_held(0, [1.0, 0.0]) == 8  # the second chunk's backwards come first
    assert uniform(4, 1, 8).most_held(3, [1.0], peak=[2.5]) == 2.5
    assert uniform(4, 1, 8).most_held(0, [1.0], peak=[2.5]) == 3 + 2.5


def test_microbatches_not_divisible_by_stages_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"microbatches=6 must be a multiple of parallel.pp=4 with parallel.vpp=2; use 4 or 8 microbatches"
    ):
        simulate([[1.0, 1.0]] * 4, [[1.0, 1.0]] * 4, 6)
    with pytest.raises(ValueError, match="use 4 microbatches"):
        order(4, 2, 3, 0)
    with pytest.raises(ValueError, match="microbatches=0"):
        order(4, 1, 0, 0)
