"""fp32 matrix products on CPU with oneDNN instead of MKL. torch ships both; oneDNN is faster on AMD processors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def use_onednn() -> Iterator[None]:
    """Context in which this process computes fp32 aten::mm and mm.out on CPU with oneDNN, forward and backward.

    Does nothing if torch was built without oneDNN. Both libraries accumulate in fp32, so results differ only in rounding.
    It overrides torch's dispatcher because the most expensive products are in megatron-core's own autograd functions.
    """
    if not torch.backends.mkldnn.is_available():
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about overriding a kernel, which is intended
        library.impl("mm", _mm, "CPU", allow_override=True)
        library.impl("mm.out", _mm_out, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if _supported(a, b):
        return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
    return torch.addmm(a.new_zeros(()), a, b, beta=0)  # another dispatcher entry, which is not overridden


def _mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    if _supported(a, b):
        return out.copy_(_mm(a, b))
    return torch.addmm(a.new_zeros(()), a, b, beta=0, out=out)


def _supported(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and a.shape[1] == b.shape[0] > 0
