"""Isolation: namespaces for the launcher, then a pid and a mount namespace, limits and dropped privileges for each process.

Requires Linux 5.14 (mount_setattr; threads counted per user namespace) and either root with CAP_SYS_ADMIN or unprivileged user
namespaces. Bubblewrap creates the same namespaces with the same calls, but would start a program for each response.
"""

from __future__ import annotations

import os
import resource
import sys
import sysconfig
from dataclasses import dataclass
from glob import glob
from itertools import product

from engine.verify.sandbox.inside import kernel, seccomp

LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib64")
PACKAGES = ("site-packages", "dist-packages")  # inside the standard library's folder in most builds of Python
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
MiB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Resource limits of one job's processes."""

    cpu_seconds: float = 4.0  # CPU time per process, the limit that usually applies; independent of the machine's load
    idle_seconds: float = 10.0  # without work, for programs that wait forever
    start_seconds: float = 60.0  # for both processes to be isolated; not part of the job's time
    seconds: float = 60.0  # wall clock of the job, for programs that work a little forever
    memory: int = 1024  # MiB of address space per process
    disk: int = 64  # MiB in /tmp
    file: int = 16  # MiB per file
    files: int = 64  # open descriptors
    threads: int = 32


def enclose() -> None:
    """Moves this process into new namespaces, and its next child, which must call `build`, into a new pid namespace."""
    uid, gid = os.getuid(), os.getgid()
    spaces = kernel.NEWNS | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS | kernel.NEWPID
    kernel.unshare(spaces | (0 if uid == 0 else kernel.NEWUSER))
    if uid != 0:
        # Not mapped to uid 0: an exec as root would restore capabilities.
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"1000 {uid} 1")
        _write("/proc/self/gid_map", f"1000 {gid} 1")


def build() -> None:
    """Makes / a read-only tmpfs that holds only Python's standard library without packages, shared libraries and four devices."""
    library = {sysconfig.get_path(name): os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    shown = {path: path for path in (*LIBRARIES, _shared_libraries())} | library
    kernel.mount("none", "/", None, kernel.PRIVATE | kernel.RECURSIVE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.NOSUID | kernel.NODEV, "mode=755,size=1m")
    os.mkdir("/tmp/old")
    kernel.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    os.mkdir("/tmp")
    for path, source in shown.items():
        _show(path, source, kernel.READ_ONLY | kernel.NOSUID | kernel.NODEV)
    for path in (*map("/".join, product(library, PACKAGES)), *glob("/usr/lib*/python*/*-packages")):
        if os.path.isdir(path):
            kernel.mount("tmpfs", path, "tmpfs", kernel.NOSUID | kernel.NODEV, "mode=755,size=4k")
    for path in DEVICES:
        _show(path, path, kernel.READ_ONLY | kernel.NOSUID | kernel.NOEXEC)
    kernel.detach("/old")
    os.rmdir("/old")
    kernel.restrict_mounts("/", kernel.READ_ONLY | kernel.NOSUID)


def _shared_libraries() -> str:
    """The folder in /usr/lib that has only shared libraries; /usr/lib itself where there is none."""
    path = f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}"
    return path if os.path.isdir(path) else "/usr/lib"


def _show(path: str, source: str, attributes: int) -> None:
    """Bind-mounts the host's `source` at `path`; a symlink is recreated."""
    old = f"/old{source}"
    if not os.path.lexists(old) or os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(old):
        return os.symlink(os.readlink(old), path)
    if os.path.isdir(old):
        os.mkdir(path)
    else:
        _write(path, "")
    kernel.mount(old, path, None, kernel.BIND | kernel.RECURSIVE)
    kernel.restrict_mounts(path, attributes)


def own_directory(limits: Limits) -> None:
    """Enters a new mount namespace with an empty, size-limited, private /tmp."""
    kernel.unshare(kernel.NEWNS)
    flags = kernel.NOSUID | kernel.NODEV | kernel.NOEXEC
    kernel.mount("tmpfs", "/tmp", "tmpfs", flags, f"mode=777,size={limits.disk}m,nr_inodes=1k")


def become_nobody(uid: int) -> None:
    """Drops all capabilities permanently. As root, first changes to user `uid`, or 65534 if that is not mapped."""
    if os.getuid() == 0:
        os.setgroups([])
        for number in (uid, 65534):
            try:
                os.setresgid(number, number, number)
                os.setresuid(number, number, number)
                break
            except OSError:
                continue
        assert 0 not in os.getresuid()
    kernel.drop_capabilities()


def restrict(limits: Limits, threads: bool) -> None:
    """Sets resource limits and the system call filter of this process. Does not need namespaces."""
    values = {
        resource.RLIMIT_AS: limits.memory * MiB,
        resource.RLIMIT_FSIZE: limits.file * MiB,
        resource.RLIMIT_NOFILE: limits.files,
        resource.RLIMIT_CORE: 0,
    }
    if threads:  # counted per user, so only where the user belongs to this sandbox
        values[resource.RLIMIT_NPROC] = limits.threads
    for limit, value in values.items():
        resource.setrlimit(limit, (value, value))
    if sys.platform == "linux":
        kernel.prctl(kernel.DUMPABLE, 0)  # no core dump, even if core_pattern ignores the limit
        kernel.prctl(kernel.NO_NEW_PRIVS, 1)
        seccomp.install()


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
