"""fp32 matrix products on CPU by oneDNN instead of MKL. torch brings both; on AMD processors oneDNN is nearly twice as fast."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def in_onednn() -> Iterator[None]:
    """While it is open, aten::mm of this process, forward and backward, computes fp32 on CPU in oneDNN. Where torch has none nothing
    changes. Both libraries accumulate in fp32: results differ in rounding alone.

    It is done at torch's dispatcher because the dearest products are in autograd functions of megatron-core's own.
    """
    if not torch.backends.mkldnn.is_available():
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overriding is the purpose
        library.impl("mm", _mm, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == b.dtype == torch.float32 and a.shape[1] == b.shape[0] > 0:
        return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
    return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))  # another entry of the dispatcher, which is not ours
