"""Text rewritten: questions and answers, a shorter text, knowledge, a list of facts, an encyclopedia's style.

Source: Nemotron-CC (arXiv 2412.02595), section 3.3 and appendix: tasks, sizes, T 0.5, top-p 0.9, and what is done to
the answers: those cut off are dropped, marks of layout and the asked-for first line are taken away, pieces of a
document are joined again, and what has fewer than 50 tokens is dropped.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minipuzzle.data.endpoint.questions import Answer, Ask, Question
from minipuzzle.data.rows import Rejected, Row, tokens_of, unusable
from minipuzzle.data.runner import Attempt
from minipuzzle.data.writing.dialogues import MIN_TOKENS, made_of, passages_of
from minipuzzle.data.writing.prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sizes in tokens, and the line that an answer must begin with."""

    min_document: int
    min_piece: int
    max_input: int
    max_output: int
    first_line: str


TASKS: Mapping[str, Task] = {
    "diverse-qa": Task(
        min_document=30, min_piece=30, max_input=1000, max_output=600, first_line="Questions and answers:"
    ),
    "distill": Task(min_document=30, min_piece=10, max_input=2000, max_output=1600, first_line="Shorter text:"),
    "extract": Task(min_document=30, min_piece=30, max_input=1400, max_output=1400, first_line="Knowledge:"),
    "list": Task(min_document=30, min_piece=30, max_input=1000, max_output=600, first_line="Facts:"),
    "wiki": Task(min_document=5, min_piece=5, max_input=512, max_output=512, first_line="Article:"),
}
SAMPLING = {"temperature": 0.5, "top_p": 0.9}
_PAIR = re.compile(r"Question:.*?Answer:.*?(?=\nQuestion:|\Z)", re.DOTALL)


def cleaned(text: str, first_line: str) -> str | None:
    """An answer without layout marks, its first line and quotation marks around it; None if the first line lacks."""
    plain = re.sub(r"\*\*|__|^#+ *", "", text.strip(), flags=re.MULTILINE)
    if not plain.lower().startswith(first_line.lower()):
        return None
    return plain[len(first_line) :].strip().strip('"').strip()


def some_pairs(text: str, piece: str, seed: str) -> str:
    """Question pairs in random order, at most 10 for every 150 tokens of their piece, behind it."""
    pairs = _PAIR.findall(text)
    chance = random.Random(seed)
    chance.shuffle(pairs)
    kept = pairs[: chance.randint(1, max(1, int(10 * tokens_of(piece) / 150)))]
    return "\n".join([piece.strip(), "", *(pair.strip() for pair in kept)]) if pairs else ""


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """Asks for each document in each task, piece by piece, and joins the pieces."""

    prompts: Prompts
    tasks: tuple[str, ...] = tuple(TASKS)
    model: str = ""
    sampling: dict[str, Any] = field(default_factory=lambda: dict(SAMPLING))
    name: str = "rewrite"

    def attempts(self, row: Row) -> Sequence[Attempt] | Rejected:
        """The document in each task that takes one of its size."""
        fitting = [name for name in self.tasks if row.num_tokens >= TASKS[name].min_document]
        if not fitting:
            return Rejected(id=row.id, reason="document too short")
        return [Attempt(row=row, text=row.content, style=name) for name in fitting]

    def questions(self, attempt: Attempt) -> Sequence[Question]:
        """One for each piece that is long enough."""
        settings = {**self.sampling, "max_tokens": TASKS[attempt.style].max_output}
        return [self.prompts.question(attempt.style, settings, text=piece) for piece in self._pieces(attempt)]

    def _pieces(self, attempt: Attempt) -> list[str]:
        task = TASKS[attempt.style]
        pieces = passages_of(attempt.text, task.max_input)
        return [piece for piece in pieces if tokens_of(piece) >= task.min_piece] or pieces[:1]

    def results(self, attempts: Sequence[Attempt], ask: Ask) -> Sequence[Row | Rejected]:
        """A rewritten document or a rejection for each attempt."""
        questions = [self.questions(attempt) for attempt in attempts]
        answers = iter(ask([question for several in questions for question in several]))
        return [
            self._result(attempt, [next(answers) for _ in several])
            for attempt, several in zip(attempts, questions, strict=True)
        ]

    def _result(self, attempt: Attempt, answers: Sequence[Answer]) -> Row | Rejected:
        texts: list[str] = []
        reasons: list[str] = []
        for piece, answer in zip(self._pieces(attempt), answers, strict=True):
            text = (
                None if answer.problem or answer.is_cut_off else cleaned(answer.text, TASKS[attempt.style].first_line)
            )
            if text and attempt.style == "diverse-qa":
                text = some_pairs(text, piece, attempt.row.id)
            if text and not unusable(text):
                texts.append(text)
            else:
                reasons.append(answer.problem or ("cut off" if answer.is_cut_off else "not in the form asked for"))
        joined = "\n\n".join(texts)
        if not texts or tokens_of(joined) < MIN_TOKENS:
            reason = reasons[0] if not texts else "too short"
            detail = "\n".join(answer.text for answer in answers)[:2000]
            return Rejected(id=attempt.row.id, reason=reason, attempt=attempt.style, detail=detail)
        return Row(
            text=joined,
            source=attempt.row.source,
            parents=(attempt.row.id,),
            labels={"pieces_lost": float(len(reasons))},
            tags=attempt.row.tags,
            made=made_of(self, attempt, answers[0]),
        )
