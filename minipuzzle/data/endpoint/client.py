"""A client of OpenAI-compatible servers (vLLM, SGLang, llama.cpp, transformers serve).

Several addresses share the work. What passes (429, 5xx, cut connections, answers that are no JSON) is tried again with
growing pauses, or after as long as the server says; what stays wrong ends the run, whose answers so far are kept. Only
a question that the server itself refuses (too long, say) is answered by a problem, which rejects one row.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from minipuzzle.data.endpoint.questions import Answer, Question, chat
from minipuzzle.errors import MinipuzzleError

KEY_VARIABLE = "MINIPUZZLE_API_KEY"
MAX_ANSWER_BYTES = 8 * 2**20
REFUSED = (400, 413, 422)  # the question is at fault
WRONG_CALL = (401, 403, 404, 405)  # the address, the name of the model, or the key
REWARDS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
KEPT = "answers so far are kept, and the same command continues"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One model behind one address or several, such as ``http://127.0.0.1:8000/v1``.

    ``tries``: of a request; ``pause_seconds``: after the first, doubled each time.
    """

    urls: tuple[str, ...]
    model: str
    concurrency: int = 8
    tries: int = 6
    pause_seconds: float = 0.5
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if not self.urls or not all(url.startswith(("http://", "https://")) for url in self.urls):
            hint = "give ‹endpoint› http://127.0.0.1:8000/v1, for instance"
            raise MinipuzzleError(f"{', '.join(self.urls) or 'nothing'} is no address of a server", hint)

    @property
    def name(self) -> str:
        """The model's: the same model at another address gives the same answers."""
        return self.model

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Positions of questions and their answers as they come, ``concurrency`` at a time.

        Raises: MinipuzzleError if the server cannot be reached or does not know the model.
        """
        with _client(self.timeout_seconds) as client, ThreadPoolExecutor(self.concurrency) as pool:
            left = iter(enumerate(questions))
            asked: dict[Future[Answer], int] = {}
            try:
                # A question is asked when an answer was taken, so that no more than these are lost when we are killed.
                while True:
                    for idx, question in islice(left, self.concurrency - len(asked)):
                        asked[pool.submit(self._answer, client, idx, question)] = idx
                    if not asked:
                        return
                    for done in wait(asked, return_when=FIRST_COMPLETED).done:
                        yield asked.pop(done), done.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, client: Any, idx: int, question: Question) -> Answer:
        import httpx2

        problem, malformed = "", None
        for attempt in range(self.tries):
            url = self.urls[(idx + attempt) % len(self.urls)].rstrip("/")
            pause = self.pause_seconds * 2**attempt * (1 + random.Random(idx).random())
            try:
                status, headers, body = _post(client, f"{url}/{question.path}", question.payload(self.model))
            except (httpx2.HTTPError, OSError) as error:
                problem = f"{url} does not answer: {type(error).__name__} {error}"
            else:
                if status == 200:
                    malformed = _parsed(body)
                    if not malformed.problem:
                        return malformed
                    problem = ""
                elif status in REFUSED:
                    return Answer(problem=f"refused by the server ({status})")
                elif status in WRONG_CALL:
                    raise self._wrong_call(client, url, status)
                else:
                    problem = f"{url} answers {status}"
                    pause = _seconds(headers.get("retry-after"), pause)
            if attempt + 1 < self.tries:
                time.sleep(pause)
        if malformed is not None and not problem:
            return malformed
        raise MinipuzzleError(f"{problem}, after {self.tries} tries", f"see to the server; {KEPT}")

    def _wrong_call(self, client: Any, url: str, status: int) -> MinipuzzleError:
        known = self.models(client, url)
        if status in (401, 403):
            return MinipuzzleError(f"{url} wants a key ({status})", f"put it into {KEY_VARIABLE}")
        if known and self.model not in known:
            return MinipuzzleError(f"{url} has no model {self.model!r}", f"‹model› can be {', '.join(known)}")
        return MinipuzzleError(f"{url} answers {status}", "check ‹endpoint›: it ends in /v1, usually")

    def models(self, client: Any, url: str) -> list[str]:
        """The names of the models that a server says it has; none if it says nothing."""
        try:
            listed = client.get(f"{url}/models").json()["data"]
            return [str(item["id"]) for item in listed]
        except Exception:  # any answer that is no list of models: there is nothing to propose then
            return []

    def probe(self) -> dict[str, bool]:
        """What the server can do, found by a few questions of some tokens each.

        Raises: MinipuzzleError if it cannot be reached or does not know the model.
        """
        hello = chat("", "Write one short sentence.", max_tokens=8, temperature=1.0, seed=1)
        plain = replace(hello, temperature=0.0)
        found = {"chat": plain, "completions": Question(prompt="One two three", max_tokens=2)}
        given = {name: not dict(self.answers([question]))[0].problem for name, question in found.items()}
        same = {answer.text for _, answer in self.answers([hello, hello])}
        given["seed"] = len(same) == 1
        with _client(self.timeout_seconds) as client:
            url = f"{self.urls[0].rstrip('/')}/{plain.path}"
            biased = _post(client, url, plain.payload(self.model) | {"logit_bias": {"0": -100}})
            several = _post(client, url, hello.payload(self.model) | {"n": 2})
            scored = _post(client, url, plain.payload(self.model) | {"logprobs": True})
        choices = _choices(several[2])
        given |= {"logit_bias": biased[0] == 200, "n": several[0] == 200 and len(choices) == 2}
        return given | {"logprobs": any(choice.get("logprobs") for choice in _choices(scored[2]))}


def _client(timeout_seconds: float) -> Any:
    import httpx2

    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx2.Client(headers=headers, timeout=timeout_seconds, trust_env=True)


def _post(client: Any, url: str, body: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body of an answer; a body beyond ``MAX_ANSWER_BYTES`` is not read on."""
    received = bytearray()
    with client.stream("POST", url, json=body) as response:
        for block in response.iter_bytes():
            received += block
            if len(received) > MAX_ANSWER_BYTES:
                return 200, response.headers, b""
        return response.status_code, response.headers, bytes(received)


def _choices(body: bytes) -> list[dict[str, Any]]:
    try:
        choices = json.loads(body)["choices"]
        return [choice for choice in choices if isinstance(choice, dict)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _parsed(body: bytes) -> Answer:
    """The answer in a body; one with a problem if there is none in it.

    Reward models answer with their scores as log-probabilities of tokens named after the attributes.
    """
    if not body:
        return Answer(problem=f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
    choices = _choices(body)
    if not choices:
        return Answer(problem="malformed answer")
    choice = choices[0]
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    usage = json.loads(body).get("usage") or {}
    listed = (choice.get("logprobs") or {}).get("content") or [] if isinstance(choice.get("logprobs"), dict) else []
    try:
        scores = {item["token"]: float(item["logprob"]) for item in listed if item["token"] in REWARDS}
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (TypeError, ValueError, KeyError, AttributeError):
        return Answer(problem="malformed answer")
    if not isinstance(text, str) and not scores:
        return Answer(problem="malformed answer")
    return Answer(
        text=text if isinstance(text, str) else "",
        finish_reason=str(choice.get("finish_reason") or ""),
        prompt_tokens=counts[0],
        completion_tokens=counts[1],
        scores=scores,
    )


def _seconds(text: str | None, otherwise: float) -> float:
    """The pause that a Retry-After asks for, at most a minute."""
    try:
        return min(60.0, max(0.0, float(text or "")))
    except ValueError:
        return otherwise
