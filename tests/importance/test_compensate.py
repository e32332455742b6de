"""Guarantee: a compensated cut is closer to its teacher than the plain one on the tokens that it was fitted to, in
every family and layout; nothing cut changes nothing, and how the work is divided changes nothing but rounding.

Closer means: the hidden states behind the last layer, by the distance that is fitted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from importance.alterations import LayerRequest
from importance.compensate import compensate, mended_quality
from importance.layers import removal_plans
from importance.measure import measure
from importance.metrics import next_token_labels
from importance.refits.results import Compensation
from importance.refits.scores import num_applications, score_mended
from importance.refits.work import expert_projections, open_stack, output_projections, predict_flops
from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.plan import Plan, keep_everything, plan_without
from minipuzzle.data.windows import EvaluationWindows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.safetensors_files import torch_dtype
from minipuzzle.progress import Advance
from minipuzzle.quality.evaluate import evaluate
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import load_model
from tests.support.cuts import TOKENS, WINDOWS, half_cut, plan_with, some_tokens
from tests.support.jobs import torchrun
from tests.support.tiny_models import EVERY_CONFIG, write_family_checkpoint, write_tiny_checkpoint


def last_states(checkpoint: Checkpoint, token_ids: torch.Tensor) -> torch.Tensor:
    stack = LayerStack(checkpoint)
    hidden = stack.embed(token_ids)
    for layer_idx in range(stack.num_layers):
        hidden = stack.apply(layer_idx, hidden)
    return hidden


def distance(student: torch.Tensor, teacher: torch.Tensor) -> float:
    return float(((student - teacher).square().mean(-1) / teacher.square().mean(-1)).sum())


def written(checkpoint: Checkpoint, folder: Path, found: Compensation | Plan) -> Checkpoint:
    plan, weights = (found, {}) if isinstance(found, Plan) else (found.plan, found.weights)
    folder.mkdir()
    write_pruned(checkpoint, plan, folder, new_weights=weights)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("name", EVERY_CONFIG)
@pytest.mark.parametrize("may_choose", [False, True])
def test_a_compensated_cut_is_closer_to_the_teacher(tmp_path: Path, name: str, may_choose: bool) -> None:
    checkpoint, token_ids = Checkpoint.open(write_family_checkpoint(tmp_path / "model", name)), some_tokens()
    plan = half_cut(checkpoint)
    found = compensate(LayerStack(checkpoint), plan, token_ids, may_choose=may_choose)
    teacher = last_states(checkpoint, token_ids)
    plain, healed = (
        distance(last_states(written(checkpoint, tmp_path / what, which), token_ids), teacher)
        for what, which in (("plain", plan), ("healed", found))
    )
    assert healed < plain
    assert found.num_refitted > 0
    assert may_choose or found.plan == plan


def test_an_uneven_cut_is_compensated_too(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_family_checkpoint(tmp_path / "model", "llama"))
    token_ids, everything = some_tokens(), keep_everything(checkpoint.architecture)
    kept = tuple(idx for idx in everything.kept_layers if idx != 2)  # an attention layer without its MLP
    plan = replace(everything, kept_layers=kept, kept_units={"ffn": {1: (0, 3, 5, 9), 3: tuple(range(20))}})
    found = compensate(LayerStack(checkpoint), plan, token_ids)
    teacher = last_states(checkpoint, token_ids)
    plain = last_states(written(checkpoint, tmp_path / "plain", plan), token_ids)
    assert distance(last_states(written(checkpoint, tmp_path / "healed", found), token_ids), teacher) < distance(
        plain, teacher
    )


def test_a_cut_of_the_hidden_states_keeps_its_units(tiny_checkpoint: Checkpoint) -> None:
    plan = plan_with(tiny_checkpoint, hidden=20, ffn=24)
    found = compensate(LayerStack(tiny_checkpoint), plan, some_tokens())
    assert found.plan.kept_units["hidden"] == plan.kept_units["hidden"]
    assert found.num_refitted > 0
    assert all(weight.shape[0] == 20 for weight in found.weights.values())


def test_where_nothing_is_cut_nothing_changes(tiny_checkpoint: Checkpoint) -> None:
    stack, plan = LayerStack(tiny_checkpoint), keep_everything(tiny_checkpoint.architecture)
    found = compensate(stack, plan, some_tokens())
    assert found.weights == {} and found.layers == [] and found.plan == plan
    assert stack.counters.layer_applications == stack.num_layers


def test_layers_below_the_first_cut_stay_and_the_others_count_three_passes(tiny_checkpoint: Checkpoint) -> None:
    stack, everything = LayerStack(tiny_checkpoint), keep_everything(tiny_checkpoint.architecture)
    plan = replace(everything, kept_layers=tuple(idx for idx in everything.kept_layers if idx != 4))
    found = compensate(stack, plan, some_tokens())
    assert [layer.layer_idx for layer in found.layers] == [5, 6]
    assert stack.counters.layer_applications == stack.num_layers + 2 * 2


def test_new_weights_have_names_shapes_and_precision_of_the_cut_model(tmp_path: Path) -> None:
    folder = write_family_checkpoint(tmp_path / "model", "llama", dtype="bfloat16", torch_dtype="bfloat16")
    checkpoint = Checkpoint.open(folder)
    found = compensate(LayerStack(checkpoint), half_cut(checkpoint), some_tokens())
    target = {tensor.name: tensor.shape for tensor in found.plan.apply(checkpoint.architecture).tensors()}
    assert found.weights
    for name, weight in found.weights.items():
        assert tuple(weight.shape) == target[name]
        assert weight.dtype == torch_dtype("BF16")


def test_few_tokens_are_fitted_by_themselves(tiny_checkpoint: Checkpoint) -> None:
    """Fewer tokens than inputs: another system, the same promise."""
    token_ids = some_tokens(2)[:, :20]
    plan = replace(keep_everything(tiny_checkpoint.architecture), kept_layers=(0, 1, 2, 3, 5, 6))
    found = compensate(LayerStack(tiny_checkpoint), plan, token_ids)
    assert len(found.layers) == 2
    for layer in found.layers:
        assert layer.missing_after <= layer.missing_before


def test_a_model_larger_than_the_memory_gives_the_same(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "model"))
    plan, token_ids = half_cut(checkpoint), some_tokens()
    whole = compensate(LayerStack(checkpoint), plan, token_ids)
    memory_bytes = 10_000
    while True:
        try:
            stack = open_stack(checkpoint, WINDOWS, TOKENS, Compute(memory_bytes=memory_bytes))
            break
        except MinipuzzleError:
            memory_bytes += 10_000
    assert not stack.is_resident
    _require_equal(compensate(stack, plan, token_ids), whole)


@pytest.mark.parametrize("hidden", [False, True])
def test_watched_text_says_what_the_written_model_is_like(
    tiny_checkpoint: Checkpoint, tmp_path: Path, hidden: bool
) -> None:
    plan = plan_with(tiny_checkpoint, hidden=20, ffn=24) if hidden else half_cut(tiny_checkpoint)
    other = torch.randint(3, 259, (5, 16), generator=torch.Generator().manual_seed(9))
    watched = EvaluationWindows(token_ids=other, labels=other.roll(-1, 1), num_bytes=80)
    quality = mended_quality(LayerStack(tiny_checkpoint), plan, some_tokens(), watched)
    found = compensate(LayerStack(tiny_checkpoint), plan, some_tokens())
    student = load_model(written(tiny_checkpoint, tmp_path / "healed", found))
    expected = evaluate(student, tiny_checkpoint.family, watched, against=load_model(tiny_checkpoint))
    assert quality.kl == pytest.approx(expected.kl, rel=1e-4)
    assert quality.loss == pytest.approx(expected.loss, rel=1e-5)


def test_compensated_scores_are_those_of_written_models(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Of each removal mended on three quarters of the windows, and measured on the rest; counted, and resumable."""
    token_ids, request = some_tokens(8), LayerRequest(layers=(1, 4, 6), removals=1, metric="kl", is_compensated=True)
    scores = measure(tiny_checkpoint, token_ids, request=request)
    removed = json.loads(scores.metadata["removed_layers"])
    assert removed == [min(request.layers or (), key=lambda idx: scores.layer["kl"][idx] if idx in removed else 1e9)]
    is_compared = torch.arange(8) % 4 == 3
    watched = EvaluationWindows(
        token_ids=token_ids[is_compared], labels=next_token_labels(token_ids[is_compared]), num_bytes=1
    )
    plan = plan_without(tiny_checkpoint.architecture, removed)
    quality = mended_quality(LayerStack(tiny_checkpoint), plan, token_ids[~is_compared], watched, may_choose=False)
    # Scores count the last token of a window, too, which predicts nothing that could be checked: the losses do not.
    full = evaluate(load_model(tiny_checkpoint), tiny_checkpoint.family, watched)
    assert scores.layer["delta_loss"][removed[0]] == pytest.approx(quality.loss - full.loss, rel=1e-3)


