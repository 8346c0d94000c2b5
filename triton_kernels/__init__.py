"""Triton kernels for post-training, independent of the engine. Each file has a torch reference, a kernel and a public function."""

from triton_kernels.decode_attention import decode_attention
from triton_kernels.dpo import DpoMetrics, dpo_norm
from triton_kernels.draw import draw
from triton_kernels.gae import gae, merge_partials
from triton_kernels.linear_logprob import linear_logprob
from triton_kernels.logprob import logprob
from triton_kernels.policy_loss import linear_policy_loss
from triton_kernels.ppo import PpoStats, ppo_loss, value_loss
from triton_kernels.rmsnorm import rmsnorm
from triton_kernels.rope import rope, rope_qkv
from triton_kernels.seq_logps import seq_logps
from triton_kernels.swiglu import swiglu

__all__ = [
    "DpoMetrics",
    "PpoStats",
    "decode_attention",
    "dpo_norm",
    "draw",
    "gae",
    "linear_logprob",
    "linear_policy_loss",
    "logprob",
    "merge_partials",
    "ppo_loss",
    "rmsnorm",
    "rope",
    "rope_qkv",
    "seq_logps",
    "swiglu",
    "value_loss",
]
