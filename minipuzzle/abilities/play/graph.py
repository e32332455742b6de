"""Prompts in a graph: each node is asked with the answers of those it depends on, and may change what comes after it.

Semantics of AgentKit (2404.11483), with two differences: cycles are refused when a graph is made, and a node that
never becomes ready is an error, where AgentKit leaves it out silently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minipuzzle.errors import MinipuzzleError, warn

TRIES = 3
NOT_ANSWERED = "N/A"  # what a node's answer is after so many that could not be read
Message = Mapping[str, str]
Ask = Callable[[Sequence[Message], int], str]  # a conversation and the tokens of its answer at most
_REFERENCE = re.compile(r"\$([A-Za-z_][\w-]*(?:\.[\w-]+)*)\$")


class UnreadableError(Exception):
    """An answer that does not hold what it should; its text tells the model what was wrong."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One prompt. ``needs``: nodes whose prompts and answers precede it, in this order; ``after``: nodes it waits for.

    ``read``: turns an answer into the value, and may change the pass; raises ``UnreadableError`` to ask again.
    The value, as text, is what nodes that need this one see.
    """

    key: str
    prompt: str
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    read: Callable[[str, Pass], Any] | None = None
    max_tokens: int = 256

    @property
    def waits_for(self) -> tuple[str, ...]:
        """All that must be answered before."""
        return (*self.needs, *self.after)


@dataclass(kw_only=True)
class Pass:
    """One evaluation of a graph: what is answered, and changes that hold until its end. Given to readers of answers.

    ``store``: values of the user's, which outlive the pass; prompts take them by ``$path.to.value$``.
    """

    nodes: dict[str, Node]
    store: dict[str, Any]
    previous: Mapping[str, Any]
    node: Node | None = None
    values: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def add_node(self, node: Node, *, before: Iterable[str] = ()) -> None:
        """Ask something more in this pass; nodes of ``before`` need it.

        Raises: MinipuzzleError if there is such a node, or what it would change is answered.
        """
        if node.key in self.nodes:
            raise _error(f"node {node.key!r} is there already")
        changed = self.nodes | {node.key: node}
        for key in before:
            changed[key] = replace(self._open(key), needs=(*self._open(key).needs, node.key))
        self._change(changed)

    def add_edge(self, first: str, then: str, *, is_order: bool = False) -> None:
        """Let a node need another (or only wait for it) in this pass.

        Raises: MinipuzzleError if the node is answered, or the graph would have a circle.
        """
        node = self._open(then)
        needs, after = ((), (first,)) if is_order else ((first,), ())
        changed = replace(node, needs=(*node.needs, *needs), after=(*node.after, *after))
        self._change(self.nodes | {then: changed})

    def remove_edge(self, first: str, then: str) -> None:
        """Let a node do without another in this pass.

        Raises: MinipuzzleError if the node is answered, or does not wait for the other.
        """
        node = self._open(then)
        if first not in node.waits_for:
            raise _error(f"{then!r} does not wait for {first!r}")
        needs, after = (tuple(key for key in keys if key != first) for keys in (node.needs, node.after))
        self._change(self.nodes | {then: replace(node, needs=needs, after=after)})

    def skip(self, *keys: str) -> None:
        """Let nodes keep their values of the pass before.

        Raises: MinipuzzleError if a node is answered already, or never was.
        """
        for key in keys:
            self._open(key)
            if key not in self.previous:
                raise _error(f"{key!r} cannot be skipped: it has no answer of an earlier pass")
            self.values[key] = self.previous[key]

    def _open(self, key: str) -> Node:
        if key not in self.nodes:
            raise _error(f"there is no node {key!r}")
        if key in self.values or (self.node is not None and key == self.node.key):
            raise _error(f"{key!r} is answered already and cannot be changed in this pass")
        return self.nodes[key]

    def _change(self, nodes: dict[str, Node]) -> None:
        check_nodes(nodes)
        self.nodes = nodes


def _error(problem: str) -> MinipuzzleError:
    return MinipuzzleError(f"prompt graph: {problem}", "mend the graph, or the hook that changes it")


def check_nodes(nodes: Mapping[str, Node]) -> None:
    """Refuse edges from nowhere, and circles.

    Raises: MinipuzzleError naming the nodes.
    """
    for node in nodes.values():
        for key in node.waits_for:
            if key not in nodes:
                raise _error(f"{node.key!r} waits for {key!r}, which is no node")
    left = {key: set(node.waits_for) for key, node in nodes.items()}
    while free := [key for key, waits in left.items() if not waits & left.keys()]:
        for key in free:
            del left[key]
    if left:
        raise _error(f"{', '.join(map(repr, left))} wait for each other in a circle")


class Graph:
    """Nodes in their order, with values of the last pass. ``system``: opens every conversation, unless it is empty."""

    def __init__(self, nodes: Iterable[Node], *, system: str = "") -> None:
        """Raises: MinipuzzleError for two nodes of one name, edges from nowhere, or circles."""
        listed = list(nodes)
        self.nodes = {node.key: node for node in listed}
        self.system, self.values = system, dict[str, Any]()
        if len(self.nodes) < len(listed):
            raise _error("two nodes have one name")
        check_nodes(self.nodes)

    def run(self, ask: Ask, store: dict[str, Any] | None = None) -> Pass:
        """Ask all nodes once: always the first in the queue whose needs are met; changes end with the pass.

        Raises: MinipuzzleError if a node never becomes ready, or a prompt names a value that the store lacks.
        """
        running = Pass(nodes=dict(self.nodes), store={} if store is None else store, previous=dict(self.values))
        queue: list[str] = []
        while True:
            # Successors queue up when a node is answered or skipped, in the order of the graph, ready or not.
            queue += [key for key, node in running.nodes.items() if key not in queue and _is_next(running, node)]
            key = next((key for key in queue if key not in running.values and _is_ready(running, key)), None)
            if key is None:
                break
            self._answer(running, key, ask)
        if waiting := [key for key in running.nodes if key not in running.values]:
            raise _error(f"{', '.join(map(repr, waiting))} never became ready")
        self.values = {key: value for key, value in running.values.items() if key in self.nodes}
        return running

    def _answer(self, running: Pass, key: str, ask: Ask) -> None:
        node = running.nodes[key]
        running.node = node
        prompt = filled(node.prompt, running.store, key)
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for needed in node.needs:
            shown = running.asked.get(needed) or filled(running.nodes[needed].prompt, running.store, needed)
            messages += _turn(shown, str(running.values[needed]))
        messages.append({"role": "user", "content": prompt})
        value: Any = NOT_ANSWERED
        for _ in range(TRIES):
            answer = ask(messages, node.max_tokens)
            before = running.nodes, dict(running.values)
            try:
                value = answer if node.read is None else node.read(answer, running)
                break
            except UnreadableError as problem:
                running.nodes, running.values = before  # a hook that failed halfway changed nothing
                messages = [*messages, {"role": "assistant", "content": answer}, _again(str(problem))]
        else:
            warn(f"node {key!r} got no answer that could be read in {TRIES} tries")
        running.values[key], running.asked[key] = value, prompt
        running.order.append(key)
        running.node = None

    def to_mermaid(self) -> str:
        """The graph as a Mermaid flowchart: full lines are needs, dotted ones order alone."""
        names = {key: f"n{idx}" for idx, key in enumerate(self.nodes)}
        lines = ["flowchart TD"]
        lines += [f'  {names[key]}["{re.sub("[^ .:_a-zA-Z0-9-]", "_", key)}"]' for key in self.nodes]
        for key, node in self.nodes.items():
            lines += [f"  {names[first]} --> {names[key]}" for first in node.needs]
            lines += [f"  {names[first]} -.-> {names[key]}" for first in node.after]
        return "\n".join(lines) + "\n"


def _is_next(running: Pass, node: Node) -> bool:
    return not node.waits_for or any(first in running.values for first in node.waits_for)


def _is_ready(running: Pass, key: str) -> bool:
    return all(first in running.values for first in running.nodes[key].waits_for)


def _turn(prompt: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _again(problem: str) -> Message:
    return {"role": "user", "content": f"That cannot be used: {problem} Answer again."}


def filled(prompt: str, store: Mapping[str, Any], key: str) -> str:
    """A prompt with values of the store in the place of ``$path.to.value$``.

    Raises: MinipuzzleError naming the path that leads nowhere.
    """

    def value(found: re.Match[str]) -> str:
        place: Any = store
        for part in found[1].split("."):
            if not isinstance(place, Mapping) or part not in place:
                raise _error(f"node {key!r} names ${found[1]}$, which the store does not hold")
            place = place[part]
        return "\n".join(map(str, place)) if isinstance(place, list | tuple) else str(place)

    return _REFERENCE.sub(value, prompt)
