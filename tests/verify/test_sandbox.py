"""Attacks on the sandbox, as root and as a user, with and without the system call filter: all judged wrong, with nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from string import Template

import psutil
import pytest

from engine.verify.sandbox import host
from engine.verify.sandbox.host import NoIsolation, Sandbox
from engine.verify.sandbox.inside import namespaces, seccomp
from engine.verify.sandbox.inside.namespaces import Limits
from engine.verify.verdict import Unjudged
from tests.verify.attacks import ENDLESS, FORGERY, HARM

LIMITS = Limits(seconds=10, cpu_seconds=1, memory=512)
UNFILTERED = "from engine.verify.sandbox.inside import seccomp; seccomp.install = lambda: True; "
SYSTEM_PYTHON = "/usr/bin/python3.11"


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("host") / "canary"
    path.write_text("alive")
    return path


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def as_nobody(folder: Path) -> str:
    """The path of a Python that runs as user nobody, in place of an ordinary user. Skips the test if that is not possible."""
    if os.getuid() != 0 or not shutil.which("setpriv") or not Path(SYSTEM_PYTHON).exists():
        pytest.skip(f"needs root, setpriv and {SYSTEM_PYTHON} to become an ordinary user")
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec setpriv --reuid 65534 --regid 65534 --clear-groups {SYSTEM_PYTHON} "$@"\n')
    script.chmod(0o755)
    return str(script)


def build(mode: str, limits: Limits, folder: Path) -> Sandbox:
    """A sandbox as root or as a user, with or without the system call filter. Skips the test if none can be created."""
    with pytest.MonkeyPatch.context() as patch:
        if "user" in mode:
            patch.setattr(sys, "executable", as_nobody(folder))
        if "unfiltered" in mode:
            patch.setattr(host, "START", host.START.replace("from", UNFILTERED + "from", 1))
        patch.setenv("TRIVET_SECRET", "a secret")
        try:
            return Sandbox(limits, unsafe="unsafe" in mode)
        except Unjudged as refusal:  # NoIsolation, or the user may not start this Python
            pytest.skip(str(refusal))


@pytest.fixture(scope="module", params=["default", "unfiltered", "as a user", "as a user, unfiltered"])
def sandbox(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    sandbox = build(request.param, LIMITS, tmp_path_factory.mktemp("bin"))
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module", params=["default", "as a user, unfiltered"])
def brief(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A sandbox with a time limit of one second."""
    sandbox = build(request.param, replace(LIMITS, seconds=1), tmp_path_factory.mktemp("bin"))
    yield sandbox
    sandbox.close()


def inside(sandbox: Sandbox) -> list[psutil.Process]:
    """Processes of the launcher's tree, and any other process with the launcher's command line, even if re-parented."""
    tree = psutil.Process(sandbox.launcher.pid).children(recursive=True)
    command = psutil.Process(sandbox.launcher.pid).cmdline()[-3:]
    seen = {process.pid for process in tree}
    return [*tree, *(p for p in psutil.process_iter() if p.pid not in seen | {sandbox.launcher.pid} and _is_ours(p, command))]


def _is_ours(process: psutil.Process, command: list[str]) -> bool:
    try:
        return process.cmdline()[-3:] == command and process.ppid() != os.getpid()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def nothing_left(sandbox: Sandbox, canary: Path) -> None:
    assert canary.read_text() == "alive"
    assert sandbox.launcher.poll() is None
    assert len(inside(sandbox)) == 1, [process.cmdline() for process in inside(sandbox)]  # the launcher inside its pid namespace


@pytest.mark.parametrize("name", HARM)
def test_harm(sandbox: Sandbox, canary: Path, port: int, name: str) -> None:
    program = Template(HARM[name]).substitute(canary=canary, port=port, host=os.getpid())
    verdict = sandbox.run([program], "assert f() is True")
    assert not verdict.correct
    nothing_left(sandbox, canary)


@pytest.mark.parametrize("name", ENDLESS)
def test_endless(brief: Sandbox, canary: Path, name: str) -> None:
    verdict = brief.run([ENDLESS[name]], "assert f() is True\nassert list(f()) == []")
    assert not verdict.correct
    nothing_left(brief, canary)


