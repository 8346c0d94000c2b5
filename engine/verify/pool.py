"""Judges responses in worker processes, which may crash or be killed at a time limit without losing the batch."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from functools import lru_cache
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from engine.verify.verdict import Unjudged, Verdict, Verifier, ruling
from engine.verify.worker import Task, Worker

ATTEMPTS = 2  # per response, if its worker is lost
LOG = logging.getLogger(__name__)


class Case(NamedTuple):
    """A response to judge, with its verifier and a ground truth that the verifier's `check` accepts."""

    verifier: Verifier
    response: str
    truth: Any


class Pool:
    """Worker processes, started on first use and kept until `close`.

    workers: number of processes; None: one per available core. max_dropped: the share of a batch, rounded up, that may remain unjudged.
    Raises ValueError if an argument is out of range.
    """

    def __init__(self, workers: int | None = None, max_dropped: float = 0.01):
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers} must be at least 1; use None for one per core")
        if not 0 <= max_dropped <= 1:
            raise ValueError(f"max_dropped={max_dropped} must be in [0, 1]; it is a share of the batch")
        self.size = workers or len(os.sched_getaffinity(0))
        self.max_dropped = max_dropped
        self.dropped = 0  # responses that could not be judged, over all batches
        self._workers: list[Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The next batch starts new ones."""
        while self._workers:
            self._workers.pop().close()

    def verify(self, cases: Sequence[Case]) -> list[Verdict | Unjudged]:
        """The result of each case, in order, independent of the number of workers.

        A response that exceeds its verifier's time limit is wrong. If its worker is lost or cannot judge it, it is retried once and
        then dropped: its result is an Unjudged with the reason. Raises Unjudged if more than `max_dropped` are dropped.
        """
        with self._lock:
            batch = _Batch(cases)
            try:
                self._run(batch)
            except BaseException:
                self.close()  # or a later batch would receive results of this one
                raise
        answers = [answer for answer in batch.answers if answer is not None]
        assert len(answers) == len(cases)
        self._count(answers)
        return answers

    def _run(self, batch: _Batch) -> None:
        if batch.waiting and not self._workers:
            self._workers = [Worker() for _ in range(self.size)]
        self._feed(batch)
        batch.judge_inline()
        while busy := [worker for worker in self._workers if worker.tasks]:
            deadline = min(worker.deadline for worker in busy)
            ready = wait([worker.pipe for worker in busy], timeout=max(0.0, deadline - time.monotonic()))
            for worker in busy:
                if worker.pipe in ready:
                    self._receive(worker, batch)
                elif worker.overdue():
                    self._replace(worker, batch)
            self._feed(batch)

    def _feed(self, batch: _Batch) -> None:
        for worker in self._workers:
            while batch.waiting and worker.accepts(task := batch.task(batch.waiting[0])):
                worker.submit(batch.waiting.popleft(), task)

    def _receive(self, worker: Worker, batch: _Batch) -> None:
        try:
            answer = worker.answer()
        except EOFError:
            self._replace(worker, batch)
        else:
            if answer:
                batch.take(*answer)

    def _replace(self, worker: Worker, batch: _Batch) -> None:
        batch.take(*worker.lost())
        batch.waiting.extendleft(index for index, _ in reversed(worker.tasks))
        worker.close()
        self._workers[self._workers.index(worker)] = Worker()

    def _count(self, answers: Sequence[Verdict | Unjudged]) -> None:
        dropped = [(index, answer) for index, answer in enumerate(answers) if isinstance(answer, Unjudged)]
        self.dropped += len(dropped)
        for index, answer in dropped:
            LOG.warning("response %d of %d dropped: %s", index, len(answers), answer)
        if len(dropped) > math.ceil(self.max_dropped * len(answers)):
            index, answer = dropped[0]
            raise Unjudged(
                f"{len(dropped)} of {len(answers)} responses could not be judged, more than max_dropped={self.max_dropped:g}; "
                f"the first is response {index}: {answer}"
            )


class _Batch:
    """The cases of a batch, their results so far, and the indices that wait for a worker."""

    def __init__(self, cases: Sequence[Case]):
        self.cases = cases
        self.answers: list[Verdict | Unjudged | None] = [None] * len(cases)
        self.waiting = deque(index for index, case in enumerate(cases) if not case.verifier.inline)
        self.attempts: Counter[int] = Counter()

    def task(self, index: int) -> Task:
        verifier, response, truth = self.cases[index]
        return Task(verifier.judge, response, truth, verifier.limit_s)

    def judge_inline(self) -> None:
        for index, (verifier, response, truth) in enumerate(self.cases):
            if verifier.inline:
                self.answers[index] = ruling(*verifier.judge(response, truth))

    def take(self, index: int, answer: Verdict | Unjudged) -> None:
        """Store a result, or queue the case again if it is Unjudged and has an attempt left."""
        self.attempts[index] += 1
        if isinstance(answer, Unjudged) and self.attempts[index] < ATTEMPTS:
            self.waiting.append(index)
        else:
            self.answers[index] = answer


def alone(verifier: Verifier, response: str, truth: Any) -> Verdict:
    """Judge one response in a worker of this process, under a time limit. Thread-safe. Raises Unjudged if the worker is lost."""
    answer = _own_pool(os.getpid()).verify([Case(verifier, response, truth)])[0]
    if isinstance(answer, Unjudged):
        raise answer
    return answer


@lru_cache(maxsize=1)
def _own_pool(pid: int) -> Pool:
    """The worker of `alone`. Keyed by pid, because a forked child must not share its parent's pipe."""
    return Pool(workers=1)
