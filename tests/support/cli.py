"""The command line, called in this process."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from minipuzzle.commands.cli import main


def run_cli(*arguments: object) -> Result:
    """One command; whatever stands for paths and numbers is written out."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> dict[str, Any]:
    """What a command that succeeds prints with ``--json``."""
    result = run_cli(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found
