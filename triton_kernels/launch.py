"""How a public function of this package computes: by its Triton kernel on GPUs and in Triton's interpreter, by its torch reference elsewhere."""

from __future__ import annotations

import os

from torch import Tensor


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter. TRITON_INTERPRET must be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def by_kernel(tensor: Tensor) -> bool:
    """Whether work on `tensor` is done by a kernel."""
    return tensor.device.type == "cuda" or (tensor.device.type == "cpu" and interpreted())
