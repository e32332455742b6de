"""Write docs/round_trips.md by making every round trip; with --check, fail if the page says otherwise."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.foreign_exports import foreign_row
from tests.support.round_trips import PAGE, page, round_trip
from tests.support.tiny_models import EVERY_CONFIG

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        own = [round_trip(name, Path(work) / name) for name in EVERY_CONFIG]
        text = page(own, [foreign_row(name, Path(work) / "foreign" / name) for name in EVERY_CONFIG])
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        click.echo("docs/round_trips.md is out of date: run `python docs/write_round_trips.py`", err=True)
        sys.exit(1)
