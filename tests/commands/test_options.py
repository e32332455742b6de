"""The options of all commands: their names, types, defaults and choices, which scripts rely on and releases keep.

After an intended change: ``python -m tests.commands.test_options`` writes the list anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from minipuzzle.commands.cli import COMMANDS, main

FROZEN = Path(__file__).with_name("options.txt")
ROOT = Path(__file__).parents[2]


def described(option: click.Parameter) -> dict[str, Any]:
    """What a script can rely on; how the value is called inside is not part of it."""
    kind: Any = option.type.to_info_dict()
    facts = {
        "type": option.type.name,
        "choices": kind.get("choices", []),
        "bounds": [kind.get("min"), kind.get("max")],
        "default": _plain(option.to_info_dict()["default"]),
        "required": option.required,
        "multiple": bool(getattr(option, "multiple", False)),
        "is_flag": bool(getattr(option, "is_flag", False)),
    }
    return {name: value for name, value in facts.items() if value not in (None, False, [], [None, None])}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.relative_to(ROOT).as_posix()
    return value if isinstance(value, str | int | float | list | None) else None


def listed_options() -> str:
    """A line an option: the command, the option's names or the argument's metavar, and the facts."""
    lines = []
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        lines += sorted(f"{name} {_names(param)} {json.dumps(described(param))}\n" for param in command.params)
    return "".join(lines)


def _names(param: click.Parameter) -> str:
    return "/".join(param.opts) if isinstance(param, click.Option) else str(param.metavar)


def test_options_are_those_that_were_promised() -> None:
    assert listed_options().splitlines() == FROZEN.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    FROZEN.write_text(listed_options(), encoding="utf-8")
