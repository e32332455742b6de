"""Guarantee: where attention and MLP of a block only go together, they are ranked by what removing both does.

The score of a block equals that of transformers' model with both outputs set to zero, and the search drops the block
whose joint score is least, not the one whose layers' scores add up to least.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from importance.measure import measure
from importance.work import open_stack, predict_work
from minipuzzle.architecture.layers import HIDDEN
from minipuzzle.architecture.memory import Deployment
from minipuzzle.architecture.model import PER_LAYER, UNIFORM
from minipuzzle.cut.scores import Scores, read_scores, write_scores
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.models import build_model
from minipuzzle.search.engine import find_candidates
from minipuzzle.search.predicted_loss import LossModel
from minipuzzle.search.request import SearchRequest
from tests.support.text import random_tokens
from tests.support.tiny_models import write_family_checkpoint

TOKEN_IDS = random_tokens(3, 17, seed=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_family_checkpoint(tmp_path_factory.mktemp("blocks") / "llama", "llama"))


def mse_without(checkpoint: Checkpoint, layers: tuple[int, ...]) -> float:
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.entries}
    for layer_idx in layers:
        for placed in checkpoint.architecture.layer_tensors(layer_idx):
            if placed.spec.dims[0] == HIDDEN and not placed.spec.rms_groups:
                tensors[placed.name] = torch.zeros_like(tensors[placed.name])
    models = (build_model(checkpoint.config, {**source}.items()) for source in (tensors, stored(checkpoint)))
    with torch.no_grad():
        changed, full = (model.get_submodule("model")(TOKEN_IDS).last_hidden_state.double() for model in models)
    return float((changed - full).square().mean())


def stored(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.tensor(name) for name in checkpoint.entries}


def test_a_block_score_is_what_removing_all_its_layers_does(checkpoint: Checkpoint, tmp_path: Path) -> None:
    scores = measure(checkpoint, TOKEN_IDS)
    wanted = [mse_without(checkpoint, block) for block in checkpoint.architecture.blocks]
    np.testing.assert_allclose(scores.blocks["mse"][::2], wanted, rtol=1e-4)
    assert not scores.blocks["mse"][1::2].any()
    assert not np.allclose(scores.blocks["mse"][::2], scores.layer["mse"].reshape(-1, 2).sum(1), rtol=0.01)
    write_scores(scores, tmp_path / "scores.safetensors")
    np.testing.assert_array_equal(read_scores(tmp_path / "scores.safetensors").blocks["mse"], scores.blocks["mse"])
    stack = open_stack(checkpoint, sequence_length=17)
    work = predict_work(stack, layer_samples=3, channel_samples=3, sequence_length=17)
    assert f'"layer_applications": {work.layer_applications}' in scores.metadata["counters"]


def test_blocks_are_dropped_by_their_joint_score(checkpoint: Checkpoint) -> None:
    layer = {"mse": np.array([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])}
    scores = Scores(layer=layer, blocks={"mse": np.array([9.0, 0, 1.5, 0, 8.0, 0])})
    request = SearchRequest(keep={"attention": 2})
    (best, *_) = find_candidates(checkpoint.architecture, scores, request, Deployment())
    assert best.kept_layers == (0, 1, 4, 5)
    assert best.predicted_loss == pytest.approx(1.5)
    without = Scores(layer=layer)
    (best, *_) = find_candidates(checkpoint.architecture, without, request, Deployment())
    assert best.kept_layers == (2, 3, 4, 5)
    loss = LossModel(source=checkpoint.architecture, scores=scores, metric="mse")
    np.testing.assert_array_equal(loss.removal_in(PER_LAYER), layer["mse"])
    assert loss.removal_in(UNIFORM)[:2].sum() == pytest.approx(9.0)
