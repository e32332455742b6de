"""Write what must come out the same on every machine. A change needs its reason in the commit.

Usage: python -m tests.golden.write [NAME ...]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from minipuzzle.files.json_files import write_json
from tests.golden.facts import NAMES, facts_of

FOLDER = Path(__file__).parent / "facts"


def main(names: list[str]) -> None:
    """Write one file for each model."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or NAMES:
        with tempfile.TemporaryDirectory() as work:
            write_json(FOLDER / f"{name}.json", facts_of(name, Path(work)))
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
