"""Commands that run in processes of their own, so that they can be killed for real.

A server that has imported everything forks each of them, so that it starts at once.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from signal import SIGKILL, Signals

import torch

from minipuzzle.commands.cli import main

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.support.kills", "tests.support.distilling"])


def start(target: Callable[..., object], *arguments: object) -> ForkServerProcess:
    """A process that runs a function, on one thread: sums come in the same order in every process."""
    process = PROCESSES.Process(target=run_on_one_thread, args=(target, arguments))
    process.start()
    return process


def run_on_one_thread(target: Callable[..., object], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    target(*arguments)


def run_command(*arguments: str) -> None:
    """The command line as a program of its own runs it, without its output."""
    with open(os.devnull, "w") as nothing:  # noqa: PTH123  (not a path of ours)
        sys.stdout = sys.stderr = nothing
        sys.argv = ["minipuzzle", *arguments]
        main(list(arguments))


def stop_when(
    process: ForkServerProcess,
    is_time: Callable[[], bool],
    *,
    by: Signals = SIGKILL,
    delay_seconds: float = 0,
    timeout_seconds: float = 300,
) -> bool:
    """Stop a process some time after something has happened; whether it was still running then."""
    deadline = time.monotonic() + timeout_seconds
    while process.is_alive() and not is_time():
        assert time.monotonic() < deadline, "what the process was to do did not happen"
        time.sleep(0.001)
    time.sleep(delay_seconds)
    was_running = process.is_alive()
    if was_running and process.pid is not None:
        os.kill(process.pid, by)
    process.join()
    return was_running


def stop_command_when(arguments: Sequence[object], is_time: Callable[[], bool], *, by: Signals = SIGKILL) -> int | None:
    """Start a command and stop it once something has happened, before it is done; its exit code."""
    process = start(run_command, *map(str, arguments))
    assert stop_when(process, is_time, by=by), "the command ended before it was stopped"
    return process.exitcode
