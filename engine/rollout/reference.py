"""The reference model of the KL penalty: the initial weights, on the device or in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from engine.megatron.policy import Policy


class Reference(Protocol):
    """Gives access to a policy with the reference weights."""

    def activated(self) -> AbstractContextManager[Policy]: ...


class Resident:
    """A second policy without an optimizer. Takes the device memory of its weights."""

    def __init__(self, policy: Policy):
        self.policy = policy

    @contextmanager
    def activated(self) -> Iterator[Policy]:
        yield self.policy


class Offloaded:
    """A copy of the policy's current weights in host memory. They are swapped with the policy's weights while they are used."""

    def __init__(self, policy: Policy):
        self.policy, self.weights = policy, policy.weights_on_host()

    @contextmanager
    def activated(self) -> Iterator[Policy]:
        with self.policy.swapped_weights(self.weights):
            yield self.policy
