"""Prompt graphs as TOML files, and the readers that their nodes name.

system = "You play a game."
[nodes.plan]
prompt = "The goal is: $goal$. What comes first?"
[nodes.action]
prompt = "Choose one of these:\\n$actions$"
needs = ["plan"]           # their prompts and answers precede this one; after = [...] only waits
read = "choice"            # an entry of READERS, or a hook given in Python
options = {of = "actions"} # what that reader is told
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from minipuzzle.abilities.play.graph import Graph, Node, Pass, UnreadableError
from minipuzzle.errors import MinipuzzleError
from minipuzzle.table import Table
from minipuzzle.toml_files import read_toml

_FIELDS = ("prompt", "needs", "after", "read", "options", "max_tokens")
_HINT = "a node has a prompt, and may have needs, after, read, options and max_tokens"
Reader = Callable[..., Any]  # of an answer, the pass, and the options of its node


def _last_json(answer: str) -> Any:
    """The last object that an answer holds, and that no other holds.

    Raises: UnreadableError if there is none.
    """
    found, place = None, answer.find("{")
    while place >= 0:
        try:
            found, end = json.JSONDecoder().raw_decode(answer, place)
        except ValueError:
            end = place + 1
        place = answer.find("{", end)
    if found is None:
        raise UnreadableError("there is no JSON object in it.")
    return found


def _json(answer: str, _running: Pass, keys: Mapping[str, str] | None = None) -> Any:
    """``keys``: those it must hold, with the names of their types."""
    found = _last_json(answer)
    kinds: dict[str, Any] = {"text": str, "number": (int, float), "list": list, "object": dict, "boolean": bool}
    for key, kind in (keys or {}).items():
        if key not in found:
            raise UnreadableError(f"the JSON object lacks {key!r}.")
        if not isinstance(found[key], kinds[kind]) or (kind == "number" and isinstance(found[key], bool)):
            raise UnreadableError(f"{key!r} must be a {kind}.")
    return found


def _choice(answer: str, running: Pass, of: str, otherwise: str | None = None) -> str:
    """The option of a list in the store that an answer names first; the longest of those that begin there."""
    options = [str(option) for option in running.store[of]]
    text = answer.casefold()
    places = {option: place for option in options if (place := text.find(option.casefold())) >= 0}
    if places:
        return min(places, key=lambda option: (places[option], -len(option)))
    if otherwise is not None and otherwise in options:
        return otherwise
    raise UnreadableError(f"it must be one of: {', '.join(options)}.")


def _yes_no(answer: str, _running: Pass) -> str:
    found = re.search(r"\b(yes|no)\b", answer.casefold())
    if found is None:
        raise UnreadableError("it must be yes or no.")
    return found[1]


def _lines(answer: str, _running: Pass, at_most: int = 20) -> str:
    """A list, one item a line, without numbers and bullets."""
    if not (items := lines_of(answer)[:at_most]):
        raise UnreadableError("it must be a list, one item a line.")
    return "\n".join(items)


def lines_of(answer: str) -> list[str]:
    """The items of a list, one a line, without numbers and bullets."""
    items = [re.sub(r"^\s*(?:[-*•]|\d+[.)])\s*", "", line).strip() for line in answer.splitlines()]
    return [item for item in items if item]


# What a node's answer is read by. Hooks of graphs that change the pass are given to ``read_graph``.
READERS: Table[Reader] = Table(
    "reader of answers",
    "readers",
    entries={"json": _json, "choice": _choice, "yes-no": _yes_no, "lines": _lines},
)


def read_graph(path: Path, hooks: Mapping[str, Reader] | None = None) -> Graph:
    """A graph from a TOML file. ``hooks``: readers by name, beside those of the table.

    Raises: MinipuzzleError for a file that is no graph, or names a reader that is not there.
    """
    found = read_toml(path, "the path")
    nodes = found.get("nodes")
    if set(found) - {"system", "nodes"} or not isinstance(nodes, dict) or not nodes:
        raise MinipuzzleError(f"{path} is no prompt graph", "it has a table [nodes.NAME] for each node")
    return Graph(
        [_node(path, key, fields, hooks or {}) for key, fields in nodes.items()], system=found.get("system", "")
    )


def _node(path: Path, key: str, fields: Any, hooks: Mapping[str, Reader]) -> Node:
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise MinipuzzleError(f"{path}: node {key!r} has no prompt", _HINT)
    if unknown := sorted(fields.keys() - set(_FIELDS)):
        raise MinipuzzleError(f"{path}: node {key!r} has an unknown field {unknown[0]!r}", _HINT)
    read = None
    if name := fields.get("read"):
        read = partial(hooks[name] if name in hooks else READERS[name], **fields.get("options", {}))
    return Node(
        key=key,
        prompt=fields["prompt"],
        needs=tuple(fields.get("needs", ())),
        after=tuple(fields.get("after", ())),
        read=read,
        max_tokens=int(fields.get("max_tokens", 256)),
    )
