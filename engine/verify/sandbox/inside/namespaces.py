"""The walls: namespaces for the launcher, then for each process its own pid and mount namespace, limits and no privileges.

Needs Linux 5.14 (mount_setattr; threads counted per user namespace) and either root with CAP_SYS_ADMIN or unprivileged user namespaces.
Bubblewrap would make the same namespaces by the same calls, at the price of a program start for each response.
"""

from __future__ import annotations

import os
import resource
import sys
import sysconfig
from dataclasses import dataclass

from engine.verify.sandbox.inside import kernel, seccomp

LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
MiB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one program may use; sizes in MiB. CPU seconds decide, wall seconds are for programs that sleep."""

    seconds: float = 10.0
    cpu_seconds: int = 4
    memory: int = 1024
    disk: int = 64
    file: int = 16
    files: int = 64
    threads: int = 32


def enclose() -> None:
    """Moves this process into new namespaces, and its next child, which must be the one to build the walls, into a new pid namespace."""
    uid, gid = os.getuid(), os.getgid()
    spaces = kernel.NEWNS | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS | kernel.NEWPID
    kernel.unshare(spaces | (0 if uid == 0 else kernel.NEWUSER))
    if uid != 0:
        # Not mapped to 0 inside: an exec as root would give capabilities back.
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"1000 {uid} 1")
        _write("/proc/self/gid_map", f"1000 {gid} 1")


def build() -> None:
    """Makes / a read-only tmpfs with Python's standard library, shared libraries and four devices: nothing else of the machine."""
    library = {sysconfig.get_path(name): os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    kernel.mount("none", "/", None, kernel.PRIVATE | kernel.RECURSIVE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.NOSUID | kernel.NODEV, "mode=755,size=1m")
    os.mkdir("/tmp/old")
    kernel.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    os.mkdir("/tmp")
    for path, source in ({path: path for path in LIBRARIES} | library).items():
        _show(path, source, kernel.READ_ONLY | kernel.NOSUID | kernel.NODEV)
    for path in DEVICES:
        _show(path, path, kernel.READ_ONLY | kernel.NOSUID | kernel.NOEXEC)
    kernel.detach("/old")
    os.rmdir("/old")
    kernel.restrict_mounts("/", kernel.READ_ONLY | kernel.NOSUID)


def _show(path: str, source: str, attributes: int) -> None:
    """Binds the machine's `source` to `path`; a symlink stays one."""
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
    """A new mount namespace whose /tmp is empty, small, and this process's alone."""
    kernel.unshare(kernel.NEWNS)
    flags = kernel.NOSUID | kernel.NODEV | kernel.NOEXEC
    kernel.mount("tmpfs", "/tmp", "tmpfs", flags, f"mode=777,size={limits.disk}m,nr_inodes=1k")


def become_nobody(uid: int) -> None:
    """Root becomes `uid`, or 65534 where that one is not mapped; everyone loses all capabilities for ever."""
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
    """Limits of this process, and the filter of its system calls. Works without any namespace too."""
    wanted = {
        resource.RLIMIT_AS: limits.memory * MiB,
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_FSIZE: limits.file * MiB,
        resource.RLIMIT_NOFILE: limits.files,
        resource.RLIMIT_CORE: 0,
    }
    if threads:  # counted per user: only where the user is the sandbox's own
        wanted[resource.RLIMIT_NPROC] = limits.threads
    for limit, value in wanted.items():
        resource.setrlimit(limit, (value, value))
    if sys.platform == "linux":
        kernel.prctl(kernel.DUMPABLE, 0)  # no core file, whatever the machine's core_pattern does with limits
        kernel.prctl(kernel.NO_NEW_PRIVS, 1)
        seccomp.install()


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
