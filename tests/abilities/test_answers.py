"""Guarantee: what a model answers is what transformers computes, in memory and behind a server alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from minipuzzle.abilities.local import LocalModel, encode_pair, plain_conversation, until_stop
from minipuzzle.abilities.served import ServedModel, served_models
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.reader import load_any_model
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.models import load_tokenizer
from minipuzzle.workflows.demo import EXAMPLE
from tests.support.served import served_model, transformers_model

MODEL = EXAMPLE / "model"
PAIRS = [
    ("The President of the United", " States"),
    ("The President of the United", " kingdom of letters"),
    ("def __init__(self, name):\n    self.name ", "= name"),
    ("Fellow citizens of the ", "Senate and House"),
    ("", "The end"),
]


@pytest.fixture(scope="module")
def local() -> LocalModel:
    checkpoint = Checkpoint.open(MODEL)
    return LocalModel(load_any_model(checkpoint), load_tokenizer(MODEL), checkpoint.family)


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    return transformers_model(MODEL), AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_model(MODEL) as (address, _):
        yield address


def wanted_log_likelihood(reference: tuple[Any, Any], prompt: str, continuation: str) -> float:
    """One row, no padding, the whole forward pass of transformers."""
    model, tokenizer = reference
    start = len(tokenizer(prompt.rstrip(" "))["input_ids"])
    tokens = tokenizer(prompt + continuation, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        log_probs = model(tokens).logits[0].log_softmax(-1)
    return sum(float(log_probs[idx - 1, tokens[0, idx]]) for idx in range(start, tokens.shape[1]))


def test_log_likelihoods_are_those_of_the_whole_forward_pass(local: LocalModel, reference: tuple[Any, Any]) -> None:
    found = local.log_likelihoods(PAIRS)
    assert found == pytest.approx([wanted_log_likelihood(reference, *pair) for pair in PAIRS], abs=1e-4)
    assert found[0] > found[1]


def test_a_server_says_the_same(local: LocalModel, url: str) -> None:
    served = ServedModel(url=url, model="model")
    assert served_models(url) == ["model"]
    assert served.log_likelihoods(PAIRS[:4]) == pytest.approx(local.log_likelihoods(PAIRS[:4]), abs=1e-4)
    prompts = ["The President of the", "import os\nimport", "Congress"]
    how: dict[str, Any] = {"max_tokens": 8, "stop": ("\n",)}
    assert served.complete(prompts, **how) == local.complete(prompts, **how)


def test_answers_do_not_depend_on_their_neighbours(local: LocalModel) -> None:
    prompts = ["The President of the", "import os\nimport", "A much longer beginning of the message to the Congress"]
    together = local.complete(prompts, max_tokens=8)
    assert together == [local.complete([prompt], max_tokens=8)[0] for prompt in prompts]
    assert len({*together}) == 3
    sampled = local.complete(prompts[:1] * 2, max_tokens=8, temperature=2.0, seed=1)
    assert sampled == local.complete(prompts[:1] * 2, max_tokens=8, temperature=2.0, seed=1)
    assert sampled[0] != sampled[1]


def test_answers_end_where_they_are_told_to(local: LocalModel) -> None:
    whole = local.complete(["import os\nimport"], max_tokens=12)[0]
    assert "\n" in whole
    assert local.complete(["import os\nimport"], max_tokens=12, stop=("\n", "@"))[0] == whole.partition("\n")[0]
    assert until_stop("a;b:c", (":", ";")) == "a" and until_stop("abc", ("x",)) == "abc"


def test_prompt_and_option_are_tokenised_as_one_text() -> None:
    tokenizer = load_tokenizer(MODEL)
    tokens, num_prompt = encode_pair(tokenizer, "The United ", "States")
    assert tokens == tokenizer("The United States")["input_ids"]
    assert tokenizer.decode(tokens[num_prompt:]) == " States"
    with pytest.raises(MinipuzzleError, match="no token of its own"):
        encode_pair(tokenizer, "The United", "")


def test_a_conversation_without_a_template_is_plain(local: LocalModel) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert plain_conversation(messages) == "system: Be brief.\nuser: Hello\nassistant:"
    assert isinstance(local.chat(messages, max_tokens=4), str)


def test_a_server_that_is_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    with served_model(MODEL, num_failures=3) as (address, served):
        assert ServedModel(url=address, model="model").complete(["A"], max_tokens=1) != [None]
        assert len(served.requests) == 1


def test_a_server_that_cannot_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    served = served_model(MODEL, has_logprobs=False)
    with served as (address, _), pytest.raises(MinipuzzleError, match="no log-probabilities"):
        ServedModel(url=address, model="model").log_likelihoods(PAIRS[:1])
    with pytest.raises(MinipuzzleError, match="does not answer"):
        ServedModel(url=address, model="model").complete(["A"], max_tokens=1)


def test_numbers_that_are_none_are_an_error() -> None:
    checkpoint = Checkpoint.open(MODEL)
    model = load_any_model(checkpoint)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").fill_(float("nan"))
    with pytest.raises(MinipuzzleError, match="no number"):
        LocalModel(model, load_tokenizer(MODEL), checkpoint.family).log_likelihoods(PAIRS[:1])
