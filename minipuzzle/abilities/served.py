"""A model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, transformers serve), asked as ours are."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from minipuzzle.abilities.local import moved_spaces, until_stop
from minipuzzle.data.endpoint.client import KEY_VARIABLE
from minipuzzle.errors import MinipuzzleError

_TRIES, _PAUSE_SECONDS, _TIMEOUT_SECONDS = 5, 0.5, 600.0
_WHILE_BUSY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """``url``: such as http://127.0.0.1:8000/v1. ``model``: the name it is served under."""

    url: str
    model: str
    concurrency: int = 8

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """How the model goes on after each prompt, up to the first text of ``stop``.

        Raises: MinipuzzleError if the server cannot be reached or refuses.
        """
        body = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": list(stop) or None}
        choices = self._choices([{"prompt": prompt, **body} for prompt in prompts])
        return [until_stop(str(choice.get("text") or ""), stop) for choice in choices]

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """The answer to a conversation."""
        body = {"messages": list(messages), "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return str((self._choice("chat/completions", body).get("message") or {}).get("content") or "")

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """log p(continuation | prompt) of each pair, in nats: the server echoes the text with its log-probabilities.

        Raises: MinipuzzleError if it does not.
        """
        moved = [moved_spaces(prompt, continuation) for prompt, continuation in pairs]
        body = {"max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
        choices = self._choices([{"prompt": prompt + continuation, **body} for prompt, continuation in moved])
        return [self._sum(choice, len(text)) for choice, (_, text) in zip(choices, moved, strict=True)]

    def _sum(self, choice: Mapping[str, Any], num_characters: int) -> float:
        """Offsets are counted from the end of the text, since what stands before it differs between servers."""
        found = choice.get("logprobs") or {}
        offsets, values = found.get("text_offset"), found.get("token_logprobs")
        if not offsets or not values or len(offsets) != len(values) or len(values) < 2:
            raise MinipuzzleError(
                f"{self.url} gives no log-probabilities of a prompt, which choosing between options needs",
                "give tasks that models answer in writing (`minipuzzle abilities --help` lists them), or the folder",
            )
        *offsets, end = offsets
        start = end - num_characters
        return float(sum(value for offset, value in zip(offsets, values[:-1], strict=True) if offset >= start))

    def _choices(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda body: self._choice("completions", body), bodies))

    def _choice(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        found = request_json(f"{self.url.rstrip('/')}/{path}", {"model": self.model, **body})
        try:
            choice: dict[str, Any] = found["choices"][0]
            return choice
        except (KeyError, IndexError, TypeError):
            raise MinipuzzleError(f"{self.url} answers without choices", "it must speak OpenAI's protocol") from None


def request_json(url: str, body: Mapping[str, Any] | None = None) -> Any:
    """The JSON that a server answers; asked again while it is busy or restarts.

    Raises: MinipuzzleError if it cannot be reached, refuses, or answers something else.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps({name: v for name, v in body.items() if v is not None}).encode()
    problem = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_SECONDS * 2**attempt)
        try:
            request = urllib.request.Request(url, data=data, headers=headers)
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            problem = f"{url} answers {error.code}: {error.read(300).decode(errors='replace')}"
            if error.code not in _WHILE_BUSY:
                break
        except (OSError, ValueError) as error:
            problem = f"{url} does not answer: {error}"
    raise MinipuzzleError(problem, "check ‹endpoint›, which ends in /v1 usually, and that the server is up")


def served_models(url: str) -> list[str]:
    """The names under which a server serves models.

    Raises: as ``request_json``.
    """
    listed = request_json(f"{url.rstrip('/')}/models")
    data = listed.get("data") if isinstance(listed, dict) else None
    return [str(item["id"]) for item in data or [] if isinstance(item, dict) and "id" in item]
