"""Settings that are options: what a field is called on the command line, what it means, and how its text is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

KEY = "option"  # of a field's metadata
Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class Option:
    """``name``: where it is not the field's. ``takes``: how text is read, by name; default: by the default's type.

    ``at_least``, ``at_most``, ``above``: bounds of a number. ``section``: the heading of its help; "" is for what most
    people need first. ``is_needed``: whether a command cannot do without
    it, where that is not so in Python as well.
    """

    help: str
    name: str = ""
    takes: str = ""
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    section: str = ""
    is_needed: bool | None = None

    def flag(self, field_name: str) -> str:
        """The option as it is typed."""
        return f"--{self.name or field_name.replace('_', '-')}"


def option(
    default: Any = MISSING, help: str = "", *, section: str = "", choices: Iterable[str] = (), **others: Any
) -> Any:
    """A field of a dataclass that is an option too; mappings as defaults are copied. ``others``: as in ``Option``."""
    about = Option(help=help, section=section, choices=tuple(choices), **others)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={KEY: about})
    return field(default=default, metadata={KEY: about})


def part(settings: type) -> Any:
    """A field that holds settings of its own, whose options stand beside the others."""
    return field(default_factory=settings, metadata={KEY: settings})


def settings_of(settings: type[Settings], values: dict[str, Any], **others: Any) -> Settings:
    """Settings of flat values, taken out of ``values``; parts of them are made first. ``others``: fields as they are.

    Raises: MinipuzzleError for values that do not go together.
    """
    found = dict(others)
    for item in fields(settings):  # type: ignore[arg-type] # all settings are dataclasses
        about = item.metadata.get(KEY)
        if isinstance(about, Option) or item.name in values:
            found |= {item.name: values.pop(item.name)} if item.name in values else {}
        elif about is not None:
            found[item.name] = settings_of(about, values)
    return settings(**found)
