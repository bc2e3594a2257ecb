"""Confine this process for the rest of its life: resource limits, no capabilities, Landlock and seccomp.

Landlock closes the file system except for Python's own libraries, which can only be read. seccomp allows the system
calls of a calculation in Python and refuses all others, among them those that start processes, open sockets, send
signals or change a file's owner and mode, which Landlock leaves open. A call that a later kernel adds is refused too.

Sources: landlock(7), seccomp(2), and the kernel's system-call tables of x86-64 and of arm64 (asm-generic).
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)

# --- what may be read ----------------------------------------------------------------------------------------


def readable_paths() -> list[str]:
    """Files and folders that a confined process can read: Python's standard library and shared libraries."""
    paths = [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64", "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    paths += ["/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


# --- Landlock ------------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on all architectures
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""Rights on files that each version of Landlock adds: all of them are handled, so all are refused by default."""
_TCP = 3
"""Bind and connect, since version 4."""
_SCOPES = 3
"""Abstract unix sockets and signals of processes outside, since version 6."""


def landlock_version() -> int:
    """Version of the kernel's Landlock interface; 0 if it is missing or disabled."""
    return max(0, _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)) if sys.platform == "linux" else 0


def _restrict_files(readable: Iterable[str]) -> None:
    version = landlock_version()
    rights = sum(bits for since, bits in _FILE_RIGHTS.items() if version >= since)
    attributes = struct.pack("=QQQ", rights, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _check(_libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    for path in readable:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
        rule = struct.pack("=Qi", allowed, descriptor)
        _check(_libc.syscall(_ADD_RULE, rules, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(descriptor)
    _check(_libc.syscall(_RESTRICT_SELF, rules, 0), "landlock_restrict_self")
    os.close(rules)


# --- seccomp -------------------------------------------------------------------------------------------------

_ALLOWED = """
    read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291,
    poll 7 -, ppoll 271 73, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, mremap 25 216,
    msync 26 227, madvise 28 233, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
    rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, pread64 17 67,
    pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, faccessat 269 48, faccessat2 439 439, pipe 22 -,
    pipe2 293 59, select 23 -, pselect6 270 72, sched_yield 24 124, dup 32 23, dup2 33 -, dup3 292 24, pause 34 -,
    nanosleep 35 101, clock_nanosleep 230 115, getitimer 36 102, setitimer 38 103, alarm 37 -, getpid 39 172,
    exit 60 93, exit_group 231 94, uname 63 160, flock 73 32, fsync 74 82, getdents 78 -, getdents64 217 61,
    getcwd 79 17, chdir 80 49, fchdir 81 50, readlink 89 -, readlinkat 267 78, umask 95 166, gettimeofday 96 169,
    time 201 -, times 100 153, sysinfo 99 179, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177,
    getresuid 118 148, getresgid 120 150, getppid 110 173, getpgrp 111 -, getpgid 121 155, getsid 124 156,
    getgroups 115 158, getrlimit 97 163, getrusage 98 165, statfs 137 43, fstatfs 138 44, sched_getaffinity 204 123,
    getcpu 309 168, arch_prctl 158 -, gettid 186 178, futex 202 98, set_tid_address 218 96, restart_syscall 219 128,
    clock_gettime 228 113, clock_getres 229 114, set_robust_list 273 99, rseq 334 293, membarrier 324 283,
    getrandom 318 278, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19,
    close_range 436 436, openat 257 56, sendto 44 206, recvfrom 45 207, getsockname 51 204, getpeername 52 205,
    getsockopt 55 209, setsockopt 54 208, shutdown 48 210, wait4 61 260, waitid 247 95
"""
"""Allowed whatever their arguments: name, number on x86-64, number on arm64. Sockets come from socketpair only."""

_CONDITIONAL = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "fork": (57, None),
    "vfork": (58, None),
    "socketpair": (53, 199),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
}


_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Identifier of an architecture in a filter's data, and its column in the tables above."""
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
_X32 = 0x40000000
_CLONE_THREAD = 0x10000
_SOCK_STREAM = 1

Instruction = tuple[int, int, int, int]
"""Operation, jump if true, jump if false, operand (struct sock_filter)."""


def _refuse(number: int) -> Instruction:
    return (_RETURN, 0, 0, 0x00050000 | number)


def _load(offset: int) -> Instruction:
    return (_LOAD, 0, 0, offset)


def _argument(index: int) -> Instruction:
    """Load the lower half of a system call's argument; both architectures are little-endian."""
    return _load(16 + 8 * index)


def _only(argument: int, values: Iterable[int]) -> list[Instruction]:
    """Allow a call if the argument is one of these values."""
    block = [_argument(argument)]
    for value in values:
        block += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*block, _refuse(errno.EPERM)]


def filter_program(machine: str) -> list[Instruction]:
    """The seccomp filter of an architecture."""
    identifier, column = _MACHINES[machine]
    program = [_load(_ARCHITECTURE), (_EQUAL, 1, 0, identifier), (_RETURN, 0, 0, _KILL), _load(_NUMBER)]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for entry in _ALLOWED.split(","):
        number = entry.split()[1 + column]
        if number != "-":
            program += [(_EQUAL, 0, 1, int(number)), (_RETURN, 0, 0, _ALLOW)]
    blocks: dict[str, list[Instruction]] = {
        # A thread is a clone with this bit. The flags of clone3 are in memory; without it glibc falls back to clone.
        "clone": [_argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW), _refuse(errno.EAGAIN)],
        "clone3": [_refuse(errno.ENOSYS)],
        "fork": [_refuse(errno.EAGAIN)],
        "vfork": [_refuse(errno.EAGAIN)],
        # A datagram socket could send to any unix socket by its address.
        "socketpair": [
            _argument(1),
            (_AND, 0, 0, 0xF),
            (_EQUAL, 0, 1, _SOCK_STREAM),
            (_RETURN, 0, 0, _ALLOW),
            _refuse(errno.EPERM),
        ],
        "ioctl": _only(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # TCGETS TIOCGWINSZ FIONREAD FIO*
        "fcntl": _only(1, (0, 1, 2, 3, 4, 1030)),  # duplicate, and flags; not owner, signal, lease, pipe size
        "prctl": _only(0, (15, 16, 0x53564D41)),  # names of threads and of memory
        "prlimit64": _only(0, (0,)),  # of this process
    }
    for name, block in blocks.items():
        number_of = _CONDITIONAL[name][column]
        if number_of is not None:
            program += [(_EQUAL, 0, len(block), number_of), *block]
    return [*program, _refuse(errno.EPERM)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def _filter_calls() -> None:
    instructions = filter_program(os.uname().machine)
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    memory = ctypes.create_string_buffer(packed, len(packed))
    program = _Program(len(instructions), ctypes.addressof(memory))
    _check(_libc.prctl(22, 2, ctypes.byref(program), 0, 0), "prctl PR_SET_SECCOMP")


# --- all of it -----------------------------------------------------------------------------------------------


def missing_wall() -> str:
    """The reason why this machine cannot confine a process; empty if it can."""
    if sys.platform != "linux":
        return f"{sys.platform} has neither Landlock nor seccomp"
    if os.uname().machine not in _MACHINES:
        return f"the sandbox has no table of system calls for {os.uname().machine}"
    if landlock_version() < 1:
        return "this kernel has no Landlock (Linux 5.13 or later, with `landlock` in its list of LSMs)"
    # Without a program the call fails in any case: with EFAULT if filters are supported.
    if _libc.prctl(22, 2, None, 0, 0) < 0 and ctypes.get_errno() != errno.EFAULT:
        return "this kernel has no seccomp filters"
    return ""


def limit_resources(*, cpu_s: int, memory_bytes: int) -> None:
    """Limit processor time, address space, file sizes, open files and core dumps."""
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 1 << 24,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def confine() -> None:
    """Give up all rights except to compute, to read `readable_paths()` and to use the open file descriptors.

    Raises OSError if a restriction cannot be set. The process must have one thread.
    """
    readable = readable_paths()
    for capability in range(64):
        if _libc.prctl(24, capability, 0, 0, 0) < 0:  # PR_CAPBSET_DROP; without privilege there is nothing to drop
            break
    _libc.prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT, clear all
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _check(_libc.capset(header, none), "capset")
    _check(_libc.prctl(38, 1, 0, 0, 0), "prctl PR_SET_NO_NEW_PRIVS")
    _restrict_files(readable)
    _filter_calls()


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; a no-op outside Linux."""
    if sys.platform == "linux":
        _check(_libc.prctl(1, 9, 0, 0, 0), "prctl PR_SET_PDEATHSIG")


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
