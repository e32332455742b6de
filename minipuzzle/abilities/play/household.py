"""A household of text, with the six kinds of task and the commands of ALFWorld (2010.03768), in pure Python.

One room with receptacles, some of them closed; what lies where is seen by going there. A task is: put an object (or
two of a kind, or one made clean, hot or cool) somewhere, or look at an object under a lamp. Rooms, texts and goals are
made here from a seed; no data of ALFWorld are used.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

CLOSED = ("fridge", "microwave", "cabinet", "drawer")  # kinds that must be opened
_ROOM = ("fridge 1", "microwave 1", "sinkbasin 1", "desklamp 1")
_MORE = ("cabinet", "drawer", "countertop", "shelf", "diningtable")
_WASHED = ("mug", "plate", "fork", "apple", "tomato", "cloth")
_HEATED = ("mug", "apple", "tomato", "egg", "potato")
_SEEN = ("book", "newspaper", "mug", "plate", "apple", "vase", "fork", "egg", "potato", "cloth", "tomato")
# Changes of an object: the command, where it is made, and the word for its result.
TREATMENTS = {"clean": ("sinkbasin 1", "clean"), "heat": ("microwave 1", "hot"), "cool": ("fridge 1", "cool")}
LAMP = "desklamp 1"
KINDS_OF_TASK = ("put", "put two", "clean", "heat", "cool", "look")
_HANDS = "hands"


@dataclass(frozen=True, kw_only=True)
class State:
    """Where the player and all objects are (``hands``: held), what is open, and what was done to objects."""

    place: str = ""
    objects: tuple[tuple[str, str], ...]
    opened: frozenset[str] = frozenset()
    treated: frozenset[tuple[str, str]] = frozenset()
    is_lamp_on: bool = False

    @property
    def held(self) -> str:
        """The object in the player's hands, or none."""
        return next((name for name, place in self.objects if place == _HANDS), "")

    def moved(self, name: str, place: str) -> State:
        """The same with an object elsewhere."""
        return replace(self, objects=tuple((one, place if one == name else at) for one, at in self.objects))

    def at(self, place: str) -> list[str]:
        """Objects in or on a receptacle."""
        return [name for name, where in self.objects if where == place]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be done with which kind of object, and where it ends."""

    kind: str
    thing: str
    target: str = ""

    @property
    def text(self) -> str:
        """As the player reads it."""
        if self.kind == "look":
            return f"look at the {self.thing} under the desklamp."
        if self.kind == "put two":
            return f"find two {self.thing}s and put them in {self.target}."
        word = f"{TREATMENTS[self.kind][1]} " if self.kind in TREATMENTS else ""
        return f"put a {word}{self.thing} in {self.target}."

    def is_reached(self, state: State) -> bool:
        """Whether a state is what was asked for."""
        things = [name for name, _ in state.objects if _kind(name) == self.thing]
        if self.kind == "look":
            return state.is_lamp_on and state.place == LAMP and state.held in things
        there = [name for name, place in state.objects if name in things and _kind(place) == self.target]
        if self.kind in TREATMENTS:
            there = [name for name in there if (name, TREATMENTS[self.kind][1]) in state.treated]
        return len(there) >= (2 if self.kind == "put two" else 1)


def _kind(name: str) -> str:
    return name.rpartition(" ")[0] or name


class Household:
    """One game. The kinds of task follow each other with the seed."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"household/{seed}")
        more = [f"{kind} {number}" for kind in _MORE for number in range(1, rng.randint(1, 3) + 1)]
        self.receptacles = sorted([*_ROOM, *more])
        self.task, self.state = _made(rng, KINDS_OF_TASK[seed % len(KINDS_OF_TASK)], self.receptacles)
        self.goal = self.task.text
        self._plans: dict[State, list[str]] = {}
        seen = ", ".join(f"a {name}" for name in self.receptacles)
        self._observation = f"You are in the middle of a room. Looking quickly around you, you see {seen}."

    @property
    def observation(self) -> str:
        """What the last action showed; at the beginning, the room."""
        return self._observation

    @property
    def is_done(self) -> bool:
        """Whether the goal is reached."""
        return self.task.is_reached(self.state)

    @property
    def actions(self) -> list[str]:
        """All commands that can be done now."""
        found = [action for action, _ in self._outcomes(self.state)]
        here = self.state.place
        looks = [f"examine {name}" for name in (here, self.state.held) if name]
        closes = [f"close {here}"] if here in self.state.opened else []
        return [*found, *closes, *looks, "inventory", "look"]

    def step(self, action: str) -> None:
        """Do a command; one that cannot be done changes nothing."""
        before, outcome = self.state, dict(self._outcomes(self.state)).get(action)
        here = before.place
        if outcome is not None:
            self.state = outcome
            self._observation = self._told(action, before)
        elif action == f"close {here}" and here in before.opened:
            self.state = replace(before, opened=before.opened - {here})
            self._observation = f"You close the {here}."
        elif action == "inventory":
            held = before.held
            self._observation = f"You are carrying: a {held}." if held else "You are not carrying anything."
        elif action == "look":
            self._observation = f"You are facing the {here}." if here else "You are in the middle of a room."
        elif here and action == f"examine {here}":
            self._observation = self._seen(here)
        elif before.held and action == f"examine {before.held}":
            states = [word for name, word in sorted(before.treated) if name == before.held]
            self._observation = f"This is a {' '.join([*states, before.held])}."
        else:
            self._observation = "Nothing happens."

    def _told(self, action: str, before: State) -> str:
        verb, _, rest = action.partition(" ")
        here, name = self.state.place, before.held or self.state.held
        texts = {
            "go": f"You arrive at {here}. {self._seen(here)}",
            "open": f"You open the {here}. {self._seen(here)}",
            "take": f"You pick up the {name} from the {here}.",
            "move": f"You move the {name} to the {here}.",
            "use": f"You turn on the {rest}.",
        }
        return texts.get(verb) or f"You {verb} the {name} using the {here}."

    def _seen(self, place: str) -> str:
        if _kind(place) in CLOSED and place not in self.state.opened:
            return f"The {place} is closed."
        things = ", ".join(f"a {name}" for name in self.state.at(place)) or "nothing"
        is_inside = _kind(place) in CLOSED
        return f"The {place} is open. In it, you see {things}." if is_inside else f"On the {place}, you see {things}."

    def _outcomes(self, state: State) -> Iterator[tuple[str, State]]:
        """Commands that change something, and the states they lead to."""
        here, held = state.place, state.held
        for place in self.receptacles:
            if place != here:
                yield f"go to {place}", replace(state, place=place)
        if not here:
            return
        is_open = _kind(here) not in CLOSED or here in state.opened
        if not is_open:
            yield f"open {here}", replace(state, opened=state.opened | {here})
        if is_open and not held:
            for name in state.at(here):
                yield f"take {name} from {here}", state.moved(name, _HANDS)
        if is_open and held:
            yield f"move {held} to {here}", state.moved(held, here)
        for verb, (place, word) in TREATMENTS.items():
            if held and here == place and (held, word) not in state.treated:
                others = {(held, other) for other in ("hot", "cool") if word in ("hot", "cool")}
                yield f"{verb} {held} with {here}", replace(state, treated=(state.treated - others) | {(held, word)})
        if here == LAMP and not state.is_lamp_on:
            yield f"use {LAMP}", replace(state, is_lamp_on=True)

    def plan(self) -> list[str]:
        """A shortest way to the goal from here, found breadth first; empty where it is reached."""
        if self.state not in self._plans:
            self._plans |= self._ways_to_goal()
        return self._plans[self.state]

    def _ways_to_goal(self) -> dict[State, list[str]]:
        """Of all states on a shortest way, the commands that are left."""
        came_from: dict[State, tuple[str, State]] = {}
        queue, known = deque([self.state]), {self.state}
        while queue:
            state = queue.popleft()
            if self.task.is_reached(state):
                ways: dict[State, list[str]] = {state: []}
                while state in came_from:
                    action, before = came_from[state]
                    ways[before] = [action, *ways[state]]
                    state = before
                return ways
            for action, after in self._outcomes(state):
                if after not in known and self._may_help(action, state):
                    known.add(after)
                    came_from[after] = action, state
                    queue.append(after)
        raise AssertionError("every game can be won")

    def _may_help(self, action: str, state: State) -> bool:
        """Whether a shortest way can hold a command: others move what no task is about, or go where nothing is."""
        verb, _, rest = action.partition(" ")
        treatment = TREATMENTS.get(self.task.kind, ("", ""))[0]
        is_in_the_way = bool(state.held) and _kind(state.held) != self.task.thing
        if verb == "go":
            place = rest.removeprefix("to ")
            is_wanted = any(_kind(name) == self.task.thing for name in state.at(place))
            is_place_to_drop = is_in_the_way and place == "sinkbasin 1"
            is_end = _kind(place) == self.task.target or (self.task.kind == "look" and place == LAMP)
            return is_wanted or is_end or is_place_to_drop or place == treatment
        if verb == "take":
            return _kind(rest.partition(" from ")[0]) == self.task.thing
        if verb == "move":
            return is_in_the_way or _kind(state.place) == self.task.target
        return verb in ("open", "use") or verb == self.task.kind

    def oracle_action(self) -> str:
        """The first action of a shortest way."""
        return self.plan()[0]


def _made(rng: random.Random, kind: str, receptacles: list[str]) -> tuple[Task, State]:
    """A task, and a room in which it is not yet done: never does a thing lie where it is to be put."""
    things = {"clean": _WASHED, "heat": _HEATED, "cool": _HEATED}.get(kind, _SEEN)
    thing = rng.choice(things)
    targets = [place for place in _MORE if place not in ("drawer",)]
    task = Task(kind=kind, thing=thing, target="" if kind == "look" else rng.choice(targets))
    allowed = [place for place in receptacles if _kind(place) not in (task.target, "desklamp", "sinkbasin")]
    number = 2 if kind == "put two" else rng.randint(1, 2)
    objects = [(f"{thing} {idx}", rng.choice(allowed)) for idx in range(1, number + 1)]
    others = rng.sample([other for other in _SEEN if other != thing], 5)
    open_places = [place for place in receptacles if place != LAMP]
    objects += [(f"{other} 1", rng.choice(open_places)) for other in others]
    return task, State(objects=tuple(sorted(objects)))
