"""A model in a folder that answers like a server does: with transformers, one question after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipuzzle.data.endpoint.questions import Answer, Question
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.reader import load_any_model
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A loaded model with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    concurrency: int = 1

    @classmethod
    def open(cls, folder: Path, compute: Compute = Compute()) -> LocalModel:
        """Load it; any export of ours will do.

        Raises: MinipuzzleError if the folder is damaged.
        """
        checkpoint = Checkpoint.open(folder)
        loaded = load_any_model(checkpoint, compute)
        return cls(name=checkpoint.fingerprint, model=loaded, tokenizer=load_tokenizer(folder))

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Positions of questions and their answers, in order.

        Raises: MinipuzzleError for a conversation where the tokenizer has no chat template.
        """
        for idx, question in enumerate(questions):
            yield idx, self._answer(question)

    @torch.inference_mode()
    def _answer(self, question: Question) -> Answer:
        torch.manual_seed(question.seed)
        ids = torch.tensor([self._prompt_ids(question)], device=self.model.device)
        warm = question.temperature > 0
        sampling = {"do_sample": True, "temperature": question.temperature, "top_p": question.top_p, "top_k": 0}
        stops = {"stop_strings": list(question.stop), "tokenizer": self.tokenizer} if question.stop else {}
        made = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=question.max_tokens,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
            **(sampling if warm else {"do_sample": False}),
            **stops,
        )[0, ids.shape[1] :]
        text = self.tokenizer.decode(made, skip_special_tokens=True)
        ends = [found for stop in question.stop if (found := text.find(stop)) >= 0]
        is_done = bool(ends) or len(made) < question.max_tokens or int(made[-1]) == self.tokenizer.eos_token_id
        return Answer(
            text=text[: min(ends)] if ends else text,
            finish_reason="stop" if is_done else "length",
            prompt_tokens=ids.shape[1],
            completion_tokens=len(made),
        )

    def _prompt_ids(self, question: Question) -> list[int]:
        if question.prompt:
            return list(self.tokenizer(question.prompt)["input_ids"])
        if getattr(self.tokenizer, "chat_template", None) is None:
            hint = "use a model that was trained on conversations, or a server"
            raise MinipuzzleError(f"the tokenizer of {self.name} has no chat template", hint)
        messages = [dict(message) for message in question.messages]
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        return list(ids)
