"""A command that was typed, as a recipe of one step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

STEP_NAMES = ("score", "prune", "distill", "export", "evaluate")  # in the order in which they run
EXPORT_FORMAT = "format"  # in recipes; a flag on the command line
_LEFT_OUT = ("out", "as_json", "dry_run")  # which say nothing of what is computed


def as_recipe(ctx: click.Context) -> str:
    """The options that were typed as TOML, in the table of their command."""
    model, given = "", dict[str, Any]()
    for param in ctx.command.params:
        name = param.name or ""
        value, source = ctx.params.get(name), ctx.get_parameter_source(name)
        if isinstance(param, click.Argument):
            model = str(value)
        elif name not in _LEFT_OUT and value is not None and source is not None and source.name == "COMMANDLINE":
            key = EXPORT_FORMAT if name == "format_name" else param.opts[-1].lstrip("-").replace("-", "_")
            given[key] = _plain(value)
    lines = [f"model = {json.dumps(model)}", 'out = "run"', "", f"[{ctx.info_name}]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in given.items() if not isinstance(value, dict)]
    for key, value in given.items():
        if isinstance(value, dict):
            lines += ["", f"[{ctx.info_name}.{key}]"]
            lines += [f"{json.dumps(name)} = {json.dumps(item)}" for name, item in value.items()]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """The value of an option as TOML has it."""
    if isinstance(value, tuple):
        return ["=".join(item) if isinstance(item, tuple) else _plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
