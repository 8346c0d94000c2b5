"""Linux system calls that Python does not wrap (os.unshare and os.setns exist from 3.12 on). All raise OSError."""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_char_p, c_int, c_long, c_uint32, c_uint64, c_ulong, c_ushort, c_void_p

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000  # CLONE_*
BIND, PRIVATE, RECURSIVE = 0x1000, 0x40000, 0x4000  # MS_*
NOSUID, NODEV, NOEXEC = 2, 4, 8  # the same for mount() and mount_setattr()
READ_ONLY = 1
DIE_WITH_PARENT, DUMPABLE, SECCOMP, NO_NEW_PRIVS = 1, 4, 22, 38  # PR_SET_*

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _path(path: str | None) -> c_char_p:
    return c_char_p(None if path is None else os.fsencode(path))


def unshare(flags: int) -> None:
    """Moves this process (with NEWPID: its next child) into new namespaces."""
    _call("unshare", c_int(flags))


def setns(fd: int, kind: int) -> None:
    _call("setns", c_int(fd), c_int(kind))


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
    _call("mount", _path(source), _path(target), _path(kind), c_ulong(flags), _path(options))


def detach(target: str) -> None:
    _call("umount2", _path(target), c_int(2))


def pivot_root(new: str, old: str) -> None:
    _call("syscall", c_long({"x86_64": 155}.get(os.uname().machine, 41)), _path(new), _path(old))


def restrict_mounts(path: str, attributes: int) -> None:
    """mount_setattr (Linux 5.12): adds attributes to the mount at `path` and to all mounts below it."""
    settings = (c_uint64 * 4)(attributes, 0, 0, 0)
    _call("syscall", c_long(442), c_int(-100), _path(path), c_uint32(0x8000), byref(settings), c_ulong(32))


def prctl(option: int, value: int, pointer: object = None) -> None:
    _call("prctl", c_int(option), c_ulong(value), c_void_p(pointer and ctypes.addressof(pointer)), c_ulong(0), c_ulong(0))  # type: ignore[arg-type]


def drop_capabilities() -> None:
    header, none = (c_uint32 * 2)(0x20080522, 0), (c_uint32 * 6)()
    _call("capset", byref(header), byref(none))


class Filter(ctypes.Structure):
    """struct sock_filter: one instruction of a seccomp program."""

    _fields_ = (("code", c_ushort), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", c_ushort), ("filters", c_void_p))


def install_filter(instructions: list[tuple[int, int, int, int]]) -> None:
    """Filters all further system calls of this thread and of threads it starts. Requires NO_NEW_PRIVS."""
    filters = (Filter * len(instructions))(*instructions)
    prctl(SECCOMP, 2, _Program(len(instructions), ctypes.addressof(filters)))
