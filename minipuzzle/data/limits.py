"""Limits on what others' files may take: a chat template is a program, and a compressed file may be any size."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

_STATM = Path("/proc/self/statm")


@contextmanager
def memory_at_most(extra_bytes: int) -> Iterator[None]:
    """What is allocated while the block runs beyond so many bytes is a MemoryError; on Linux, elsewhere no limit."""
    if not _STATM.is_file():
        yield
        return
    import resource

    used_bytes = int(_STATM.read_text(encoding="ascii").split()[5]) * os.sysconf("SC_PAGESIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [used_bytes + extra_bytes, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def time_at_most(cpu_seconds: float) -> Iterator[None]:
    """A TimeoutError once this process has computed for so long while the block runs; in its main thread only.

    A single operation that does not return to Python is not interrupted.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGVTALRM"):
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"it ran for more than {cpu_seconds} s")

    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, stop))
        stack.callback(signal.setitimer, signal.ITIMER_VIRTUAL, *signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds))
        yield
