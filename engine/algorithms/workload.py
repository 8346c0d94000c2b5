"""The computation of one step of an algorithm, as input of the dry run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import Model, Optim
from engine.rollout.config import RolloutConfig


@dataclass(frozen=True)
class Generation:
    """Response generation of one step."""

    rollout: RolloutConfig
    samples_per_prompt: int
    max_prompt_tokens: int
    max_response_tokens: int
    evaluates: bool  # the training ranks also generate, for evaluation


@dataclass(frozen=True)
class Workload:
    """One step of an algorithm, over all ranks."""

    lengths: Literal["conversation", "preference", "rollout"]  # assumed distribution of sequence lengths
    sequences: int
    max_length: int  # predicted tokens of one sequence
    samples: int  # data rows per step
    token_loss: bool  # the loss is a sum over tokens, computed by the output layer
    sequences_per_sample: int = 1  # sequences of one sample share a microbatch
    token_values: int = 0  # float32 values per token of a batch: log-probs, advantages, ...
    passes: float = 1.0  # passes over the data in the whole run
    epochs: int = 1  # passes over the sequences of a step
    minibatches: int = 1  # optimizer steps per epoch
    generation: Generation | None = None
    critic: tuple[Model, Optim] | None = None
    policy_logprobs: bool = False  # a forward pass of the policy before the updates
    reference: Literal["none", "cached", "resident", "offloaded"] = "none"  # cached: log-probs are computed once, before the first step

    @property
    def collect_passes(self) -> dict[str, int]:
        """Forward passes over a step's sequences before its updates, by the name of the model; generating a sequence counts as one."""
        inference = self.policy_logprobs + (self.reference in ("resident", "offloaded")) + (self.generation is not None)
        return {"policy": inference, "critic": int(self.critic is not None)}

    @staticmethod
    def of_pairs(pairs: int, max_length: int, passes: float) -> Workload:
        """A step on preference pairs, whose halves share a microbatch."""
        return Workload("preference", 2 * pairs, max_length, pairs, token_loss=False, sequences_per_sample=2, passes=passes)