@pytest.mark.parametrize("name", ["read a file", "/etc/passwd", "loopback", "a shell", "delete a file past Python"])
def test_the_attacks_are_attacks(name: str, canary: Path, port: int, tmp_path: Path) -> None:
    """Without isolation and filter, the attacks succeed: the other tests pass because of the sandbox."""
    victim = tmp_path / "victim"
    victim.write_text("alive")
    sandbox = build("unsafe, unfiltered", LIMITS, tmp_path)
    verdict = sandbox.run([Template(HARM[name]).substitute(canary=victim, port=port, host=os.getpid())], "assert f() is True")
    assert verdict.correct, verdict.reason
    sandbox.close()


@pytest.mark.parametrize("name", FORGERY)
def test_forgery(sandbox: Sandbox, canary: Path, name: str) -> None:
    tests = "assert abs(f(1) - 7) < 1e-6\nassert f(1) == 7\nassert all(map(lambda x: f(x) == 7, [1]))"
    for lines in (tests, tests.splitlines()[1], tests.splitlines()[2]):
        verdict = sandbox.run([FORGERY[name]], lines)
        assert not verdict.correct, lines
    nothing_left(sandbox, canary)


@pytest.mark.parametrize("leave", ["os._exit(0)", "ctypes.string_at(0)", "os.closerange(0, 64)"])
def test_a_test_that_catches_everything_catches_no_exit(sandbox: Sandbox, leave: str) -> None:
    verdict = sandbox.run([f"import ctypes, os\ndef f(): {leave}"], "try:\n    f()\nexcept:\n    pass")
    assert not verdict.correct


def test_the_host_is_as_before(sandbox: Sandbox, canary: Path) -> None:
    """After all attacks, a correct program passes, a wrong one fails, and each starts in an empty directory."""
    honest = "import os\nassert os.listdir('.') == [] and os.getcwd() == '/tmp'\nopen('mine', 'w').close()\ndef f(x): return x + 1"
    for _ in range(3):
        assert sandbox.run([honest], "assert f(1) == 2").correct
        assert not sandbox.run([honest], "assert f(1) == 3").correct
    assert not Path("/dev/shm/trivet").exists()
    nothing_left(sandbox, canary)


def test_the_whole_tree_dies_with_the_host(tmp_path: Path) -> None:
    program = (
        "from engine.verify.sandbox.host import Sandbox; s = Sandbox(); print(s.launcher.pid, flush=True); "
        "s.run(['import time; time.sleep(1000)'], 'f()')"
    )
    host = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert host.stdout is not None
    assert host.stderr is not None
    line = host.stdout.readline()
    if not line:
        assert "NoIsolation" in host.stderr.read()
        pytest.skip("no isolation on this machine")
    launcher = psutil.Process(int(line))
    deadline = time.monotonic() + 30
    while (
        len(tree := launcher.children(recursive=True)) < 3 and time.monotonic() < deadline
    ):  # launcher inside the namespace, judge, program
        time.sleep(0.01)
    assert len(tree) == 3
    host.kill()
    host.communicate()
    _, alive = psutil.wait_procs([launcher, *tree], timeout=30)
    assert not alive


@pytest.mark.parametrize("which", ["launcher", "judge", "program"])
def test_a_killed_process_gives_no_verdict(which: str, tmp_path: Path) -> None:
    """A process killed from outside, for example by the OOM killer: the response is not judged."""
    sandbox = build("default", LIMITS, tmp_path)
    inner = psutil.Process(sandbox.launcher.pid).children()[0]

    def kill() -> None:
        while len(children := inner.children()) < 2:
            time.sleep(0.01)
        program, judge = sorted(children, key=lambda process: process.pid)
        {"launcher": inner, "judge": judge, "program": program}[which].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(Unjudged):
        sandbox.run(["import time\ntime.sleep(2)"], "assert True")
    killer.join()
    assert sandbox.launcher.poll() is not None


