"""``minipuzzle data``: recovery data, a command for each verb, made from its settings."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from minipuzzle.commands.options.generate import SectionedCommand, from_options, settings_options
from minipuzzle.commands.options.shared import dry_run_option, echo_json, json_option, model_argument
from minipuzzle.progress import silent
from minipuzzle.show.bars import drawn_bar

# By verb: its settings, where it is carried out, and what it does.
VERBS = {
    "label": ("LabelSettings", "selecting", "Measure text: shape, repetition, and by classifiers."),
    "dedup": ("DedupSettings", "selecting", "Leave out what was there already, equal or nearly so."),
    "train-quality": ("TrainQualitySettings", "selecting", "Train a classifier from good and bad text, in seconds."),
    "buckets": ("BucketSettings", "selecting", "Sort rows into five buckets by quality."),
    "select": ("SelectSettings", "selecting", "Select text that is like a target (DSIR)."),
    "blend": ("BlendSettings", "selecting", "Share a run's tokens out over sources; writes what distill --data reads."),
    "dialogues": ("DialogueSettings", "writing", "Have raw text told as dialogues (MIND)."),
    "rewrite": ("RewriteSettings", "writing", "Have text rewritten: questions, shorter, facts, encyclopedia."),
    "instruct": ("InstructSettings", "writing", "Have conversations written from topics alone."),
    "reward": ("RewardSettings", "writing", "Score conversations by a reward model, and keep the good ones."),
    "preferences": ("PreferenceSettings", "writing", "Make pairs of a better and a worse answer."),
    "revise": ("ReviseSettings", "writing", "Make reasoning shorter and better (Retro-Search)."),
}


class DataGroup(click.Group):
    """Makes the command of a verb when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which data is made."""
        return [*VERBS, *self.commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb."""
        return _command(cmd_name) if cmd_name in VERBS else self.commands.get(cmd_name)


@click.group(cls=DataGroup, short_help="Make recovery data: label, select, blend, synthesise, judge, revise.")
def data() -> None:
    """Turn raw text and a served model into data to distil on.

    Each command reads text or the rows of another one and writes a folder of Parquet shards, which distill --data
    reads as it is, with a manifest of what came of every row. The same command continues a run that was interrupted
    and asks nothing twice.
    """


def _command(verb: str) -> click.Command:
    settings_name, module, about = VERBS[verb]
    settings = getattr(importlib.import_module("minipuzzle.workflows.data.settings"), settings_name)

    @click.command(verb, cls=SectionedCommand, short_help=about, help=about)
    @settings_options(settings)
    @json_option
    @dry_run_option
    def command(dry_run: bool, as_json: bool, **options: Any) -> None:
        run = getattr(importlib.import_module(f"minipuzzle.workflows.data.{module}"), f"run_{verb.replace('-', '_')}")
        if "running" in settings.__dataclass_fields__:
            options["progress"] = silent if as_json else drawn_bar
        _show(run(from_options(settings, options), is_dry=dry_run).to_json(), as_json=as_json)

    return command


@data.command(short_help="Say how far a step is, or what it did.")
@model_argument("folder", "FOLDER")
@json_option
def status(folder: Path, as_json: bool) -> None:
    """Say how far the step that writes FOLDER is, or what it did."""
    from minipuzzle.workflows.data.status import status as status_of

    _show(status_of(folder).to_json(), as_json=as_json)


def _show(figures: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        echo_json(figures)
        return
    for name, value in figures.items():
        if isinstance(value, Mapping):
            click.echo(name.replace("_", " "))
            for key, item in value.items():
                click.echo(f"  {key:<28} {_shown(item)}")
        elif value is not None:
            click.echo(f"{name.replace('_', ' '):<30} {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
