"""JSON objects in files: read with messages that name the file, written as people and diffs like to read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipuzzle.errors import MinipuzzleError

if TYPE_CHECKING:
    pass


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises: MinipuzzleError for a missing file, broken JSON or anything but an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MinipuzzleError(f"{path} does not exist", "check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MinipuzzleError(f"{path} is not valid JSON: {error}", "restore the file from its source") from None
    if not isinstance(value, dict):
        raise MinipuzzleError(f"{path} holds a JSON {type(value).__name__}, not an object", "check the path")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object the way people and diffs like to read it. Infinity and NaN, which are not JSON, fail."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
