"""The rules of the cost model, on work that is small enough to compute by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from engine.config import ModelShape, Parallel
from engine.dryrun.clock import CostModel
from engine.dryrun.decoding import decode_work, generation_time, round_seconds
from engine.dryrun.hardware import Gemm, Hardware, Link
from engine.dryrun.types import Collective, Matmul, Overlapped, Stage, Work

# A FLOP and a byte of memory traffic take 1 s each, a byte sent within a node 10 s, between nodes 100 s. Everything else is free.
PLAIN = Hardware(
    name="plain",
    peak=1.0,
    width=1,
    bandwidth=1.0,
    streaming=1.0,
    memory=1e9,
    allowance=0.0,
    attention=1.0,
    launch=0.0,
    dispatch=0.0,
    decode_layer=0.0,
    overlap=1.0,
    node=8,
    watts=0.0,
    gemm=Gemm(1.0, 0.0, 0.0),
    inside=Link(0.1, 0.0, 0.0, 0.0),
    across=Link(0.01, 0.0, 0.0, 0.0),
)


def clock(hardware: Hardware = PLAIN, world_size: int = 8, **parallel: Any) -> CostModel:
    return CostModel(hardware, Parallel(**parallel), world_size)


def test_a_product_is_bound_by_arithmetic_or_by_memory() -> None:
    assert clock().product(Matmul(10, 20, 30)) == 2 * 10 * 20 * 30
    fast = replace(PLAIN, peak=1e9)
    assert clock(fast).product(Matmul(10, 20, 30)) == 10 * 20 + 20 * 30 + 10 * 30
    assert clock(replace(fast, width=4)).product(Matmul(1, 20, 30)) == 4 * (20 + 600 + 30)
    assert clock().product(Matmul(0, 20, 30)) == 0


def test_small_products_are_less_efficient() -> None:
    shaped = replace(PLAIN, gemm=Gemm(0.5, wave=100.0, fill=10.0))
    assert clock(shaped).product(Matmul(10, 20, 30)) == pytest.approx(12000 / 0.5 * (1 + 100 / 300) * (1 + 10 / 20))
    h100 = clock(Hardware.load("h100"))
    rates = [m * 16384 * 13312 * 2 / h100.product(Matmul(m, 16384, 13312)) for m in (16, 256, 2048, 8192)]
    assert rates == sorted(rates)
    assert rates[0] < 0.1 * rates[-1]  # few rows take as long as reading the weights
    assert rates[2] > 0.93 * rates[-1]


def test_rings() -> None:
    inside, across = clock(tp=8), clock(world_size=64, tp=8, pp=1)
    gather = Collective("all_gather", "tp", 800, True)
    assert inside.collective(gather) == pytest.approx(7 / 8 * 800 / 0.1)
    assert inside.collective(gather._replace(kind="all_reduce")) == pytest.approx(2 * 7 / 8 * 800 / 0.1)
    assert across.collective(gather._replace(axis="dp")) == pytest.approx(7 / 8 * 800 / 0.01)  # one rank per node: one network adapter
    together = clock(world_size=64, tp=2)  # four ranks of a node are replicas of each other and share four adapters
    assert together.collective(gather._replace(axis="dp")) == pytest.approx(31 / 32 * 800 / 0.04)
    assert clock(world_size=64).collective(gather._replace(axis="dp")) == pytest.approx(63 / 64 * 800 / 0.08)
    assert inside.collective(gather._replace(axis="dp")) == 0  # a group of one
    late = replace(PLAIN, inside=Link(0.1, latency=3.0, step=0.5, message=7.0), across=Link(0.01, latency=5.0, step=2.0, message=0.0))
    assert clock(late, tp=4).collective(gather._replace(size=0)) == pytest.approx(3 + 3 * 0.5)
    assert clock(late, world_size=16).collective(Collective("all_reduce", "dp", 0, True)) == pytest.approx(5 + 2 * (2 + 14 * 0.5))


def test_which_axes_are_within_a_node() -> None:
    grid = clock(world_size=64, tp=8, pp=4)
    assert [grid.crosses_nodes(axis) for axis in ("tp", "dp", "pp")] == [False, True, True]
    assert clock(world_size=32, tp=16, pp=2).crosses_nodes("tp")
    assert not clock(world_size=8, tp=2, pp=2).crosses_nodes("pp")
    assert grid.hop(100) == pytest.approx(100 / 0.01)
    assert clock(tp=2, pp=4).hop(100) == pytest.approx(100 / 0.1)
    assert clock(replace(PLAIN, inside=Link(0.1, 3.0, 0.5, message=7.0)), tp=2, pp=4).hop(100) == pytest.approx(7 + 100 / 0.1)
    assert clock().hop(100) == 0


def test_work_adds_up_and_overlaps_nonblocking_communication() -> None:
    def work(waits: bool, size: int) -> Work:
        return Work(Counter({Matmul(10, 10, 10): 2}), 500.0, 300.0, 10, Counter({Collective("all_gather", "tp", size, waits): 1}))

    busy, grid = 4000 + 500 + 300, clock(tp=2)
    assert grid.seconds(work(True, 40)) == busy + 200
    assert grid.seconds(work(False, 40)) == busy
    assert grid.seconds(work(False, 2000)) == 10000  # communication longer than all computation is visible
    assert clock(replace(PLAIN, overlap=0.25), tp=2).seconds(work(False, 400)) == busy + 2000 - 0.25 * busy
    assert clock(replace(PLAIN, launch=2.0), tp=2).seconds(work(True, 40)) == busy + 200 + 20
    assert clock(replace(PLAIN, dispatch=1000.0), tp=2).seconds(work(True, 40)) == 10_000  # the host is slower


def test_an_overlapped_product_waits_for_its_first_block_or_for_messages() -> None:
    matmul = Matmul(20, 10, 10)  # 4000 seconds, 1000 per block
    grid = clock(tp=4)
    assert grid.overlapped(Overlapped(matmul, 400)) == 4000  # 1000 per message
    assert grid.overlapped(Overlapped(matmul, 800)) == 1000 + 3 * 2000
    late = clock(replace(PLAIN, inside=Link(0.1, latency=3.0, step=0.5, message=7.0)), tp=4)
    assert late.overlapped(Overlapped(matmul, 400)) == 4000 + 3 + 2 * 3 * 0.5
    thin = clock(replace(PLAIN, peak=1e9), tp=4)  # each block reads the matrix: 5 rows of 10 in and out, and 100
    assert thin.overlapped(Overlapped(matmul, 0)) == 4 * (50 + 50 + 100)
    parts = grid.parts(Work(overlapped=Counter({Overlapped(matmul, 800): 2})))
    assert (parts.products, parts.waits, parts.seconds) == (8000, 6000, 14000)
    assert Work(overlapped=Counter({Overlapped(matmul, 800): 2})).flops == 8000


def stage(pp: int = 0, chunk: int = 0, seconds: float = 100.0, parameters: int = 10) -> Stage:
    forward, backward = Work(traffic=seconds), Work(traffic=2 * seconds)
    sizes = {"weights": 2 * parameters, "gradients": 4 * parameters, "optimizer": 12 * parameters}
    return Stage(pp, chunk, 1, parameters, **sizes, forward=forward, backward=backward, inference=forward, held=1, peak=1, inference_peak=1)


def test_an_update_on_one_gpu() -> None:
    results = clock(world_size=1).update([stage()], 5, 0.0)
    assert results.timeline.seconds == 5 * 300
    assert results.reduction == 0
    assert results.optimizer == 3 * 40 + 2 * 120 + 4 * 40 + 20
    assert results.seconds == 1500 + results.optimizer


def test_gradients_are_reduced_after_or_during_the_last_backward() -> None:
    reduce, gather = 40 / 2 / 0.1, 20 / 2 / 0.1  # of 40 and 20 bytes between two replicas in a node
    hidden = clock(world_size=2).update([stage(seconds=150.0)], 5, 0.0)
    assert hidden.reduction == 0  # 200 seconds during a backward of 300
    assert hidden.timeline.seconds == 5 * 450 + gather  # the first forward waits for a single bucket
    assert clock(world_size=2).update([stage(seconds=50.0)], 5, 0.0).reduction == reduce - 100
    staged = clock(world_size=4, pp=2).update([stage(0), stage(1)], 4, 0.0).timeline
    assert staged.seconds == (4 + 1) * 300 + gather  # stages gather concurrently at the start
    full = clock(world_size=2)
    full = replace(full, parallel=replace(full.parallel, distributed_optimizer=False)).update([stage(seconds=50.0)], 5, 0.0)
    assert (full.reduction, full.timeline.seconds) == (2 * reduce - 100, 5 * 150)
    shared = clock(world_size=2).update([stage()], 1, 0.0).optimizer
    assert shared == 3 * 40 + 2 * 120 + 4 * 40 / 2 + 20 / 2 + 6 * 2 * 8 / 2 / 0.1  # Stage.optimizer is already sharded


def test_pipeline_ranks_reduce_in_their_bubble() -> None:
    results = clock(world_size=4, pp=2).update([stage(0, seconds=100.0), stage(1, seconds=100.0)], 4, 0.0)
    # The last stage ends 200 before the first, which is the time of its reduction; the first overlaps its own with its last backward.
    assert results.reduction == 0
    virtual = clock(world_size=4, pp=2, vpp=2)
    stages = [stage(r, c, seconds=100.0) for r in range(2) for c in range(2)]
    assert virtual.update(stages, 4, 0.0).reduction == 200  # of chunk 0, all at once
    with pytest.raises(ValueError, match=r"microbatches=5 must be a multiple of parallel.pp=2"):
        virtual.update(stages, 5, 0.0)


def test_forward_only() -> None:
    assert clock(world_size=2, pp=2).forward([stage(0), stage(1)], 4, 1.0).seconds == 5 * 100 + 1 / 0.1


SMALL = ModelShape(layers=2, hidden=64, ffn=128, heads=8, kv_heads=4, vocab=256)
LLAMA8B = ModelShape(layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256)


def test_decoding_reads_weights_and_cache() -> None:
    h100 = clock(Hardware.load("h100"), world_size=1)
    weights, sequence = 2 * (LLAMA8B.parameters - LLAMA8B.vocab * LLAMA8B.hidden), 2 * 2 * 32 * 8 * 128
    floor = (weights + 16 * 1000 * sequence) / (0.8 * 3.35e12)
    assert floor < round_seconds(h100, LLAMA8B, 16, 1000, graphs=True) < 1.6 * floor
    assert round_seconds(h100, LLAMA8B, 16, 1000, graphs=False) == pytest.approx(32 * 1e-3 + 30 * 8e-6)  # host-bound
    short = clock(replace(h100.hardware, bandwidth=1e18, peak=1e21, launch=0.0), world_size=1)
    assert round_seconds(short, LLAMA8B, 16, 1000, graphs=True) == pytest.approx(10 * 8e-6)
    assert round_seconds(short, LLAMA8B, 16, 1000, [100], graphs=True) == pytest.approx(32 * 1e-3 + 30 * 8e-6)  # prefill uses no graph
    assert decode_work(LLAMA8B, 1, 32, 16, 0, head=True).flops == pytest.approx(2 * 16 * weights / 2, rel=1e-4)


def test_a_prompt_costs_what_a_forward_does() -> None:
    work = decode_work(LLAMA8B, 4, 32, 0, 0.0, prompts=[100, 300], head=True)
    body = LLAMA8B.parameters - 2 * LLAMA8B.vocab * LLAMA8B.hidden
    causal = 4 * 4096 * (100 * 101 + 300 * 301) / 2 * 32
    assert 4 * work.flops == pytest.approx(2 * 400 * body + causal + 2 * 2 * LLAMA8B.vocab * LLAMA8B.hidden, rel=1e-4)
    assert sum(times for c, times in work.collectives.items() if c.kind == "reduce_scatter") == 64


def test_finished_sequences_are_replaced() -> None:
    machine = clock(Hardware.load("h100"), world_size=1)
    results = generation_time(machine, LLAMA8B, [10] * 4, [5, 100, 20, 30], slots=2, graphs=False)
    assert (results.rounds, results.tokens) == (100, 155)
    assert results.decode == pytest.approx(100 * (32 * 1e-3 + 30 * 8e-6))  # host-bound
    assert results.prefill == 0  # few additional tokens are free
    assert generation_time(machine, LLAMA8B, [3000] * 4, [5, 100, 20, 30], slots=2, graphs=False).prefill > 0
    assert generation_time(machine, LLAMA8B, [10] * 4, [5, 100, 20, 30], slots=1, graphs=False).rounds == 155
    two = clock(Hardware.load("h100"), world_size=2, pp=2)
    assert generation_time(two, LLAMA8B, [10] * 4, [5, 100, 20, 30], slots=1, graphs=False).rounds == 100
    replayed = generation_time(machine, LLAMA8B, [10] * 4, [5, 100, 20, 30], slots=2, graphs=True)
    assert replayed.decode < 0.3 * results.decode
    assert replayed.prefill > 0  # prefill is launched kernel by kernel


def test_tokens_come_back_to_the_first_stage() -> None:
    late = replace(PLAIN, inside=Link(0.1, 0.0, 0.0, message=7.0))
    alone, piped = (round_seconds(clock(late, pp=pp), SMALL, 4, 0.0, graphs=True) for pp in (1, 2))
    hidden = 4 * SMALL.hidden * 1 / 0.1
    assert piped == pytest.approx(alone + 2 * (7 + hidden) + 7 + 4 * 16 / 0.1)
