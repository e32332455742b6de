"""The options of all commands: their names, types, defaults and choices, which scripts rely on and releases keep.

After an intended change: ``python -m tests.commands.test_options`` writes the list anew.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from distill.engine import EngineSettings
from minipuzzle.commands.cli import OPTION_OF_FIELD, every_command, main, with_options
from minipuzzle.option import KEY, Option
from minipuzzle.workflows import settings as workflow_settings
from minipuzzle.workflows.data import settings as data_settings

FROZEN = Path(__file__).with_name("options.txt")
ROOT = Path(__file__).parents[2]
SETTINGS = [
    EngineSettings,
    *(
        value
        for module in (workflow_settings, data_settings)
        for value in vars(module).values()
        if dataclasses.is_dataclass(value)
    ),
]


def command_of(words: Sequence[str]) -> click.Command:
    command: click.Command | None = main
    for word in words:
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), word)
    assert command is not None
    return command


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
    for words in every_command():
        params = command_of(words).params
        lines += sorted(f"{' '.join(words)} {_names(param)} {json.dumps(described(param))}\n" for param in params)
    return "".join(lines)


def _names(param: click.Parameter) -> str:
    return "/".join(param.opts) if isinstance(param, click.Option) else str(param.metavar)


def test_options_are_those_that_were_promised() -> None:
    assert listed_options().splitlines() == FROZEN.read_text(encoding="utf-8").splitlines()


def test_errors_name_fields_and_the_command_line_turns_them_into_its_options() -> None:
    """The one table of renamed fields is what the settings say, and every field that a message names is an option."""
    renamed = {
        field.name: about.name
        for settings in SETTINGS
        for field in dataclasses.fields(settings)
        if isinstance(about := field.metadata.get(KEY), Option) and about.name.replace("-", "_") not in ("", field.name)
    }
    assert renamed == OPTION_OF_FIELD
    known = {
        option
        for words in every_command()
        for parameter in command_of(words).params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = {
        field: with_options(f"‹{field}›")
        for package in ("minipuzzle", "importance", "distill")
        for path in (ROOT / package).rglob("*.py")
        for field in re.findall("‹([a-z0-9_]+)›", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 40
    assert {field: option for field, option in named.items() if option not in known} == {}
    assert with_options("give ‹latency_ms› or ‹memory›") == "give --latency or --memory"
    assert with_options("token '<s>' stays") == "token '<s>' stays"


def test_no_error_of_the_core_speaks_of_options() -> None:
    """Commands quoted whole, in backticks, do."""
    found = []
    for package in ("minipuzzle", "importance", "distill"):
        for path in (ROOT / package).rglob("*.py"):
            if "commands" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error"):
                    parts = [c.value for a in node.args for c in ast.walk(a) if isinstance(c, ast.Constant)]
                    texts = "".join(part for part in parts if isinstance(part, str)).split("`")[::2]
                    found += [(path.name, text) for text in texts if re.search(r"(?<![\w-])--[a-z]", text)]
    assert found == []


if __name__ == "__main__":
    FROZEN.write_text(listed_options(), encoding="utf-8")
