"""Runs an untrusted program against tests in a sandbox. This is the host side; engine/verify/sandbox/inside runs in the sandbox.

Isolation: no network, no view of other processes, no files except the standard library (read-only) and an empty private /tmp; limits on
CPU, memory, files and threads; an allow-list of system calls (x86-64 and aarch64); an unprivileged user. All processes of a job are in
pid namespaces, which are killed at the time limit.

Integrity of the verdict: the tested program and the tests run in two processes. Only the tests process has the job's nonce and a
connection to the host. The program process has one socket, on which it receives requests for values and replies with plain data. It
receives arguments but never the expected results, and no assertion, exit code, stack frame, file descriptor or marker in its process
decides the verdict. inside/proxies.py has the rules for its objects, inside/names.py for what it is asked for.

What remains possible: memorized tests; guessing; a test that compares two objects of the program's own classes, or calls a method of
one, depends on the program's code; so does a test that uses a helper defined only by the program; and bugs of the kernel or of CPython.
"""

from __future__ import annotations

import json
import secrets
import signal
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
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}  # nothing of the host's environment, which may hold secrets
GRACE_S = 60.0  # for the launcher to start, and beyond a job's time limit, before it is considered dead: the machine may be busy
VERDICT_MAX = 1 << 16  # bytes


class NoIsolation(Unjudged, ValueError):
    """No sandbox can be created on this machine, so no program can be judged unless the user accepts to run without one."""


class Sandbox:
    """A sandbox with one launcher process, which runs one program at a time. Thread-safe: `run` holds a lock.

    `unsafe=True` runs programs without namespaces and under the current user. Raises NoIsolation if namespaces cannot be created, and
    Unjudged if the launcher does not start.
    """

    def __init__(self, limits: Limits = Limits(), *, unsafe: bool = False) -> None:  # noqa: B008  (frozen)
        self.limits = limits
        self.lock = threading.Lock()
        self.control, theirs = socket.socketpair()
        isolation = "unsafe" if unsafe else "isolated"
        command = [sys.executable, "-S", "-s", "-P", "-B", "-c", START, ROOT, json.dumps(asdict(limits)), isolation]
        devnull = subprocess.DEVNULL
        with theirs:
            self.launcher = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=devnull, stderr=devnull, env=ENVIRONMENT, cwd="/", start_new_session=True
            )
        self.lines = self.control.makefile("rb")
        try:
            refused = self._read_message(GRACE_S).get("refused")
        except OSError as error:
            self.close()
            raise Unjudged(f"the sandbox did not start: {error}") from error
        if refused is not None:
            self.close()
            raise NoIsolation(
                f"verifier=code: cannot isolate programs on this machine ({refused}); run as root or allow unprivileged user namespaces, "
                "or accept the risk with --unsafe-code"
            )

    def run(self, program: list[str], tests: str, setup: str = "", entry_point: str | None = None) -> Verdict:
        """Loads the parts of `program` in one process and runs `setup` and `tests` in another, which ask the first for `entry_point`.

        Raises Unjudged if the machine fails; the sandbox is then closed.
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
        timeout = self.limits.start_seconds + self.limits.seconds + GRACE_S
        with ours:
            with theirs:
                socket.send_fds(self.control, [b"j"], [theirs.fileno()])
            ours.settimeout(timeout)
            try:
                ours.sendall(job)
                ours.shutdown(socket.SHUT_WR)
                verdict = ours.makefile("rb").read(VERDICT_MAX)
            except (BrokenPipeError, ConnectionResetError):
                verdict = b""  # the tests process has ended; the launcher reports how
        return json.loads(verdict or b"{}"), self._read_message(timeout)

    def _read_message(self, timeout: float) -> dict[str, Any]:
        self.control.settimeout(timeout)
        line = self.lines.readline()
        if not line:
            raise OSError(f"the launcher exited with status {self.launcher.wait(GRACE_S)}")
        return json.loads(line)

    def _verdict(self, nonce: str, result: dict[str, Any], report: dict[str, Any]) -> Verdict:
        """Unjudged only for what no program can bring about: a process that did not start, or was killed from outside."""
        if result and result["nonce"] != nonce:
            raise Unjudged("a verdict of another job")
        if result.get("correct"):
            return Verdict(True, result["reason"])
        if not report["started"]:
            raise Unjudged(f"its processes did not start (status {report['judge']['status']} and {report['program']['status']})")
        if report["exceeded"]:
            return Verdict(False, report["exceeded"])
        for name, process in (("the program", report["program"]), ("the tests", report["judge"])):
            if process["status"] == -signal.SIGKILL and not process["killed"]:
                return self._killed(name, process["memory"])
        if not result:
            return Verdict(False, f"the program's values end the tests process (status {report['judge']['status']})")
        if result["lost"] and not report["program"]["killed"] and report["program"]["status"] != 0:
            return Verdict(False, f"the program exited before its tests finished (status {report['program']['status']})")
        return Verdict(False, result["reason"])

    def _killed(self, name: str, memory: int) -> Verdict:
        """The seccomp filter refuses SIGKILL, so the kernel or an outside process sent it. memory: the most it used, in MiB."""
        if memory > self.limits.memory / 2:
            return Verdict(False, f"{name} used {memory} MiB of memory, more than the machine had left")
        raise Unjudged(f"{name} was killed from outside the sandbox; check whether the machine ran out of memory")

    def close(self) -> None:
        """Ends the launcher and all processes that it started."""
        self.lines.close()
        self.control.close()
        self.launcher.kill()
        self.launcher.wait()
