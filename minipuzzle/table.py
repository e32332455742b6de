"""Tables: names for things of one sort, which load when they are used and which other packages can add to.

A list of names exists once. Commands offer ``table.names()``, which imports nothing; ``table[name]`` imports the entry
and proposes the nearest names where there is no such one. Another package adds entries by an entry point in the group
``minipuzzle.<table>``, or at run time by ``register``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from minipuzzle.errors import MinipuzzleError

Entry = TypeVar("Entry")


class UnknownNameError(MinipuzzleError, KeyError):
    """A name that a table does not hold; to ``Mapping.get`` a missing key like any other."""

    __str__ = Exception.__str__  # KeyError would quote the message


_entry_points = cache(entry_points)  # of all packages, found once: it takes as long as the rest of a command's help


class Table(Mapping[str, Entry], Generic[Entry]):
    """Named entries in the order given; those of other packages follow, in alphabetical order.

    ``sort``: what an entry is, in the words of error messages ("loss form"). ``plural``: the name of the table, which
    entry points add to as ``minipuzzle.<plural>``. ``lazy``: name -> "package.module:attribute".
    """

    def __init__(
        self,
        sort: str,
        plural: str,
        *,
        entries: Mapping[str, Entry] | None = None,
        lazy: Mapping[str, str] | None = None,
    ) -> None:
        self.sort, self.plural = sort, plural
        self._entries: dict[str, Entry] = dict(entries or {})
        self._places = dict(lazy or {})
        self._loaded: dict[str, Entry] = {}

    @cached_property
    def _places_of_others(self) -> dict[str, str]:
        points = _entry_points().select(group=f"minipuzzle.{self.plural}")
        return {point.name: point.value for point in sorted(points, key=lambda point: point.name)}

    def names(self) -> tuple[str, ...]:
        """All names; nothing is imported for it."""
        return tuple(dict.fromkeys((*self._places, *self._entries, *self._places_of_others)))

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """A decorator that adds an entry.

        Raises: MinipuzzleError if the name is taken.
        """

        def add(entry: Entry) -> Entry:
            if name in self.names():
                raise MinipuzzleError(f"there is a {self.sort} {name!r} already", "choose another name")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> Entry:
        """The entry of a name.

        Raises: UnknownNameError with the nearest names.
        """
        if name in self._entries:
            return self._entries[name]
        if name not in self._loaded:
            place = self._places.get(name) or self._places_of_others.get(name)  # nobody can replace what is ours
            if place is None:
                raise self.unknown(name)
            module, _, attribute = place.partition(":")
            self._loaded[name] = getattr(import_module(module), attribute)
        return self._loaded[name]

    def check(self, name: object) -> None:
        """Refuse a name that is not in the table; nothing is imported for it.

        Raises: UnknownNameError with the nearest names.
        """
        if name not in self:
            raise self.unknown(name)

    def unknown(self, name: object) -> UnknownNameError:
        """The error for a name that is not in the table."""
        near = get_close_matches(str(name), self.names(), n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return UnknownNameError(f"unknown {self.sort} {name!r}", f"{hint}there are {', '.join(self.names())}")

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        return name in self._entries or name in self._places or name in self._places_of_others

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())
