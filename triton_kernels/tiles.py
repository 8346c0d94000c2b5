"""Tile sizes, and loading of rows."""

from __future__ import annotations

from torch import Tensor

from triton_kernels.launch import constexpr, jit, tl


def parts(count: int, size: int) -> int:
    """ceil(count / size)."""
    return -(-count // size)


def power_of_2(least: int) -> int:
    """The smallest power of 2 that is at least `least`: a tile dimension."""
    return 1 << max(0, least - 1).bit_length()


def contiguous_rows(x: Tensor) -> Tensor:
    """`x`, copied if its last dimension is not contiguous; the row stride may be anything."""
    return x if x.stride(-1) == 1 else x.contiguous()


AS_ANY = constexpr("")  # no cache hint. A constexpr, because Triton 3.6 rejects a plain string as a default


@jit
def load_row(ROW, cols, width, eviction_policy: tl.constexpr = AS_ANY):
    """A row's columns as float32, 0 beyond its width. Converted immediately, because the interpreter cannot compute with bfloat16."""
    return tl.load(ROW + cols, mask=cols < width, other=0.0, eviction_policy=eviction_policy).to(tl.float32)  # type: ignore[arg-type]
