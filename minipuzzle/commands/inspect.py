"""``minipuzzle inspect``: what a model is made of and what it needs, from config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minipuzzle.architecture.deployments import NamedDeployment
from minipuzzle.commands.options.shared import deployment_options, echo_json, json_option, model_argument


@click.command()
@model_argument(metavar="MODEL|config.json")
@deployment_options
@json_option
def inspect(model: Path, named_deployment: NamedDeployment, as_json: bool) -> None:
    """Show layers, parameters and every memory term of a model.

    MODEL is a checkpoint folder or a config.json; weights are not read.
    """
    from minipuzzle.architecture.memory import memory_breakdown
    from minipuzzle.architecture.quantities import format_gib, parse_bytes
    from minipuzzle.files.checkpoint import architecture_at
    from minipuzzle.formats.choices import warn_of_terms_not_exported
    from minipuzzle.show.report import architecture_summary, print_architecture

    architecture, deployment = architecture_at(model), named_deployment.deployment
    warn_of_terms_not_exported(architecture, deployment)
    needed_bytes = memory_breakdown(architecture, deployment).total_bytes
    budget_bytes = parse_bytes(named_deployment.memory) if named_deployment.memory else None
    if as_json:
        facts: dict[str, Any] = {"model": str(model), **architecture_summary(architecture, deployment)}
        if budget_bytes is not None:
            facts |= {"deployment_name": named_deployment.name, "budget_bytes": budget_bytes}
        echo_json(facts)
        return
    print_architecture(architecture, deployment)
    if budget_bytes is not None:
        answer = "it fits" if needed_bytes <= budget_bytes else f"{format_gib(needed_bytes - budget_bytes)} too much"
        click.echo(f"{named_deployment.name} has {format_gib(budget_bytes)}: {answer} ({named_deployment.source})")