@pytest.mark.parametrize("name", ["kernel.unshare", "namespaces.own_directory"])
def test_a_machine_without_namespaces_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = f"lambda flags: (_ for _ in ()).throw(PermissionError(1, 'no {name}'))"
    broken = f"from engine.verify.sandbox.inside import kernel, namespaces; {name} = {refuse}; "
    monkeypatch.setattr(host, "START", host.START.replace("from", broken + "from", 1))
    with pytest.raises(NoIsolation, match=r"verifier=code: cannot isolate programs on this machine \(.+\); .* --unsafe-code"):
        Sandbox()
    assert issubclass(NoIsolation, ValueError)


def test_unsafe_runs_where_nothing_can_be_isolated() -> None:
    sandbox = Sandbox(LIMITS, unsafe=True)
    assert sandbox.run(["def f(x): return x + 1"], "assert f(1) == 2").correct
    assert not sandbox.run(["def f(x): return x"], "assert f(1) == 2").correct
    assert not sandbox.run(["while True: pass"], "assert True").correct
    assert not sandbox.run(["import os\nos.fork()"], "assert True").correct
    sandbox.close()


def decide(program: list[tuple[int, int, int, int]], **words: int) -> int:
    """The return value of a seccomp program, by an interpreter of the four instructions in use."""
    offsets = {"number": seccomp.NUMBER, "architecture": seccomp.ARCHITECTURE, "first": 16, "second": 24, "third": 32}
    data = {offset: words.get(name, 0) for name, offset in offsets.items()}
    at = accumulator = 0
    while True:
        code, if_true, if_false, k = program[at]
        if code == seccomp.RETURN:
            return k
        if code == seccomp.LOAD:
            accumulator = data[k]
        else:
            at += if_true if (accumulator == k if code == seccomp.EQUAL else accumulator & k) else if_false
        at += 1


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_the_filter_on_both_machines(machine: str) -> None:
    column, architecture = seccomp.MACHINES[machine]
    rows = [cell.split() for cell in seccomp.ALLOWED.split(",")]
    table = {name: int(numbers[column]) for name, *numbers in rows if numbers[column] != "-"}
    assert len(set(table.values())) == len(table)
    program = seccomp.program(column, architecture, pid=7)
    allow, refuse, absent, pretend = seccomp.ALLOW[3], 0x50001, 0x50026, 0x50000
    for number in range(600):
        special = {seccomp.CLONE3[column]: absent, seccomp.FLOCK[column]: pretend}
        special |= {group[column]: allow for group in (seccomp.PRLIMIT, seccomp.FCNTL, seccomp.KILL)}  # with arguments of 0
        expected = special.get(number, allow if number in table.values() else refuse)
        assert decide(program, architecture=architecture, number=number) == expected
        assert decide(program, architecture=0x40000003, number=number) == refuse  # i386's table, by int 0x80
        assert decide(program, architecture=architecture, number=number | 0x40000000) == refuse  # x32's
    clone, ioctl = seccomp.CLONE[column], seccomp.IOCTL[column]
    assert decide(program, architecture=architecture, number=clone, first=0x3D0F00) == allow  # glibc creating a thread
    assert decide(program, architecture=architecture, number=clone, first=0x1200011) == refuse  # fork
    assert decide(program, architecture=architecture, number=ioctl, second=0x5401) == allow
    assert decide(program, architecture=architecture, number=ioctl, second=0x5412) == refuse  # TIOCSTI, which injects terminal input
    assert decide(program, architecture=architecture, number=seccomp.PRLIMIT[column], third=1) == refuse
    for command in (*range(40), *range(1024, 1040)):
        expected = pretend if command in (6, 7, 37, 38) else allow if command in seccomp.FCNTLS else refuse  # so no F_SETLEASE, no F_NOTIFY
        assert decide(program, architecture=architecture, number=seccomp.FCNTL[column], second=command) == expected
    for first, signal, expected in ((7, 10, allow), (7, 9, refuse), (0, 9, refuse), (8, 10, refuse), (2**32 - 1, 10, refuse)):
        assert decide(program, architecture=architecture, number=seccomp.KILL[column], first=first, second=signal) == expected
        within = refuse if first == 0 else expected
        assert decide(program, architecture=architecture, number=seccomp.TGKILL[column], first=first, second=7, third=signal) == within
    assert not set(table) & {"fork", "vfork", "execve", "execveat", "socket", "connect", "ptrace", "unshare", "setns", "mount", "prctl"}


