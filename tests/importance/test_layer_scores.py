"""Guarantee: a layer's score is what the LM head's input does when that layer alone is skipped.

It equals removing the layer from the whole transformers model and comparing with plain formulas in float64, for every
metric and for irregular patterns; it does not depend on how the samples are sliced or on how much of the model fits in
memory; and it costs L (L + 1) / 2 layer applications and one read of the weights a slice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from importance.layers import working_set
from importance.metrics import HeadInputMetrics, next_token_labels
from minipuzzle.cut.layer_metrics import LAYER_METRICS
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import sample_windows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import EMBEDDINGS, FINAL_NORM, LayerStack, resident_weight_bytes
from minipuzzle.runtime.meta_models import transformers_config
from minipuzzle.runtime.models import load_tokenizer, parts_of
from tests.support.oracles import Scores, assert_same_scores, plain_metrics
from tests.support.scoring import score_layers
from tests.support.text import random_tokens
from tests.support.tiny_models import change_tensors, write_tiny_checkpoint
from tests.support.watched import watched

Tensors = dict[str, torch.Tensor]
SAMPLES, TOKENS = 3, 37
EMBEDDED = Path(__file__).parents[2] / "examples" / "tiny_hybrid"


TOKEN_IDS = random_tokens(SAMPLES, TOKENS)


def scores_by_naive_removal(checkpoint: Checkpoint, token_ids: torch.Tensor, compute: Compute = Compute()) -> Scores:
    """Run transformers' own model once for every removed layer and compare, in float64 and without any sharing."""
    # transformers clamps dt at time_step_min, which only serves initialisation.
    config = transformers_config({**checkpoint.config, "time_step_min": 0.0})
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, config=config, dtype=compute.torch_dtype)
    parts = parts_of(model, checkpoint.family)
    if checkpoint.architecture.tied_embeddings:  # which transformers does not know of here
        parts.head.weight = parts.embeddings.get_parameter("weight")

    def head_input(skipped: int | None) -> torch.Tensor:
        hidden = parts.embeddings(token_ids)
        for layer_idx, layer in enumerate(parts.layers):
            hidden = hidden if layer_idx == skipped else layer(hidden)
        normed: torch.Tensor = parts.final_norm(hidden)
        return normed.double()

    with torch.no_grad():
        full = head_input(None)
        each = [
            plain_metrics(full, head_input(j), parts.head.weight.double(), token_ids) for j in range(len(parts.layers))
        ]
    return {metric: np.array([scores[metric] for scores in each]) for metric in LAYER_METRICS}


@pytest.fixture(scope="module")
def real_tokens() -> torch.Tensor:
    documents = read_documents([EMBEDDED / "text" / "calibration.jsonl"])
    return sample_windows(load_tokenizer(EMBEDDED / "model"), documents, num_samples=1, sequence_length=96)


def test_every_score_of_the_embedded_model_is_that_of_naive_removal(real_tokens: torch.Tensor) -> None:
    checkpoint = Checkpoint.open(EMBEDDED / "model")
    exact = scores_by_naive_removal(checkpoint, real_tokens, Compute(dtype="float64"))
    in_float64 = score_layers(LayerStack(checkpoint, Compute(dtype="float64")), real_tokens)
    assert_same_scores(in_float64, exact, relative=1e-5)  # transformers computes scans and norms in float32
    # Rounding to float32 moves the hidden states themselves, in either way of scoring.
    in_float32, naive = (
        score_layers(LayerStack(checkpoint), real_tokens),
        scores_by_naive_removal(checkpoint, real_tokens),
    )
    for metric, values in exact.items():
        ours, theirs = (np.abs(scores[metric] - values).max() / np.abs(values).max() for scores in (in_float32, naive))
        assert ours <= 1e-5, metric
        assert theirs <= 1e-5, metric


@pytest.mark.parametrize("pattern", ["M-M*-M-", "M---MM---M*-", "*", "-M"])
def test_a_score_is_what_removing_that_layer_alone_does(tmp_path: Path, pattern: str) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, pattern=pattern))
    found = score_layers(LayerStack(checkpoint), TOKEN_IDS)
    assert_same_scores(found, scores_by_naive_removal(checkpoint, TOKEN_IDS), relative=1e-5)
    assert all((found[metric] > 0).all() for metric in ("mse", "nmse", "cosine", "kl"))


