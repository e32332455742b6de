"""Guarantee: what passes is tried again, what stays wrong ends the run with a reason, and nothing is asked twice."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from minipuzzle.data.endpoint.client import MAX_ANSWER_BYTES, Endpoint
from minipuzzle.data.endpoint.journal import Journal, Journaled
from minipuzzle.data.endpoint.questions import Answer, Question, Several, chat
from minipuzzle.errors import MinipuzzleError
from tests.support.scripted_server import MODEL, Reply, asked, rewarded, said, scripted_server

HELLO = chat("", "hello")


def ask(url: str, *questions: Question, **settings: Any) -> list[Answer]:
    endpoint = Endpoint(urls=(url,), model=MODEL, pause_seconds=0.001, **settings)
    return [answer for _, answer in sorted(endpoint.answers(questions), key=lambda pair: pair[0])]


def test_answers_come_back_in_order_whoever_is_first() -> None:
    def slow_at_first(body: Mapping[str, Any], _before: int) -> Reply:
        time.sleep(0.05 if asked(body) == "0" else 0)
        return said(f"answer to {asked(body)}")

    with scripted_server(slow_at_first) as server:
        questions = [Question(prompt=str(number)) for number in range(20)]
        assert [answer.text for answer in ask(server.url, *questions)] == [f"answer to {n}" for n in range(20)]
        assert server.num_calls() == 20


@pytest.mark.parametrize(
    "fault",
    [(429, {"Retry-After": "0"}, b""), (503, {}, b"busy"), (200, {}, b"{not json"), (200, {}, b'{"choices": []}'),
     (200, {"Content-Length": "500"}, b"{"), (200, {}, None)],
)  # fmt: skip
def test_what_passes_is_tried_again(fault: Reply) -> None:
    with scripted_server(lambda _body, before: fault if before < 2 else said("at last")) as server:
        (answer,) = ask(server.url, HELLO, timeout_seconds=2)
        assert (answer.text, server.num_calls()) == ("at last", 3)


def test_a_server_that_stays_down_ends_the_run_and_one_of_two_does_not() -> None:
    with pytest.raises(MinipuzzleError, match=r"does not answer: ConnectError.*after 6 tries"):
        ask("http://127.0.0.1:9/v1", HELLO)
    with scripted_server(lambda _body, _before: said("here")) as server:
        two = Endpoint(urls=("http://127.0.0.1:9/v1", server.url), model=MODEL, pause_seconds=0.001)
        assert [answer.text for _, answer in two.answers([HELLO])] == ["here"]


def test_answers_that_never_are_any_reject_one_question_only() -> None:
    def half(body: Mapping[str, Any], _before: int) -> Reply:
        bad = {"0": (200, {}, b"nonsense"), "1": (400, {}, b"too long"), "2": said("x" * (MAX_ANSWER_BYTES + 1))}
        return bad.get(asked(body), said("good"))

    with scripted_server(half) as server:
        answers = ask(server.url, *(Question(prompt=str(number)) for number in range(4)), tries=2)
        problems = [answer.problem for answer in answers]
        assert problems == ["malformed answer", "refused by the server (400)", "an answer of more than 8 MiB", ""]


def test_a_wrong_name_proposes_the_servers_models() -> None:
    with scripted_server(lambda _body, _before: said("x")) as server:
        endpoint = Endpoint(urls=(server.url,), model="other")
        with pytest.raises(MinipuzzleError, match="has no model 'other'") as caught:
            list(endpoint.answers([HELLO]))
        assert MODEL in caught.value.hint
        assert server.num_calls() == 1


def test_rewards_are_read_in_nvidias_form() -> None:
    scores = {"helpfulness": 3.5, "correctness": 3.0, "coherence": 4.0, "complexity": 1.0, "verbosity": 1.5}
    with scripted_server(lambda _body, _before: rewarded(scores)) as server:
        assert ask(server.url, HELLO)[0].scores == scores


def test_a_probe_says_what_a_server_can_do() -> None:
    def able(body: Mapping[str, Any], before: int) -> Reply:
        if "logit_bias" in body:
            return 400, {}, b""
        return said(f"sample {before}") if body["temperature"] else said("same", logprobs={"content": []})

    with scripted_server(able) as server:
        assert Endpoint(urls=(server.url,), model=MODEL).probe() == {
            **{"chat": True, "completions": True},
            **{"seed": False, "logit_bias": False, "n": False, "logprobs": True},
        }


def test_a_journal_asks_nothing_twice_also_after_an_error(tmp_path: Path) -> None:
    def down_after_three(body: Mapping[str, Any], _before: int) -> Reply:
        return said(asked(body)) if server.num_calls() <= 3 or is_mended else (401, {}, b"")

    questions, is_mended = [Question(prompt=str(number)) for number in range(8)], False
    with scripted_server(down_after_three) as server:
        model = Endpoint(urls=(server.url,), model=MODEL, concurrency=1)
        first = Journal(tmp_path / "journal.sqlite")
        with pytest.raises(MinipuzzleError, match="wants a key"):
            Journaled(model=model, journal=first).ask(questions)
        is_mended, before = True, server.num_calls()
        again = Journaled(model=model, journal=Journal(tmp_path / "journal.sqlite"))
        assert [answer.text for answer in again.ask([*questions, questions[0]])] == [*"01234567", "0"]
        assert server.num_calls() == before + 5
        again.ask(questions)
        assert server.num_calls() == before + 5


def test_questions_go_to_the_model_they_name() -> None:
    with scripted_server(lambda b, _: said("one")) as one, scripted_server(lambda b, _: said("two")) as two:
        models = {name: Endpoint(urls=(at.url,), model=MODEL) for name, at in (("one", one), ("two", two))}
        questions = [Question(prompt="x", to=name) for name in ("two", "one", "two")]
        answers = dict(Several(models=models).answers(questions))
        assert [answers[idx].text for idx in range(3)] == ["two", "one", "two"]
