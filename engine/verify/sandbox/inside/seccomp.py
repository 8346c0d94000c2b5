"""The allow-list of system calls for tested programs. (A deny-list would miss calls that new kernels add.)

Not on the list, and refused with EPERM: starting processes or programs (fork, execve), the network (socket), other processes' memory
(ptrace, process_vm_writev), namespaces and mounts (unshare, setns, mount), io_uring, bpf, keyctl and everything newer than this file.

A process may signal only itself, and not by SIGKILL, which is how a machine without memory ends a process. File locks succeed without
effect: the standard library's files are the host's, where a real lock would block the host and other sandboxes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from engine.verify.sandbox.inside import kernel

# name, number on x86_64, number on aarch64 (- if it does not exist there), from Linux's unistd tables; the most frequent first.
ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, sendto 44 206, recvfrom 45 207, sendmsg 46 211,
recvmsg 47 212, shutdown 48 210, futex 202 98, sched_yield 24 124, sched_getaffinity 204 123, membarrier 324 283, rseq 334 293,
mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214, msync 26 227, mincore 27 232,
getrandom 318 278, arch_prctl 158 -, openat 257 56, open 2 -, close 3 57, close_range 436 436, lseek 8 62, fstat 5 80,
newfstatat 262 79, statx 332 291, stat 4 -, lstat 6 -, statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48,
faccessat2 439 439, dup 32 23, dup2 33 -, dup3 292 24, fsync 74 82, fdatasync 75 83, truncate 76 45,
ftruncate 77 46, fallocate 285 47, fadvise64 221 223, copy_file_range 326 285, sendfile 40 71, getdents64 217 61, getcwd 79 17,
chdir 80 49, fchdir 81 50, umask 95 166, mkdir 83 -, mkdirat 258 34, rmdir 84 -, rename 82 -, renameat 264 38, renameat2 316 276,
unlink 87 -, unlinkat 263 35, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, readlink 89 -, readlinkat 267 78,
chmod 90 -, fchmod 91 52, fchmodat 268 53, utimensat 280 88, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
rt_sigpending 127 136, sigaltstack 131 132, rt_sigsuspend 130 133, rt_sigtimedwait 128 137, pause 34 -,
alarm 37 -, setitimer 38 103, getitimer 36 102, restart_syscall 219 128, nanosleep 35 101,
clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, time 201 -, gettimeofday 96 169, times 100 153,
getrusage 98 165, sysinfo 99 179, uname 63 160, getpid 39 172, getppid 110 173, gettid 186 178, getpgrp 111 -, getpgid 121 155,
getsid 124 156, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148,
getresgid 120 150, getrlimit 97 163, getpriority 140 141, set_robust_list 273 99, get_robust_list 274 100, set_tid_address 218 96,
exit 60 93, exit_group 231 94, wait4 61 260, waitid 247 95, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19, pipe 22 -, pipe2 293 59,
socketpair 53 199, getsockopt 55 209, setsockopt 54 208
"""
IOCTL, CLONE, CLONE3, PRLIMIT = (16, 29), (56, 220), (435, 435), (302, 261)
KILL, TGKILL, SIGKILL = (62, 129), (234, 131), 9
FCNTL, FLOCK = (72, 25), (73, 32)
FCNTLS = (0, 1, 2, 3, 4, 5, 36, 1030, 1032)  # F_DUPFD, F_[GS]ETFD, F_[GS]ETFL, F_GETLK, F_OFD_GETLK, F_DUPFD_CLOEXEC, F_GETPIPE_SZ
FCNTL_LOCKS = (6, 7, 37, 38)  # F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW
IOCTLS = (0x5401, 0x541B, 0x5421, 0x5451)  # TCGETS, FIONREAD, FIONBIO, FIOCLEX
CLONE_THREAD = 0x10000
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

Instructions = Sequence[tuple[int, int, int, int]]  # code, jump if true, jump if false, operand

LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K
NUMBER, ARCHITECTURE, FIRST, SECOND, THIRD = 0, 4, 16, 24, 32  # offsets in struct seccomp_data; of arguments, the low 32 bits
ALLOW = (RETURN, 0, 0, 0x7FFF0000)
SUCCESS, EPERM, ENOSYS = 0, 1, 38


def install() -> bool:
    """Installs the filter in this process. NO_NEW_PRIVS must be set.

    Returns False, without a filter, on an architecture that is not in MACHINES. There, a program may start processes, up to the limit on
    threads.
    """
    machine = MACHINES.get(os.uname().machine)
    if machine is not None:
        kernel.install_filter(program(*machine, os.getpid()))
    return machine is not None


def program(column: int, architecture: int, pid: int) -> list[tuple[int, int, int, int]]:
    """The filter of process `pid` as (code, jump if true, jump if false, operand). System calls of another architecture are refused."""
    instructions = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), _refuse(EPERM), (LOAD, 0, 0, NUMBER)]
    for number in (cell.split()[1 + column] for cell in ALLOWED.split(",")):
        if number != "-":
            instructions += [(EQUAL, 0, 1, int(number)), ALLOW]
    instructions += [
        (EQUAL, 0, 1, CLONE3[column]),
        _refuse(ENOSYS),
    ]  # its flags are in memory, out of the filter's reach; libc falls back to clone
    allow, refuse, pretend = [ALLOW], [_refuse(EPERM)], [_refuse(SUCCESS)]
    instructions += [(EQUAL, 0, 1, FLOCK[column]), *pretend]
    instructions += _if(CLONE[column], [*_when(FIRST, ANY_BIT, [CLONE_THREAD], allow), *refuse])
    instructions += _if(IOCTL[column], [*_when(SECOND, EQUAL, IOCTLS, allow), *refuse])
    instructions += _if(FCNTL[column], [*_when(SECOND, EQUAL, FCNTLS, allow), *_when(SECOND, EQUAL, FCNTL_LOCKS, pretend), *refuse])
    instructions += _if(PRLIMIT[column], [*_when(THIRD, EQUAL, [0], allow), *refuse])  # may read limits, not set them
    instructions += _if(KILL[column], [*_when(SECOND, EQUAL, [SIGKILL], refuse), *_when(FIRST, EQUAL, [0, pid], allow), *refuse])
    instructions += _if(TGKILL[column], [*_when(THIRD, EQUAL, [SIGKILL], refuse), *_when(FIRST, EQUAL, [pid], allow), *refuse])
    return [*instructions, *refuse]


def _if(number: int, body: Instructions) -> Instructions:
    """`body`, which must return, for system call `number`."""
    return [(EQUAL, 0, len(body), number), *body]


def _when(offset: int, test: int, values: Iterable[int], answer: Instructions) -> Instructions:
    """`answer`, one instruction, if the argument at `offset` passes `test` with one of `values`."""
    return [(LOAD, 0, 0, offset), *(step for value in values for step in ((test, 0, 1, value), *answer))]


def _refuse(error: int) -> tuple[int, int, int, int]:
    return (RETURN, 0, 0, 0x00050000 | error)
