"""Every shipped kernel configuration compiles for three architectures without faults such as spills, and faults are detected."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import triton
import triton.language as tl

from triton_kernels.aot import CHIPS, AotCase, AotReport, all_cases, compile_case


@pytest.mark.parametrize(
    ("case", "arch"), [pytest.param(case, arch, id=f"{case.name}-{arch}") for case in all_cases() for arch in case.archs]
)
def test_shipped_kernels_pass_all_checks(case: AotCase, arch: int) -> None:
    assert not compile_case(case, arch).faults


def test_every_kernel_file_has_cases_with_unique_names() -> None:
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    assert {"rmsnorm", "rope", "swiglu"} <= {name.split()[0] for name in names}


@triton.jit
def centre(X, Y, stride, width, BLOCK: tl.constexpr):
    """A row minus its sum: the whole row stays live across the reduction."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + cols, mask=cols < width, other=0.0)
    tl.store(Y + row * stride + cols, x - tl.sum(x, 0), mask=cols < width)


@triton.jit
def square(X, Y, SIZE: tl.constexpr):
    """X @ X in float16."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(X + at)
    tl.store(Y + at, tl.dot(x, x))


def centre_case(**changes: Any) -> AotCase:
    signature = {"X": "*fp32", "Y": "*fp32", "stride": "i32", "width": "i32"}
    return replace(AotCase("centre", centre, signature, {"BLOCK": 4096}, tuple(signature), num_warps=4), **changes)


def report(**changes: Any) -> AotReport:
    return replace(
        AotReport(centre_case(), 90, registers=32, spill_bytes=0, shared=0, vector_loads=1, async_copies=0, matrix_instructions=()),
        **changes,
    )


@pytest.mark.parametrize("arch", CHIPS)
def test_a_kernel_that_spills_fails(arch: int) -> None:
    """65536 floats over 128 threads need 512 registers per thread; 255 are available."""
    spilling = compile_case(centre_case(constexprs={"BLOCK": 65536}), arch)
    assert spilling.spill_bytes > 0
    assert not spilling.passes
    assert spilling.faults[0] == f"centre on sm_{arch} spills {spilling.spill_bytes} bytes"


def test_aligned_rows_need_128_bit_loads() -> None:
    """4096 floats over 128 threads are 8 loads of 4 per thread; if the width may be odd, the mask splits them into single loads."""
    assert compile_case(centre_case(), 90).vector_loads == 8
    narrow = compile_case(centre_case(divisible=("X", "Y", "stride")), 90)
    assert narrow.vector_loads == 0
    assert narrow.faults == ("centre on sm_90 has no 128-bit load though its rows are aligned",)
    assert compile_case(centre_case(divisible=("X", "Y")), 90).passes


@pytest.mark.parametrize(("arch", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")])
def test_matrix_instructions_are_detected(arch: int, instruction: str) -> None:
    case = AotCase("square", square, {"X": "*fp16", "Y": "*fp32"}, {"SIZE": 64}, ("X", "Y"), num_warps=4)
    results = compile_case(case, arch)
    assert results.matrix_instructions == (instruction,)
    assert results.shared > 0
    assert compile_case(centre_case(), arch).matrix_instructions == ()


def test_shared_memory_beyond_a_block_fails() -> None:
    assert report(shared=200_000).passes
    assert report(shared=200_000, arch=80).faults == ("centre on sm_80 needs 200000 bytes of shared memory where a block has 166912",)


def test_a_kernel_that_prefetches_needs_asynchronous_copies() -> None:
    assert report(case=centre_case(prefetches=True)).faults == ("centre on sm_90 has no asynchronous copy though it prefetches",)
    assert report(case=centre_case(prefetches=True), async_copies=1).passes
    assert compile_case(centre_case(), 90).async_copies == 0


def test_occupancy_is_limited_by_the_scarcest_resource() -> None:
    """Of 64 warps: 65536 registers hold 4 blocks of 4 warps at 128 per thread; 228 KiB hold 2 blocks of 100 KiB; 32 blocks of one warp."""
    assert report().occupancy == 1.0
    assert report(registers=128).occupancy == 16 / 64
    assert report(registers=121).occupancy == 16 / 64  # rounded up to 128
    assert report(shared=100 << 10).occupancy == 8 / 64
    assert report(case=centre_case(num_warps=1)).occupancy == 32 / 64


def test_bad_cases_are_named() -> None:
    with pytest.raises(ValueError, match="arch=70 is unknown; use one of 80, 90, 100"):
        compile_case(centre_case(), 70)
    with pytest.raises(ValueError, match="case 'centre': Z: not an argument, or one without a type"):
        compile_case(centre_case(divisible=("Z",)), 90)
    with pytest.raises(ValueError, match="case 'centre': Y: not an argument, or one without a type"):
        compile_case(centre_case(signature={"X": "*fp32", "stride": "i32", "width": "i32"}, divisible=()), 90)


def test_an_interpreting_process_says_that_it_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is set"):
        compile_case(centre_case(), 90)
