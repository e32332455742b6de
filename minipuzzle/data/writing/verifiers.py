"""Verifiers: whether a final answer is right, by a rule and not by an opinion. 1 is right, 0 is wrong."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from functools import partial

from minipuzzle.errors import MinipuzzleError
from minipuzzle.table import Table

COMMAND_SECONDS = 30
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
Verifier = Callable[[str, Mapping[str, str]], float]


def number(text: str, record: Mapping[str, str]) -> float:
    """Whether the last number of a text is the number of the record's ``answer``."""
    found, wanted = (_NUMBER.findall(part) for part in (text, record.get("answer", "")))
    if not found or not wanted:
        return 0.0
    return float(float(found[-1].replace(",", "")) == float(wanted[-1].replace(",", "")))


def exact(text: str, record: Mapping[str, str]) -> float:
    """Whether the last line of a text is the record's ``answer``."""
    lines = text.strip().splitlines() or [""]
    return float(lines[-1].strip() == record.get("answer", "").strip())


def reasoning_gym(text: str, record: Mapping[str, str]) -> float:
    """The score that reasoning-gym gives the last line, for a record with its ``dataset`` and ``entry`` (JSON).

    Raises: MinipuzzleError where reasoning-gym is missing.
    """
    try:
        import reasoning_gym as gym
    except ImportError:
        raise MinipuzzleError("this verifier needs reasoning-gym", "pip install reasoning-gym") from None
    lines = text.strip().splitlines() or [""]
    entry = json.loads(record["entry"])
    return float(gym.get_score_answer_fn(record["dataset"])(lines[-1].strip(), entry))


def by_command(command: str, text: str, record: Mapping[str, str]) -> float:
    """Whether a program ends well that gets the text and the record as JSON on its standard input."""
    given = json.dumps({"text": text, **record})
    try:
        done = subprocess.run(
            shlex.split(command), input=given.encode(), capture_output=True, timeout=COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return 0.0
    except (OSError, ValueError) as error:
        raise MinipuzzleError(f"the verifier cannot be run: {error}", "check ‹verifier›") from None
    return float(done.returncode == 0)


VERIFIERS: Table[Verifier] = Table(
    "verifier", "verifiers", entries={"number": number, "exact": exact, "reasoning-gym": reasoning_gym}
)


def verifier_of(text: str) -> Verifier:
    """A verifier by its name, or a program as ``command:PROGRAM ARGUMENTS``.

    Raises: MinipuzzleError for a name that is unknown.
    """
    name, colon, command = text.partition(":")
    return partial(by_command, command) if name == "command" and colon else VERIFIERS[text]