@pytest.mark.parametrize("fits", [True, False])
def test_a_head_tied_to_the_embeddings_is_read_with_them(tmp_path: Path, fits: bool) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, tie_word_embeddings=True))
    stack = open_stack(checkpoint, fits=fits)
    found = score_layers(stack, TOKEN_IDS)
    assert_same_scores(found, scores_by_naive_removal(checkpoint, TOKEN_IDS), relative=1e-5)
    second_read = 0 if fits else stack.stored_bytes(EMBEDDINGS)  # not both in memory at once
    assert stack.counters.weight_bytes_read == checkpoint.weight_bytes + second_read


def test_a_layer_that_adds_nothing_scores_zero(tmp_path: Path) -> None:
    def silence(tensors: Tensors) -> None:
        tensors["backbone.layers.2.mixer.out_proj.weight"].zero_()
        tensors["backbone.layers.3.mixer.o_proj.weight"].zero_()

    checkpoint = Checkpoint.open(change_tensors(write_tiny_checkpoint(tmp_path), silence))
    for metric, values in score_layers(LayerStack(checkpoint), TOKEN_IDS).items():
        assert np.flatnonzero(values == 0).tolist() == [2, 3], metric


def open_stack(checkpoint: Checkpoint, *, fits: bool) -> LayerStack:
    """A stack that may keep the whole model, or one that lacks a single byte for that."""
    needs = working_set(checkpoint.architecture, TOKENS, len(checkpoint.architecture.layers), Compute(memory_bytes=1))
    reserved = needs.reserved_bytes(checkpoint, torch.float32)
    wanted = resident_weight_bytes(checkpoint.architecture, torch.float32) + reserved
    stack = needs.open_stack(checkpoint, Compute(memory_bytes=wanted if fits else wanted - 1))
    assert stack.is_resident == fits
    return stack


@pytest.mark.parametrize("slice_samples", [1, 2, SAMPLES])
@pytest.mark.parametrize("fits", [True, False])
def test_slicing_and_memory_do_not_change_the_scores(
    tiny_checkpoint: Checkpoint, slice_samples: int, fits: bool
) -> None:
    wanted = score_layers(LayerStack(tiny_checkpoint), TOKEN_IDS, slice_samples=SAMPLES)
    stack = open_stack(tiny_checkpoint, fits=fits)
    found = score_layers(stack, TOKEN_IDS, slice_samples=slice_samples)
    assert_same_scores(found, wanted, relative=1e-6)


@pytest.mark.parametrize("fits", [True, False])
def test_the_cost_is_half_a_square_and_one_read_a_slice(tiny_checkpoint: Checkpoint, fits: bool) -> None:
    num_layers, num_slices = len(tiny_checkpoint.architecture.layers), 3
    stack = open_stack(tiny_checkpoint, fits=fits)
    score_layers(stack, TOKEN_IDS, slice_samples=1)
    assert stack.counters.layer_applications == num_slices * num_layers * (num_layers + 1) // 2
    final_norm_bytes = stack.stored_bytes(FINAL_NORM)  # small: it stays in memory
    reads = 1 if fits else num_slices
    assert (
        stack.counters.weight_bytes_read == reads * (tiny_checkpoint.weight_bytes - final_norm_bytes) + final_norm_bytes
    )


def test_one_part_at_a_time_means_one(tiny_checkpoint: Checkpoint) -> None:
    stack = open_stack(tiny_checkpoint, fits=False)
    hidden = stack.embed(TOKEN_IDS)
    for layer_idx in range(stack.num_layers):
        hidden = stack.apply(layer_idx, hidden)
        loaded = [i for i in range(stack.num_layers) if not any(p.is_meta for p in stack.layer(i).parameters())]
        assert loaded == [layer_idx]


def test_the_next_layer_is_read_in_the_background(tiny_checkpoint: Checkpoint) -> None:
    checkpoint = watched(tiny_checkpoint.folder)
    wanted = score_layers(LayerStack(checkpoint), TOKEN_IDS)
    checkpoint.reads.clear()
    found = score_layers(open_stack(checkpoint, fits=False), TOKEN_IDS)
    in_background = {read.name for read in checkpoint.reads if not read.is_in_main_thread}
    assert in_background == {read.name for read in checkpoint.reads if ".layers." in read.name}
    assert_same_scores(found, wanted, relative=1e-6)


