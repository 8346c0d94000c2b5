"""Jobs of the tests of overlapped communication."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed.world import World
from engine.megatron import overlap
from tests.support import jobs_gradients

CALLED = ["fused_all_gather_matmul", "fused_matmul_reduce_scatter"]


@contextmanager
def symmetric_memory() -> Iterator[list[str]]:
    """Makes PyTorch's symmetric-memory operations accept CPU tensors, by its own reference implementation, and the engine call them. Yields
    the names of called operations."""
    import torch.distributed._symmetric_memory as memory

    library, called = torch.library.Library("symm_mem", "IMPL"), []
    for name in CALLED:
        compute = getattr(memory, f"_{name}_fallback")

        def noted(*args: Any, name: str = name, compute: Callable[..., Any] = compute, **kwargs: Any) -> Any:
            called.append(name)
            return compute(*args, **kwargs)

        library.impl(name, noted, "CPU")
    try:
        with mock.patch.object(overlap, "_uses_fallback", return_value=False):
            yield called
    finally:
        library._destroy()


def products(world: World, symmetric: bool) -> list[Tensor]:
    """(gathered rows, product, product without gathered rows, scattered sums) on this rank; inputs depend on the rank."""
    group = dist.group.WORLD
    assert group is not None
    draw = torch.Generator().manual_seed(world.rank)
    block, matrix, rows = (torch.randn(shape, generator=draw) for shape in ((3, 5), (5, 7), (3 * world.size, 5)))
    with symmetric_memory() if symmetric else mock.MagicMock():
        full, out = overlap.gather_multiply(block, matrix, group, keep=True)
        nothing, again = overlap.gather_multiply(block, matrix, group, keep=False)
        scattered = overlap.multiply_scatter(rows, matrix, group)
    assert full is not None
    assert nothing is None
    return [full, out, again, scattered]


def checked(world: World, fault: str) -> str:
    """The error of `check` if PyTorch's operations are correct ("none"), wrong, or refused."""
    group = dist.group.WORLD
    assert group is not None

    def gather(rows: Tensor, matrix: Tensor, group: Any, *, keep: bool) -> tuple[Tensor, Tensor]:
        if fault == "refused":
            raise RuntimeError("no peer access\nand a trace")
        full = torch.cat([rows] * group.size())  # every block is this rank's own
        return full, full @ matrix

    with symmetric_memory(), mock.patch.object(overlap, "gather_multiply", overlap.gather_multiply if fault == "none" else gather):
        try:
            overlap.check(group, world.device, torch.float32)
        except ValueError as error:
            return str(error)
    return ""


def gradients(world: World, symmetric: bool, least: int = 1, **asked: Any) -> tuple[dict[str, list[float]], int]:
    """jobs_gradients.main_grads, overlapping blocks of at least `least` rows, and the number of calls of PyTorch's operations."""
    with mock.patch.object(overlap, "LEAST_ROWS", least), symmetric_memory() if symmetric else mock.MagicMock() as called:
        results, _ = jobs_gradients.main_grads(world, fused=True, **asked)
    return results, len(called) if symmetric else 0


def read_only(world: World, **asked: Any) -> dict[str, Any]:
    """jobs_gradients.read_only_gradients with overlap of all products."""
    with mock.patch.object(overlap, "LEAST_ROWS", 1):
        return jobs_gradients.read_only_gradients(world, **asked)
