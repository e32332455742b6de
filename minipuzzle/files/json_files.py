"""JSON objects in files: read with messages that name the file, written as people and diffs like to read them."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minipuzzle.errors import MinipuzzleError

RESTORE = "restore the file from its source"
# As transformers writes numbers that JSON does not have.
_FLOAT_TAG = "__float__"
_TAGGED_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def require_regular_file(path: Path, hint: str = "check the path") -> int:
    """The size in bytes of what must be a file: a pipe would be waited for, a device read without end.

    Raises: MinipuzzleError for anything else, and for links that lead nowhere.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise MinipuzzleError(f"{path} does not exist", hint) from None
    except (OSError, ValueError) as error:
        raise MinipuzzleError(f"{path} cannot be read: {error}", hint) from None
    if not stat.S_ISREG(found.st_mode):
        raise MinipuzzleError(f"{path} is not a file", hint)
    return found.st_size


def parse_json(text: str | bytes, where: str, hint: str = RESTORE) -> Any:
    """The value of a JSON text; ``where`` says in messages what it is.

    Raises: MinipuzzleError for anything but JSON, and for nesting or numbers that no honest file has.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise MinipuzzleError(f"{where} is nested too deeply", hint) from None
    except ValueError as error:  # of broken JSON, bytes that are not UTF-8, and numbers of thousands of digits
        raise MinipuzzleError(f"{where} is not valid JSON: {error}", hint) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises: MinipuzzleError for a missing file, broken JSON or anything but an object.
    """
    require_regular_file(path)
    value = parse_json(path.read_bytes(), str(path))
    if not isinstance(value, dict):
        raise MinipuzzleError(f"{path} holds a JSON {type(value).__name__}, not an object", "check the path")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object the way people and diffs like to read it. Infinity and NaN, which are not JSON, fail."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def untagged(value: Any) -> Any:
    """A value in which ``{"__float__": "Infinity"}``, as transformers writes such numbers, has become the number."""
    if isinstance(value, dict):
        tag = value.get(_FLOAT_TAG) if len(value) == 1 else None
        if isinstance(tag, str) and tag in _TAGGED_FLOATS:
            return _TAGGED_FLOATS[tag]
        return {key: untagged(item) for key, item in value.items()}
    return [untagged(item) for item in value] if isinstance(value, list) else value


def tagged(value: Any) -> Any:
    """The inverse of ``untagged``: a value that JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT_TAG: next(tag for tag, number in _TAGGED_FLOATS.items() if str(number) == str(value))}
    if isinstance(value, Mapping):
        return {key: tagged(item) for key, item in value.items()}
    return [tagged(item) for item in value] if isinstance(value, list | tuple) else value
