"""Matrix products overlapped with tensor-parallel communication (`parallel.tp_comm_overlap`).

Rows are all-gathered, or partial sums reduce-scattered, in one block per rank: while one block is multiplied, another is transferred. On
GPUs this uses PyTorch's symmetric memory (torch.ops.symm_mem). On CPU the communication comes before or after the product; results are the
same.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Rows of a block. Every block reads the whole matrix, and with fewer rows that takes longer than the arithmetic.
LEAST_ROWS = 256


def gather_multiply(rows: Tensor, matrix: Tensor, group: ProcessGroup, *, keep: bool) -> tuple[Tensor | None, Tensor]:
    """Return (rows of all ranks [n R, K], their product with `matrix` [n R, N]), where n is the size of the group.

    rows    [R, K], this rank's
    matrix  [K, N], this rank's
    keep    False: None instead of the gathered rows
    """
    if _uses_fallback(rows):
        gathered = rows.new_empty(group.size() * rows.shape[0], rows.shape[1])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return (gathered if keep else None), gathered.mm(matrix)
    gathered, (out,) = torch.ops.symm_mem.fused_all_gather_matmul(rows.contiguous(), [matrix], 0, group.group_name, return_A=keep)
    return gathered, out


def multiply_scatter(rows: Tensor, matrix: Tensor, group: ProcessGroup) -> Tensor:
    """Return this rank's rows [R, N] of the sum of rows @ matrix over ranks. On GPUs the terms have the rows' dtype and are summed in fp32.

    rows    [n R, K], with this rank's shard of K
    matrix  [K, N], with the same shard
    """
    if _uses_fallback(rows):
        partial = rows.mm(matrix)
        out = partial.new_empty(len(partial) // group.size(), partial.shape[1])
        dist.reduce_scatter_tensor(out, partial, group=group)
        return out
    return torch.ops.symm_mem.fused_matmul_reduce_scatter(rows, matrix, "sum", 0, group.group_name)


def _uses_fallback(rows: Tensor) -> bool:
    return rows.device.type == "cpu"


def check(group: ProcessGroup, device: torch.device, dtype: torch.dtype) -> None:
    """Compare both functions of this module with separate communication. All ranks of `group` must call it.

    Raises ValueError if the devices do not support symmetric memory, or if results differ.
    """
    rank, ranks = group.rank(), group.size()
    generator = torch.Generator().manual_seed(rank)
    rows, matrix = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((ranks * LEAST_ROWS, 64), (64, 128)))
    block = rows[:LEAST_ROWS]
    try:
        gathered, out = gather_multiply(block, matrix, group, keep=True)
        summed = multiply_scatter(rows, matrix, group)
    except RuntimeError as error:
        raise ValueError(_message(str(error).splitlines()[0])) from error
    expected = torch.empty_like(rows)
    dist.all_gather_into_tensor(expected, block.contiguous(), group=group)
    partial = rows.float() @ matrix.float()
    dist.all_reduce(partial, group=group)
    errors = [
        _relative_error(gathered, expected),
        _relative_error(out, expected.float() @ matrix.float()),
        _relative_error(summed, partial.chunk(ranks)[rank]),
    ]
    if max(errors) > 2**-6:  # bf16 keeps 8 bits
        raise ValueError(_message(f"results differ by {max(errors):.2g} of the largest value"))


def _relative_error(actual: Tensor | None, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert actual is not None
    return float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())


def _message(reason: str) -> str:
    return f"parallel.tp_comm_overlap=true does not work between these GPUs ({reason}); use parallel.tp_comm_overlap=false"
