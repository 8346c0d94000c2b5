"""fp32 matrix products on CPU by oneDNN instead of MKL. torch brings both; on AMD processors oneDNN is the faster."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def use_onednn() -> Iterator[None]:
    """While it is open, aten::mm and mm.out of this process, forward and backward, compute fp32 on CPU in oneDNN. Where torch has none
    nothing changes. Both libraries accumulate in fp32: results differ in rounding alone.

    It is done at torch's dispatcher because the dearest products are in autograd functions of megatron-core's own.
    """
    if not torch.backends.mkldnn.is_available():
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overriding is the purpose
        library.impl("mm", _mm, "CPU", allow_override=True)
        library.impl("mm.out", _mm_out, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if _fits(a, b):
        return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
    return torch.addmm(a.new_zeros(()), a, b, beta=0)  # another entry of the dispatcher, which is not ours


def _mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    if _fits(a, b):
        return out.copy_(_mm(a, b))
    return torch.addmm(a.new_zeros(()), a, b, beta=0, out=out)


def _fits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and a.shape[1] == b.shape[0] > 0
