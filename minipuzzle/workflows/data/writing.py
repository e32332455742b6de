"""Text that a model writes, verb by verb."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from minipuzzle.data.endpoint.journal import JOURNAL_FILE, Journal, Journaled
from minipuzzle.data.endpoint.questions import Model, Several
from minipuzzle.data.rows import Rejected, Row, read_rows
from minipuzzle.data.runner import StepReport, run_step
from minipuzzle.data.writing.dialogues import SAMPLING, STYLES, Dialogues
from minipuzzle.data.writing.instruct import GREEDY, KINDS, Conversations, Sizes, first_messages
from minipuzzle.data.writing.judging import BOTH_ORDERS, BY_REWARD, JUDGE, Preferences, Reward, parse_condition
from minipuzzle.data.writing.prompts import Prompts, read_prompts
from minipuzzle.data.writing.revising import Revising
from minipuzzle.data.writing.rewriting import TASKS, Rewriting
from minipuzzle.data.writing.verifiers import verifier_of
from minipuzzle.errors import MinipuzzleError
from minipuzzle.workflows.data.running import PlannedStep, chosen_of, model_of, plan_step, run_made, run_rows
from minipuzzle.workflows.data.settings import (
    Asking,
    DialogueSettings,
    InstructSettings,
    PreferenceSettings,
    ReviseSettings,
    RewardSettings,
    RewriteSettings,
)
from minipuzzle.workflows.settings import paths_of
from minipuzzle.workflows.verbs import keywords

Done = StepReport | PlannedStep


def _prompts(name: str, asking: Asking) -> Prompts:
    return read_prompts(name, None if asking.prompts is None else Path(asking.prompts))


def run_dialogues(settings: DialogueSettings, *, is_dry: bool = False) -> Done:
    """Dialogues of each passage in some styles."""
    model = model_of(settings.asking)
    step = Dialogues(
        prompts=_prompts("dialogues", settings.asking),
        styles=chosen_of(settings.styles, STYLES, "styles"),
        passage_tokens=settings.chunk,
        combine=settings.combine,
        min_coverage=settings.min_coverage,
        model=model.name,
        sampling={**SAMPLING, "max_tokens": settings.max_tokens},
    )
    return run_rows(step, settings.data, settings.running, model=model, settings=settings, is_dry=is_dry)


def run_rewrite(settings: RewriteSettings, *, is_dry: bool = False) -> Done:
    """Each document rewritten in some tasks."""
    model = model_of(settings.asking)
    tasks = chosen_of(settings.tasks, tuple(TASKS), "tasks")
    step = Rewriting(prompts=_prompts("rewriting", settings.asking), tasks=tasks, model=model.name)
    return run_rows(step, settings.data, settings.running, model=model, settings=settings, is_dry=is_dry)


def run_instruct(settings: InstructSettings, *, is_dry: bool = False) -> Done:
    """Topics, first messages, conversations."""
    model, running, paths = model_of(settings.asking), settings.running, paths_of(settings.data)
    kinds, prompts = chosen_of(settings.kinds, KINDS, "kinds"), _prompts("instruct", settings.asking)
    numbers = settings.topics.split("x")
    if len(numbers) != 3 or not all(number.isdigit() and int(number) for number in numbers):
        raise MinipuzzleError(f"‹topics› {settings.topics!r} is not three numbers", "give 20x5x10, for instance")
    if ("closed" in kinds) != bool(paths):
        raise MinipuzzleError("documents are for the kind 'closed'", "give both ‹data› and that kind, or neither")
    sizes = Sizes(**dict(zip(("topics", "subtopics", "openlines"), map(int, numbers), strict=True)))
    sampling = {**GREEDY, "max_tokens": settings.max_tokens}
    step = Conversations(prompts=prompts, turns=settings.turns, model=model.name, sampling=sampling)
    if is_dry:
        count = sizes.topics * (1 + sizes.subtopics) * sizes.openlines * len(kinds)
        likely = Row(messages=({"role": "user", "content": "A question of some length, as they come."},))
        return plan_step(step, [likely] * count, running, model)

    def work(folder: Path) -> StepReport:
        journal = Journal(folder / JOURNAL_FILE)
        documents = [row for row in read_rows(paths) if isinstance(row, Row)]
        rows: list[Row | Rejected] = []
        for kind in kinds:
            found, invented = first_messages(
                prompts, kind, sizes, Journaled(model=model, journal=journal).ask, documents
            )
            rows += [*found, *([Rejected(id="", reason="invented in a list", attempt=kind)] * invented)]
        journal.close()
        return run_step(step, _distinct(rows), folder, model, running.work)

    return run_made(work, step.name, running, paths, settings)


def _distinct(rows: Iterable[Row | Rejected]) -> Iterable[Row | Rejected]:
    """Rows of which none comes twice."""
    seen: set[str] = set()
    for row in rows:
        if isinstance(row, Row) and row.id in seen:
            yield Rejected(id=row.id, reason="duplicate")
            continue
        seen.add(row.id if isinstance(row, Row) else "")
        yield row


def run_reward(settings: RewardSettings, *, is_dry: bool = False) -> Done:
    """Scores of a reward model for conversations."""
    model = model_of(settings.asking)
    step = Reward(keep=tuple(parse_condition(text) for text in settings.keep), model=model.name)
    return run_rows(step, settings.data, settings.running, model=model, settings=settings, is_dry=is_dry)


def run_preferences(settings: PreferenceSettings, *, is_dry: bool = False) -> Done:
    """Pairs of a better and a worse answer."""
    if settings.by not in (BOTH_ORDERS, BY_REWARD):
        verifier_of(settings.by)
    first = model_of(settings.asking)
    others = {name: _served(name, url, settings.asking) for name, url in _pairs(settings.responders)}
    judge = first
    for name, url in _pairs((settings.judge,) if settings.judge else ()):
        judge = _served(name, url, settings.asking)
    responders: dict[str, Model] = {first.name: first, **others}
    step = Preferences(
        prompts=_prompts("judging", settings.asking),
        responders=tuple(responders),
        by=settings.by,
        samples=settings.samples,
        max_tokens=settings.max_tokens,
        model=first.name,
    )
    model = Several(models={**responders, JUDGE: judge})
    return run_rows(step, settings.data, settings.running, model=model, settings=settings, is_dry=is_dry)


def _pairs(texts: Iterable[str]) -> list[tuple[str, str]]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [name for name, equals, url in pairs if not (name and equals and url)]:
        raise MinipuzzleError(f"{wrong[0]!r} is not NAME=URL", "check ‹responders› and ‹judge›")
    return [(name, url) for name, _, url in pairs]


def _served(name: str, url: str, asking: Asking) -> Model:
    return model_of(replace(asking, endpoint=(url,), model=name, teacher=None))


def run_revise(settings: ReviseSettings, *, is_dry: bool = False) -> Done:
    """Traces made shorter where that keeps them right."""
    verifier_of(settings.verifier)
    model = model_of(settings.asking)
    step = Revising(
        verifier=settings.verifier,
        model=model.name,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        gamma=settings.gamma,
        has_baseline=settings.baseline,
    )
    return run_rows(step, settings.data, settings.running, model=model, settings=settings, is_dry=is_dry)


dialogues = keywords(DialogueSettings, run_dialogues)
rewrite = keywords(RewriteSettings, run_rewrite)
instruct = keywords(InstructSettings, run_instruct)
reward = keywords(RewardSettings, run_reward)
preferences = keywords(PreferenceSettings, run_preferences)
revise = keywords(ReviseSettings, run_revise)
