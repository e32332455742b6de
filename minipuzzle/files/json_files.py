"""JSON objects in files: read with messages that name the file, written as people and diffs like to read them."""

from __future__ import annotations

import json
import math
import stat
import sys
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from minipuzzle.errors import MinipuzzleError

RESTORE = "restore the file from its source"
Record = TypeVar("Record")
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


def record_of(kind: type[Record], values: object, name: str = "the record") -> Record:
    """A dataclass from a JSON value that holds exactly its fields, each of the type that the class gives it.

    Lists become tuples; a field whose default is None may be left out.

    Raises: ValueError naming the field; MinipuzzleError as the class does.
    """
    found: Record = _typed(kind, values, name)
    return found


def _typed(kind: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        return _typed(next(one for one in arguments if one is not types.NoneType), value, name)
    if is_dataclass(kind):
        return _from_fields(kind, value, name)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(arguments[0], item, f"{name}[{idx}]") for idx, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    is_number = type(value) is int or (type(value) is float and math.isfinite(value))
    if is_number and abs(value) <= sys.float_info.max if kind is float else type(value) is kind:
        return value
    wanted = "finite number" if kind is float else getattr(origin or kind, "__name__", str(kind))
    raise ValueError(f"{name} is {str(value)[:40]!r}, no {wanted}")


def _from_fields(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {str(value)[:40]!r}, no object")
    known, hints = {field.name: field for field in fields(kind)}, get_type_hints(kind)
    missing = [field.name for field in known.values() if field.name not in value and field.default is not None]
    for problem, names in (("lacks", missing), ("does not know", sorted(value.keys() - known.keys()))):
        if names:
            raise ValueError(f"{name} {problem} {names[0]}")
    return kind(**{key: _typed(hints[key], item, key) for key, item in value.items()})
