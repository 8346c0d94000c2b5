"""Messages with sampled tokens: when receives are posted, and when sends are completed. Contents are tested by test_sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.megatron.backend import Grid
from engine.megatron.tokens import TokenSender

GROUP: Any = None
DRAWN = torch.tensor([[3.0, 5.0], [-0.5, -1.5]], dtype=torch.float64)


class Sending:
    """A send whose receiver may not exist any more."""

    def __init__(self) -> None:
        self.waited = False

    def wait(self) -> None:
        self.waited = True


def sender(pp: int, pp_rank: int, in_thread: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[TokenSender, list[Sending]]:
    sends: list[Sending] = []

    def isend(*_: Any, **__: Any) -> Sending:
        sends.append(Sending())
        return sends[-1]

    monkeypatch.setattr(dist, "isend", isend)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda _: list(range(pp)))
    return TokenSender(Grid(0, 1, GROUP, pp_rank, pp, GROUP, GROUP, 0, 1, GROUP), in_thread=in_thread), sends


def test_a_receive_is_posted_when_the_result_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[int] = []
    own, _ = sender(4, 1, True, monkeypatch)
    monkeypatch.setattr(Grid, "last_stage", 3)
    monkeypatch.setattr(dist, "recv", lambda into, source, **_: posted.append(source) or into.copy_(DRAWN))
    pending = own.receive(2)
    assert posted == []
    assert torch.equal(pending(), DRAWN)
    assert posted == [3]


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_failed_generation_does_not_wait_for_receivers(in_thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own, sends = sender(3, 2, in_thread, monkeypatch)
    assert torch.equal(own.send(DRAWN)(), DRAWN)
    assert len(sends) == 2
    own.close()
    assert not any(send.waited for send in sends)
    own, sends = sender(3, 2, in_thread, monkeypatch)
    own.send(DRAWN)
    own.finish()
    assert len(sends) == 2
    assert all(send.waited for send in sends)
    own.close()


def test_completed_messages_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    own, sends = sender(2, 1, False, monkeypatch)
    for _ in range(40):
        own.send(DRAWN)
    assert len(own.sending) == 16
    assert sum(send.waited for send in sends) == 24


def test_a_pipeline_of_one_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own, sends = sender(1, 0, True, monkeypatch)
    assert torch.equal(own.send(DRAWN)(), DRAWN)
    assert own.thread is None
    assert sends == []
