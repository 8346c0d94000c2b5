"""What one step of an algorithm computes: the dry run asks every algorithm for this, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import Model, Optim
from engine.rollout.config import RolloutConfig


@dataclass(frozen=True)
class Generation:
    """Responses that are sampled in every step."""

    rollout: RolloutConfig
    samples_per_prompt: int
    max_prompt_tokens: int
    max_response_tokens: int
    evaluates: bool  # the training ranks generate too, for evaluation


@dataclass(frozen=True)
class Workload:
    """One step of an algorithm, over all ranks."""

    lengths: Literal["conversation", "preference", "rollout"]  # which distribution of sequence lengths is assumed
    sequences: int
    max_length: int  # predicted tokens of one sequence
    samples: int  # rows of the data that a step takes
    token_loss: bool  # the loss is a sum over tokens, computed by the output layer
    sequences_per_sample: int = 1  # they share a microbatch
    token_values: int = 0  # float32 values that each token of a batch brings along: log-probs, advantages, ...
    passes: float = 1.0  # over the data, in a whole run
    epochs: int = 1  # updates on each sequence of a step
    minibatches: int = 1  # optimizer steps an epoch
    generation: Generation | None = None
    critic: tuple[Model, Optim] | None = None
    policy_logprobs: bool = False  # a forward pass of the policy before the updates
    reference: Literal["none", "cached", "resident", "offloaded"] = "none"  # cached: log-probs are computed once, before the first step
