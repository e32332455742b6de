"""``minipuzzle export``: a folder that serving engines load, in BF16, FP8 or NVFP4."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minipuzzle.architecture.quantities import format_gib
from minipuzzle.commands.options.generate import (
    SectionedCommand,
    compute_of,
    compute_options,
    from_options,
    option_fields,
    settings_options,
)
from minipuzzle.commands.options.shared import dry_run_option, echo_json, json_option, model_argument, push_option
from minipuzzle.formats.choices import FORMATS, PLAIN
from minipuzzle.workflows.settings import ExportSettings

if TYPE_CHECKING:
    from minipuzzle.workflows.export import ExportedFolder


def _format_options(function: Any) -> Any:
    for name in reversed(FORMATS.names()):
        function = click.option(f"--{name}", _flag(name), is_flag=True, help=FORMATS[name].help)(function)
    return function


def _flag(name: str) -> str:
    return f"is_{name.replace('-', '_')}"


@click.command(cls=SectionedCommand, short_help="Write a BF16, FP8 or NVFP4 folder for serving.")
@model_argument()
@_format_options
@settings_options(ExportSettings)
@compute_options(
    memory_help="Memory that calibration and verification may use, e.g. 24GiB; default: most of what is free. If the "
    "model does not fit, one layer at a time is in memory.",
)
@json_option
@push_option
@dry_run_option
def export(model: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Write MODEL as a folder for deployment, checked by reading it back.

    --fp8 and --nvfp4 measure activations on --data, write codes and their scales, load the result and compare what it
    computes with MODEL rounded the same way. Memory stays bounded: nothing needs the whole model at once.
    Without a format, a model that was cut for one is written in that one; what takes more than the model was cut for is
    refused (--over-budget).
    """
    from minipuzzle.cut.budget import read_serving_budget
    from minipuzzle.export.budget import format_of_budget
    from minipuzzle.workflows.export import export_request, plan_export, run_export
    from minipuzzle.workflows.verbs import open_plain

    asked = [name for name in FORMATS.names() if options.pop(_flag(name))]
    if len(asked) > 1:
        raise click.UsageError(f"one folder holds one format, not {' and '.join(f'--{name}' for name in asked)}")
    checkpoint, format_name = open_plain(model), next(iter(asked), None)
    if format_name is None:
        made_for = read_serving_budget(checkpoint.folder)
        if made_for is None:
            raise click.UsageError("say which format: " + ", ".join(f"--{name}" for name in FORMATS))
        format_name = format_of_budget(made_for)
        click.echo(f"in {FORMATS[format_name].title}, which {model} was cut for", err=True)
    _check_usage(format_name, options)

    compute = compute_of(options, is_quiet=as_json)
    command = shlex.join(["minipuzzle", *sys.argv[1:]])
    settings = from_options(ExportSettings, options, compute=compute, command=command)
    request = export_request(checkpoint, format_name, settings)
    if not settings.data and request.layout(checkpoint).needs_calibration:
        raise click.UsageError(f"--{format_name} needs --data: text like what the model will see")
    if dry_run:
        _show_plan(plan_export(checkpoint, format_name, settings), as_json=as_json)
        return
    exported = run_export(checkpoint, format_name, settings)
    for warning in exported.warnings:
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {warning}", err=True)
    if as_json:
        echo_json(exported.to_json())
    else:
        _show(exported, request.scheme, is_verified=not settings.no_verify)


def _check_usage(format_name: str, options: dict[str, Any]) -> None:
    context = click.get_current_context()
    for item, about in option_fields(ExportSettings):
        source = context.get_parameter_source(item.name)
        if format_name == PLAIN and about.section == "Format" and source is not None and source.name == "COMMANDLINE":
            raise click.UsageError(f"{about.flag(item.name)} belongs to --fp8 and --nvfp4")
    if format_name == "nvfp4" and options["activations"] == "dynamic":
        raise click.UsageError("--activations dynamic belongs to --fp8; NVFP4 needs one calibrated scale a layer")


def _show_plan(facts: dict[str, int], *, as_json: bool) -> None:
    if as_json:
        echo_json(facts)
        return
    click.echo(f"disk: {format_gib(facts['disk_bytes'])}")
    click.echo(f"would quantise {facts['num_quantized_modules']} linear layers")
    if facts["memory_bytes"]:
        click.echo(
            f"would calibrate on {facts['calibration_tokens']:,} tokens\nmemory: {format_gib(facts['memory_bytes'])}, "
            f"or at least {format_gib(facts['least_memory_bytes'])} with one layer at a time"
        )


def _show(exported: ExportedFolder, scheme: str, *, is_verified: bool) -> None:
    click.echo(f"{exported.folder}: {exported.num_tensors} tensors, {format_gib(exported.weight_bytes)}")
    if not is_verified:
        click.echo("not verified: run `minipuzzle verify` before deploying it")
        return
    if scheme == PLAIN:
        click.echo("verified: every tensor read back and compared with the source, rounded once to BF16")
    if (found := exported.verification) and found.before is not None:
        before, after = found.before, found.after
        click.echo(
            f"verified: reloaded and run on {after.num_tokens:,} tokens; differs from the source rounded alike by "
            f"{found.relative_difference:.1e}\n"
            f"cost of {scheme}: KL {after.kl:.4g} nats/token from the source, "
            f"agreement {after.agreement:.2%}, loss {before.loss:.4f} -> {after.loss:.4f}"
        )
