"""Learning from a fixed set of samples: what SFT, the reward model and DPO share once they have started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from engine.batching.build import batch
from engine.megatron.policy import Learner, Policy
from engine.types import LossFunction, Sample


@dataclass(frozen=True)
class Supervised:
    """An algorithm under way. `batches(step)` are the samples of a step, a function of (seed, step), the same on every rank."""

    policy: Policy
    loss: LossFunction
    batches: Callable[[int], list[Sample]]
    steps: int
    held_out: list[Sample]
    budget: int  # tokens of a microbatch
    tokenizer: PreTrainedTokenizerFast
    notes: list[str]
    data: list[tuple[str, str]]  # path of every source, and the digest of its samples

    @property
    def learners(self) -> list[Learner]:
        """The run's policy alone."""
        return [Learner("", self.policy, self.loss)]

    def collect(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        """The samples of `step`; there is nothing to say of them."""
        return self.batches(step), {}

    def minibatches(self, step: int, samples: list[Sample]) -> list[list[Sample]]:
        """One optimizer step on all of them."""
        return [samples]

    def evaluate(self) -> dict[str, float]:
        """The loss function's metrics on held-out samples, where there are any."""
        if not self.held_out:
            return {}
        return self.policy.evaluate(batch(self.held_out, self.budget, **self.policy.batch_options), self.loss)

    def extra_state(self) -> dict[str, bytes]:
        """All there is to go on with is in the weights."""
        return {}

    def close(self) -> None:
        """It holds nothing but the policy, which is not its own."""
