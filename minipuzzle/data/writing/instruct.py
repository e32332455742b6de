"""Conversations from nothing but topics: topics, then first messages of users, then dialogues.

Lists are asked for in words, written again as a list by a second question, and every item is looked up in the first
answer: what is not there was invented and is refused.

Source: the pipeline of Nemotron-4 340B (arXiv 2406.11704, section 3.2): topics x subtopics x first messages; the user's
further turns are simulated in three ways, the assistant decodes greedily.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minipuzzle.data.endpoint.questions import Answer, Ask, Question
from minipuzzle.data.rows import Message, Rejected, Row, unusable
from minipuzzle.data.runner import Attempt
from minipuzzle.data.writing.dialogues import made_of
from minipuzzle.data.writing.prompts import Prompts

KINDS = ("open", "writing", "closed", "maths", "code")
_TOPICS = {
    "open": "macro-topics",
    "writing": "macro-topics",
    "maths": "maths-macro-topics",
    "code": "code-macro-topics",
}
USERS = ("user-turn", "user-turn-complex", "user-turn-critical")
LISTING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 1024}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1024}
_ITEM = re.compile(r"^\s*-\s+(.+?)\s*$", re.MULTILINE)
_LETTERS = re.compile(r"\W+")


def items_of(listed: str, first_answer: str) -> tuple[list[str], int]:
    """The items of a YAML list that stand in the first answer too, and how many do not."""
    haystack = _LETTERS.sub(" ", first_answer.lower())
    items = list(dict.fromkeys(item.strip("'\"") for item in _ITEM.findall(listed)))
    found = [item for item in items if (plain := _LETTERS.sub(" ", item.lower()).strip()) and plain in haystack]
    return found, len(items) - len(found)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many topics, subtopics of each, and first messages for each of these."""

    topics: int = 20
    subtopics: int = 5
    openlines: int = 10


def ask_for_lists(
    prompts: Prompts, questions: Sequence[Question], number: int, ask: Ask
) -> tuple[list[list[str]], int]:
    """At most ``number`` items for each question, and how many were refused because they were invented."""
    first = ask(questions)
    second = ask([prompts.question("list", GREEDY, text=answer.text or "(nothing)") for answer in first])
    pairs = [items_of(listed.text, answer.text) for listed, answer in zip(second, first, strict=True)]
    return [items[:number] for items, _ in pairs], sum(invented for _, invented in pairs)


def first_messages(
    prompts: Prompts, kind: str, sizes: Sizes, ask: Ask, documents: Sequence[Row] = ()
) -> tuple[list[Row], int]:
    """Rows with one message of a user each, and how many items were refused.

    ``documents``: for the kind "closed", whose messages hold a document and an instruction for it.
    """
    if kind == "closed":
        questions = [
            prompts.question(kind, LISTING, text=row.content, number=str(sizes.openlines)) for row in documents
        ]
        lists, invented = ask_for_lists(prompts, questions, sizes.openlines, ask)
        pairs = [(row, item) for row, items in zip(documents, lists, strict=True) for item in items]
        rows = [_openline(f"{item}\n\n{row.content}", kind, parents=(row.id,), topic=row.source) for row, item in pairs]
        return rows, invented
    topic_list = prompts.question(_TOPICS[kind], LISTING, number=str(sizes.topics))
    (topics,), refused = ask_for_lists(prompts, [topic_list], sizes.topics, ask)
    questions = [prompts.question("subtopics", LISTING, topic=topic, number=str(sizes.subtopics)) for topic in topics]
    narrower, more = ask_for_lists(prompts, questions, sizes.subtopics, ask)
    every = list(dict.fromkeys((*topics, *(item for items in narrower for item in items))))
    questions = [prompts.question(kind, LISTING, topic=topic, number=str(sizes.openlines)) for topic in every]
    lists, last = ask_for_lists(prompts, questions, sizes.openlines, ask)
    rows = [_openline(item, kind, topic=topic) for topic, items in zip(every, lists, strict=True) for item in items]
    return rows, refused + more + last


def _openline(text: str, kind: str, *, topic: str, parents: tuple[str, ...] = ()) -> Row:
    message = {"role": "user", "content": text}
    return Row(messages=(message,), source="instruct", parents=parents, tags={"kind": kind, "topic": topic})


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Answers first messages, and goes on for ``turns`` messages of the user, whom the model plays too."""

    prompts: Prompts
    turns: int = 3
    model: str = ""
    sampling: dict[str, Any] = field(default_factory=lambda: dict(GREEDY))
    name: str = "instruct"

    def attempts(self, row: Row) -> Sequence[Attempt] | Rejected:
        """The first message, with each way to be a user in turn."""
        if not row.messages or row.messages[-1]["role"] != "user":
            return Rejected(id=row.id, reason="no message of a user at its end")
        return [Attempt(row=row, text=row.messages[-1]["content"], style=USERS[int(row.id, 16) % len(USERS)])]

    def questions(self, attempt: Attempt) -> Sequence[Question]:
        """All calls of a conversation, the later ones as long as the first."""
        return [Question(messages=attempt.row.messages, **self.sampling)] * (2 * self.turns - 1)

    def results(self, attempts: Sequence[Attempt], ask: Ask) -> Sequence[Row | Rejected]:
        """A conversation or a rejection for each first message; all go on together, turn by turn."""
        talks: list[list[Message]] = [list(attempt.row.messages) for attempt in attempts]
        last = [Answer() for _ in attempts]
        problems: dict[int, str] = {}
        for turn in range(2 * self.turns - 1):
            role = "assistant" if turn % 2 == 0 else "user"
            going = [idx for idx in range(len(attempts)) if idx not in problems]
            answers = ask([self._next(role, attempts[idx], talks[idx]) for idx in going])
            for idx, answer in zip(going, answers, strict=True):
                last[idx] = answer
                reason = answer.problem or ("cut off" if answer.is_cut_off else unusable(answer.text))
                if reason:
                    problems[idx] = f"{reason} ({role})"
                talks[idx].append({"role": role, "content": answer.text.strip()})
        return [self._result(attempts[idx], talks[idx], last[idx], problems.get(idx, "")) for idx in range(len(talks))]

    def _next(self, role: str, attempt: Attempt, talk: Sequence[Message]) -> Question:
        if role == "assistant":
            return Question(messages=tuple(talk), **self.sampling)
        history = "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in talk)
        return self.prompts.question(attempt.style, self.sampling, text=history)

    def _result(self, attempt: Attempt, talk: Sequence[Message], answer: Answer, problem: str) -> Row | Rejected:
        if problem:
            detail = talk[-1]["content"][:2000]
            return Rejected(id=attempt.row.id, reason=problem, attempt=attempt.style, detail=detail)
        return Row(
            messages=tuple(talk),
            source=attempt.row.source,
            parents=(attempt.row.id,),
            tags=attempt.row.tags,
            made=made_of(self, attempt, answer),
        )
