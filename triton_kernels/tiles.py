"""How work is cut into tiles, and a row loaded."""

from __future__ import annotations

from torch import Tensor

from triton_kernels.launch import constexpr, jit, tl


def parts(count: int, size: int) -> int:
    """How many parts of `size` hold `count`."""
    return -(-count // size)


def power_of_2(least: int) -> int:
    """The smallest power of 2 that is not below `least`: the shape of a tile."""
    return 1 << max(0, least - 1).bit_length()


def contiguous_rows(x: Tensor) -> Tensor:
    """`x`, copied where its last dimension is not contiguous; rows may be any stride apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


AS_ANY = constexpr("")  # no hint to the cache. As a constexpr: Triton 3.6 takes no bare string for a default


@jit
def load_row(ROW, cols, width, eviction_policy: tl.constexpr = AS_ANY):
    """A row's columns as float32, 0 beyond its width. At once, for the interpreter cannot compute on bfloat16."""
    return tl.load(ROW + cols, mask=cols < width, other=0.0, eviction_policy=eviction_policy).to(tl.float32)  # type: ignore[arg-type]