def test_too_little_memory_is_refused_with_the_amount_that_is_needed(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(MinipuzzleError, match=r"needs \S+ GiB \(.*\), but \S+ GiB may be used"):
        LayerStack(tiny_checkpoint, Compute(memory_bytes=1000))


def test_an_overflow_is_named_with_the_layer(tmp_path: Path) -> None:
    def inflate(tensors: Tensors) -> None:
        tensors["backbone.layers.1.mixer.up_proj.weight"].mul_(1e25)

    stack = LayerStack(Checkpoint.open(change_tensors(write_tiny_checkpoint(tmp_path), inflate)))
    with pytest.raises(MinipuzzleError, match="layer 1 computes NaN or infinite values for sample 0 in the full model"):
        score_layers(stack, TOKEN_IDS)


@pytest.mark.parametrize("slice_samples", [1, 2, 3])
def test_an_overflow_is_named_with_the_sample(tmp_path: Path, slice_samples: int) -> None:
    def poison(tensors: Tensors) -> None:
        tensors["backbone.embeddings.weight"][5] = 3e38

    checkpoint = Checkpoint.open(change_tensors(write_tiny_checkpoint(tmp_path), poison))
    tokens = TOKEN_IDS
    tokens[tokens == 5] = 6
    score_layers(LayerStack(checkpoint), tokens)  # nothing overflows without token 5
    tokens[2, 4] = 5
    with pytest.raises(MinipuzzleError, match="for sample 2 in"):
        score_layers(LayerStack(checkpoint), tokens, slice_samples=slice_samples)


@pytest.mark.parametrize("slice_samples", [1, 2])
def test_forty_layers_in_irregular_runs(tmp_path: Path, slice_samples: int) -> None:
    pattern = "M---MM---M*MM--*-M-M---MMM*----M-MM*M--M"
    assert len(pattern) == 40
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, pattern=pattern))
    tokens = random_tokens(2, 33)
    stack = LayerStack(checkpoint)
    found = score_layers(stack, tokens, slice_samples=slice_samples)
    assert_same_scores(found, scores_by_naive_removal(checkpoint, tokens), relative=1e-5)
    assert stack.counters.layer_applications == (2 // slice_samples) * 40 * 41 // 2


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 300.0])
def test_metrics_keep_their_digits_from_tiny_to_huge_changes(size: float) -> None:
    generator = torch.Generator().manual_seed(3)
    full, change = (torch.randn(2, 50, 16, generator=generator) for _ in range(2))
    head, ids = torch.randn(300, 16, generator=generator), torch.randint(300, (2, 50), generator=generator)
    metrics = HeadInputMetrics(1)
    altered = full + size * change
    for sample in range(2):  # in uneven chunks
        labels = next_token_labels(ids)[sample]
        for chunk in (slice(0, 33), slice(33, 50)):
            metrics.add(full[sample, chunk], altered[None, sample, chunk], head, labels[chunk])
    wanted = plain_metrics(full.double(), altered.double(), head.double(), ids)
    found = {metric: values.item() for metric, values in metrics.result().items()}
    assert found == pytest.approx(wanted, rel=2e-4 if size < 0.01 else 1e-5)


@pytest.mark.parametrize("size", [24.0, 30.0, 60.0])
def test_metrics_keep_their_digits_where_all_likely_tokens_fall(size: float) -> None:
    head = torch.eye(16).repeat(20, 1)[:300]
    full, altered = torch.zeros(1, 4, 16), torch.zeros(1, 4, 16)
    full[..., 3], altered[..., 3], altered[..., 5] = 25.0, 25.0 - size, 1.0
    ids = torch.tensor([[3, 5, 7, 3]])
    metrics = HeadInputMetrics(1)
    metrics.add(full[0], altered, head, next_token_labels(ids)[0])
    found = {metric: values.item() for metric, values in metrics.result().items()}
    assert found == pytest.approx(plain_metrics(full.double(), altered.double(), head.double(), ids), rel=1e-5)