def test_the_work_of_compensated_scores_is_counted_exactly(tiny_checkpoint: Checkpoint) -> None:
    source, stack = tiny_checkpoint.architecture, LayerStack(tiny_checkpoint)
    plans = removal_plans(source, range(stack.num_layers))
    half: dict[str, Any] = {}

    def stop(values: dict[str, Any]) -> None:
        half.update({name: array.copy() for name, array in values.items()})
        if np.isfinite(values["kl"]).sum() == 3:
            raise InterruptedError

    whole = score_mended(stack, plans, some_tokens(8))
    assert stack.counters.layer_applications == num_applications(source, plans)
    with pytest.raises(InterruptedError):
        score_mended(LayerStack(tiny_checkpoint), plans, some_tokens(8), after_plan=stop)
    again = LayerStack(tiny_checkpoint)
    resumed = score_mended(again, plans, some_tokens(8), earlier=half)
    assert again.counters.layer_applications == num_applications(source, plans[3:])
    assert all(np.array_equal(resumed[name], values) for name, values in whole.items())


def test_one_window_is_refused(tiny_checkpoint: Checkpoint) -> None:
    plan = half_cut(tiny_checkpoint)
    with pytest.raises(MinipuzzleError, match="1 windows of text cannot be divided"):
        compensate(LayerStack(tiny_checkpoint), plan, some_tokens(1))


