"""Dialogues from raw text, in seven styles.

Source: MIND (arXiv 2410.12881): passages of 500 tokens, T 1.0 and top-p 0.9, up to 4,096 tokens, dialogues below 50
tokens dropped; the longest of a passage's dialogues, or all of them, teach more than any single style.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minipuzzle.data.endpoint.questions import Answer, Ask, Question
from minipuzzle.data.rows import BYTES_PER_TOKEN, Rejected, Row, tokens_of, unusable
from minipuzzle.data.runner import Attempt
from minipuzzle.data.writing.prompts import Prompts

STYLES = (
    "two-professors", "teacher-student", "two-students", "interview", "problem-solving", "layman-expert", "debate",
)  # fmt: skip
COMBINATIONS = ("replace", "concat", "longest", "all")
MIN_TOKENS = 50
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 4096}
_TURN = re.compile(r"^\W*[A-Z][\w .'’-]{0,40}\W{0,3}:\W", re.MULTILINE)
_WORDS = re.compile(r"\w+")


def passages_of(text: str, max_tokens: int) -> list[str]:
    """A text in passages of at most about ``max_tokens``, cut at lines where there are any, else between words."""
    limit = max_tokens * BYTES_PER_TOKEN
    passages, current = [], ""
    for line in text.splitlines(keepends=True):
        pieces = [line] if len(line) <= limit else re.findall(rf".{{1,{limit}}}(?:\s+|$)|\S{{{limit}}}", line, re.S)
        for piece in pieces:
            if current and len(current) + len(piece) > limit:
                passages.append(current)
                current = ""
            current += piece
    return [*passages, *([current] if current.strip() else [])]


def coverage(dialogue: str, passage: str) -> float:
    """The share of the passage's words (of four letters or more) that the dialogue takes up."""
    words = {word for word in _WORDS.findall(passage.lower()) if len(word) > 3}
    return len(words & {*_WORDS.findall(dialogue.lower())}) / max(len(words), 1)


def refused(answer: Answer, min_tokens: int) -> str:
    """Why an answer is no text to train on; "" if it is one."""
    reason = answer.problem or ("cut off" if answer.is_cut_off else unusable(answer.text))
    return reason or ("too short" if tokens_of(answer.text) < min_tokens else "")


@dataclass(frozen=True, kw_only=True)
class Dialogues:
    """Asks for a dialogue of each passage in each style, and combines what comes.

    ``combine``: "replace" takes every dialogue; "concat" puts each behind its passage; "longest" takes one dialogue a
    passage; "all" joins a passage's dialogues into one row.
    """

    prompts: Prompts
    styles: tuple[str, ...] = STYLES
    passage_tokens: int = 500
    combine: str = "longest"
    min_coverage: float = 0.0
    model: str = ""
    sampling: dict[str, Any] = field(default_factory=lambda: dict(SAMPLING))
    name: str = "dialogues"

    def attempts(self, row: Row) -> Sequence[Attempt] | Rejected:
        """Each passage in each style."""
        passages = passages_of(row.content, self.passage_tokens)
        return [
            Attempt(row=row, text=text, style=style, number=number)
            for number, text in enumerate(passages)
            for style in self.styles
        ]

    def questions(self, attempt: Attempt) -> Sequence[Question]:
        """The request for the dialogue."""
        return (self.prompts.question(attempt.style, self.sampling, text=attempt.text),)

    def results(self, attempts: Sequence[Attempt], ask: Ask) -> Sequence[Row | Rejected]:
        """A dialogue or a rejection for each attempt."""
        answers = ask([question for attempt in attempts for question in self.questions(attempt)])
        found = [self._result(attempt, answer) for attempt, answer in zip(attempts, answers, strict=True)]
        return found if self.combine in ("replace", "concat") else self._one_of_each(attempts, found)

    def _result(self, attempt: Attempt, answer: Answer) -> Row | Rejected:
        share = coverage(answer.text, attempt.text)
        reason = refused(answer, MIN_TOKENS)
        if not reason and len(_TURN.findall(answer.text)) < 2:
            reason = "no dialogue"
        if not reason and share < self.min_coverage:
            reason = "leaves the passage out"
        if reason:
            return Rejected(id=attempt.row.id, reason=reason, attempt=attempt.style, detail=answer.text[:2000])
        text = answer.text.strip()
        return Row(
            text=f"{attempt.text.strip()}\n\n{text}" if self.combine == "concat" else text,
            source=attempt.row.source,
            parents=(attempt.row.id,),
            labels={"coverage": share},
            tags=attempt.row.tags,
            made=made_of(self, attempt, answer),
        )

    def _one_of_each(self, attempts: Sequence[Attempt], found: Sequence[Row | Rejected]) -> list[Row | Rejected]:
        """Of each passage's dialogues the longest, or one row of them all; the others are accounted for."""
        groups: dict[tuple[str, int], list[int]] = {}
        for idx, (attempt, result) in enumerate(zip(attempts, found, strict=True)):
            if isinstance(result, Row):
                groups.setdefault((attempt.row.id, attempt.number), []).append(idx)
        results = list(found)
        for members in groups.values():
            rows = {idx: row for idx in members if isinstance(row := found[idx], Row)}
            best = max(rows, key=lambda idx: (rows[idx].num_tokens, -idx))
            for idx, row in rows.items():
                reason = "not the longest" if self.combine == "longest" else "joined to another row"
                results[idx] = Rejected(id=row.parents[0], reason=reason, attempt=attempts[idx].style)
            joined = "\n\n".join(row.text for row in rows.values())
            winner = rows[best]
            results[best] = winner if self.combine == "longest" else _with_text(winner, joined)
        return results


def _with_text(row: Row, text: str) -> Row:
    made = {**row.made, "style": "all"}
    return Row(text=text, source=row.source, parents=row.parents, labels=row.labels, tags=row.tags, made=made)


def made_of(step: Any, attempt: Attempt, answer: Answer) -> dict[str, Any]:
    """How a row came about, for its provenance."""
    return {
        "step": step.name,
        "style": attempt.style,
        "piece": attempt.number,
        "model": step.model,
        "prompt_hash": step.prompts.hash,
        "sampling": step.sampling,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }
