"""Rewards of conversations, and pairs of a better and a worse answer.

Source: Nemotron-4 340B (arXiv 2406.11704, section 3.2): five attributes of 0 to 4; preferences by a rule where there is
a right answer, else by a judge that must say the same in both orders, or by the reward model. The weights of one reward
for all are those of NVIDIA's model card.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from minipuzzle.data.endpoint.client import REWARDS
from minipuzzle.data.endpoint.questions import Answer, Ask, Question
from minipuzzle.data.rows import Rejected, Row, unusable
from minipuzzle.data.runner import Attempt
from minipuzzle.data.writing.prompts import Prompts
from minipuzzle.data.writing.verifiers import verifier_of
from minipuzzle.errors import MinipuzzleError

WEIGHTS = dict(zip(REWARDS, (0.3, 0.74, 0.46, 0.47, -0.33), strict=True))
JUDGE, BOTH_ORDERS, BY_REWARD = "judge", "both-orders", "reward"
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+.\d]+)\s*")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a label must fulfil, such as ``helpfulness>=3``."""

    label: str
    comparison: str
    bound: float

    def holds(self, labels: Mapping[str, float]) -> bool:
        """Whether it does; a label that is missing does not."""
        return self.label in labels and _COMPARISONS[self.comparison](labels[self.label], self.bound)


def parse_condition(text: str) -> Condition:
    """A condition as it is typed.

    Raises: MinipuzzleError for anything else.
    """
    found = _CONDITION.fullmatch(text)
    if found is None:
        raise MinipuzzleError(f"‹keep› {text!r} is no condition", "give 'helpfulness>=3', for instance")
    return Condition(label=found[1], comparison=found[2], bound=float(found[3]))


