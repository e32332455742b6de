"""``minipuzzle verify``: whether a folder for deployment is whole, and what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minipuzzle.commands.options.generate import (
    SectionedCommand,
    compute_of,
    compute_options,
    from_options,
    settings_options,
)
from minipuzzle.commands.options.shared import dry_run_option, echo_json, json_option, model_argument
from minipuzzle.errors import ExitCode
from minipuzzle.workflows.settings import VerifySettings

_NAMES_SHOWN = 4


@click.command(cls=SectionedCommand, short_help="Check an exported folder and what it computes.")
@model_argument("folder", "FOLDER")
@settings_options(VerifySettings)
@compute_options(memory_help="Memory to use at most, e.g. 24GiB; default: most of what is free.")
@json_option
@dry_run_option
def verify(folder: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Read FOLDER with minipuzzle's own reader: its layout, its scales, every weight, and what it computes.

    Refuses missing, unknown or misshapen tensors, and scales or codes that are zero or not numbers, naming the tensor.
    Runs the model on --data, or on random tokens without it; with --against it prints KL and agreement. --dry-run
    checks names, shapes and configuration, and reads no weights.

    Every tensor is compared with the digests that export recorded, and with --against with the source rounded alike.
    It ends with "ok", or with "not ok" and exit code 5.
    """
    from minipuzzle.workflows.verify import plan_verify, run_verify

    compute = compute_of(options, is_quiet=as_json)
    settings = from_options(VerifySettings, options, compute=compute)
    verified = (plan_verify if dry_run else run_verify)(folder, settings)
    facts = verified.to_json()
    if as_json:
        echo_json(facts)
    else:
        for name, value in facts.items():
            click.echo(f"{name.replace('_', ' '):<22} {_shown(value)}")
    if not verified.is_ok:
        click.get_current_context().exit(ExitCode.NOT_OK)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"{len(value)}: " + ", ".join(value[:_NAMES_SHOWN]) + (", ..." if len(value) > _NAMES_SHOWN else "")
    return str(value)
