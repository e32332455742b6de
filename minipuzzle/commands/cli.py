"""The ``minipuzzle`` command: a group whose commands load only when they are called.

Commands import torch inside their bodies, so that ``--help`` answers at once.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import click
from safetensors import SafetensorError

from minipuzzle.errors import ExitCode, MinipuzzleError, MinipuzzleWarning
from minipuzzle.files.records import COMMAND_LINE
from minipuzzle.version import __version__

# Fields of settings whose option has another name than theirs.
OPTION_OF_FIELD = {
    "batch_sequences": "batch",
    "compile_layers": "compile",
    "latency_ms": "latency",
    "maximum": "max",
    "micro_batch_sequences": "micro-batch",
    "min_ffn_fraction": "min-ffn",
    "min_kept_fraction": "min-kept",
    "minimum": "min",
    "num_candidates": "candidates",
    "num_finalists": "finalists",
    "overrides": "override",
}
_WHOLE_RUNS = ("run", "report", "demo")  # which lie in a room of their own
_VERBS = ("inspect", "score", "search", "prune", "distill", "export", "verify", "evaluate", "abilities", "data")
COMMANDS = (*_VERBS, *_WHOLE_RUNS)


def command_of(name: str) -> click.Command:
    """A command by its name; its module is imported now."""
    room = "minipuzzle.commands.whole_runs" if name in _WHOLE_RUNS else "minipuzzle.commands"
    command: click.Command = getattr(importlib.import_module(f"{room}.{name}"), name)
    return command


class MinipuzzleGroup(click.Group):
    """Finds each command in ``minipuzzle.commands`` and turns user errors into a message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order of a working day, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command's module."""
        if cmd_name not in COMMANDS:
            return None
        return command_of(cmd_name)

    def main(self, args: Any = None, *others: Any, **settings: Any) -> Any:
        """Remember the command as it was given, for what its outputs say of themselves."""
        COMMAND_LINE.set(tuple(sys.argv[1:] if args is None else args))
        return super().main(args, *others, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a MinipuzzleError becomes problem, hint and exit code, a warning a line."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", MinipuzzleWarning)
                warnings.showwarning = _print_warning
                return super().invoke(ctx)
        except MinipuzzleError as error:
            if ctx.params["debug"]:
                raise
            _print_error(error)
            ctx.exit(int(error.exit_code))
        except (OSError, SafetensorError) as error:
            if ctx.params["debug"] or isinstance(error, BrokenPipeError):
                raise
            _print_error(MinipuzzleError(f"{type(error).__name__}: {error}", "mend that, then give the command again"))
            ctx.exit(1)
        except KeyboardInterrupt:
            if ctx.params["debug"]:
                raise
            click.echo("\ninterrupted; the same command continues where it can", err=True)
            ctx.exit(int(ExitCode.INTERRUPTED))


def every_command() -> Iterator[tuple[str, ...]]:
    """The words of each command, those of groups too: ("data",), ("data", "select"), ..."""
    context = click.Context(main)
    for name in main.list_commands(context):
        yield (name,)
        command = main.get_command(context, name)
        if isinstance(command, click.Group):
            yield from ((name, verb) for verb in command.list_commands(context))


def with_options(message: str) -> str:
    """A message in which fields of settings have become the options that set them."""

    def option_of(field: re.Match[str]) -> str:
        return f"--{OPTION_OF_FIELD.get(field[1], field[1]).replace('_', '-')}"

    return re.sub("‹([a-z0-9_]+)›", option_of, message)


def _print_error(error: MinipuzzleError) -> None:
    problem, hint = with_options(error.problem), with_options(error.hint)
    if "--json" in sys.argv:
        click.echo(json.dumps({"error": problem, "hint": hint, "exit_code": int(error.exit_code)}))
    click.echo(f"{click.style('error:', fg='red', bold=True)} {problem}", err=True)
    if hint:
        click.echo(f"{click.style('hint:', fg='cyan', bold=True)}  {hint}", err=True)


def _print_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    if issubclass(category, MinipuzzleWarning):
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {message}", err=True)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


@click.group(cls=MinipuzzleGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="minipuzzle")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Make large language models smaller: measure, search, cut, distil, export.

    A hybrid checkpoint and a memory budget go in; a Hugging Face checkpoint that fits comes out.
    """
    # On a CPU transformers would say of every Mamba kernel that it runs in plain torch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
