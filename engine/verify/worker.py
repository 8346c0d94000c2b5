"""One process that judges in another's place: a response that never ends, or takes its process down, takes that one down.

The clock of a response is a kernel timer of the worker itself, SIGALRM with its default action. It runs from the first moment of the work,
stops code that never comes back to Python, needs no thread of the parent, and ends a worker whose parent is gone; an idle one ends when the
pipe does.
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

MEMORY_BYTES = 4 << 30  # of a worker's address space: an expression that would fill the machine fails here instead
GRACE_S = 15.0  # how long after its limit a worker may stay silent before it is taken for stuck
IN_FLIGHT = 8  # tasks a worker is given ahead of its answers, so that it never waits for the next one
IN_FLIGHT_CHARACTERS = 1 << 14  # and no more text than a pipe holds, so that the parent never waits either
REASON_CHARACTERS = 1000  # so that a worker never waits for its answers to be read, while the parent waits for it to take a task
START = "import sys; from engine.verify.worker import serve; serve(int(sys.argv[1]))"


class Task(NamedTuple):
    """A call of `judge(response, truth)`; `limit_s` in seconds of wall clock."""

    judge: Callable[[str, Any], Verdict]
    response: str
    truth: Any
    limit_s: float


class Worker:
    """The parent's side: tasks in, answers out, in order. A process of its own session, started without a copy of its parent's modules."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a verifier prints must not mix with what this process writes
            start_new_session=True,  # so that all it started can be killed with it, and Ctrl-C is the parent's alone
        )
        theirs.close()
        self.asked: deque[tuple[int, Task]] = deque()
        self.deadline = 0.0

    def takes(self, task: Task) -> bool:
        """Whether it should be given one more."""
        text = sum(len(waiting.response) for _, waiting in self.asked) + len(task.response)
        return not self.asked or (len(self.asked) < IN_FLIGHT and text < IN_FLIGHT_CHARACTERS)

    def ask(self, index: int, task: Task) -> None:
        """Give it a task; `answer` names it by `index`. A worker that is gone says so when its answer is awaited."""
        self.asked.append((index, task))
        if len(self.asked) == 1:
            self._wind()
        try:
            self.pipe.send(task)
        except OSError:
            self._end()

    def answer(self) -> tuple[int, Verdict | Unjudged]:
        """The answer to the oldest task. EOFError when the worker is gone: then `lost` says why."""
        try:
            answer = self.pipe.recv()
        except OSError as error:
            raise EOFError from error
        index, _ = self.asked.popleft()
        self._wind()
        return index, answer

    def overdue(self) -> bool:
        """Whether it neither answered nor was ended by its own timer."""
        return bool(self.asked) and time.monotonic() > self.deadline and not self.pipe.poll()

    def lost(self) -> tuple[int, Verdict | Unjudged]:
        """End it. What that means for the oldest task; the others were not begun."""
        overdue = self.overdue()
        code = self._end()
        index, task = self.asked.popleft()
        if code == -signal.SIGALRM:
            return index, Verdict(False, f"time limit of {task.limit_s:g} s")
        how = "stayed silent" if overdue else f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return index, Unjudged(f"its worker {how}")

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._end()
        self.pipe.close()

    def _wind(self) -> None:
        self.deadline = time.monotonic() + GRACE_S + (self.asked[0][1].limit_s if self.asked else 0.0)

    def _end(self) -> int:
        """Kill its whole session; how the worker itself ended: if that was before, a later signal does not change it."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def serve(fd: int) -> None:
    """The worker's side, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most), most))
    pipe = Connection(fd)
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        pipe.send(_answer(message))


def _answer(message: bytes) -> Verdict | Unjudged:
    try:
        task: Task = pickle.loads(message)  # imports the verifier's module: before the clock starts
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, task.limit_s)
        correct, reason = task.judge(task.response, task.truth)
        return ruling(correct, reason[:REASON_CHARACTERS])
    except Unjudged as failure:
        return Unjudged(str(failure))
    except MemoryError:
        return Verdict(False, f"memory limit of {MEMORY_BYTES >> 30} GiB")
    except Exception as error:  # a verifier's own fault is not the response's
        return Unjudged(f"{type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
