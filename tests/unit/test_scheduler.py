"""Continuous batching: the tokens of a request do not depend on the batch."""

from __future__ import annotations

from collections import deque

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.rollout.scheduler import Request, Scheduler, rng_keys, rng_stream

STOP = 7


def token_of(history: tuple[int, ...]) -> int:
    """A fake model: the next token is a function of all tokens in the cache."""
    return hash(history) % 10


class Rows:
    """A fake cache: the tokens of each row."""

    def __init__(self, count: int):
        self.seen: list[list[int]] = [[] for _ in range(count)]

    def step(self, slots: Scheduler) -> bool:
        wave = slots.plan()
        if wave is None:
            return False
        for row in range(wave.decode_rows):
            assert wave.positions[row] == len(self.seen[row]) < wave.max_context
            self.seen[row].append(wave.tokens[row])
        place = wave.decode_rows
        for length, rows in zip(wave.prompts, wave.rows, strict=True):
            assert wave.positions[place : place + length] == list(range(length))
            for row in rows:
                self.seen[row] = wave.tokens[place : place + length]
            place += length
        assert place == len(wave.tokens)
        live = len(wave.sampled_R)
        for source, target, positions in slots.update([token_of(tuple(seen)) for seen in self.seen[:live]], [0.0] * live):
            # The token just sampled is not in the cache yet; it is an input of the next decode batch.
            assert positions == len(self.seen[source]) + 1
            self.seen[target] = list(self.seen[source])
        return True


def alone(prompt: list[int], limit: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < limit and STOP not in tokens:
        tokens.append(token_of((*prompt, *tokens)))
    return tokens


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 3)), max_size=8),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 12),
)
def test_tokens_do_not_depend_on_the_batch(asked: list[tuple[list[int], int, int]], count: int, groups: int, prefill: int) -> None:
    requests = [Request(p, limit, rng_stream(i, k), (i, k)) for i, (p, limit, n) in enumerate(asked) for k in range(n)]
    queue = deque(requests)
    pairs = [(Scheduler(count, queue, frozenset([STOP]), prefill), Rows(count)) for _ in range(groups)]
    while sum(rows.step(slots) for slots, rows in pairs):  # a sum, so that every group does its step
        assert all(len(slots.running) <= count for slots, _ in pairs)
    for request in requests:
        assert request.tokens == alone(request.prompt, request.max_tokens)
        assert request.stopped == (request.tokens[-1] == STOP)
        assert len(request.logprobs) == len(request.tokens)


def test_a_request_can_stop_at_a_stop_condition() -> None:
    """It stops at the token that completes the condition, in any batch. Without it, the request runs to its limit."""
    requests = [Request([0], 6, rng_stream(i), (i, 0)) for i in range(3)]
    slots = Scheduler(2, deque(requests), frozenset([STOP]), 4, until=lambda tokens: tokens[-2:] == [1, 2])
    message = {0: [1, 1, 2, 5], 1: [2, 1, 3, 1, 1, 0], 2: [1, STOP, 1]}
    while slots.plan():
        slots.update([message[request.index[0]][len(request.tokens)] for request in slots.running], [0.0] * len(slots.running))
    assert [request.tokens for request in requests] == [[1, 1, 2], [2, 1, 3, 1, 1, 0], [1, STOP]]
    assert [request.stopped for request in requests] == [True, False, True]


def test_random_streams_differ_in_every_key_and_in_their_order() -> None:
    names = [(s, p, k) for s in range(4) for p in range(20) for k in range(4)]
    assert len({int(rng_stream(*name)) for name in names}) == len(names)
    assert rng_stream(1, 2) != rng_stream(2, 1)
    assert len({tuple(key) for key in rng_keys([rng_stream(0)] * 1000, list(range(1000))).tolist()}) == 1000
    assert rng_keys([rng_stream(5)], [3]).tobytes() == rng_keys([rng_stream(4), rng_stream(5)], [9, 3])[1:].tobytes()
    assert rng_keys([], []).shape == (0, 2)
    assert rng_keys([rng_stream(0)], [0]).dtype == np.int32
