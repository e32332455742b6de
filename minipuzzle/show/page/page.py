"""Writing the page of a run: the template with everything in it, so that the file needs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.outputs import write_whole
from minipuzzle.show.page.facts import PAGE_FILE, Step, read_run
from minipuzzle.show.page.sections import page_of
from minipuzzle.version import __version__


def render_page(steps: Sequence[Step]) -> str:
    """The page of some steps as HTML: the same text for the same steps."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    room = files(__package__)
    template = environment.from_string(room.joinpath("page.html").read_text(encoding="utf-8"))
    style = room.joinpath("page.css").read_text(encoding="utf-8")
    return template.render(page=page_of(steps), style=style, version=__version__) + "\n"


def check_page(path: Path) -> None:
    """Refuse a file that is no page of ours.

    Raises: MinipuzzleError for any other.
    """
    with path.open("rb") as file:
        if b'<meta name="generator" content="minipuzzle' not in file.read(1000):
            raise MinipuzzleError(f"{path} is no page of minipuzzle", "choose another name")


def write_page(folder: Path, *, before: Sequence[Path] = ()) -> None:
    """Write the page of an output into its folder; ``before``: folders of earlier steps, for what they hold."""
    with write_whole(folder / PAGE_FILE) as path:
        path.write_text(render_page(read_run([*before, folder])), encoding="utf-8")
