"""TOML files, read with messages that name the file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from minipuzzle.errors import MinipuzzleError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path, option: str) -> dict[str, Any]:
    """The tables of a file that was given with ``option``.

    Raises: MinipuzzleError for a file that cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MinipuzzleError(f"cannot read {path}: {error.strerror}", f"check {option}") from None
    except (ValueError, RecursionError) as error:
        raise MinipuzzleError(f"{path} is not TOML: {error}", "mend the file") from None
