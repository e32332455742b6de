"""Tables: names for things of one sort, which load when they are used and which other packages can add to.

A list of names exists once. Commands offer ``table.names()``, which imports nothing; ``table[name]`` imports the entry
and proposes the nearest names where there is no such one. Another package adds entries by an entry point in the group
``minipuzzle.<table>``, or at run time by ``register``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from typing import Generic, TypeVar

from minipuzzle.errors import MinipuzzleError

Entry = TypeVar("Entry")


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
        self._own_places = dict(lazy or {})

    @cached_property
    def _places(self) -> dict[str, str]:
        """Where entries lie that are not loaded yet; no package can replace a name that is taken."""
        from importlib.metadata import entry_points

        found = sorted(entry_points(group=f"minipuzzle.{self.plural}"), key=lambda point: point.name)
        others = {point.name: point.value for point in found if point.name not in self._entries}
        return {**others, **self._own_places}

    def names(self) -> tuple[str, ...]:
        """All names; nothing is imported for it."""
        own = dict.fromkeys((*self._own_places, *self._entries))
        return (*own, *(name for name in self._places if name not in own))

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

        Raises: MinipuzzleError for an unknown name, with the nearest ones.
        """
        if name not in self._entries:
            if name not in self._places:
                raise self.unknown(name)
            module, _, attribute = self._places[name].partition(":")
            self._entries[name] = getattr(import_module(module), attribute)
        return self._entries[name]

    def unknown(self, name: object) -> MinipuzzleError:
        """The error for a name that is not in the table."""
        near = get_close_matches(str(name), self.names(), n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return MinipuzzleError(f"unknown {self.sort} {name!r}", f"{hint}there are {', '.join(self.names())}")

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())