PYTHONS = [sys.executable, getattr(sys, "_base_executable", sys.executable), SYSTEM_PYTHON]


@pytest.mark.parametrize("python", PYTHONS, ids=["virtual environment", "its base", "the system's"])
def test_no_package_is_visible_in_any_python(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path(python).exists():
        pytest.skip(f"no {python}")
    monkeypatch.setattr(sys, "executable", python)
    try:
        sandbox = Sandbox(LIMITS)
    except NoIsolation as refusal:
        pytest.skip(str(refusal))
    program = """
import os, sys
places = [path for path in sys.path + ['/usr/lib', os.path.dirname(os.__file__)] if os.path.isdir(path)]
def files():
    return [os.path.join(top, name) for place in places for top, _, names in os.walk(place) if top.endswith('-packages') for name in names]
def f():
    sys.path += [os.path.join(place, name) for place in places for name in ('site-packages', 'dist-packages', 'python3/dist-packages')]
    try: import numpy
    except ImportError: return files()
"""
    verdict = sandbox.run([program], "assert f() == []\nimport json, sqlite3, lzma, ctypes, hashlib")
    sandbox.close()
    assert verdict.correct, verdict.reason


def test_a_lock_on_the_standard_library_does_not_block_the_host(tmp_path: Path) -> None:
    sandbox = build("default", LIMITS, tmp_path)
    program = """
import fcntl, os, time
def f():
    held = [open(os.__file__), open(os.__file__)]
    fcntl.flock(held[0], fcntl.LOCK_EX)
    fcntl.lockf(held[1], fcntl.LOCK_SH)
    for command, argument in ((1026, 0x80000002), (1024, 0)):  # F_NOTIFY, F_SETLEASE
        try: fcntl.fcntl(os.open(os.path.dirname(os.__file__), os.O_RDONLY), command, argument)
        except PermissionError: held.append(command)
    fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX)  # would wait forever if the first lock were real
    return held[2:]
"""
    verdict = sandbox.run([program], "assert f() == [1026, 1024]")
    sandbox.close()
    assert verdict.correct, verdict.reason


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("while True: pass", "the program exceeded the limit of 1 s of CPU time"),
        ("import time\ntime.sleep(100)", "waited for 2 s, the limit without work"),
        ("import time\nwhile True: time.sleep(0.0001)", "limit"),
        ("def f():\n    while True: yield 1", "the tests exceeded the limit of 1 s of CPU time|the program exceeded"),
    ],
)
def test_limits_are_named(program: str, reason: str, tmp_path: Path) -> None:
    sandbox = build("default", replace(LIMITS, idle_seconds=2), tmp_path)
    verdict = sandbox.run([program], "assert list(f()) == []")
    sandbox.close()
    assert not verdict.correct
    assert re.search(reason, verdict.reason), verdict.reason


def test_a_slow_start_is_not_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that take two seconds to be isolated, with limits of one second."""
    slow = "from engine.verify.sandbox.inside import namespaces; import time; r = namespaces.restrict; "
    slow += "namespaces.restrict = lambda *a, **k: (time.sleep(2), r(*a, **k)); "
    monkeypatch.setattr(host, "START", host.START.replace("from", slow + "from", 1))
    sandbox = build("default", replace(LIMITS, seconds=1, idle_seconds=1), tmp_path)
    verdict = sandbox.run(["def f(x): return x"], "assert f(1) == 1")
    sandbox.close()
    assert verdict.correct, verdict.reason


def test_limits_apply_to_the_program(tmp_path: Path) -> None:
    sandbox = build("default", LIMITS, tmp_path)
    program = "import resource\ndef f(): return [resource.getrlimit(getattr(resource, 'RLIMIT_' + n)) for n in ('AS', 'CORE', 'NPROC')]"
    expected = [(LIMITS.memory * namespaces.MiB,) * 2, (0, 0), (LIMITS.threads,) * 2]
    verdict = sandbox.run([program], f"assert f() == {expected}")
    assert verdict.correct, verdict.reason
    sandbox.close()
