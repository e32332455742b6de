"""How abilities are asked for. Free of torch, so that the command can show help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minipuzzle.abilities.items import DEFAULT_CONTEXT_WORDS, DEFAULT_TASKS, TASKS
from minipuzzle.abilities.play.worlds import AGENTS, WORLDS
from minipuzzle.errors import MinipuzzleError
from minipuzzle.option import option
from minipuzzle.runtime.compute import Compute
from minipuzzle.workflows.settings import OVERWRITE_HELP

if TYPE_CHECKING:
    from minipuzzle.workflows.verbs import Model


@dataclass(frozen=True, kw_only=True)
class AbilitiesSettings:
    """Which tasks, how many items of each, and which model the others are compared with.

    Raises: MinipuzzleError for lengths that are none.
    """

    against: Model | None = option(
        None, "The model that the others are compared with: a folder, or the address of a server.", metavar="TEACHER"
    )
    endpoint: Sequence[str] = option(
        (),
        "A model behind an OpenAI-compatible server, such as http://127.0.0.1:8000/v1; NAME= where it serves several. "
        "Repeatable.",
        takes="texts",
        metavar="[NAME=]URL",
    )
    tasks: Sequence[str] = option(
        (),
        f"{', '.join(TASKS.names())}, or files of yours (.toml, .jsonl); several with commas. Repeatable. Default: "
        f"{', '.join(DEFAULT_TASKS)}, which need no data.",
        takes="texts",
        metavar="TASK,...",
    )
    worlds: Sequence[str] = option(
        (), f"Let models play: {', '.join(WORLDS.names())}. Repeatable.", takes="texts", metavar="WORLD"
    )
    agent: str = option(
        "direct",
        f"How a model plays: {', '.join(AGENTS.names())}, or a prompt graph of yours (.toml).",
        metavar="AGENT",
    )
    data: Mapping[str, str] = option(
        {},
        "The file of a task that needs one: .jsonl, or .csv of MMLU. Repeatable.",
        takes="pairs",
        metavar="TASK=FILE",
    )
    episodes: int = option(50, "Items of each task, and of each of its lengths.", at_least=1)
    seed: int = option(0, "Seed of the items, which are the same for all models.", takes="integer")
    context_words: str = option(
        ",".join(map(str, DEFAULT_CONTEXT_WORDS)),
        "Lengths of copying, induction and needle, in words.",
        metavar="N,...",
    )
    out: str | Path | None = option(
        None, "Folder for every decision (JSONL) and the result; a killed run continues there.", takes="path"
    )
    overwrite: bool = option(False, OVERWRITE_HELP)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        self.lengths  # noqa: B018 # refused now, not after models were read

    @property
    def lengths(self) -> tuple[int, ...]:
        """Words of context."""
        try:
            lengths = tuple(sorted({int(part) for part in str(self.context_words).split(",")}))
        except ValueError:
            lengths = (0,)
        if min(lengths) < 1:
            raise MinipuzzleError(f"{self.context_words!r} is no list of lengths", "give ‹context_words› 64,256,1024")
        return lengths

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names and files of tasks, each once."""
        given = [self.tasks] if isinstance(self.tasks, str) else self.tasks
        names = [name.strip() for part in given for name in str(part).split(",") if name.strip()]
        return tuple(dict.fromkeys(names)) or (() if self.worlds else DEFAULT_TASKS)
