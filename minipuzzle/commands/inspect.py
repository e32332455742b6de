"""``minipuzzle inspect``: what a model is made of and what it needs, from config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minipuzzle.memory import Deployment
from minipuzzle.options import deployment_options, echo_json, json_option, model_argument


@click.command()
@model_argument(metavar="MODEL|config.json")
@deployment_options
@json_option
def inspect(model: Path, deployment: Deployment, as_json: bool) -> None:
    """Show layers, parameters and every memory term of a model.

    MODEL is a checkpoint folder or a config.json; weights are not read.
    """
    from minipuzzle.checkpoint import read_json
    from minipuzzle.families import read_architecture
    from minipuzzle.report import architecture_summary, print_architecture

    config = read_json(model / "config.json" if model.is_dir() else model)
    architecture = read_architecture(config)
    summary: dict[str, Any] = {"model": str(model), **architecture_summary(architecture, deployment)}
    if as_json:
        echo_json(summary)
    else:
        print_architecture(architecture, deployment)
