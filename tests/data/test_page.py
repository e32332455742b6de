"""Guarantee: every command of the page on recovery data can be typed as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from minipuzzle.commands.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "recovery_data.md"
LINES = re.findall(r"^minipuzzle (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
def test_commands_of_the_page_parse(line: str) -> None:
    command: click.Command | None = main
    words = shlex.split(line)
    while isinstance(command, click.Group):
        command = command.get_command(click.Context(command), words.pop(0))
    assert command is not None
    command.make_context("x", words)
