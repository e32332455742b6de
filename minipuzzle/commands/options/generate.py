"""Options made from settings: each field that says what it means becomes an option, under the heading it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import click

from minipuzzle.architecture.quantities import parse_bytes
from minipuzzle.commands.options.as_recipe import STEP_NAMES, as_recipe
from minipuzzle.commands.options.shared import COUNT, FOLDER_OR_FILE, Function, PathType
from minipuzzle.devices import Device, checked_device
from minipuzzle.option import KEY, Option, settings_of
from minipuzzle.progress import silent
from minipuzzle.runtime.compute import DTYPES, Compute
from minipuzzle.show.bars import drawn_bar


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """NAME=TEXT pairs."""
    found = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not text.strip():
            raise click.BadParameter(f"{value!r} is not {param.metavar}", ctx, param)
        found[name.strip()] = text.strip()
    return found


def _numbers(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    """NAME=COUNT pairs."""
    return {name: COUNT.convert(text, param, ctx) for name, text in _pairs(ctx, param, values).items()}


def _patterns(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """PATTERN=FORMAT pairs, in order."""
    found = []
    for value in values:
        pattern, equals, wanted = value.rpartition("=")
        if not equals or not pattern:
            raise click.BadParameter(f"{value!r} is not {param.metavar}", ctx, param)
        found.append((pattern, wanted))
    return tuple(found)


def _positions(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Positions of layers: 0,5,51."""
    try:
        return tuple(sorted({int(part) for part in value.split(",")})) if value else ()
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of layers such as 0,5,51", ctx, param) from None


# How options read what is typed, by ``Option.takes``.
READERS: dict[str, dict[str, Any]] = {
    "text": {},
    "texts": {"multiple": True},
    "count": {"type": COUNT},
    "path": {"type": FOLDER_OR_FILE},
    "paths": {"type": FOLDER_OR_FILE, "multiple": True},
    "folder": {"type": PathType(path_type=Path, file_okay=False)},
    "number": {"type": float},
    "integer": {"type": int},
    "flag": {"is_flag": True},
    "pairs": {"multiple": True, "callback": _pairs},
    "numbers": {"multiple": True, "callback": _numbers},
    "patterns": {"multiple": True, "callback": _patterns},
    "positions": {"callback": _positions},
}
from_options = settings_of  # flat values are what click gives
_READER_OF_TYPE = {bool: "flag", int: "count", float: "number"}


class SectionOption(click.Option):
    """An option that stands under a heading of its command's help."""

    def __init__(self, *names: Any, section: str = "", **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help puts first what most people need, and the rest under headings; it can be a recipe's step."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        if name in STEP_NAMES:
            self.params.append(
                click.Option(
                    ["--print-recipe"],
                    is_flag=True,
                    expose_value=False,
                    callback=lambda ctx, _param, wanted: ctx.meta.update(prints_recipe=wanted),
                    help="Print these options as a recipe for `minipuzzle run`, and stop.",
                )
            )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, or print what it was asked for."""
        if ctx.meta.pop("prints_recipe", False):
            click.echo(as_recipe(ctx), nl=False)
            return None
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section in the order of their first options."""
        sections: dict[str, list[tuple[str, str]]] = {"": []}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(param, "section", ""), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading or "Options"):
                formatter.write_dl(records)


def option_fields(settings: type) -> Iterator[tuple[Field[Any], Option]]:
    """All fields of settings that are options, those of their parts too, in order."""
    for item in fields(settings):
        about = item.metadata.get(KEY)
        if isinstance(about, Option):
            yield item, about
        elif about is not None:
            yield from option_fields(about)


def _click_option(item: Field[Any], about: Option) -> Callable[[Any], Any]:
    has_default = item.default is not MISSING or item.default_factory is not MISSING
    default = None if item.default is MISSING or item.default == () else item.default
    kind = READERS[about.takes or _READER_OF_TYPE.get(type(default), "text")]
    if about.choices:
        kind = {"type": click.Choice(about.choices)}
    elif (about.at_least, about.at_most, about.above) != (None, None, None):
        bounds: dict[str, Any] = {"max": about.at_most}
        bounds |= {"min": about.at_least} if about.above is None else {"min": about.above, "min_open": True}
        of_integers = about.takes == "integer" or type(default) is int
        kind = {"type": (click.IntRange if of_integers else click.FloatRange)(**bounds)}
    says_default = default is not None and "default:" not in about.help.lower() and "flag" not in about.takes
    return click.option(
        *(["-o", "--out"] if item.name == "out" else [about.flag(item.name)]),
        item.name,
        cls=SectionOption,
        section=about.section,
        default=None if kind.get("multiple") else default,
        required=not has_default if about.is_needed is None else about.is_needed,
        help=about.help,
        metavar=about.metavar,
        show_default=says_default,
        **kind,
    )


def settings_options(settings: type) -> Callable[[Function], Function]:
    """The options of settings; the command takes their values as ``**options`` and makes settings of them."""

    def decorate(function: Any) -> Any:
        for item, about in reversed(list(option_fields(settings))):
            function = _click_option(item, about)(function)
        return function

    return decorate


def compute_options(
    *, dtype: str | None = None, dtype_help: str | None = "", memory_help: str = ""
) -> Callable[[Function], Function]:
    """Where and how to compute. ``dtype``: the default (None: by the device); options without help are left out."""
    options = [_section_option("--device", help="cpu, cuda, ...; default: the accelerator there is, else cpu.")]
    if dtype_help != "":
        choices = click.Choice(DTYPES.names())
        options += [
            _section_option("--dtype", type=choices, default=dtype, help=dtype_help, show_default=dtype is not None)
        ]
    if memory_help:
        options += [_section_option("--device-memory", help=memory_help)]

    def decorate(function: Any) -> Any:
        for add in reversed(options):
            function = add(function)
        return function

    return decorate


def _section_option(name: str, **settings: Any) -> Callable[[Any], Any]:
    return click.option(name, cls=SectionOption, section="Computing", **settings)


def compute_of(options: dict[str, Any], *, is_quiet: bool) -> Compute:
    """The ``Compute`` that was asked for, taken out of ``options``; with bars on standard error unless quiet.

    Raises: MinipuzzleError for a device that cannot be used, or memory that is no size.
    """
    device, memory = checked_device(options.pop("device", None)), options.pop("device_memory", None)
    dtype = options.pop("dtype", "float32") or Device(device).best_dtype
    return Compute(
        device=device,
        dtype=dtype,
        memory_bytes=None if memory is None else parse_bytes(memory),
        progress=silent if is_quiet else drawn_bar,
    )
