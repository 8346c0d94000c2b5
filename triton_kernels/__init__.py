"""Kernels of post-training, and nothing of the engine. Each file holds its torch reference, its kernel and its public function."""

from triton_kernels.linear_logprob import linear_logprob
from triton_kernels.logprob import logprob
from triton_kernels.policy_loss import linear_policy_loss

__all__ = ["linear_logprob", "linear_policy_loss", "logprob"]
