"""The weights a policy started from, kept to measure how far it has moved: beside it on the device, or in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from engine.megatron.policy import Policy


class Reference(Protocol):
    """Lends a policy that speaks as the reference."""

    def activated(self) -> AbstractContextManager[Policy]: ...


class Resident:
    """A second policy with no optimizer: as much device memory as its weights."""

    def __init__(self, policy: Policy):
        self.policy = policy

    @contextmanager
    def activated(self) -> Iterator[Policy]:
        yield self.policy


class Offloaded:
    """The policy's weights as they are now, in host memory; to speak, they change places with those of the day."""

    def __init__(self, policy: Policy):
        self.policy, self.weights = policy, policy.weights_on_host()

    @contextmanager
    def activated(self) -> Iterator[Policy]:
        with self.policy.swapped_weights(self.weights):
            yield self.policy
