"""Training on a fixed set of samples: what SFT, the reward model and DPO share once they have started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.batching.build import batch
from engine.data.template import ChatTemplate
from engine.megatron.policy import Learner, Policy
from engine.types import LossFunction, Sample


@dataclass(frozen=True)
class Supervised:
    """A started run on fixed samples; see `Algorithm` in engine/train.py. `batches(step)` are the samples of a step: a function of
    (seed, step), equal on every rank."""

    policy: Policy
    loss: LossFunction
    batches: Callable[[int], list[Sample]]
    steps: int
    held_out: list[Sample]
    budget: int  # tokens of a microbatch
    chat: ChatTemplate
    stop: tuple[int, ...]
    notes: list[str]
    data: list[tuple[str, str]]  # path of every source, and the digest of its samples

    @property
    def learners(self) -> list[Learner]:
        """The run's policy alone."""
        return [Learner("policy", self.policy, self.loss)]

    @property
    def headline(self) -> Sequence[str]:
        """The metrics of the printed step line; those of pairs are missing in SFT."""
        return "policy/loss", "reward/accuracy", "reward/margin", "policy/grad_norm", "policy/lr"

    def collect(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        """The samples of `step`, without metrics."""
        return self.batches(step), {}

    def minibatches(self, step: int, samples: list[Sample]) -> list[list[Sample]]:
        """One optimizer step on all of them."""
        return [samples]

    def evaluate(self) -> dict[str, float]:
        """The loss function's metrics on the held-out samples; none without held-out samples."""
        if not self.held_out:
            return {}
        (learner,) = self.learners
        return learner.grouped(self.policy.evaluate(batch(self.held_out, self.budget, **self.policy.batch_options), self.loss))

    def extra_state(self) -> dict[str, bytes]:
        """Nothing: the checkpoint of the weights and the step are enough to resume."""
        return {}

    def close(self) -> None:
        """Nothing to release: the policy belongs to the caller."""
