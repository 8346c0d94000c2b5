"""The settings of generation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from engine.config.choices import CudaGraphs

# Where each engine is defined; imported when `rollout.engine` names it.
ENGINES = {"sampler": "engine.rollout.sampler:SamplerEngine"}


@dataclass(frozen=True)
class RolloutConfig:
    """Memory, pace and place of generation; of these, only `max_staleness` affects responses."""

    max_num_seqs: int = 64  # sequences generated at once on each replica; fewer if the KV cache holds fewer
    kv_cache_gb: float = 16.0  # KV cache of one rank, in GiB
    max_prefill_tokens: int = 8192  # prompt tokens of one forward, except for a single longer prompt
    generator_gpus: int = 0  # the last ranks of the launch only generate; 0: the training ranks generate
    max_staleness: int = 0  # 1: generate the next step's responses while this step trains, one step off-policy
    importance_cap: float = 2.0  # with max_staleness=1: cap of truncated importance sampling
    prefix_caching: bool = False  # compute the prompts' common prefix once
    # CUDA graphs for decoding; not with prefix_caching. auto: on GPUs, if the first graph's results equal eager execution. on: fail
    # if they do not (on CPU, "on" only pads rows as graphs do).
    cuda_graphs: CudaGraphs = "auto"
    engine: str = "sampler"  # a name of ENGINES

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.kv_cache_gb <= 0 or self.max_prefill_tokens < 1:
            raise ValueError(
                f"rollout.max_num_seqs={self.max_num_seqs}, rollout.kv_cache_gb={self.kv_cache_gb} and "
                f"rollout.max_prefill_tokens={self.max_prefill_tokens} must be positive"
            )
        if self.generator_gpus < 0 or self.importance_cap <= 0:
            raise ValueError(
                f"rollout.generator_gpus={self.generator_gpus} must not be negative and "
                f"rollout.importance_cap={self.importance_cap} must be positive"
            )
        if self.max_staleness not in (0, 1):
            raise ValueError(f"rollout.max_staleness={self.max_staleness} must be 0 (on-policy) or 1 (generate one step ahead)")
        if self.cuda_graphs not in get_args(CudaGraphs):
            raise ValueError(f"rollout.cuda_graphs={self.cuda_graphs!r} must be one of {', '.join(get_args(CudaGraphs))}")
        if self.engine not in ENGINES:
            raise ValueError(f"rollout.engine={self.engine!r} must be one of {', '.join(ENGINES)}")
        if self.max_staleness and not self.generator_gpus:
            raise ValueError(
                "rollout.max_staleness=1 needs dedicated generator ranks, but rollout.generator_gpus=0; "
                "set rollout.generator_gpus, or rollout.max_staleness=0"
            )

    def max_cached_seqs(self, slot_bytes: int, positions: int, groups: int, beside: int = 0) -> int:
        """How many sequences of `positions` tokens the KV cache of this rank can hold, at `slot_bytes` bytes each.

        `beside` bytes of the cache are in use for something else. Raises ValueError if fewer than `groups` sequences fit: each pipeline
        stage works on a group of its own.
        """
        held = max(0, int(self.kv_cache_gb * 2**30) - beside) // max(1, slot_bytes)
        if held < groups:
            need = math.ceil(1000 * (groups * slot_bytes + beside) / 2**30) / 1000
            raise ValueError(
                f"rollout.kv_cache_gb={self.kv_cache_gb} holds {held} sequences of {positions} tokens, and {groups} pipeline stages need "
                f"one each; use rollout.kv_cache_gb={need} or more, or shorter responses"
            )
        return held
