"""Calibration recovers known constants, and measures this machine into a file that loads."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from engine.config import ModelShape
from engine.distributed.world import World
from engine.dryrun.calibrate import Sizes, calibrate, fit_gemm, fit_kernels, save
from engine.dryrun.hardware import Gemm, Hardware
from engine.dryrun.types import Matmul, Work
from tests.support.pool import ranks

TINY = ModelShape(layers=1, hidden=16, ffn=32, heads=2, kv_heads=1, vocab=64)
SMALL = Sizes(
    products=(Matmul(16, 16, 16), Matmul(64, 32, 64)),
    attention=(2, 16, 8),
    copied=1 << 16,
    messages=(1 << 10, 1 << 14),
    layers=((TINY, 8), (TINY, 32)),
)


def test_products_are_fitted_by_shape() -> None:
    shapes = [Matmul(m, k, n) for m in (128, 1024, 8192) for k in (256, 4096) for n in (512, 8192)]
    true = Gemm(0.7, 1e5, 100.0)
    measured = [true.ceiling / (1 + true.wave / (s.m * s.n)) / (1 + true.fill / s.k) for s in shapes]
    results = fit_gemm(shapes, measured)
    again = [results.ceiling / (1 + results.wave / (s.m * s.n)) / (1 + results.fill / s.k) for s in shapes]
    assert again == pytest.approx(measured, rel=0.04)
    assert results.ceiling == pytest.approx(0.7, rel=0.03)
    flat = fit_gemm(shapes, [0.5] * len(shapes))
    assert (flat.ceiling, flat.wave, flat.fill) == (pytest.approx(0.5), 0.0, 0.0)


def test_kernel_costs_are_fitted_per_byte_and_per_launch() -> None:
    works = [Work(traffic=traffic, kernels=kernels) for traffic, kernels in ((1e6, 10), (1e8, 10), (1e7, 100))]
    rests = [work.traffic * 1e-9 + work.kernels * 1e-4 for work in works]
    assert fit_kernels(works, rests, rests) == pytest.approx((1e-9, 1e-4))
    assert fit_kernels(works, [work.traffic * 1e-9 for work in works], rests) == (pytest.approx(1e-9), pytest.approx(0, abs=1e-9))
    fewer = [work.kernels * 1e-4 - work.traffic * 1e-11 for work in works]  # negative costs per byte are not fitted
    assert fit_kernels(works, fewer, rests)[0] == 0


def measured(world: World) -> Hardware:
    return calibrate(world, SMALL)


@pytest.mark.parametrize("size", [1, 2])
def test_a_machine_is_measured_and_saved(size: int, tmp_path: Path) -> None:
    results = ranks(size).run(measured)
    for each in results:  # all ranks have the same numbers, except for their own memory
        assert (each.peak, each.gemm, each.inside) == (results[0].peak, results[0].gemm, results[0].inside)
    machine = results[0]
    numbers = [machine.peak, machine.attention, machine.bandwidth, machine.streaming, machine.memory, machine.inside.bandwidth]
    assert all(np.isfinite(number) and number > 0 for number in numbers)
    assert 1e-5 < machine.decode_layer < 1  # busy or not
    assert (machine.width, machine.node, machine.overlap) == (4, size, 0.0)
    assert machine.across == machine.inside
    save(machine, tmp_path / "here.toml")
    loaded = Hardware.load(str(tmp_path / "here.toml"))
    assert loaded.peak == pytest.approx(machine.peak, rel=1e-5)
    assert re.search(r"streaming = .*# measured", (tmp_path / "here.toml").read_text())
