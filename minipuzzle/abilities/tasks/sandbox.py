"""Programs that a model wrote, run where they can do no harm: no network, no files written, no other processes.

A child process gives up, before it runs the program, the right to every system call but those that computing and
reading files need (seccomp, Linux), and gets limits on time and memory. What the filter does not know fails with
EPERM. Where the kernel cannot do this nothing is run.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache

from minipuzzle.errors import MinipuzzleError

PASSED, TIMED_OUT = "passed", "timed out"
_MAX_SAID = 500  # characters of the error that ended a program

# Numbers of system calls: x86_64, aarch64 (None: it has no such call). From the kernel's tables (unistd.h).
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "nanosleep": (35, 101), "getpid": (39, 172),
    "exit": (60, 93), "uname": (63, 160), "fcntl": (72, 25), "getcwd": (79, 17), "readlink": (89, None),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "ppoll": (271, 73),
    "set_robust_list": (273, 99), "getrandom": (318, 278), "statx": (332, 291), "rseq": (334, 293),
    "faccessat2": (439, 439),
}  # fmt: skip
# Allowed where an argument has none of some bits: opening files to read only.
_OPEN = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
_WRITING_FLAGS = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000  # WRONLY, RDWR, CREAT, TRUNC, APPEND, TMPFILE
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Runs in the child, by itself: reads what to do from standard input. BPF as in linux/filter.h and linux/seccomp.h.
_CHILD = """
import ctypes, json, os, resource, struct, sys
job = json.load(sys.stdin)
for name, limit in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
sys.setrecursionlimit(5000)
libc = ctypes.CDLL(None, use_errno=True)
rows = b"".join(struct.pack("HBBI", *row) for row in job["filter"])
buffer = ctypes.create_string_buffer(rows, len(rows))
program = struct.pack("HxxxxxxP", len(job["filter"]), ctypes.addressof(buffer))
holder = ctypes.create_string_buffer(program, len(program))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, holder, 0, 0):
    os.write(1, b"cannot be confined")
    os._exit(3)
if job["program"]:
    try:
        exec(compile(job["program"], "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        sys.stdout.flush()
        os.write(2, f"{type(error).__name__}: {error}".encode(errors="replace")[:500])
        os._exit(1)
sys.stdout.flush()
os.write(2, job["token"].encode())
os._exit(0)
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may take: ``seconds`` of wall time and of computing, ``memory_bytes`` of address space."""

    seconds: float = 10.0
    memory_bytes: int = 2 * 2**30
    open_files: int = 32


def run_program(program: str, limits: Limits = Limits()) -> str:
    """Run a Python program to its end, confined; ``PASSED``, ``TIMED_OUT``, or the error that ended it.

    A program that ends itself before its last line has not passed.

    Raises: MinipuzzleError where programs cannot be confined.
    """
    require_confinement()
    return _run(program, limits)


@cache
def require_confinement() -> None:
    """Check that this machine can confine a program, by confining one that does nothing.

    Raises: MinipuzzleError if not.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ARCHITECTURES or _run("", Limits()) != PASSED:
        raise MinipuzzleError(
            f"programs of a model cannot be confined on this machine ({sys.platform}, {machine})",
            "leave humaneval out, or run it on Linux (x86_64 or aarch64) where seccomp is not forbidden",
        )


def _run(program: str, limits: Limits) -> str:
    token = secrets.token_hex(16)
    job = {"program": program, "token": token, "filter": _filter(platform.machine()), "limits": _resources(limits)}
    with (
        tempfile.TemporaryDirectory(prefix="minipuzzle-") as folder,
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        ) as child,
    ):
        assert child.stdin is not None and child.stderr is not None
        try:
            child.stdin.write(json.dumps(job).encode())
            child.stdin.close()
            # Read when it is over: what a program says beyond the pipe's 64 KiB makes it wait for its end.
            child.wait(timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        text = child.stderr.read().decode(errors="replace")
    if child.returncode == 0 and text.endswith(token):
        return PASSED
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return TIMED_OUT
    return text.replace(token, "")[-_MAX_SAID:].strip() or f"ended by itself with {child.returncode}"


def _resources(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_CPU": max(1, round(limits.seconds)),
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
    }


def _filter(machine: str) -> list[tuple[int, int, int, int]]:
    """A BPF program: (code, jump if true, jump if false, value). Anything not allowed returns EPERM."""
    column, architecture = _ARCHITECTURES[machine]
    load, equal, set_bits, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    rows = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    for numbers in _ALLOWED.values():
        if (number := numbers[column]) is not None:
            rows += [(equal, 0, 1, number), (give, 0, 0, allow)]
    for numbers, argument in _OPEN.values():
        if (number := numbers[column]) is not None:
            rows += [
                (equal, 0, 4, number),
                (load, 0, 0, 16 + 8 * argument),
                (set_bits, 0, 1, _WRITING_FLAGS),
                (give, 0, 0, refuse),
                (give, 0, 0, allow),
            ]
    return [*rows, (give, 0, 0, refuse)]
