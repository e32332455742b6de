"""What a model is asked and what it answers, whoever runs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from minipuzzle.data.rows import Message


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation to answer (``messages``), or a text to continue (``prompt``).

    ``seed`` tells samples of one question apart, also where a server takes none. ``to``: which of several models.
    """

    messages: tuple[Message, ...] = ()
    prompt: str = ""
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: bool = False
    to: str = ""

    def __post_init__(self) -> None:
        assert bool(self.messages) != bool(self.prompt), "either a conversation or a text to continue"

    @property
    def path(self) -> str:
        """Where an OpenAI-compatible server takes it."""
        return "chat/completions" if self.messages else "completions"

    def payload(self, model: str) -> dict[str, Any]:
        """The body of the request."""
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }
        if self.messages:
            body["messages"] = [dict(message) for message in self.messages]
        else:
            body["prompt"] = self.prompt
        return body | ({"stop": list(self.stop)} if self.stop else {}) | ({"logprobs": True} if self.logprobs else {})

    def key(self, model: str) -> str:
        """The same for the same question to the same model, and for no other."""
        return hashlib.sha256(json.dumps([model, asdict(self)], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back. ``scores``: of a reward model, by attribute. ``problem``: why there is nothing usable."""

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def is_cut_off(self) -> bool:
        """Whether the model had more to say than it was allowed to."""
        return self.finish_reason == "length"


class Model(Protocol):
    """Who answers: a server, or a folder."""

    @property
    def name(self) -> str:
        """What provenance calls it."""

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Positions of questions and their answers, each as soon as it is there."""


@dataclass(frozen=True, kw_only=True)
class Several:
    """Models by name; a question goes to the one it names."""

    models: Mapping[str, Model]

    @property
    def name(self) -> str:
        """All of them."""
        return "+".join(self.models)

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Positions of questions and their answers, model by model."""
        for name, model in self.models.items():
            theirs = [idx for idx, question in enumerate(questions) if question.to == name]
            for idx, answer in model.answers([questions[idx] for idx in theirs]):
                yield theirs[idx], answer


Ask = Callable[[Sequence[Question]], list[Answer]]


def chat(system: str, user: str, **settings: Any) -> Question:
    """A question of one turn, with a system prompt unless that is empty."""
    turns = ((("system", system),) if system else ()) + (("user", user),)
    return Question(messages=tuple({"role": role, "content": content} for role, content in turns), **settings)
