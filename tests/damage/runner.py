"""Runs commands on damaged inputs and says what became of each.

A case runs in a child forked from a process that has imported everything, so that a thousand of them take minutes; or,
for the few that the test suite runs, in this process. It may use two GiB, half a minute, and no standard input; its
inputs are fingerprinted before and after.
"""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from click.testing import CliRunner

from minipuzzle.data.limits import memory_at_most
from minipuzzle.errors import ExitCode

MEMORY_BYTES = 2 * 2**30
TIME_SECONDS = 30
CANARY = "CANARY"  # a file that only executed code of an input can have made

REFUSED, DONE, EITHER = "refused", "done", "either"  # what a case expects
# What may happen besides: each of these is a fault.
SILENT, TRACEBACK, HANG, MEMORY, EXECUTED, CHANGED = "silent", "traceback", "hang", "memory", "executed", "changed"
NEEDLESS = "needless refusal"
OUTPUTS = ("out", "out.partial", "out.json", "out.safetensors", "out.safetensors.partial-sums", "cache", CANARY)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One damaged input. ``name``: group/what. ``prepare``: damages a copy of the material in the given folder and
    returns the arguments of the command. ``expected``: REFUSED, DONE or EITHER. ``watched``: what must not change,
    below the folder; everything that is there when the command starts if empty."""

    name: str
    prepare: Callable[[Path], list[str]]
    expected: str = REFUSED
    may_write: tuple[str, ...] = OUTPUTS


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case: its class, and the last lines that it printed."""

    case: str
    verdict: str
    is_right: bool
    output: str
    seconds: float


def fingerprints(folder: Path, except_for: tuple[str, ...]) -> dict[str, str]:
    """Contents of all files, and the kind of everything else, below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in except_for or name.startswith(tuple(f"{allowed}/" for allowed in except_for)):
            continue
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(mode):
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = str(stat.S_IFMT(mode))
    return found


def run_case(case: Case, folder: Path) -> Outcome:
    """Prepare and run one case in a child of this process."""
    folder.mkdir(parents=True)
    arguments = case.prepare(folder)
    before = fingerprints(folder, case.may_write)
    log, started = folder.with_suffix(".log"), time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(arguments, folder, log)
    verdict = _wait(pid)
    seconds = time.monotonic() - started
    text = log.read_text(encoding="utf-8", errors="replace")
    if verdict not in (HANG, MEMORY):
        verdict = _verdict(int(verdict), text)
    return _judged(case, folder, before, verdict, text, seconds)


def run_here(case: Case, folder: Path) -> Outcome:
    """Prepare and run one case in this process, in its main thread."""
    from minipuzzle.commands.cli import main

    folder.mkdir(parents=True)
    arguments = case.prepare(folder)
    before, started, place = fingerprints(folder, case.may_write), time.monotonic(), Path.cwd()
    os.chdir(folder)
    try:
        with _alarm(TIME_SECONDS), memory_at_most(MEMORY_BYTES):
            result = CliRunner().invoke(main, arguments)
    finally:
        os.chdir(place)
    error, text = result.exception, result.output
    if error is not None and not isinstance(error, SystemExit):
        text += "".join(traceback.format_exception(error))
    verdict = HANG if isinstance(error, TimeoutError) else _verdict(result.exit_code, text)
    return _judged(case, folder, before, verdict, text, time.monotonic() - started)


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise TimeoutError

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def _judged(case: Case, folder: Path, before: dict[str, str], verdict: str, text: str, seconds: float) -> Outcome:
    if (folder / CANARY).exists():
        verdict = EXECUTED
    elif fingerprints(folder, case.may_write) != before:
        verdict = CHANGED
    elif verdict == DONE and case.expected == REFUSED:
        verdict = SILENT
    elif verdict == REFUSED and case.expected == DONE:
        verdict = NEEDLESS
    is_right = verdict == case.expected or (case.expected == EITHER and verdict in (REFUSED, DONE))
    return Outcome(case=case.name, verdict=verdict, is_right=is_right, output=text[-1500:], seconds=seconds)


def _child(arguments: list[str], folder: Path, log: Path) -> None:
    """The command, with its output in a file; never returns."""
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(descriptor, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        used = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, used + MEMORY_BYTES))
        from minipuzzle.commands.cli import main

        sys.argv = ["minipuzzle", *arguments]
        main(arguments, standalone_mode=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(pid: int) -> str:
    """The exit code as text, or HANG."""
    deadline = time.monotonic() + TIME_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return str(os.waitstatus_to_exitcode(status))
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return HANG


def _verdict(code: int, text: str) -> str:
    if "MemoryError" in text or "can't allocate memory" in text or code == -signal.SIGKILL:
        return MEMORY
    if "Traceback (most recent call last)" in text or code not in (0, 1, 2, 3, 4, 5, 6):
        return TRACEBACK
    if code == 0:
        return DONE
    return REFUSED if code == ExitCode.NOT_OK or "error:" in text.lower() else TRACEBACK
