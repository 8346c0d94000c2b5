"""Runs a program against tests where it can do no harm: the host's side of engine/verify/sandbox/inside.

What holds it: no network, no other process in sight, no file but the standard library's (read-only) and an empty /tmp of its own; limits
on CPU, memory, files and threads; a list of allowed system calls (x86-64 and aarch64); an unprivileged user; the end of its pid namespace
when its time is over.

What its verdict rests on: program and tests run in two processes. The tests' process is told the run's nonce and speaks to the host; the
program's has one socket, on which it is asked for values and answers with plain data. It hears arguments and never what is expected of
them; there is no assert, exit, frame, descriptor or marker within its reach that decides. What remains possible: answering by a table of
the tests it has learnt by heart; guessing; a test that compares two objects of the program's own classes, or calls a method of one, asks
the program; a test that uses a helper which only the program defines trusts that helper; and faults of the kernel or of CPython.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.verify.sandbox.inside.namespaces import Limits
from engine.verify.verdict import Unjudged, Verdict

ROOT = str(Path(__file__).parents[3])
START = "import sys; sys.path.append(sys.argv.pop(1)); from engine.verify.sandbox.inside.launcher import main; main(sys.argv[1:])"
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}  # no more: what the host's environment holds is not the program's business
GRACE = 10.0  # seconds over the limit after which the launcher itself is taken for dead
SAID_MAX = 1 << 16  # bytes of a verdict


class NoIsolation(Unjudged, ValueError):
    """This machine lets us build no sandbox: nothing can be judged on it, and the user has to decide."""


class Sandbox:
    """One launcher process, one program at a time; threads wait for each other. `unsafe=True` leaves out every namespace and the user.

    Raises NoIsolation when the walls cannot be built here.
    """

    def __init__(self, limits: Limits = Limits(), *, unsafe: bool = False) -> None:  # noqa: B008  (frozen)
        self.limits = limits
        self.lock = threading.Lock()
        self.control, theirs = socket.socketpair()
        words = [sys.executable, "-S", "-s", "-P", "-B", "-c", START, ROOT, json.dumps(asdict(limits)), "unsafe" if unsafe else "walled"]
        quiet = subprocess.DEVNULL
        with theirs:
            self.launcher = subprocess.Popen(
                words, stdin=theirs.fileno(), stdout=quiet, stderr=quiet, env=ENVIRONMENT, cwd="/", start_new_session=True
            )
        self.lines = self.control.makefile("rb")
        try:
            refused = self._hear(GRACE).get("refused")
        except OSError as error:
            self.close()
            raise Unjudged(f"the sandbox did not start: {error}") from error
        if refused is not None:
            self.close()
            raise NoIsolation(
                f"verifier=code: this machine gives programs no isolation ({refused}); run as root or allow unprivileged user namespaces, "
                "or accept the risk with --unsafe-code"
            )

    def run(self, program: str, tests: str, setup: str = "", entry_point: str | None = None) -> Verdict:
        """Loads `program`, then runs `tests` beside it, after `setup`; calls the tests' check(entry_point) if there is one.

        Raises Unjudged when the machine fails; the sandbox is then closed.
        """
        nonce = secrets.token_hex(16)
        job = {"nonce": nonce, "program": program, "tests": tests, "setup": setup, "entry_point": entry_point}
        with self.lock:
            try:
                return self._verdict(nonce, *self._exchange(json.dumps(job).encode()))
            except (OSError, ValueError, Unjudged) as error:
                self.close()
                raise Unjudged(f"the sandbox failed: {error}") from error

    def _exchange(self, job: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
        ours, theirs = socket.socketpair()
        patience = self.limits.seconds + GRACE
        with ours:
            with theirs:
                socket.send_fds(self.control, [b"j"], [theirs.fileno()])
            ours.settimeout(patience)
            try:
                ours.sendall(job)
                ours.shutdown(socket.SHUT_WR)
                said = ours.makefile("rb").read(SAID_MAX)
            except (BrokenPipeError, ConnectionResetError):
                said = b""  # the judge is gone; the report says how
        return json.loads(said or b"{}"), self._hear(patience)

    def _hear(self, seconds: float) -> dict[str, Any]:
        self.control.settimeout(seconds)
        line = self.lines.readline()
        if not line:
            raise OSError(f"the launcher ended with {self.launcher.wait(GRACE)}")
        return json.loads(line)

    def _verdict(self, nonce: str, said: dict[str, Any], report: dict[str, Any]) -> Verdict:
        judge, program = report["judge"], report["program"]
        if said:
            assert said["nonce"] == nonce
        if said.get("correct"):
            return Verdict(True, said["reason"])
        for process, name in ((program, "the program"), (judge, "the tests")):
            # Half, because the kernel limits by ticks and reports by the clock.
            if _was_killed(process) and process["cpu_seconds"] > self.limits.cpu_seconds / 2:
                return Verdict(False, f"{name} took over {self.limits.cpu_seconds} s of CPU time")
        if not report["in_time"]:
            return Verdict(False, f"over {self.limits.seconds:g} s")
        if _was_killed(program):
            raise Unjudged("something killed the program from outside; is the machine out of memory?")
        if not said and judge["status"] in (1, 3, -9):
            raise Unjudged(f"the tests' process ended with {judge['status']}")
        if not said or (said["lost"] and not program["killed"]):
            return Verdict(False, f"the program left before its tests were over (status {program['status']})")
        return Verdict(False, said["reason"])

    def close(self) -> None:
        """Ends the launcher and with it all that it started."""
        self.lines.close()
        self.control.close()
        self.launcher.kill()
        self.launcher.wait()


def _was_killed(process: dict[str, Any]) -> bool:
    """By the kernel or from outside: it cannot send itself SIGKILL, being the first process of its namespace."""
    return process["status"] == -9 and not process["killed"]
