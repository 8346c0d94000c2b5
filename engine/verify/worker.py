"""A worker process that judges responses, so that one that hangs or crashes its verifier does not affect the parent.

The time limit of a response is a kernel timer in the worker: SIGPROF with its default action, which ends the process. It counts CPU time,
so that a busy machine makes no response wrong. It starts with the work, interrupts code that never returns to Python, needs no thread in
the parent, and ends a worker whose parent is gone. A second timer, SIGALRM, ends a worker that waits instead of working. An idle worker
ends when its pipe is closed.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from engine.verify.verdict import Unjudged, Verdict, ruling

MEMORY_BYTES = 4 << 30  # of a worker's address space, so that a huge expression does not exhaust the machine's memory
WALL_FACTOR = 10.0  # a task may take this many times its CPU limit of wall clock, because the machine may be busy
START_S = 120.0  # seconds for a worker to start; not part of a response's time
GRACE_S = 15.0  # seconds after its wall clock limit at which an unresponsive worker is considered stuck
IN_FLIGHT = 8  # tasks queued per worker, so that it does not wait for the next one
IN_FLIGHT_CHARACTERS = 1 << 14  # at most what a pipe holds, so that the parent does not block on sending
REASON_CHARACTERS = 1000  # bounds results, so that the worker does not block on sending while the parent blocks on sending it a task
START = "import sys; from engine.verify.worker import serve; serve(int(sys.argv[1]))"


class Task(NamedTuple):
    """A call of `judge(response, truth)`; `limit_s` in seconds of CPU time."""

    judge: Callable[[str, Any], Verdict]
    response: str
    truth: Any
    limit_s: float


class Worker:
    """The parent's handle of a worker: takes tasks, returns results in order. The process is spawned in a new session."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=2,  # output of a verifier must not mix with this process's stdout
            start_new_session=True,  # to kill it with all its children, and to keep Ctrl-C from it
        )
        theirs.close()
        self.tasks: deque[tuple[int, Task]] = deque()
        self.started = False
        self.deadline = time.monotonic() + START_S

    def accepts(self, task: Task) -> bool:
        """Whether its queue has room for `task`."""
        text = sum(len(waiting.response) for _, waiting in self.tasks) + len(task.response)
        return not self.tasks or (len(self.tasks) < IN_FLIGHT and text < IN_FLIGHT_CHARACTERS)

    def submit(self, index: int, task: Task) -> None:
        """Send a task; `answer` returns its result with `index`. If the worker has ended, `answer` raises."""
        self.tasks.append((index, task))
        if len(self.tasks) == 1:
            self._reset_deadline()
        try:
            self.pipe.send(task)
        except OSError:
            self._end()

    def answer(self) -> tuple[int, Verdict | Unjudged] | None:
        """(index, result) of the oldest task; None if it has just started. Raises EOFError if the worker has ended; then call `lost`."""
        try:
            answer = self.pipe.recv()
        except OSError as error:
            raise EOFError from error
        if not self.started:
            self.started = True
            return self._reset_deadline()
        index, _ = self.tasks.popleft()
        self._reset_deadline()
        return index, answer

    def overdue(self) -> bool:
        """Whether it has neither returned a result nor been ended by its timer."""
        return bool(self.tasks) and time.monotonic() > self.deadline and not self.pipe.poll()

    def lost(self) -> tuple[int, Verdict | Unjudged]:
        """End the worker; (index, result) of its oldest task. The other tasks were not started."""
        overdue = self.overdue()
        code = self._end()
        index, task = self.tasks.popleft()
        if code == -signal.SIGPROF:
            return index, Verdict(False, f"time limit of {task.limit_s:g} s")
        cause = "did not respond" if overdue else f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        return index, Unjudged(f"its worker {cause}")

    def close(self) -> None:
        """End the worker, whatever it is doing."""
        self._end()
        self.pipe.close()

    def _reset_deadline(self) -> None:
        if self.started:
            self.deadline = time.monotonic() + GRACE_S + (WALL_FACTOR * self.tasks[0][1].limit_s if self.tasks else 0.0)

    def _end(self) -> int:
        """Kill the session. Returns the worker's exit status, which is the earlier one if it had already ended."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def serve(fd: int) -> None:
    """The worker's main loop, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF, signal.SIGALRM])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard), hard))
    pipe = Connection(fd)
    pipe.send("started")
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        pipe.send(_answer(message))


def _answer(message: bytes) -> Verdict | Unjudged:
    try:
        task: Task = pickle.loads(message)  # imports the verifier's module, before the timer starts
        _set_timers(task.limit_s)
        correct, reason = task.judge(task.response, task.truth)
        return ruling(correct, reason[:REASON_CHARACTERS])
    except Unjudged as failure:
        return Unjudged(str(failure))
    except MemoryError:
        return Verdict(False, f"memory limit of {MEMORY_BYTES >> 30} GiB")
    except Exception as error:  # a bug of the verifier is not the response's fault
        return Unjudged(f"{type(error).__name__}: {error}")
    finally:
        _set_timers(0)


def _set_timers(limit_s: float) -> None:
    """0: no limit."""
    for timer, number, seconds in (
        (signal.ITIMER_PROF, signal.SIGPROF, limit_s),
        (signal.ITIMER_REAL, signal.SIGALRM, WALL_FACTOR * limit_s),
    ):
        signal.signal(number, signal.SIG_DFL)
        signal.setitimer(timer, seconds)
