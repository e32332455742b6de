"""A model of ours in memory, asked as an endpoint is: text that goes on, and how likely given text is.

Shape suffixes: B rows of a batch, T tokens of a row, C tokens of a continuation, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from minipuzzle.architecture.families import Family
from minipuzzle.data.windows import document_tokens
from minipuzzle.errors import MinipuzzleError
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import parts_of

BATCH_TOKENS = 4096  # of a batch with its padding
_STOP_TAIL_TOKENS = 16  # decoded after each step to look for what ends an answer

Pair = tuple[str, str]  # a prompt and how it may go on


class LocalModel:
    """A transformers model in evaluation mode, whatever its folder holds: plain weights or an emulated export."""

    def __init__(self, model: nn.Module, tokenizer: Any, family: Family, compute: Compute = Compute()) -> None:
        self._model, self.tokenizer, self._compute = model, tokenizer, compute
        self._parts = parts_of(model, family)

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[float]:
        """log p(continuation | prompt) of each pair, in nats, summed over the continuation's tokens.

        Raises: MinipuzzleError if one is not a finite number.
        """
        return [
            likelihood for likelihood, _ in self.score_tokens([encode_pair(self.tokenizer, *pair) for pair in pairs])
        ]

    @torch.inference_mode()
    def score_tokens(self, encoded: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of tokens and the number of those that are given, at least 1: log-likelihood of the others in nats, and
        whether each of them is the most likely one.

        Raises: MinipuzzleError if a log-likelihood is not a finite number.
        """
        found = [(0.0, False)] * len(encoded)
        for batch in _batches([len(tokens) for tokens, _ in encoded]):
            for row, value in zip(batch, self._score_batch([encoded[row] for row in batch]), strict=True):
                found[row] = value
        if not all(math.isfinite(likelihood) for likelihood, _ in found):
            raise MinipuzzleError(
                "the model gives text a probability that is no number", "check the weights, or try ‹dtype› float32"
            )
        return found

    def _score_batch(self, batch: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Padding stands behind the text, where causal layers do not see it."""
        device = self._compute.torch_device
        token_ids_BT = torch.zeros(len(batch), max(len(tokens) for tokens, _ in batch), dtype=torch.long)
        for row, (tokens, _) in enumerate(batch):
            token_ids_BT[row, : len(tokens)] = torch.tensor(tokens)
        hidden_BTH = self._parts.logits_input(token_ids_BT.to(device))
        found = []
        for row, (tokens, num_prompt) in enumerate(batch):
            logits_CV = self._parts.head(hidden_BTH[row, num_prompt - 1 : len(tokens) - 1]).float()
            next_C = torch.tensor(tokens[num_prompt:], device=device)
            likelihood_C1 = logits_CV.log_softmax(-1).gather(-1, next_C[:, None])
            found.append((float(likelihood_C1.cpu().double().sum()), bool((logits_CV.argmax(-1) == next_C).all())))
        return found

    @torch.inference_mode()
    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """How the model goes on after each prompt, up to the first text of ``stop`` (which is cut off).

        ``temperature`` 0: always the most likely token.
        """
        encoded = [document_tokens(self.tokenizer, prompt) for prompt in prompts]
        answers = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda row: len(encoded[row]))
        # Rows of one length need no padding, which Mamba layers would take for text.
        for length, group in groupby(order, key=lambda row: len(encoded[row])):
            rows = list(group)
            per_batch = max(1, BATCH_TOKENS // (length + max_tokens))
            for start in range(0, len(rows), per_batch):
                batch = rows[start : start + per_batch]
                if temperature:
                    torch.manual_seed(seed)
                texts = self._go_on([encoded[row] for row in batch], max_tokens, tuple(stop), temperature)
                answers = [texts[batch.index(row)] if row in batch else text for row, text in enumerate(answers)]
        return answers

    def _go_on(
        self, token_ids: list[list[int]], max_tokens: int, stop: tuple[str, ...], temperature: float
    ) -> list[str]:
        token_ids_BT = torch.tensor(token_ids, device=self._compute.torch_device)
        end = self.tokenizer.eos_token_id
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
        generate: Any = self._model.generate
        out_BT = generate(
            token_ids_BT,
            attention_mask=torch.ones_like(token_ids_BT),
            max_new_tokens=max_tokens,
            pad_token_id=end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            eos_token_id=end,
            stopping_criteria=[_Stops(self.tokenizer, stop)] if stop else None,
            **({"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | sampling),
        )
        texts = self.tokenizer.batch_decode(out_BT[:, token_ids_BT.shape[1] :], skip_special_tokens=True)
        return [until_stop(text, stop) for text in texts]

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """The answer to a conversation, spelled out by the tokenizer's chat template, or plainly where it has none."""
        if self.tokenizer.chat_template:
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return self.complete([prompt], max_tokens=max_tokens, temperature=temperature, seed=seed)[0]
        prompt = plain_conversation(messages)
        return self.complete([prompt], max_tokens=max_tokens, stop=("\nuser:",), temperature=temperature, seed=seed)[0]


class _Stops:
    """Ends rows whose answers hold a text that stops them."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._start: int | None = None

    def __call__(self, token_ids_BT: torch.Tensor, scores: Any, **_others: Any) -> torch.Tensor:
        if self._start is None:
            self._start = token_ids_BT.shape[1] - 1
        tails = token_ids_BT[:, max(self._start, token_ids_BT.shape[1] - _STOP_TAIL_TOKENS) :]
        texts = self._tokenizer.batch_decode(tails, skip_special_tokens=True)
        return torch.tensor([any(one in text for one in self._stop) for text in texts], device=token_ids_BT.device)


def until_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of some texts that end it."""
    return text[: min((place for one in stop if (place := text.find(one)) >= 0), default=len(text))]


def plain_conversation(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation for a model that knows no chat template."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


def moved_spaces(prompt: str, continuation: str) -> Pair:
    """The same text with the prompt's last spaces put before the continuation: tokens begin with spaces."""
    bare = prompt.rstrip(" ")
    return bare, prompt[len(bare) :] + continuation


def encode_pair(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], int]:
    """Tokens of both together, and how many of them are the prompt's.

    The whole is tokenised at once, as a model meets it and as lm-eval does it.

    Raises: MinipuzzleError where nothing is left to predict.
    """
    prompt, continuation = moved_spaces(prompt, continuation)
    num_prompt = len(document_tokens(tokenizer, prompt)) if prompt else 0
    tokens = document_tokens(tokenizer, prompt + continuation)
    if num_prompt == 0:  # the first token is what others are predicted from
        num_prompt = 1
    if len(tokens) <= num_prompt:
        raise MinipuzzleError(
            f"after {prompt[-40:]!r} the text {continuation[:40]!r} has no token of its own", "lengthen the option"
        )
    return tokens, num_prompt


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of about equal lengths, padded no more than they must be."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
