"""fp32 matrix products on CPU by oneDNN instead of MKL. torch brings both, and on an AMD EPYC with AVX-512 oneDNN is twice as fast."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

_library = torch.library.Library("aten", "IMPL")  # what it registers lives as long as this object


@cache
def use_onednn() -> None:
    """From now on aten::mm of this process, forward and backward, computes fp32 on CPU in oneDNN; all other products stay as they were.

    Both accumulate in fp32, so results differ in rounding alone. Where torch has no oneDNN nothing changes.
    """
    if torch.backends.mkldnn.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # overriding is the purpose
            _library.impl("mm", _mm, "CPU", allow_override=True)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == b.dtype == torch.float32 and a.shape[1] == b.shape[0] > 0:
        return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
    return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))  # another entry of the dispatcher, which is not ours
