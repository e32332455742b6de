"""Reasoning traces made shorter and better: what would have come if a thought had not been broken off?

A trace is steps between blank lines; a thought begins at a step that opens with a change of mind. At each such place,
from the left, everything before it stays and one continuation is sampled whose first step opens with no change of mind.
If the value of the new trace is higher, it takes the place of the old one.

V = gamma ** (N - i) * R: i the place of the cut, N the steps of the whole trace, R whether its answer is right.

Source: Retro-Search (arXiv 2504.04383), gamma 0.9. A server that takes no bias on words is asked again where the first
step opens with a change of mind. Beside it, at equal cost: the shortest right one of 1 + k samples.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minipuzzle.data.endpoint.questions import Ask, Question
from minipuzzle.data.rows import Rejected, Row, tokens_of, unusable
from minipuzzle.data.runner import Attempt
from minipuzzle.data.writing.verifiers import verifier_of

GAMMA = 0.9
TURNS_OF_MIND = (
    "alternatively",
    "but wait",
    "wait",
    "hmm",
    "another approach",
    "let me double-check",
    "on second thought",
)
FIRST_STEP_TRIES = 4
STEP = "\n\n"


def steps_of(trace: str) -> list[str]:
    """The steps of a trace, which blank lines divide."""
    return [step.strip() for step in re.split(r"\n\s*\n", trace.strip()) if step.strip()]


def changes_mind(step: str, words: Sequence[str] = TURNS_OF_MIND) -> bool:
    """Whether a step opens a new thought."""
    return step.lstrip(" *-").lower().startswith(tuple(words))


def boundaries_of(steps: Sequence[str]) -> list[int]:
    """Where thoughts begin, apart from the first."""
    return [place for place, step in enumerate(steps) if place and changes_mind(step)]


def value(num_steps: int, place: int, reward: float, gamma: float = GAMMA) -> float:
    """V of a trace of ``num_steps`` steps, seen from step ``place``."""
    return gamma ** (num_steps - place) * reward


@dataclass(frozen=True, kw_only=True)
class Revising:
    """Revises traces with the answer they should lead to; ``verifier``: by name, see ``verifiers``."""

    verifier: str
    model: str = ""
    max_tokens: int = 1024
    temperature: float = 1.0
    gamma: float = GAMMA
    has_baseline: bool = False
    name: str = "revise"

    def attempts(self, row: Row) -> Sequence[Attempt] | Rejected:
        """The trace, if it is one and leads to the right answer."""
        missing = [name for name in ("question", "answer", "trace") if not row.tags.get(name)]
        if missing:
            return Rejected(id=row.id, reason=f"no {missing[0]}")
        if not verifier_of(self.verifier)(row.tags["trace"], row.tags):
            return Rejected(id=row.id, reason="its answer is wrong")
        return [Attempt(row=row, text=row.tags["trace"])]

    def questions(self, attempt: Attempt) -> Sequence[Question]:
        """The first step after the first boundary; how many more follow depends on what comes."""
        steps = steps_of(attempt.text)
        return [self._question(attempt, steps[:place], seed=0) for place in boundaries_of(steps)]

    def _question(self, attempt: Attempt, before: Sequence[str], *, seed: int, is_step: bool = True) -> Question:
        prompt = attempt.row.tags["question"].rstrip() + STEP + "".join(step + STEP for step in before)
        stop = (STEP,) if is_step else ()
        return Question(prompt=prompt, max_tokens=self.max_tokens, temperature=self.temperature, stop=stop, seed=seed)

    def results(self, attempts: Sequence[Attempt], ask: Ask) -> Sequence[Row | Rejected]:
        """Each trace, revised as far as it gets better."""
        return [self._result(attempt, ask) for attempt in attempts]

    def _result(self, attempt: Attempt, ask: Ask) -> Row | Rejected:
        reward, steps = verifier_of(self.verifier), steps_of(attempt.text)
        place, rollouts, spent = 1, 0, 0
        while (at := next((found for found in boundaries_of(steps) if found >= place), None)) is not None:
            tail, tokens = self._continuation(attempt, steps[:at], ask, rollouts)
            rollouts, spent = rollouts + 1, spent + tokens
            new = [*steps[:at], *tail]
            right = reward(STEP.join(new), attempt.row.tags) if tail else 0.0
            if value(len(new), at, right, self.gamma) > value(len(steps), at, 1.0, self.gamma):
                steps = new
            place = at + 1
        best = STEP.join(steps)
        tags, labels = dict(attempt.row.tags), dict(attempt.row.labels)
        labels |= {"tokens_before": float(tokens_of(attempt.text)), "tokens_after": float(tokens_of(best))}
        labels |= {"rollouts": float(rollouts), "tokens_spent": float(spent)}
        if self.has_baseline:
            tags["shortest_of_samples"] = self._shortest(attempt, ask, samples=max(rollouts, 1))
        if reason := unusable(best):
            return Rejected(id=attempt.row.id, reason=reason, detail=best[:2000])
        made = {"step": self.name, "model": self.model, "verifier": self.verifier, "gamma": self.gamma}
        question = tags["question"].rstrip()
        return Row(
            text=question + STEP + best,
            source=attempt.row.source,
            parents=(attempt.row.id,),
            labels=labels,
            tags={**tags, "trace": best},
            made=made,
        )

    def _continuation(self, attempt: Attempt, before: Sequence[str], ask: Ask, rollout: int) -> tuple[list[str], int]:
        """One continuation in steps, and the tokens it took; none if every first step changes its mind."""
        spent = 0
        for retry in range(FIRST_STEP_TRIES):
            seed = rollout * FIRST_STEP_TRIES + retry
            first = ask([self._question(attempt, before, seed=seed)])[0]
            spent += first.completion_tokens
            step = first.text.strip()
            if first.problem or not step or changes_mind(step):
                continue
            rest = ask([self._question(attempt, [*before, step], seed=seed, is_step=False)])[0]
            spent += rest.completion_tokens
            return [] if rest.problem or rest.is_cut_off else [step, *steps_of(rest.text)], spent
        return [], spent

    def _shortest(self, attempt: Attempt, ask: Ask, *, samples: int) -> str:
        """The shortest right one of the trace and ``samples`` whole samples."""
        reward = verifier_of(self.verifier)
        answers = ask([self._question(attempt, (), seed=1000 + idx, is_step=False) for idx in range(samples)])
        usable = [answer.text.strip() for answer in answers if not answer.problem and not answer.is_cut_off]
        right = [text for text in usable if text and reward(text, attempt.row.tags)]
        return min([attempt.text, *right], key=tokens_of)


def summary(rows: Sequence[Row]) -> Mapping[str, Any]:
    """Mean tokens before and after, and of the baseline where there is one."""
    found: dict[str, Any] = {}
    for name in ("tokens_before", "tokens_after", "tokens_spent"):
        found[name] = sum(row.labels[name] for row in rows) / max(len(rows), 1)
    shortest = [tokens_of(row.tags["shortest_of_samples"]) for row in rows if "shortest_of_samples" in row.tags]
    return found | ({"tokens_of_shortest": sum(shortest) / len(shortest)} if shortest else {})
