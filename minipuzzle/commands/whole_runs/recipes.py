"""A whole run in one file: a table for each step, whose keys are the options of the command of that name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from minipuzzle.commands.cli import command_of
from minipuzzle.commands.options.as_recipe import EXPORT_FORMAT, STEP_NAMES
from minipuzzle.commands.options.generate import from_options
from minipuzzle.commands.options.shared import PathType, pop_deployment
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.hub import is_hub_id
from minipuzzle.formats.choices import FORMATS
from minipuzzle.toml_files import read_toml
from minipuzzle.workflows import settings

# Of each step: what it writes, and the settings that check themselves.
_WHAT = (
    ("scores.safetensors", settings.ScoreSettings),
    ("pruned", settings.PruneSettings),
    ("recovered", settings.DistillOptions),
    ("deploy", settings.ExportSettings),
    ("quality", settings.EvaluateSettings),
)
STEPS: Mapping[str, tuple[str, type]] = dict(zip(STEP_NAMES, _WHAT, strict=True))
_COMPUTING = ("device", "dtype", "device_memory")  # which say where and how, not what
_OWN_KEYS = ("model", "out")
_WRITTEN = ("out", "teacher_cache", "tensorboard", "plot", "csv")  # options that name what a command writes


@dataclass(frozen=True, kw_only=True)
class RecipeStep:
    """One step: its command with all arguments, what it reads and what it writes.

    ``needs``: what earlier steps write; ``files``: what must be there before anything starts.
    """

    name: str
    arguments: tuple[str, ...]
    params: Mapping[str, Any]
    target: Path
    files: tuple[Path, ...]

    @property
    def command(self) -> click.Command:
        """The command of this name."""
        return command_of(self.name)

    @property
    def line(self) -> str:
        """As it would be typed."""
        return shlex.join(["minipuzzle", self.name, *self.arguments])

    def settings(self) -> Any:
        """What the options ask for.

        Raises: MinipuzzleError for options that do not go together.
        """
        others = dict[str, Any]()
        params = {name: value for name, value in self.params.items() if name not in _COMPUTING}
        if "named_deployment" not in params and "deployment_name" in params:
            others["deployment"] = pop_deployment(params)
        return from_options(STEPS[self.name][1], params, **others)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All steps of a run on a model, in order."""

    model: Path
    out: Path
    steps: tuple[RecipeStep, ...]

    def key(self, step: RecipeStep) -> str:
        """A fingerprint of a step and of all before it, with what they read: the same run, the same key."""
        earlier = self.steps[: self.steps.index(step) + 1]
        parts = [[each.name, each.arguments, [*map(_fingerprint, each.files)]] for each in earlier]
        return sha256(json.dumps([_fingerprint(self.model), *parts]).encode()).hexdigest()[:16]


def _fingerprint(path: Path) -> str:
    from minipuzzle.files.checkpoint import Checkpoint
    from minipuzzle.files.outputs import fingerprint_files

    return Checkpoint.open(path).fingerprint if (path / "config.json").is_file() else fingerprint_files([path])


def read_recipe(path: Path, out: Path | None = None) -> Recipe:
    """A recipe with every option read as its command reads it; nothing is run and no weight is opened.

    ``out``: in the place of the recipe's own. Files are found from where the recipe lies.

    Raises: MinipuzzleError naming the table and the key that is wrong, or a file that is not there.
    """
    found = read_toml(path, "the recipe")
    model, target = found.pop("model", None), out or found.pop("out", None)
    found.pop("out", None)
    if not isinstance(model, str) or not isinstance(target, str | Path):
        raise MinipuzzleError(
            f"{path} does not say {' and '.join(_OWN_KEYS)}", 'begin it with model = "..." and out = "..."'
        )
    tables = {name: table for name, table in found.items() if isinstance(table, dict)}
    shared = {name: value for name, value in found.items() if name not in tables}
    if unknown := tables.keys() - STEPS.keys():
        raise MinipuzzleError(f"{path}: there is no step [{min(unknown)}]", f"there are {', '.join(STEPS)}")
    if not tables:
        raise MinipuzzleError(f"{path} holds no step", f"give one of {', '.join(f'[{name}]' for name in STEPS)}")
    model_path = _found_from(path.parent, model)
    flags = {flag.lstrip("-") for name in tables for param in command_of(name).params for flag in param.opts}
    if unused := [key for key in shared if _dashed(key) not in flags]:
        raise MinipuzzleError(
            f"{path}: no step has an option {unused[0]}", "put steps into tables: [prune], for instance"
        )
    steps = list(_linked(path, tables, shared, model_path, Path(target)))
    for step in steps:
        for file in step.files:
            if not file.exists() and not is_hub_id(file):
                raise MinipuzzleError(f"{path}, [{step.name}]: {file} does not exist", "mend the path")
        step.settings()
    return Recipe(model=model_path, out=Path(target), steps=tuple(steps))


