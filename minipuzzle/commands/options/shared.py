"""Options that several commands share, so that they look and behave the same everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from minipuzzle.architecture.deployments import DEPLOYMENTS, SERVING_FIELDS, NamedDeployment, find_deployment
from minipuzzle.architecture.memory import FROM_CONFIG, PRECISION_FIELDS, PRECISIONS, TERMS, Deployment
from minipuzzle.architecture.quantities import parse_count
from minipuzzle.errors import MinipuzzleError

Function = TypeVar("Function", bound=Callable[..., Any])


class CountType(click.ParamType[int]):
    """A count such as 4096, 128k or 1M."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse, turning a malformed count into click's usage error."""
        if isinstance(value, int):
            return value
        try:
            return parse_count(value)
        except MinipuzzleError as error:
            self.fail(f"{error.problem}; {error.hint}", param, ctx)


COUNT = CountType()


class PathType(click.Path):
    """A path that can be one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does, which fails on NUL."""
        if "\0" in str(value):
            self.fail(f"{value!r} holds a NUL, which no path can", param, ctx)
        return super().convert(value, param, ctx)


FOLDER_OR_FILE = PathType(path_type=Path)


def model_argument(name: str = "model", metavar: str = "MODEL") -> Callable[[Function], Function]:
    """A checkpoint folder."""
    return click.argument(name, metavar=metavar, type=FOLDER_OR_FILE)


def data_option(*, required: bool = True) -> Callable[[Function], Function]:
    """Text to measure or train on; may be given several times."""
    return click.option(
        "--data",
        "data",
        type=FOLDER_OR_FILE,
        multiple=True,
        required=required,
        help="Text: .txt, .md, .jsonl or .parquet with 'text' or chat 'messages', or a folder of these. Repeatable.",
    )


def json_option(function: Function) -> Function:
    """Machine-readable results on standard output; people's tables and progress stay away."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")(
        function
    )


def dry_run_option(function: Function) -> Function:
    """Check everything and say what would happen."""
    return click.option(
        "--dry-run", is_flag=True, help="Check all inputs, print what would be done and what it needs, and stop."
    )(function)


def out_option(kind: str = "folder", *, required: bool = True) -> Callable[[Function], Function]:
    """Where the result goes."""
    return click.option(
        "-o", "--out", "out", type=FOLDER_OR_FILE, required=required, help=f"Output {kind}; appears only when complete."
    )


def overwrite_option(function: Function) -> Function:
    """Replace an earlier output of ours."""
    return click.option(
        "--overwrite", is_flag=True, help="Replace an output folder that minipuzzle wrote; never any other."
    )(function)


def push_option(function: Function) -> Function:
    """Upload what the command wrote, once it is finished."""

    @wraps(function)
    def pushing(push_to_hub: str | None, **params: Any) -> Any:
        result = function(**params)
        if push_to_hub is not None and not params["dry_run"]:
            from minipuzzle.files.hub import push
            from minipuzzle.runtime.processes import processes_from_environment

            if processes_from_environment().is_first:
                click.echo(f"uploaded to {push(Path(params['out']), push_to_hub)}", err=True)
        return result

    help_text = "Upload the finished folder to this repository on the hub, which is made (private) if there is none."
    option = click.option("--push-to-hub", metavar="ORG/NAME", default=None, help=help_text)
    return option(pushing)  # type: ignore[return-value] # of the same form


def device_option(function: Function) -> Function:
    """Where to compute."""
    return click.option("--device", default=None, help="cpu, cuda, ...; default: the accelerator there is, else cpu.")(
        function
    )


def deployment_options(function: Function) -> Function:
    """The serving conditions that memory is counted for, and their budget; passed on as ``named_deployment``."""

    @wraps(function)
    def with_deployment(**params: Any) -> Any:
        return function(named_deployment=pop_deployment(params), **params)

    return with_options(with_deployment, deployment_option_list())  # type: ignore[no-any-return]


def pop_deployment(params: dict[str, Any]) -> NamedDeployment:
    """The named deployment that was asked for (or the defaults), with whatever else was given on top."""
    name, file = params.pop("deployment_name"), params.pop("deployments_file")
    named = find_deployment(name, file) if name else NamedDeployment(name="", deployment=Deployment())
    given = {field: value for field in SERVING_FIELDS if (value := params.pop(field)) is not None}
    if "context" in given:
        given["context_tokens"] = given.pop("context")
    return replace(named, deployment=replace(named.deployment, **given))


def deployment_option_list() -> list[Callable[[Function], Function]]:
    defaults = Deployment()
    precision = click.Choice(PRECISIONS.names())
    named = (
        f"Serving conditions and budget by name: {', '.join(DEPLOYMENTS)}, or one of your file. "
        "Options given beside it win; its budget is not applied beside --memory, --keep or --width."
    )
    options = [
        click.option("--deployment", "deployment_name", metavar="NAME", default=None, help=named),
        click.option(
            "--deployments",
            "deployments_file",
            type=FOLDER_OR_FILE,
            envvar="MINIPUZZLE_DEPLOYMENTS",
            show_envvar=True,
            help="TOML file with deployments of your own: [name] memory, context, batch, weights, kv_cache, ...",
        ),
        click.option("--context", type=COUNT, help="Context in tokens, e.g. 128k or 1M.", show_default="8192"),
        click.option("--batch", type=click.IntRange(min=1), help="Sequences served at once.", show_default="1"),
    ]
    labels = {**TERMS, "ssm_state": "SSM state; config: as config.json says"}
    for field in PRECISION_FIELDS:
        choices = click.Choice([*PRECISIONS, FROM_CONFIG]) if field == "ssm_state" else precision
        option, text = f"--{field.replace('_', '-')}", f"Precision of {labels[field]}."
        options.append(click.option(option, field, type=choices, help=text, show_default=getattr(defaults, field)))
    return options


def with_options(function: Any, options: Sequence[Callable[[Any], Any]]) -> Any:
    for option in reversed(options):
        function = option(function)
    return function


def echo_json(value: Any) -> None:
    """Print a result for machines."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))