def test_experts_of_a_latent_width_are_mended_by_their_common_way_out(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_family_checkpoint(tmp_path / "model", "nemotron_h-moe"))
    moe = checkpoint.architecture.layer_indices("moe")[0]
    names = [placed.spec.name for placed in output_projections(checkpoint.architecture, moe)]
    assert names == ["shared_experts.down_proj.weight", "fc2_latent_proj.weight"]
    assert not expert_projections(checkpoint.architecture, moe)


def test_an_interrupted_run_continues_with_the_same_result(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan, token_ids, folder = half_cut(tiny_checkpoint), some_tokens(), tmp_path / "finished"
    whole = LayerStack(tiny_checkpoint)
    expected = compensate(whole, plan, token_ids)

    class StoppedError(Exception):
        pass

    @contextmanager
    def stopping(_description: str, _total: float) -> Iterator[Advance]:
        steps = iter(range(4))

        def advance(_steps: float) -> None:
            if next(steps, None) is None:
                raise StoppedError

        yield advance

    with pytest.raises(StoppedError):
        compensate(LayerStack(tiny_checkpoint, Compute(progress=stopping)), plan, token_ids, unfinished=folder)
    again = LayerStack(tiny_checkpoint)
    found = compensate(again, plan, token_ids, unfinished=folder)
    assert again.counters.layer_applications < whole.counters.layer_applications
    assert (found.plan, found.layers) == (expected.plan, expected.layers)
    assert all(found.weights[name].equal(weight) for name, weight in expected.weights.items())
    other = compensate(LayerStack(tiny_checkpoint), plan, some_tokens(8), unfinished=folder)  # of another run
    assert other.num_tokens != found.num_tokens and other.layers != found.layers


def test_the_predicted_work_grows_with_the_tokens(tiny_checkpoint: Checkpoint) -> None:
    source = tiny_checkpoint.architecture
    body = sum(t.num_active_elements for t in source.tensors() if t.layer_idx is not None)
    once, twice = (predict_flops(source, num_tokens) for num_tokens in (10_000, 20_000))
    assert twice - once > 6 * 10_000 * body
    assert twice < 2 * once


JOB = """
import sys
from pathlib import Path
import torch
from importance.compensate import compensate
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.progress import Advance
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.processes import joined_processes
from tests.support.cuts import half_cut, some_tokens

checkpoint = Checkpoint.open(Path(sys.argv[1]))
with joined_processes("cpu") as processes:
    stack = LayerStack(checkpoint, Compute(processes=processes))
    found = compensate(stack, half_cut(checkpoint), some_tokens())
    torch.save(found, f"{sys.argv[2]}/{processes.rank}.pt")
"""


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model")
    (tmp_path / "job.py").write_text(JOB)
    torchrun(2, str(tmp_path / "job.py"), str(folder), str(tmp_path))
    checkpoint = Checkpoint.open(folder)
    alone = compensate(LayerStack(checkpoint), half_cut(checkpoint), some_tokens())
    for rank in range(2):
        _require_equal(torch.load(tmp_path / f"{rank}.pt", weights_only=False), alone)


def _require_equal(found: Compensation, expected: Compensation) -> None:
    assert found.plan == expected.plan
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-4, atol=1e-6)
