"""Decisions: what each model answered to each item, kept line by line, and what they show side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from minipuzzle.abilities.items import Item, Task
from minipuzzle.abilities.statistics import Difference, Share, difference_of, share_of
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.json_files import parse_json, record_of

ITEMS_AT_ONCE = 16  # between two looks at the disk


class Answers(Protocol):
    """A model that can be asked: ours in memory, or one behind an endpoint."""

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """log p(continuation | prompt) of each pair, in nats."""

    def complete(self, prompts: Sequence[str], *, max_tokens: int, stop: Sequence[str]) -> list[str]:
        """How the model goes on after each prompt."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One model's answer to one item. ``score``: 0 to 1. ``log_likelihoods``: of the options, in nats, in the item's
    order, the right one first; None where it wrote ``answer``."""

    model: str
    task: str
    item: str
    state: str
    group: str
    score: float
    log_likelihoods: tuple[float, ...] | None = None
    answer: str | None = None


Decisions = Mapping[tuple[str, str], Decision]  # of one model, by task and item


def chunks(task: Task, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Items in the portions that are put together, wherever a run continues: batches shape the last digits."""
    number = 1 if task.play else ITEMS_AT_ONCE
    for start in range(0, len(items), number):
        yield items[start : start + number]


def decide(model: Answers, label: str, name: str, task: Task, items: Sequence[Item]) -> list[Decision]:
    """Put items to a model; equally likely best options share the point among them."""
    found: Iterable[dict[str, Any]]
    if task.play is not None:
        played = [task.play(model, item) for item in items]
        found = [{"score": score, "answer": answer} for score, answer in played]
    else:
        found = _chosen(model, task, items) if task.score is None else _written(model, task, items)
    return [
        Decision(model=label, task=name, item=item.name, state=item.state, group=item.group, **facts)
        for item, facts in zip(items, found, strict=True)
    ]


def _chosen(model: Answers, task: Task, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    values = iter(model.log_likelihoods([(item.prompt, option) for item in items for option in item.options]))
    for item in items:
        log_likelihoods = tuple(next(values) for _ in item.options)
        ranked = log_likelihoods
        if task.by_length:
            lengths = (len(option.encode()) for option in item.options)
            ranked = tuple(value / length for value, length in zip(log_likelihoods, lengths, strict=True))
        best = max(ranked)
        score = 1 / ranked.count(best) if ranked[0] == best else 0.0
        yield {"score": score, "log_likelihoods": log_likelihoods}


def _written(model: Answers, task: Task, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    assert task.score is not None
    alike: dict[tuple[int, tuple[str, ...]], list[Item]] = {}
    for item in items:
        alike.setdefault((item.max_tokens, item.stop), []).append(item)
    answers: dict[str, str] = {}
    for (max_tokens, stop), group in alike.items():
        texts = model.complete([item.prompt for item in group], max_tokens=max_tokens, stop=stop)
        answers |= {item.name: text for item, text in zip(group, texts, strict=True)}
    for item in items:
        answer = answers[item.name]
        yield {"score": float(task.score(item, answer)), "answer": answer}


class Journal:
    """Decisions in a file of JSON lines, each written once; a line that a killed run left unfinished is dropped."""

    def __init__(self, path: Path | None) -> None:
        """``path``: None keeps decisions in memory alone.

        Raises: MinipuzzleError for lines that are no decisions.
        """
        self._path = path
        self.decisions: dict[str, dict[tuple[str, str], Decision]] = {}
        if path is None or not path.is_file():
            return
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        if torn:
            with path.open("r+b") as file:
                file.truncate(len(whole) + 1 if whole else 0)
        self._keep(read_decisions(whole.decode("utf-8"), str(path)))

    def add(self, decisions: Sequence[Decision]) -> None:
        """Write decisions down before anything else happens."""
        self._keep(decisions)
        if self._path is not None:
            lines = "".join(json.dumps(asdict(decision), allow_nan=False) + "\n" for decision in decisions)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)

    def of(self, model: str) -> Decisions:
        """What one model decided so far."""
        return self.decisions.get(model, {})

    def _keep(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            self.decisions.setdefault(decision.model, {})[decision.task, decision.item] = decision


def read_decisions(text: str, where: str) -> Iterator[Decision]:
    """Decisions from JSON lines.

    Raises: MinipuzzleError naming the line.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            yield record_of(Decision, parse_json(line, f"{where}:{number}"))
        except ValueError as error:
            raise MinipuzzleError(f"{where}:{number}: {error}", "remove the folder and start afresh") from None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on one task, or on one group of its items; ``group`` "" is all of them.

    ``difference``, ``kl`` (nats a decision, of the distributions over options) and ``agreement`` (same best option or
    same score): from the model compared with. ``log_prob_right``: of the right option among all, nats, mean.
    """

    model: str
    task: str
    group: str
    share: Share
    difference: Difference | None = None
    kl: float | None = None
    agreement: float | None = None
    log_prob_right: float | None = None


def compare(decisions: Mapping[str, Decisions], against: str | None) -> list[Row]:
    """Rows task by task, model by model; groups of items after the whole task.

    Raises: MinipuzzleError where two models were asked different things.
    """
    places: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (task, item), decision in next(iter(decisions.values())).items():
        places.setdefault((task, ""), []).append((task, item))
        if decision.group:
            places.setdefault((task, decision.group), []).append((task, item))
    tasks = dict.fromkeys(task for task, _ in places)
    ordered = [place for task in tasks for place in places if place[0] == task]
    return [
        _row(
            model,
            task,
            group,
            [own[key] for key in places[task, group]],
            decisions[against] if against not in (None, model) else None,
        )
        for task, group in ordered
        for model, own in decisions.items()
    ]


def _row(model: str, task: str, group: str, own: Sequence[Decision], against: Decisions | None) -> Row:
    share = share_of([decision.score for decision in own])
    chosen = all(decision.log_likelihoods is not None for decision in own)
    right = _mean([_log_softmax(decision)[0] for decision in own]) if chosen else None
    if against is None:
        return Row(model=model, task=task, group=group, share=share, log_prob_right=right)
    others = [against[decision.task, decision.item] for decision in own]
    for one, other in zip(own, others, strict=True):
        if one.state != other.state:
            raise MinipuzzleError(f"{task}, item {one.item}: {model} and {other.model} saw different states", "")
    kl = _mean([_divergence(other, one) for one, other in zip(own, others, strict=True)]) if chosen else None
    same = [_best(one) == _best(other) for one, other in zip(own, others, strict=True)]
    return Row(
        model=model,
        task=task,
        group=group,
        share=share,
        difference=difference_of([one.score for one in own], [other.score for other in others]),
        kl=kl,
        agreement=_mean(same),
        log_prob_right=right,
    )


def _best(decision: Decision) -> int | str | None:
    values = decision.log_likelihoods
    return decision.answer if values is None else values.index(max(values))


def _log_softmax(decision: Decision) -> list[float]:
    values = decision.log_likelihoods or ()
    highest = max(values)
    total = highest + math.log(sum(math.exp(value - highest) for value in values))
    return [value - total for value in values]


def _divergence(teacher: Decision, student: Decision) -> float:
    pairs = zip(_log_softmax(teacher), _log_softmax(student), strict=True)
    return sum(math.exp(log_p) * (log_p - log_q) for log_p, log_q in pairs)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
