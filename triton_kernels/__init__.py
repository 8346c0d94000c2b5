"""Kernels of post-training, and nothing of the engine. Each file holds its torch reference, its kernel and its public function."""

from triton_kernels.linear_logprob import linear_logprob
from triton_kernels.rmsnorm import rmsnorm
from triton_kernels.rope import rope
from triton_kernels.swiglu import swiglu

__all__ = ["linear_logprob", "rmsnorm", "rope", "swiglu"]
