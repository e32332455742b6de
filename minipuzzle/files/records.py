"""What a finished output says of itself in its minipuzzle.json: what came out, by which command, after which steps."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.files.outputs import ADDED_FIELDS, PROVENANCE_FILE, write_whole

# The arguments of the command that runs, without the program; None where Python code calls.
COMMAND_LINE: ContextVar[Sequence[str] | None] = ContextVar("command_line", default=None)
PLACES_FILE = "minipuzzle/places.json"
_MADE, _RESULTS, _LINEAGE = ADDED_FIELDS
_PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def command_line() -> str | None:
    """The command that runs, as it may be shown to others: paths of this machine are shortened to their last part."""
    arguments = COMMAND_LINE.get()
    return None if arguments is None else shlex.join(["minipuzzle", *map(without_place, arguments)])


def without_place(text: str) -> str:
    """A path without the folders of this machine that it lies in; any other text as it is."""
    name, equals, value = text.partition("=")
    if text.startswith("--") and equals:
        return f"{name}={without_place(value)}"
    return Path(text).name if Path(text).is_absolute() else text


def made(device: str = "cpu") -> dict[str, Any]:
    """By which command, with what, when and on what kind of machine something is made."""
    from datetime import datetime, timezone
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command_line": command_line(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, computed on {device}",
    }


def complete_record(
    folder: Path,
    results: Mapping[str, Any],
    *,
    before: Sequence[Path] = (),
    device: str = "cpu",
    places: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Add to the minipuzzle.json of an output what came out of it; ``before``: the folder that it was made from.

    ``places``: where inputs lie on this machine, which goes into a file of its own that is not passed on.

    Returns the whole record.
    """
    write_places(folder, places)
    lineage = [step for source in before for step in history_of(source)]
    added = {_MADE: made(device), _RESULTS: results, _LINEAGE: lineage}
    record = {**read_json(folder / PROVENANCE_FILE), **added}
    with write_whole(folder / PROVENANCE_FILE) as path:
        write_json(path, record)
    return record


def write_places(folder: Path, places: Mapping[str, str]) -> None:
    """Write down where inputs lie on this machine, if there is any to name."""
    if places:
        (folder / PLACES_FILE).parent.mkdir(exist_ok=True)
        write_json(folder / PLACES_FILE, places)


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The records of the steps that made a folder, the first step first; none for a folder that is not ours."""
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return []
    record = read_json(path)
    return [*record.get(_LINEAGE, ()), {name: value for name, value in record.items() if name != _LINEAGE}]


def place_of(folder: Path, what: str) -> Path | None:
    """Where an input of an output lies: on the hub, or where it lay when the output was made; None if nothing says."""
    known = {}
    for file in (PROVENANCE_FILE, PLACES_FILE):
        record = read_json(folder / file) if (folder / file).is_file() else {}
        # A record itself holds a place in outputs of earlier versions only, or a name on the hub.
        if isinstance(record.get(what), str) and (file == PLACES_FILE or "/" in record[what]):
            known[file] = Path(record[what])
    return next(iter(known.values()), None)
