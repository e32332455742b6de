"""``minipuzzle abilities``: what models can still do, task by task, beside the model they were made from."""

from __future__ import annotations

from typing import Any

import click

from minipuzzle.commands.options.generate import (
    SectionedCommand,
    compute_of,
    compute_options,
    from_options,
    settings_options,
)
from minipuzzle.commands.options.shared import dry_run_option, echo_json, json_option
from minipuzzle.workflows.abilities.settings import AbilitiesSettings


@click.command(cls=SectionedCommand, short_help="Compare what models can do, task by task, with intervals.")
@click.argument("models", metavar="MODEL...", nargs=-1)
@settings_options(AbilitiesSettings)
@compute_options(dtype_help="Precision of the computation; default: float32 on a CPU, bfloat16 elsewhere.")
@json_option
@dry_run_option
def abilities(models: tuple[str, ...], dry_run: bool, as_json: bool, **options: Any) -> None:
    """Put the same items to each MODEL, and to TEACHER: choices by likelihood, and answers that are written.

    A MODEL is a folder, plain or quantised (its rounding is computed as engines do it), or stands behind --endpoint.
    The table has 95 % intervals, paired differences with sign tests, and says what so many items can show.
    """
    from minipuzzle.show.abilities import print_abilities
    from minipuzzle.workflows.abilities.run import plan_abilities, run_abilities

    compute = compute_of(options, is_quiet=as_json)
    settings = from_options(AbilitiesSettings, options, compute=compute)
    if dry_run:
        plan = plan_abilities(list(models), settings)
        if as_json:
            echo_json(plan)
            return
        click.echo(f"would ask {', '.join(plan['models'])}")
        for name, facts in plan["tasks"].items():
            shown = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in facts.items() if key != "kind")
            click.echo(f"{name} ({facts['kind']}): {shown}")
        return
    found = run_abilities(list(models), settings)
    echo_json(found.to_json()) if as_json else print_abilities(found.rows, found.notes)
