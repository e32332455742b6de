"""Worlds of text behind one interface, and the table of those there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from minipuzzle.table import Table


class World(Protocol):
    """A game. What happens depends on its seed and the actions alone."""

    goal: str

    @property
    def observation(self) -> str:
        """What the last action showed; at the beginning, the place."""

    @property
    def actions(self) -> list[str]:
        """All commands that do something now, in a fixed order."""

    @property
    def is_done(self) -> bool:
        """Whether the goal is reached."""

    def step(self, action: str) -> None:
        """Act; what cannot be done changes nothing."""

    def oracle_action(self) -> str:
        """The first action of a shortest way to the goal, by one who sees everything."""


WORLDS: Table[Callable[[int], World]] = Table(
    "world", "worlds", lazy={"household": "minipuzzle.abilities.play.household:Household"}
)

# Who chooses commands, made of a model that answers.
AGENTS: Table[Callable[[Any], Any]] = Table(
    "agent",
    "agents",
    lazy={
        "direct": "minipuzzle.abilities.play.agents:DIRECT",
        "agentkit": "minipuzzle.abilities.play.agents:AGENTKIT",
        "spring": "minipuzzle.abilities.play.agents:SPRING",
        "pet": "minipuzzle.abilities.play.agents:PetAgent",
    },
)
