"""The launcher: a process inside the sandbox that forks a program process and a tests process (judge) for each job.

    host ── control ── launcher            the launcher never reads a job: it passes the descriptor to the judge
      └──── job ────── judge ── channel ── program

Both children are forked from a warm interpreter, each into its own pid namespace (and, when run as root, under its own user), so the
program cannot see, signal or trace the judge. Both are killed when the judge ends or a limit is exceeded; when the first process of a
pid namespace ends, the kernel kills all others in it. The launcher ends with the host.

The launcher enforces the CPU limit by reading the processes' CPU clocks. RLIMIT_CPU would end a process with the same signal as the
machine does when it runs out of memory, and a program could choose to look like a failure of the machine.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from engine.verify.sandbox.inside import judge, kernel, namespaces
from engine.verify.sandbox.inside.namespaces import Limits
from engine.verify.sandbox.inside.program import ProgramServer

# Modules that programs and tests often import, imported once before forking. Some need shared libraries that are outside the sandbox.
WARM = (
    "abc array asyncio bisect bz2 cmath collections contextlib copy dataclasses datetime decimal enum fractions functools hashlib heapq "
    "inspect io itertools json lzma math numbers operator queue random re sqlite3 statistics string struct textwrap threading time typing "
    "unicodedata uuid zlib"
)

FIRST_UID = 0x40000000  # outside the usual range of user ids; each launcher uses two
OPEN_MAX = 64  # upper bound on descriptor numbers: the launcher holds about a dozen
NOT_STARTED = 3  # exit code of a child that could not be isolated
END_S = 1.0  # for a process to end by itself after the tests, so that its own exit status is seen
POLL_S = 0.1  # how often limits are checked
BUSY_S = 0.05  # a job that uses less CPU time than this within its idle limit is waiting


@dataclass
class Child:
    """A forked process."""

    pid: int

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far, exact. Only Linux tells; elsewhere 0, and only the time limit applies."""
        if sys.platform != "linux":
            return 0.0
        return time.clock_gettime(~self.pid << 3 | 2)  # the id of a process's CPU clock: CPUCLOCK_SCHED in Linux's posix-timers.h

    def end(self, patience: float) -> dict[str, Any]:
        """Waits up to `patience` seconds for it to end, then kills it. Returns how it ended. Call once."""
        deadline = time.monotonic() + patience
        while not (killed := time.monotonic() >= deadline) and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            time.sleep(0.001)
        if killed:
            os.kill(self.pid, signal.SIGKILL)
        _, status, used = os.wait4(self.pid, 0)
        return {"killed": killed, "status": os.waitstatus_to_exitcode(status), "memory": used.ru_maxrss // 1024}


class Launcher:
    """Runs jobs one at a time. `isolated` is False only if the user disabled isolation."""

    def __init__(self, control: socket.socket, limits: Limits, isolated: bool, first_uid: int) -> None:
        self.control, self.limits, self.isolated, self.first_uid = control, limits, isolated, first_uid
        self.directory = "/tmp"
        self.home = os.pidfd_open(os.getpid()) if isolated else -1

    def check_isolation(self) -> None:
        """Raises OSError if a child cannot be isolated."""
        _, status = os.waitpid(self.fork(self.first_uid, [], lambda: None).pid, 0)
        if status:
            raise OSError(f"a process inside exited with status {os.waitstatus_to_exitcode(status)}")

    def serve(self) -> None:
        """Runs jobs until the host closes the control socket."""
        while True:
            _, fds, _, _ = socket.recv_fds(self.control, 16, 1)
            if not fds:
                return
            with socket.socket(fileno=fds[0]) as job:
                report = self.run(job)
            self.control.sendall(json.dumps(report).encode() + b"\n")

    def run(self, job: socket.socket) -> dict[str, Any]:
        """Runs one job and removes its processes and files. Returns whether it started, the limit it exceeded, and how both ended."""
        ours, theirs = socket.socketpair()
        alive, held = os.pipe()
        with nullcontext("/tmp") if self.isolated else tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as self.directory:
            program = self.fork(self.first_uid + 1, [theirs.fileno()], lambda: ProgramServer(theirs).serve())
            tests = self.fork(self.first_uid, [ours.fileno(), job.fileno(), held], lambda: judge.serve(ours, job, held))
            for end in (ours, theirs, job):
                end.close()
            os.close(held)
            patience, report = 0.0, {"started": False, "exceeded": None}
            try:
                report["started"] = self.readable(alive, self.limits.start_seconds) and os.read(alive, 1) != b""
                report["exceeded"] = self.exceeded(alive, {"the tests": tests, "the program": program}) if report["started"] else None
                patience = 0.0 if report["exceeded"] else END_S
            finally:
                report |= {"judge": tests.end(patience), "program": program.end(patience)}
                os.close(alive)
        return report

    def readable(self, alive: int, seconds: float) -> bool:
        """Whether the judge has written to its pipe or ended, within `seconds`. Raises SystemExit if the host has ended."""
        ready, _, _ = select.select([alive, self.control], [], [], seconds)
        if self.control in ready:
            raise SystemExit("the host closed the control socket")
        return bool(ready)

    def exceeded(self, alive: int, children: dict[str, Child]) -> str | None:
        """Waits for the judge to end. The limit that the job exceeds before that, in words, or None."""
        limits, started = self.limits, time.monotonic()
        progress, mark = started, 0.0
        while not self.readable(alive, POLL_S):
            now, used = time.monotonic(), {name: child.cpu_seconds() for name, child in children.items()}
            for name, seconds in used.items():
                if seconds > limits.cpu_seconds:
                    return f"{name} exceeded the limit of {limits.cpu_seconds:g} s of CPU time"
            if sum(used.values()) > mark + BUSY_S:
                progress, mark = now, sum(used.values())
            if now - progress > limits.idle_seconds:
                return f"waited for {limits.idle_seconds:g} s, the limit without work"
            if now - started > limits.seconds:
                return f"exceeded the time limit of {limits.seconds:g} s"
        return None

    def fork(self, uid: int, keep: list[int], work: Callable[[], None]) -> Child:
        """Forks an isolated child that runs `work` with only the descriptors `keep`. The child never returns from this call."""
        if self.isolated:
            kernel.unshare(kernel.NEWPID)
        pid = os.fork()
        if pid == 0:
            _child(self, uid, keep, work)
        if self.isolated:
            kernel.setns(self.home, kernel.NEWPID)
        return Child(pid)


def _child(launcher: Launcher, uid: int, keep: list[int], work: Callable[[], None]) -> None:
    code = NOT_STARTED
    try:
        os.setsid()  # kill(0) reaches a process group through pid namespaces
        if launcher.isolated:
            namespaces.own_directory(launcher.limits)
        os.chdir(launcher.directory)
        _close_descriptors(keep)
        if launcher.isolated:
            namespaces.become_nobody(uid)
        if sys.platform == "linux":
            kernel.prctl(kernel.DIE_WITH_PARENT, signal.SIGKILL)  # forgotten when the user changes, so not earlier
        namespaces.restrict(launcher.limits, threads=launcher.isolated)
        code = 1
        work()
        code = 0
    finally:
        os._exit(code)


def _close_descriptors(keep: list[int]) -> None:
    """Closes every descriptor except `keep`. Output goes to an unlinked file, bounded by the file-size limit."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    name = f"output{os.getpid()}"
    output = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.unlink(name)
    for number, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(number, target)
    for number in set(range(3, OPEN_MAX)) - set(keep):
        with suppress(OSError):
            os.close(number)


def main(arguments: list[str]) -> None:
    """arguments: limits as JSON, then "isolated" or "unsafe". Standard input is the control socket.

    The first message is {"ready": true}, or {"refused": reason} if processes cannot be isolated.
    """
    control, limits, isolated = socket.socket(fileno=os.dup(0)), Limits(**json.loads(arguments[0])), arguments[1] == "isolated"
    first_uid = FIRST_UID + 2 * os.getpid()
    for name in WARM.split():
        with suppress(ImportError):  # of a Python that was built without it
            importlib.import_module(name)
    try:
        if isolated:
            _enter()
        launcher = Launcher(control, limits, isolated, first_uid)
        launcher.check_isolation()
    except OSError as error:
        control.sendall(json.dumps({"refused": str(error)}).encode() + b"\n")
        return
    control.sendall(b'{"ready": true}\n')
    launcher.serve()


def _enter() -> None:
    """Returns in a child that is the first process of a new pid namespace, so that all others end with it. The parent waits for it."""
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has no namespaces")
    namespaces.enclose()
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        os._exit(0)
    kernel.prctl(kernel.DIE_WITH_PARENT, signal.SIGKILL)
    namespaces.build()
