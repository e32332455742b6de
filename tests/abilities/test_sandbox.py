"""Guarantee: a program that a model wrote computes, and does nothing else: not to files, processes, or the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipuzzle.abilities.items import Item
from minipuzzle.abilities.tasks.programs import HUMANEVAL, whole_program
from minipuzzle.abilities.tasks.sandbox import PASSED, TIMED_OUT, Limits, run_program

QUICK = Limits(seconds=1.0)
REFUSED = "PermissionError"

# What programs try, and how that must end.
ATTEMPTS = {
    "import socket; socket.socket()": REFUSED,
    "import os; os.fork()": REFUSED,
    "import subprocess; subprocess.run(['true'])": REFUSED,
    "import os; os.kill(os.getppid(), 9)": REFUSED,
    "import os; os.kill(-1, 9)": REFUSED,
    "import os; os.execv('/bin/true', ['true'])": REFUSED,
    "import threading; threading.Thread(target=print).start()": "RuntimeError",
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))": "ValueError",
    "from multiprocessing.shared_memory import SharedMemory; SharedMemory(create=True, size=9)": REFUSED,
    "import ctypes; ctypes.CDLL(None).fork()  >= 0 or 1 / 0": "ZeroDivisionError",
    "x = bytearray(10 * 2**30)": "MemoryError",
    "while True: pass": TIMED_OUT,
    "import time; time.sleep(60)": TIMED_OUT,
    "import sys\nwhile True: sys.stderr.write('x' * 10_000)": TIMED_OUT,
    "def f(n): return f(n + 1)\nf(0)": "RecursionError",
    "import os; os._exit(0)": "ended by itself with 0",
    "raise SystemExit(0)": "SystemExit",
    "import signal; signal.raise_signal(signal.SIGSEGV)": REFUSED,
}


@pytest.mark.parametrize(("program", "end"), ATTEMPTS.items())
def test_what_a_program_must_not_do_ends_it(program: str, end: str) -> None:
    assert run_program(program, QUICK).startswith(end)


@pytest.mark.parametrize(
    "attempt",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'r+')",
        "open({path!r}, 'a')",
        "import os; os.open({path!r}, os.O_CREAT)",
        "import os; os.unlink({path!r})",
        "import os; os.rename({path!r}, {path!r} + '2')",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.chmod({path!r}, 0o777)",
        "import os; os.symlink('/', {path!r} + '2')",
        "import os; os.mkdir({path!r} + '2')",
        "import shutil, os; shutil.rmtree(os.path.dirname({path!r}))",
        "open('here', 'w')",
    ],
)
def test_no_file_is_changed_anywhere(tmp_path: Path, attempt: str) -> None:
    path = tmp_path / "precious"
    path.write_text("kept")
    mode = path.stat().st_mode
    assert run_program(attempt.format(path=str(path)), QUICK).startswith(REFUSED)
    assert path.read_text() == "kept" and path.stat().st_mode == mode
    assert [found.name for found in tmp_path.iterdir()] == ["precious"]


def test_a_program_that_only_computes_passes() -> None:
    program = "import math, re, collections, itertools, json, hashlib, random, datetime, decimal\nassert math.pi > 3"
    assert run_program(program) == PASSED
    assert run_program("assert 1 == 2, 'no'") == "AssertionError: no"
    assert run_program("def f(:").startswith("SyntaxError")


def test_secrets_of_the_environment_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPUZZLE_API_KEY", "secret")
    assert run_program("import os; assert 'secret' not in str(os.environ)") == PASSED


def test_a_body_is_right_if_the_problems_own_tests_pass() -> None:
    facts = {
        "prompt": "def double(x: int) -> int:\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2",
        "entry_point": "double",
    }
    item = Item(name="0", prompt=facts["prompt"], facts=facts)
    assert HUMANEVAL.score is not None
    bodies = {"    return 2 * x": 1.0, "    return x * x": 0.0, "    import os; os._exit(0)": 0.0, "  x = (": 0.0}
    assert {body: HUMANEVAL.score(item, body) for body in bodies} == bodies
    assert whole_program(item, "    return 2 * x").endswith("check(double)\n")
