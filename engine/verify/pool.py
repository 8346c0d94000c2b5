"""Many responses judged at once, in workers that may be lost; and one, in a worker of its own."""

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

ATTEMPTS = 2  # at a response whose worker is lost
LOG = logging.getLogger(__name__)


class Case(NamedTuple):
    """One response to judge, by a verifier, against a truth that its `check` has accepted."""

    verifier: Verifier
    response: str
    truth: Any


class Pool:
    """Worker processes, started when they are first needed and kept until `close`.

    `max_dropped` is the share of a batch, rounded up, that may stay unjudged; a batch with more of them raises.
    """

    def __init__(self, workers: int | None = None, max_dropped: float = 0.01):
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers} must be at least 1; None means one for each core")
        if not 0 <= max_dropped <= 1:
            raise ValueError(f"max_dropped={max_dropped} must be a share of the batch from 0 to 1")
        self.size = workers or len(os.sched_getaffinity(0))
        self.max_dropped = max_dropped
        self.dropped = 0  # responses that no worker could judge, of all batches
        self._workers: list[Worker] = []
        self._turn = threading.Lock()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; the next batch starts others."""
        while self._workers:
            self._workers.pop().close()

    def verify(self, cases: Sequence[Case]) -> list[Verdict | Unjudged]:
        """An answer for each case, in order, the same however many workers there are.

        A response over its verifier's limit is wrong. One whose worker is lost, or that could not be judged, is tried again in another
        worker and then dropped: its answer is an Unjudged that says why. Raises Unjudged when more than `max_dropped` are.
        """
        with self._turn:
            batch = _Batch(cases)
            try:
                self._run(batch)
            except BaseException:
                self.close()  # or a later batch would hear answers to this one
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
        while busy := [worker for worker in self._workers if worker.asked]:
            soonest = min(worker.deadline for worker in busy)
            heard = wait([worker.pipe for worker in busy], timeout=max(0.0, soonest - time.monotonic()))
            for worker in busy:
                if worker.pipe in heard:
                    self._hear(worker, batch)
                elif worker.overdue():
                    self._replace(worker, batch)
            self._feed(batch)

    def _feed(self, batch: _Batch) -> None:
        for worker in self._workers:
            while batch.waiting and worker.takes(task := batch.task(batch.waiting[0])):
                worker.ask(batch.waiting.popleft(), task)

    def _hear(self, worker: Worker, batch: _Batch) -> None:
        try:
            batch.take(*worker.answer())
        except EOFError:
            self._replace(worker, batch)

    def _replace(self, worker: Worker, batch: _Batch) -> None:
        batch.take(*worker.lost())
        batch.waiting.extendleft(index for index, _ in reversed(worker.asked))
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
    """What is asked, what is answered, and what still waits."""

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
        """Keep an answer, or ask again for one that is none."""
        self.attempts[index] += 1
        if isinstance(answer, Unjudged) and self.attempts[index] < ATTEMPTS:
            self.waiting.append(index)
        else:
            self.answers[index] = answer


def alone(verifier: Verifier, response: str, truth: Any) -> Verdict:
    """Judge one response in this process's own worker, from any thread, under the verifier's limit. Raises Unjudged when that is lost."""
    answer = _own_pool(os.getpid()).verify([Case(verifier, response, truth)])[0]
    if isinstance(answer, Unjudged):
        raise answer
    return answer


@lru_cache(maxsize=1)
def _own_pool(pid: int) -> Pool:
    """One worker for `alone`; a forked child, which has another `pid`, must not share its parent's pipe."""
    return Pool(workers=1)
