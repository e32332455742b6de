"""Items: one question each, put to all models alike, and tasks that make them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipuzzle.errors import MinipuzzleError
from minipuzzle.table import Table

DEFAULT_TASKS = ("copying", "induction", "needle")  # what hybrids lose first; made from the seed alone
DEFAULT_CONTEXT_WORDS = (16, 64, 256)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. With ``options`` a model chooses the likeliest, ``options[0]`` being right; else it writes.

    ``group``: what the item is counted under beside its task, such as a length. ``reference``: what a written answer
    is scored by. ``facts``: what else the scorer needs.
    """

    name: str
    prompt: str
    options: tuple[str, ...] = ()
    reference: str = ""
    max_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    group: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """A hash of all that a model sees, by which two models' decisions are laid side by side."""
        seen = json.dumps([self.prompt, self.options, self.max_tokens, self.stop])
        return hashlib.sha256(seen.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which items: how many, from which seed, of which file, at which lengths."""

    num_items: int
    seed: int = 0
    data: Path | None = None
    context_words: tuple[int, ...] = DEFAULT_CONTEXT_WORDS


@dataclass(frozen=True, kw_only=True)
class Task:
    """``items``: makes them, the same for the same sampling in every process. ``score``: of a written answer, 0 to 1;
    None: models choose between options. ``by_length``: options are compared by log-likelihood a byte, else by its sum.
    ``play``: instead, of a model and an item, the score and what happened.
    """

    description: str
    items: Callable[[Sampling], list[Item]]
    score: Callable[[Item, str], float] | None = None
    by_length: bool = False
    needs_data: bool = False
    play: Callable[[Any, Item], tuple[float, str]] | None = None

    @property
    def kind(self) -> str:
        """How models answer."""
        return "game" if self.play else "writing" if self.score else "choice"


TASKS: Table[Task] = Table(
    "task",
    "tasks",
    lazy={
        "copying": "minipuzzle.abilities.tasks.recall:COPYING",
        "induction": "minipuzzle.abilities.tasks.recall:INDUCTION",
        "needle": "minipuzzle.abilities.tasks.recall:NEEDLE",
        "recall": "minipuzzle.abilities.tasks.recall:RECALL",
        "piqa": "minipuzzle.abilities.tasks.choices:PIQA",
        "siqa": "minipuzzle.abilities.tasks.choices:SIQA",
        "boolq": "minipuzzle.abilities.tasks.choices:BOOLQ",
        "commonsenseqa": "minipuzzle.abilities.tasks.choices:COMMONSENSEQA",
        "mmlu": "minipuzzle.abilities.tasks.choices:MMLU",
        "household": "minipuzzle.abilities.play.agents:HOUSEHOLD",
        "humaneval": "minipuzzle.abilities.tasks.programs:HUMANEVAL",
    },
)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))]


def _is_number(item: Item, answer: str) -> float:
    found, wanted = _numbers(answer), _numbers(item.reference)
    return float(bool(found and wanted) and found[-1] == wanted[-1])


# How a written answer is held against the reference; 1 is right.
SCORERS: Table[Callable[[Item, str], float]] = Table(
    "scorer",
    "scorers",
    entries={
        "exact": lambda item, answer: float(_words(answer) == _words(item.reference)),
        "begins": lambda item, answer: float(_words(answer)[: len(_words(item.reference))] == _words(item.reference)),
        "contains": lambda item, answer: float(item.reference.casefold() in answer.casefold()),
        "number": _is_number,
    },
)


def check_items(name: str, items: Sequence[Item]) -> None:
    """Refuse items that measure nothing, or that could not be told apart.

    Raises: MinipuzzleError naming the item.
    """
    if not items:
        raise MinipuzzleError(f"task {name} has no items", "give it more data")
    seen = set()
    for item in items:
        if item.name in seen:
            raise MinipuzzleError(f"task {name} has two items {item.name!r}", "give each a name of its own")
        if item.options and (len(item.options) < 2 or len(set(item.options)) < len(item.options)):
            raise MinipuzzleError(f"task {name}, item {item.name}: options must be two or more and differ", "mend it")
        if not item.options and not item.reference and not item.facts:
            raise MinipuzzleError(f"task {name}, item {item.name} has no right answer", "mend it")
        seen.add(item.name)