def total_reward(scores: Mapping[str, float]) -> float:
    """One number of the five."""
    return sum(weight * scores[name] for name, weight in WEIGHTS.items())


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Labels conversations with the scores of a reward model, and keeps those that fulfil all conditions."""

    keep: tuple[Condition, ...] = ()
    model: str = ""
    name: str = "reward"

    def attempts(self, row: Row) -> Sequence[Attempt] | Rejected:
        """The conversation, if an assistant has the last word."""
        if not row.messages or row.messages[-1]["role"] != "assistant":
            return Rejected(id=row.id, reason="no answer at its end")
        return [Attempt(row=row, text=row.content)]

    def questions(self, attempt: Attempt) -> Sequence[Question]:
        """The conversation, for its scores."""
        return (Question(messages=attempt.row.messages, max_tokens=1, logprobs=True),)

    def results(self, attempts: Sequence[Attempt], ask: Ask) -> Sequence[Row | Rejected]:
        """Conversations with scores, or rejections with the condition that failed."""
        answers = ask([question for attempt in attempts for question in self.questions(attempt)])
        return [self._result(attempt.row, answer) for attempt, answer in zip(attempts, answers, strict=True)]

    def _result(self, row: Row, answer: Answer) -> Row | Rejected:
        if answer.problem or answer.scores.keys() != set(REWARDS):
            return Rejected(id=row.id, reason=answer.problem or "no scores", detail=answer.text[:2000])
        labels = {**row.labels, **answer.scores, "reward": total_reward(answer.scores)}
        failed = next((item for item in self.keep if not item.holds(labels)), None)
        if failed is not None:
            value = labels.get(failed.label, float("nan"))
            return Rejected(
                id=row.id, reason=f"not {failed.label}{failed.comparison}{failed.bound:g}", detail=f"{value:g}"
            )
        return replace(row, labels=labels)


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Pairs of answers to a prompt by ``responders``; ``by``: "reward", "both-orders", or a verifier's name.

    A pair is kept where the way of judging tells its answers apart: one is right and one wrong, the judge names the
    same one in both orders, or the rewards differ.
    """

    prompts: Prompts
    responders: tuple[str, ...]
    by: str
    samples: int = 1
    max_tokens: int = 1024
    model: str = ""
    name: str = "preferences"

    def __post_init__(self) -> None:
        if self.samples * len(self.responders) < 2:
            raise MinipuzzleError("a preference needs two answers", "give ‹samples› 2, or another responder")

    def attempts(self, row: Row) -> Sequence[Attempt] | Rejected:
        """The prompt."""
        messages = row.messages or ({"role": "user", "content": row.text},)
        if messages[-1]["role"] != "user":
            return Rejected(id=row.id, reason="no message of a user at its end")
        return [Attempt(row=replace(row, text="", messages=messages), text=messages[-1]["content"])]

    def questions(self, attempt: Attempt) -> Sequence[Question]:
        """The prompt to every responder, sample by sample."""
        warmth = 0.0 if self.samples == 1 else 1.0
        return [
            Question(messages=attempt.row.messages, max_tokens=self.max_tokens, temperature=warmth, seed=seed, to=name)
            for name in self.responders
            for seed in range(self.samples)
        ]

    def results(self, attempts: Sequence[Attempt], ask: Ask) -> Sequence[Row | Rejected]:
        """A pair or a rejection for each prompt."""
        questions = [self.questions(attempt) for attempt in attempts]
        answers = iter(ask([question for several in questions for question in several]))
        found = []
        for attempt, several in zip(attempts, questions, strict=True):
            given = [next(answers) for _ in several]
            usable = [answer.text.strip() for answer in given if not (answer.problem or unusable(answer.text))]
            found.append(self._pair(attempt.row, list(dict.fromkeys(usable)), ask))
        return found

    def _pair(self, row: Row, texts: list[str], ask: Ask) -> Row | Rejected:
        if len(texts) < 2:
            return Rejected(id=row.id, reason="fewer than two different answers")
        if self.by == BOTH_ORDERS:
            best, worst = self._judged(row, texts[0], texts[1], ask)
            scores = {best: 1.0, worst: 0.0} if best else {}
        elif self.by == BY_REWARD:
            scores = self._rewarded(row, texts, ask)
        else:
            scores = {text: verifier_of(self.by)(text, row.tags) for text in texts}
        if len(scores) < 2 or max(scores.values()) == min(scores.values()):
            return Rejected(id=row.id, reason="the answers are not told apart")
        chosen, rejected = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
        return Row(
            messages=(*row.messages, {"role": "assistant", "content": chosen}),
            source=row.source,
            parents=(row.id,),
            labels={"margin": scores[chosen] - scores[rejected]},
            tags={**row.tags, "chosen": chosen, "rejected": rejected},
            made={"step": self.name, "by": self.by, "responders": self.responders, "prompt_hash": self.prompts.hash},
        )

    def _judged(self, row: Row, first: str, second: str, ask: Ask) -> tuple[str, str]:
        """The better and the worse by a judge who says the same in both orders; nothing where it does not."""
        request = row.messages[-1]["content"]
        texts = [f"Request: {request}\n\nA: {one}\n\nB: {other}" for one, other in ((first, second), (second, first))]
        settings = {"max_tokens": 4, "temperature": 0.0, "to": JUDGE}
        answers = ask([self.prompts.question("compare", settings, text=text) for text in texts])
        said = [answer.text.strip()[:1].upper() for answer in answers]
        return {("A", "B"): (first, second), ("B", "A"): (second, first)}.get((said[0], said[1]), ("", ""))

    def _rewarded(self, row: Row, texts: Sequence[str], ask: Ask) -> dict[str, float]:
        talks = [(*row.messages, {"role": "assistant", "content": text}) for text in texts]
        answers = ask([Question(messages=talk, max_tokens=1, logprobs=True, to=JUDGE) for talk in talks])
        pairs = zip(texts, answers, strict=True)
        return {text: total_reward(answer.scores) for text, answer in pairs if answer.scores.keys() == set(REWARDS)}
