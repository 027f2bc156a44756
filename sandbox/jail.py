"""What holds a process that runs untrusted code.

Limits, another user, no new privileges, a list of system calls. Only for Linux on x86-64 and arm64;
stdlib only. `confine` is for a freshly forked process, and there is no way back.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
from contextlib import suppress

MEMORY = 1 << 30  # bytes of address space
STACK = 1 << 24  # of each thread: with MEMORY no more than 64 threads, whoever the user is
THREADS = 64
FIRST_USER = 2_000_000_000  # above it a user for each process: limits a user are limits a process
NOBODY = 65534  # where a container has no such users

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
ALLOW, ERRNO, EPERM, ENOSYS = 0x7FFF0000, 0x00050000, 1, 38
CLONE_THREAD = 0x10000
# signals by which others end a process: an operator, a scheduler, a machine without memory
BY_OTHERS = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

# What an interpreter needs that computes and speaks over sockets already open, and no more:
# its numbers on x86-64 and arm64.
CALLS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "nanosleep": (35, 101), "getpid": (39, 172),
    "sendto": (44, 206), "recvfrom": (45, 207), "exit": (60, 93), "gettimeofday": (96, 169),
    "getrusage": (98, 165), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176),
    "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132),
    "gettid": (186, 178), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "exit_group": (231, 94), "set_robust_list": (273, 99), "getrandom": (318, 278),
    "membarrier": (324, 283), "rseq": (334, 293),
}  # fmt: skip
MACHINES = {  # audit number, column above, clone
    "x86_64": (0xC000003E, 0, 56),
    "aarch64": (0xC00000B7, 1, 220),
}
CLONE3 = 435


def prctl(option: int, value: int, pointer: bytes | None = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise OSError(ctypes.get_errno(), f"prctl {option} refused")


def die_with_parent(parent: int) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def limit(name: str, value: int) -> None:
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def confine(seconds: float, parent: int) -> None:
    """`seconds` of processor time are left, and it dies with process `parent`.

    OSError where the kernel can't give this.
    """
    limits = {"AS": MEMORY, "CPU": int(seconds) + 2, "STACK": STACK, "NOFILE": 16}
    limits |= dict.fromkeys(("FSIZE", "CORE", "MEMLOCK", "MSGQUEUE"), 0)
    if os.getuid() == 0:
        os.setgroups([])
        for user in (FIRST_USER + os.getpid(), NOBODY):
            with suppress(OSError):
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
                break
        if os.getuid() == 0:
            raise OSError("no other user to be")
        if user != NOBODY:
            limit("NPROC", THREADS)
    for name, value in limits.items():
        limit(name, value)
    prctl(PR_SET_DUMPABLE, 0)
    die_with_parent(parent)  # after the change of user, which would undo it
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    program = ctypes.create_string_buffer(_filter())
    prctl(PR_SET_SECCOMP, 2, struct.pack("HP", len(program) // 8, ctypes.addressof(program)))


def _filter() -> bytes:
    """The seccomp program: CALLS pass, clone only makes threads, all others fail with EPERM."""
    machine = platform.machine()
    if machine not in MACHINES:
        raise OSError(f"no list of system calls for {machine}")
    audit, column, clone = MACHINES[machine]
    # of 32 bits: load; jump if equal; if bits are set; return
    load, equal, bits, give = 0x20, 0x15, 0x45, 0x06

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    allow, refuse = step(give, ALLOW), step(give, ERRNO | EPERM)
    steps = [step(load, 4), step(equal, audit, 1, 0), refuse, step(load, 0)]
    # glibc then takes clone, whose flags can be read
    steps += [step(equal, CLONE3, 0, 1), step(give, ERRNO | ENOSYS)]
    steps += [step(equal, clone, 0, 4), step(load, 16), step(bits, CLONE_THREAD, 0, 1)]
    steps += [allow, refuse]
    for numbers in CALLS.values():
        steps += [step(equal, numbers[column], 0, 1), allow]
    return b"".join([*steps, refuse])
