"""The launcher: one process inside the walls that forks, for each job, a program and its judge, and outlives neither host nor mercy.

    host ── control ── launcher            the launcher never reads a job: it passes the judge's descriptor on
      └──── job ────── judge ── channel ── program

Both children are forked from a warm interpreter, each alone in a pid namespace of its own (for root: under a user of its own), so the
program can neither see, signal nor trace its judge. When the judge ends or the time is over both are killed, and with its first process a
pid namespace loses all others.
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
from engine.verify.sandbox.inside.program import Guest

# What answers and tests usually import, imported once.
WARM = (
    "abc array bisect cmath collections contextlib copy dataclasses datetime decimal enum fractions functools hashlib heapq inspect io "
    "itertools json math numbers operator queue random re statistics string struct textwrap threading time typing unicodedata"
)

FIRST_UID = 0x40000000  # far from any user of the machine; two for each launcher
OPEN_MAX = 64  # the launcher starts with three descriptors and holds a dozen
NOT_STARTED = 3  # exit code of a child whose walls did not stand


@dataclass
class Child:
    """A forked process, to be ended once."""

    pid: int

    def end(self) -> dict[str, Any]:
        """Kills it unless it is over already. Says which, its wait status and its CPU seconds."""
        pid, status, used = os.wait4(self.pid, os.WNOHANG)
        killed = pid == 0
        if killed:
            os.kill(self.pid, signal.SIGKILL)
            _, status, used = os.wait4(self.pid, 0)
        return {"killed": killed, "status": os.waitstatus_to_exitcode(status), "cpu_seconds": used.ru_utime + used.ru_stime}


class Launcher:
    """Runs jobs one at a time. `walled` is False only where the user asked for no isolation."""

    def __init__(self, control: socket.socket, limits: Limits, walled: bool, first_uid: int) -> None:
        self.control, self.limits, self.walled, self.first_uid = control, limits, walled, first_uid
        self.directory = "/tmp"
        self.home = os.pidfd_open(os.getpid()) if walled else -1

    def try_out(self) -> None:
        """Raises OSError when a child cannot get its walls."""
        _, status = os.waitpid(self.fork(self.first_uid, [], lambda: None).pid, 0)
        if status:
            raise OSError(f"a process inside ended with {os.waitstatus_to_exitcode(status)}")

    def serve(self) -> None:
        """Until the host hangs up."""
        while True:
            _, fds, _, _ = socket.recv_fds(self.control, 16, 1)
            if not fds:
                return
            with socket.socket(fileno=fds[0]) as job:
                report = self.run(job)
            self.control.sendall(json.dumps(report).encode() + b"\n")

    def run(self, job: socket.socket) -> dict[str, Any]:
        """One job; afterwards nothing of it is left, neither process nor file."""
        ours, theirs = socket.socketpair()
        alive, held = os.pipe()
        with nullcontext("/tmp") if self.walled else tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as self.directory:
            program = self.fork(self.first_uid + 1, [theirs.fileno()], lambda: Guest(theirs).serve())
            referee = self.fork(self.first_uid, [ours.fileno(), job.fileno(), held], lambda: judge.serve(ours, job))
            for end in (ours, theirs, job):
                end.close()
            os.close(held)
            try:
                in_time = self.wait(alive)
            finally:
                ends = {"judge": referee.end(), "program": program.end()}
                os.close(alive)
        return {"in_time": in_time, **ends}

    def wait(self, alive: int) -> bool:
        """Until the judge is gone (its end of the pipe closes) or the time is over; leaves at once when the host is gone."""
        end = time.monotonic() + self.limits.seconds
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([alive, self.control], [], [], left)
            if alive in ready:
                return True
            if self.control in ready:
                raise SystemExit("the host hung up")
        return False

    def fork(self, uid: int, keep: list[int], work: Callable[[], None]) -> Child:
        """A child with nothing but `keep` open that does `work` inside the walls. It never returns from here."""
        if self.walled:
            kernel.unshare(kernel.NEWPID)
        pid = os.fork()
        if pid == 0:
            _child(self, uid, keep, work)
        if self.walled:
            kernel.setns(self.home, kernel.NEWPID)
        return Child(pid)


def _child(launcher: Launcher, uid: int, keep: list[int], work: Callable[[], None]) -> None:
    code = NOT_STARTED
    try:
        os.setsid()  # kill(0) reaches a process group through pid namespaces
        if launcher.walled:
            namespaces.own_directory(launcher.limits)
        os.chdir(launcher.directory)
        _only(keep)
        if launcher.walled:
            namespaces.become_nobody(uid)
        namespaces.restrict(launcher.limits, threads=launcher.walled)
        code = 1
        work()
        code = 0
    finally:
        os._exit(code)


def _only(keep: list[int]) -> None:
    """Closes every descriptor but `keep`; output goes to a file under the file-size limit, which is the cap on it."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    name = f"output{os.getpid()}"
    output = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.unlink(name)
    for number, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(number, target)
    for number in set(range(3, OPEN_MAX)) - set(keep):
        with suppress(OSError):
            os.close(number)


def main(words: list[str]) -> None:
    """words: limits as JSON, "walled" or "unsafe"; standard input is the control socket. First says whether it can do its work."""
    control, limits, walled = socket.socket(fileno=os.dup(0)), Limits(**json.loads(words[0])), words[1] == "walled"
    first_uid = FIRST_UID + 2 * os.getpid()
    for name in WARM.split():
        importlib.import_module(name)
    try:
        if walled:
            _enter()
        launcher = Launcher(control, limits, walled, first_uid)
        launcher.try_out()
    except OSError as error:
        control.sendall(json.dumps({"refused": str(error)}).encode() + b"\n")
        return
    control.sendall(b'{"ready": true}\n')
    launcher.serve()


def _enter() -> None:
    """Returns in a child that is first in the walls' pid namespace, so that all die with it; the parent waits for its end."""
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has no namespaces")
    namespaces.enclose()
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        os._exit(0)
    kernel.prctl(kernel.DIE_WITH_PARENT, signal.SIGKILL)
    namespaces.build()
