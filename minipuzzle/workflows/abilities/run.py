"""Asking models what they can still do: the same items for all, one model in memory at a time, every answer kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from minipuzzle.abilities.decisions import Answers, Journal, Row, chunks, compare, decide
from minipuzzle.abilities.items import Item, Sampling, Task, check_items
from minipuzzle.abilities.play.agents import CHANCE, ORACLE, world_task
from minipuzzle.abilities.served import ServedModel, served_models
from minipuzzle.abilities.statistics import what_items_show
from minipuzzle.abilities.tasks.own_tasks import find_task
from minipuzzle.data.windows import document_tokens
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.reader import open_any
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.files.outputs import check_target_folder, output_folder, write_whole
from minipuzzle.progress import Advance
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import load_tokenizer
from minipuzzle.workflows.abilities.harness import open_local
from minipuzzle.workflows.abilities.settings import AbilitiesSettings
from minipuzzle.workflows.verbs import Model, open_model, verb

DECISIONS_FILE, RESULT_FILE = "decisions.jsonl", "abilities.json"
_ADDRESS = "://"


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What models can do. ``rows``: by task, group of items, and model; ``against``: the model compared with.

    ``references``: by task, the score of chance, and in worlds of the oracle that sees everything.
    """

    rows: Sequence[Row]
    against: str | None
    seed: int
    references: Mapping[str, Mapping[str, float]]

    @property
    def notes(self) -> list[str]:
        """What so many items can show, task by task, and how many comparisons there are."""
        compared = [row for row in self.rows if row.difference is not None and not row.group]
        notes = [f"{row.model}, {row.task}: {what_items_show(row.difference)}" for row in compared if row.difference]
        for task, references in self.references.items():
            shown = " and ".join(f"{score:.0%} by {name}" for name, score in references.items())
            notes.append(f"{task}: {shown}, on the same items")
        if len(compared) > 1:
            notes.append(f"of {len(compared)} comparisons one in twenty has p < 0.05 where nothing differs")
        return notes

    def to_json(self) -> dict[str, Any]:
        """All rows and notes."""
        return {
            "against": self.against,
            "seed": self.seed,
            "references": self.references,
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
        }


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A model to be asked: by its label, what tells whether it changed, and how it is loaded."""

    label: str
    identity: str
    open: Callable[[Compute], Answers]
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    models: Sequence[_Asked]
    against: str | None
    tasks: Mapping[str, Task]
    items: Mapping[str, list[Item]]


def run_abilities(models: Sequence[Model] | Model, settings: AbilitiesSettings) -> Abilities:
    """Put tasks to models, and compare each with the one they were made from.

    Raises: MinipuzzleError for models, tasks or files that cannot be used; InputChangedError if an interrupted run
    that is continued had others.
    """
    prepared = _prepare(models, settings)
    if settings.out is None:
        return _asked(prepared, settings, Journal(None))
    provenance = {
        "command": "abilities",
        "models": {model.label: model.identity for model in prepared.models},
        "against": prepared.against,
        "items": {name: _states(items) for name, items in prepared.items.items()},
    }
    with output_folder(Path(settings.out), provenance, overwrite=settings.overwrite) as partial:
        found = _asked(prepared, settings, Journal(partial / DECISIONS_FILE))
        with write_whole(partial / RESULT_FILE) as path:
            write_json(path, found.to_json())
    return found


abilities = verb(AbilitiesSettings, run_abilities)


def plan_abilities(models: Sequence[Model] | Model, settings: AbilitiesSettings) -> dict[str, Any]:
    """What would be asked, after all checks that need no weights.

    Raises: as ``run_abilities``.
    """
    prepared = _prepare(models, settings)
    checkpoint = next((model.checkpoint for model in prepared.models if model.checkpoint is not None), None)
    tokenizer = None if checkpoint is None else load_tokenizer(checkpoint.folder)
    return {
        "models": [model.label for model in prepared.models],
        "against": prepared.against,
        "tasks": {name: _size(prepared.tasks[name], items, tokenizer) for name, items in prepared.items.items()},
    }


def _size(task: Task, items: Sequence[Item], tokenizer: Any) -> dict[str, Any]:
    """How much work one model has with a task: of options each is read with the whole prompt."""
    facts: dict[str, Any] = {"items": len(items), "kind": task.kind}
    if task.play is not None:
        return facts | {"steps_at_most": sum(int(item.facts["steps"]) for item in items)}
    if tokenizer is not None:
        texts = [item.prompt + option for item in items for option in item.options or ("",)]
        facts["tokens_read"] = sum(len(document_tokens(tokenizer, text)) for text in texts)
    if task.score is not None:
        facts["tokens_written_at_most"] = sum(item.max_tokens for item in items)
    return facts


def _prepare(models: Sequence[Model] | Model, settings: AbilitiesSettings) -> _Prepared:
    several: list[Model] = list(models) if isinstance(models, list | tuple) else [models]  # type: ignore[list-item] # one
    if settings.out is not None:
        folders = [Path(model) for model in several if isinstance(model, str | Path)]
        check_target_folder(Path(settings.out), overwrite=settings.overwrite, inputs=folders)
    named = dict(find_task(name) for name in settings.task_names)
    named |= {f"{world} ({settings.agent})": world_task(world, settings.agent) for world in settings.worlds}
    for name in settings.data:
        if name not in named:
            raise MinipuzzleError(f"‹data› names {name!r}, which is no task of this run", "add it to ‹tasks›")
    items = {name: _items(name, task, settings) for name, task in named.items()}
    against = None if settings.against is None else _asked_model(settings.against)
    found = [] if against is None else [against]
    for model in (*several, *settings.endpoint):
        one = _asked_model(model)
        if against is None or one.identity != against.identity:
            found.append(one)
    if not found:
        raise MinipuzzleError("there is no model to ask", "give a folder or ‹endpoint›")
    labels = [model.label for model in found]
    if len(set(labels)) < len(labels):
        raise MinipuzzleError(f"two models have one name: {', '.join(labels)}", "rename a folder, or give it once")
    return _Prepared(models=found, against=against.label if against else None, tasks=named, items=items)


def _items(name: str, task: Task, settings: AbilitiesSettings) -> list[Item]:
    data = settings.data.get(name)
    if task.needs_data and data is None:
        raise MinipuzzleError(f"task {name} needs a file", f"give ‹data› {name}=FILE, or leave it out of ‹tasks›")
    sampling = Sampling(
        num_items=settings.episodes,
        seed=settings.seed,
        data=None if data is None else Path(data),
        context_words=settings.lengths,
    )
    items = task.items(sampling)
    check_items(name, items)
    return items


def _asked_model(model: Model) -> _Asked:
    if isinstance(model, str) and _ADDRESS in model:
        return _served(model)
    checkpoint = open_any(open_model(model))
    load_tokenizer(checkpoint.folder)  # refused now, not after other models were asked
    label, load = checkpoint.folder.resolve().name, partial(open_local, checkpoint)
    return _Asked(label=label, identity=checkpoint.fingerprint, open=load, checkpoint=checkpoint)


def _served(text: str) -> _Asked:
    name, equals, url = text.partition("=")
    if not equals or _ADDRESS in name:
        name, url = "", text
    if not url.startswith(("http://", "https://")):
        raise MinipuzzleError(f"{url!r} is no address of a server", "give ‹endpoint› http://127.0.0.1:8000/v1")
    if not name:
        names = served_models(url)
        if len(names) != 1:
            known = ", ".join(names) or "none"
            raise MinipuzzleError(f"{url} serves {len(names)} models: {known}", "give ‹endpoint› NAME=URL")
        name = names[0]
    model = ServedModel(url=url, model=name)
    return _Asked(label=Path(name).name, identity=f"{name} at {url}", open=lambda _compute: model)


def _states(items: Sequence[Item]) -> str:
    """A hash of all items of a task: of its data, prompts, seed and lengths."""
    return hashlib.sha256("".join(item.state + item.reference for item in items).encode()).hexdigest()[:16]


def _asked(prepared: _Prepared, settings: AbilitiesSettings, journal: Journal) -> Abilities:
    for model in prepared.models:
        num_items = sum(map(len, prepared.items.values()))
        with settings.compute.progress(f"asking {model.label}", num_items) as advance:
            _ask(model, prepared, journal, settings.compute, advance)
    decisions = {model.label: journal.of(model.label) for model in prepared.models}
    references = {name: _references(prepared.tasks[name], items) for name, items in prepared.items.items()}
    return Abilities(
        rows=compare(decisions, prepared.against),
        against=prepared.against,
        seed=settings.seed,
        references={name: scores for name, scores in references.items() if scores},
    )


def _references(task: Task, items: Sequence[Item]) -> dict[str, float]:
    if task.play is not None:
        return {name: fmean(task.play(name, item)[0] for item in items) for name in (CHANCE, ORACLE)}
    return {CHANCE: fmean(1 / len(item.options) for item in items)} if task.score is None else {}


def _ask(model: _Asked, prepared: _Prepared, journal: Journal, compute: Compute, advance: Advance) -> None:
    """Put to one model what it has not answered yet; it is loaded only if there is anything left."""
    opened: Answers | None = None
    for name, items in prepared.items.items():
        for some in chunks(prepared.tasks[name], items):
            known = journal.of(model.label)
            missing = {item.name for item in some if (name, item.name) not in known}
            if missing:
                opened = opened or model.open(compute)
                found = decide(opened, model.label, name, prepared.tasks[name], some)
                journal.add([decision for decision in found if decision.item in missing])
            advance(len(some))
