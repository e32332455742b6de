"""Tasks of the user's: a file of questions (.jsonl), or a small .toml file that says how one is put and scored."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from minipuzzle.abilities.items import SCORERS, TASKS, Item, Sampling, Task
from minipuzzle.abilities.tasks.choices import option_place, read_records
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.json_files import record_of
from minipuzzle.toml_files import read_toml

TOML, JSONL = ".toml", ".jsonl"
_OPTION = "‹tasks›"


@dataclass(frozen=True, kw_only=True)
class _OwnTask:
    """What a task file may say. ``prompt``, ``answer``: templates with the records' fields in braces. ``options``: the
    field that holds the options; without it models write."""

    data: str
    prompt: str = "{prompt}"
    answer: str = "{answer}"
    options: str = ""
    score: str = "exact"
    by_length: bool = False
    max_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    description: str = ""


def find_task(name: str) -> tuple[str, Task]:
    """A task by its name in the table, or from a file of the user's, with the name it is reported under.

    Raises: MinipuzzleError for an unknown name, or a file that describes no task.
    """
    if name in TASKS or not name.endswith((TOML, JSONL)):
        return name, TASKS[name]
    path = Path(name)
    if name.endswith(JSONL):
        _, first = next(read_records(path), (1, {}))
        own = _OwnTask(data=path.name, options="options" if "options" in first else "")
    else:
        try:
            own = record_of(_OwnTask, _with_defaults(read_toml(path, _OPTION)), str(path))
        except ValueError as error:
            raise MinipuzzleError(str(error), "`docs/abilities.md` lists what a task file may say") from None
    data = path.parent / own.data
    task = Task(
        description=own.description,
        items=partial(_items, own, data),
        score=None if own.options else SCORERS[own.score],
        by_length=own.by_length,
    )
    return path.stem, task


def _with_defaults(found: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {name: value for name, value in vars(_OwnTask(data="")).items() if name != "data"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in {**defaults, **found}.items()}


def _items(own: _OwnTask, data: Path, sampling: Sampling) -> list[Item]:
    records = list(read_records(data))
    chosen = random.Random(f"{sampling.seed}").sample(records, len(records))[: sampling.num_items]
    return [_item(own, record, f"{data}:{number}", str(number)) for number, record in chosen]


def _item(own: _OwnTask, record: Mapping[str, Any], where: str, name: str) -> Item:
    try:
        answer = own.answer.format_map(record)
        item = Item(
            name=name,
            prompt=own.prompt.format_map(record),
            reference=answer,
            max_tokens=own.max_tokens,
            stop=own.stop,
        )
        if not own.options:
            return item
        options = [f" {str(option).strip()}" for option in record[own.options]]
        right = option_place(answer, [option.strip() for option in options])
    except (KeyError, ValueError, AttributeError, TypeError, IndexError) as error:
        problem = f"has no field {error}" if isinstance(error, KeyError) else str(error)
        raise MinipuzzleError(f"{where}: {problem}", f"mend the record, or the task given with {_OPTION}") from None
    return replace(item, options=(options[right], *options[:right], *options[right + 1 :]))