def _linked(
    path: Path, tables: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any], model: Path, out: Path
) -> Iterator[RecipeStep]:
    """The steps, each on what the ones before it leave."""
    latest, scores = model, None
    for name in (name for name in STEPS if name in tables):
        options, target = dict(tables[name]), out / STEPS[name][0]
        command = command_of(name)
        known = {flag.lstrip("-"): param for param in command.params for flag in param.opts}
        options = {**{key: value for key, value in shared.items() if _dashed(key) in known}, **options}
        arguments = [str(latest if name != "score" and name != "prune" else model)]
        arguments += _typed_all(path, name, options, known)
        if name == "prune" and scores is not None and not {"scores", "plan"} & options.keys():
            arguments += ["--scores", str(scores)]
        if name == "evaluate" and "against" not in options:
            arguments += ["--against", str(model)]
        arguments += ["--out", str(target)]
        try:
            params = command.make_context(name, list(arguments)).params
        except click.UsageError as error:
            raise MinipuzzleError(
                f"{path}, [{name}]: {error.format_message()}", f"see minipuzzle {name} --help"
            ) from None
        files = tuple(file for file in _inputs(command, params) if file not in (scores, latest, model))
        yield RecipeStep(name=name, arguments=tuple(arguments), params=params, target=target, files=files)
        scores = target if name == "score" else scores
        latest = target if name in ("prune", "distill", "export") else latest


def _typed_all(
    path: Path, name: str, options: Mapping[str, Any], known: Mapping[str, click.Parameter]
) -> Iterator[str]:
    """Options as they are typed, files found from where the recipe lies."""
    for key, value in options.items():
        if name == "export" and key == EXPORT_FORMAT:
            FORMATS.check(value)
            yield f"--{value}"
            continue
        param = known.get(_dashed(key))
        if param is None or _field(key) == "out":
            near = get_close_matches(_dashed(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"see minipuzzle {name} --help"
            raise MinipuzzleError(f"{path}, [{name}]: there is no option {key}", hint)
        if isinstance(value, bool):
            yield from [f"--{_dashed(key)}"] if value else []
            continue
        items = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
        for item in items if isinstance(items, list) else [items]:
            yield from (f"--{_dashed(key)}", str(_found_from(path.parent, item)) if _is_file(param) else str(item))


def _is_file(param: click.Parameter) -> bool:
    return isinstance(param.type, PathType) and param.name not in _WRITTEN


def _inputs(command: click.Command, params: Mapping[str, Any]) -> Iterator[Path]:
    """Files and folders that options name and that a command reads."""
    for param in command.params:
        value = params.get(param.name or "")
        if isinstance(param, click.Option) and _is_file(param) and value:
            yield from value if isinstance(value, tuple) else (value,)


def _found_from(folder: Path, text: str) -> Path:
    """A path of a recipe: from its folder, unless there is nothing there, or a name on the hub."""
    is_elsewhere = Path(text).exists() or is_hub_id(text)
    return Path(text) if is_elsewhere and not (folder / text).exists() else folder / text


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _field(key: str) -> str:
    return key.replace("-", "_")
