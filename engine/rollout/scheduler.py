"""Continuous batching: which sequence has which slot, and what is computed next. A function of the requests and sampled tokens alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engine.megatron.decode import DecodeBatch


@dataclass(eq=False)
class Request:
    """One sequence to generate, and its tokens so far."""

    prompt: list[int]
    max_tokens: int
    rng_stream: np.uint64  # see `rng_stream`
    index: tuple[int, int]  # (prompt, sample)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False  # ended by a stop token

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


class Scheduler:
    """A group of slots that takes requests from a queue. Rows 0 ... len(running) - 1 are running: decoding reads them as a view."""

    def __init__(
        self,
        max_num_seqs: int,
        waiting: deque[Request],
        stop: frozenset[int],
        prefill: int,
        until: Callable[[list[int]], bool] | None = None,
    ):
        self.max_num_seqs, self.waiting, self.stop, self.prefill, self.until = max_num_seqs, waiting, stop, prefill, until
        self.running: list[Request] = []

    def plan(self) -> DecodeBatch | None:
        """The next batch: a token per running sequence, and waiting prompts, at least one, within max_num_seqs and the prefill budget."""
        decode = len(self.running)
        tokens = [request.tokens[-1] for request in self.running]
        positions = [request.length - 1 for request in self.running]
        wanted, prompts, rows = list(range(decode)), [], []
        while (
            self.waiting
            and len(self.running) < self.max_num_seqs
            and (not prompts or sum(prompts) + len(self.waiting[0].prompt) <= self.prefill)
        ):
            mates = self._admit()
            rows.append(list(range(len(self.running), len(self.running) + len(mates))))
            self.running += mates
            prompt = mates[0].prompt
            prompts.append(len(prompt))
            tokens += prompt
            positions += range(len(prompt))
            wanted += [len(tokens) - 1] * len(mates)
        if not tokens:
            return None
        keys_R2 = rng_keys([request.rng_stream for request in self.running], [len(request.tokens) for request in self.running])
        return DecodeBatch(tokens, positions, decode, max(positions[:decode], default=0) + 1, prompts, rows, wanted, keys_R2)

    def _admit(self) -> list[Request]:
        """The next request, and those after it with the same prompt, which is computed once."""
        mates = [self.waiting.popleft()]
        while self.waiting and self.waiting[0].index[0] == mates[0].index[0] and len(self.running) + len(mates) < self.max_num_seqs:
            mates.append(self.waiting.popleft())
        return mates

    def update(self, tokens_R: list[int], logprobs_R: list[float]) -> list[tuple[int, int, int]]:
        """Append a token to each running sequence, and remove finished sequences. Returns (from, to, positions) of rows that move."""
        for request, token, logprob in zip(self.running, tokens_R, logprobs_R, strict=True):
            request.tokens.append(token)
            request.logprobs.append(logprob)
            request.stopped = token in self.stop or (self.until is not None and self.until(request.tokens))
        moves, row = [], 0
        while row < len(self.running):
            if not self._done(self.running[row]):
                row += 1
                continue
            last = self.running.pop()
            if row < len(self.running):
                self.running[row] = last
                if not self._done(last):
                    moves.append((len(self.running), row, last.length))
        return moves

    def _done(self, request: Request) -> bool:
        return request.stopped or len(request.tokens) >= request.max_tokens


MULTIPLIER, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


def rng_stream(*names: int) -> np.uint64:
    """The random stream of (seed, step, prompt, sample): a 64-bit hash of the numbers in order (SplitMix64)."""
    state = 0
    for name in names:
        state = (state ^ (name & MASK)) + MULTIPLIER & MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
        state ^= state >> 31
    return np.uint64(state)


def rng_keys(noises: list[np.uint64], drawn: list[int]) -> np.ndarray:
    """The key of the next sample of each stream, int32 [R, 2]: SplitMix64's output at that position."""
    with np.errstate(over="ignore"):
        state = np.array(noises, dtype=np.uint64) + np.uint64(MULTIPLIER) * (np.array(drawn, dtype=np.uint64) + np.uint64(1))
        state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (state ^ state >> np.uint64(31)).view(np.int32).reshape(-1, 2)
