"""A verifier that misbehaves in its process as the response tells it to."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.verify import Unjudged, Verdict, Verifier


def _spin() -> None:
    while True:
        pass


def _product() -> None:
    str(9 ** (9**9))  # minutes inside one instruction of the interpreter


def _memory() -> None:
    bytearray(1 << 40)


def _unjudged() -> None:
    raise Unjudged("no room on the disk")


def _bug() -> None:
    raise KeyError("missing")


DEEDS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(3),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "deaf": lambda: (signal.signal(signal.SIGPROF, signal.SIG_IGN), signal.signal(signal.SIGALRM, signal.SIG_IGN), _spin()),
    "spin": _spin,
    "product": _product,
    "memory": _memory,
    "unjudged": _unjudged,
    "bug": _bug,
    "doze": lambda: time.sleep(1.5),
    "print": lambda: print("noise"),
}


def judge(response: str, truth: Any) -> Verdict:
    """Performs the fault, then returns whether response and truth are equal.

    "once F" kills the process only if no file F exists. "child F" starts a child, writes its pid to F, and kills the process.
    """
    deed, _, path = response.partition(" ")
    if deed in DEEDS:
        DEEDS[deed]()
    elif deed == "once" and not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "child":
        Path(path).write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "nap":
        time.sleep(0.001)
    elif deed in ("nan", "inf"):
        return Verdict(float(deed), "no number")  # type: ignore[arg-type]
    return Verdict(response == truth, f"process {os.getpid()}" if deed == "pid" else "compared")


def moody(response: str, truth: Any) -> Verdict:
    """Short responses are correct, unless the truth is that nobody knows."""
    return Verdict(float("nan") if truth == "nobody knows" else len(response) < 9, "measured")  # type: ignore[arg-type]


FAULTY = Verifier("faulty", judge, lambda truth: None, judge=judge, limit_s=0.5)
MOODY = Verifier("moody", moody, lambda truth: None, judge=moody)
INLINE = Verifier("inline", judge, lambda truth: None, judge=judge, inline=True)
