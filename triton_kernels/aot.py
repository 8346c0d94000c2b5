"""Compile kernels ahead of time, without a GPU, and check registers, spills, shared memory, load widths and matrix instructions.

Each kernel file lists its shipped configurations in `aot_cases()`. Each is compiled to the cubin that a launch on that architecture would
load, with the specialization (arguments divisible by 16) that a launch would infer, and checked for faults.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
import re
from dataclasses import dataclass
from typing import Any

from triton_kernels.launch import interpreted


@dataclass(frozen=True)
class AotCase:
    """One shipped configuration of a kernel.

    signature   Triton type of each argument ("*bf16", "i64", "fp32"); constexprs may be left out
    constexprs  the value of each constexpr; an absent optional pointer is the constexpr None
    divisible   names of arguments whose value or pointer is a multiple of 16. If an integer is among them (a row's stride or
                width), rows are aligned, and the check requires 128-bit loads
    """

    name: str
    kernel: Any  # a function decorated with jit
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int = 2
    prefetches: bool = False  # the check then requires asynchronous copies to shared memory
    archs: tuple[int, ...] = (80, 90, 100)  # compute capabilities that it is shipped for

    @property
    def rows_aligned(self) -> bool:
        return any(not self.signature[name].startswith("*") for name in self.divisible)


@dataclass(frozen=True)
class Chip:
    """Resources of one multiprocessor, from the CUDA programming guide's table of compute capabilities. Shared memory in bytes."""

    blocks: int
    warps: int
    registers: int
    shared: int
    shared_of_block: int


CHIPS = {
    80: Chip(blocks=32, warps=64, registers=65536, shared=164 << 10, shared_of_block=163 << 10),
    90: Chip(blocks=32, warps=64, registers=65536, shared=228 << 10, shared_of_block=227 << 10),
    100: Chip(blocks=32, warps=64, registers=65536, shared=228 << 10, shared_of_block=227 << 10),
}


ASYNC_COPY = re.compile(r"\bcp\.async\.cg\.shared\.global|\bcp\.async\.bulk\.")  # 16 bytes per thread, or TMA


@dataclass(frozen=True)
class AotReport:
    """The result of compiling a case for one architecture. Registers and spilled bytes are per thread, bytes of shared memory per block."""

    case: AotCase
    arch: int
    registers: int
    spill_bytes: int
    shared: int
    vector_loads: int
    async_copies: int
    matrix_instructions: tuple[str, ...]

    @property
    def occupancy(self) -> float:
        """The fraction of a multiprocessor's warps that can be resident, as limited by registers, shared memory and warps."""
        chip, warps = CHIPS[self.arch], self.case.num_warps
        by_registers = chip.registers // (warps * _up(self.registers * 32, 256))  # allocated per warp in units of 256
        by_shared = chip.shared // (self.shared + 1024)  # the driver reserves 1 KiB per block
        return min(chip.blocks, chip.warps // warps, by_registers, by_shared) * warps / chip.warps

    @property
    def faults(self) -> tuple[str, ...]:
        """The requirements that this fails; empty if it passes."""
        limit = CHIPS[self.arch].shared_of_block
        checks = {
            f"spills {self.spill_bytes} bytes": self.spill_bytes > 0,
            f"needs {self.shared} bytes of shared memory where a block has {limit}": self.shared > limit,
            "has no 128-bit load though its rows are aligned": self.case.rows_aligned and not self.vector_loads,
            "has no asynchronous copy though it prefetches": self.case.prefetches and not self.async_copies,
        }
        return tuple(f"{self.case.name} on sm_{self.arch} {fault}" for fault, present in checks.items() if present)

    @property
    def passes(self) -> bool:
        return not self.faults


def compile_case(case: AotCase, arch: int) -> AotReport:
    """Compiles `case` for compute capability `arch` (80, 90 or 100); no GPU is needed.

    Raises ValueError for an unknown architecture, for argument names that the kernel does not have, and if TRITON_INTERPRET=1.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _check(case, arch)
    source = ASTSource(case.kernel, _signature(case), case.constexprs, _attributes(case))
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # a cached cubin has no log
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = str(compiled.asm["ptx"])
    return AotReport(
        case,
        arch,
        registers=max(_numbers(r"Used (\d+) registers", log.getvalue())),
        spill_bytes=sum(_numbers(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())),
        shared=compiled.metadata.shared,
        vector_loads=_vector_loads(ptx),
        async_copies=len(ASYNC_COPY.findall(ptx)),
        matrix_instructions=tuple(sorted(set(re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)))),
    )


def all_cases() -> list[AotCase]:
    """The cases of all files of this package, in order of file names."""
    package = importlib.import_module("triton_kernels")
    files = [importlib.import_module(f"triton_kernels.{info.name}") for info in pkgutil.iter_modules(package.__path__)]
    return [case for file in files if hasattr(file, "aot_cases") for case in file.aot_cases()]


def _check(case: AotCase, arch: int) -> None:
    if interpreted():
        raise ValueError("TRITON_INTERPRET=1 is set: kernels run in the interpreter and cannot be compiled; unset it")
    if arch not in CHIPS:
        raise ValueError(f"arch={arch} is unknown; use one of {', '.join(map(str, CHIPS))}")
    names = set(case.kernel.arg_names)
    named = case.signature.keys() | case.constexprs.keys()
    if names != named or not names.issuperset(case.divisible):
        wrong = sorted((names ^ named) | (set(case.divisible) - names))
        raise ValueError(f"case {case.name!r}: {', '.join(wrong)}: not an argument, or one without a type; fix its aot_cases()")


def _signature(case: AotCase) -> dict[str, str]:
    return {name: "constexpr" if name in case.constexprs else case.signature[name] for name in case.kernel.arg_names}


def _attributes(case: AotCase) -> dict[tuple[int, ...], list[list[Any]]]:
    return {(case.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}


def _vector_loads(ptx: str) -> int:
    """Loads from global memory of 16 or more bytes per thread, including asynchronous copies to shared memory and TMA."""
    plain = re.findall(r"\bld\.global[\w.:]*\.v(\d)\.[a-z](\d+)", ptx)
    return sum(int(count) * int(bits) >= 128 for count, bits in plain) + len(ASYNC_COPY.findall(ptx))


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, text)]


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
