"""Guarantee: narrower layers, removals one after another, chosen layers and several processes are measured exactly.

A variant scores what the pruned checkpoint does; a removal scores what the model without all those layers does, and
nothing below it runs again; two processes give the scores of one; a picture shows every layer.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from importance.alterations import LayerRequest, parse_layers, parse_widths
from importance.layers import Hooks, alteration_tree, removal_plans, score_plans
from importance.measure import measure
from importance.metrics import HeadInputMetrics, next_token_labels
from importance.stream_cache import StreamCache
from minipuzzle.cut.plan import Plan
from minipuzzle.cut.scores import Scores, read_scores
from minipuzzle.cut.selection import make_plan
from minipuzzle.cut.surgery import cut_tensors
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import build_model, load_model, parts_of
from tests.support.cli import run_cli
from tests.support.jobs import launcher
from tests.support.kills import stop_command_when
from tests.support.tiny_models import VOCABULARY

TOKENS = torch.randint(VOCABULARY, (3, 37), generator=torch.Generator().manual_seed(7))


def score_of_cut_model(checkpoint: Checkpoint, plan: Plan, token_ids: torch.Tensor = TOKENS) -> dict[str, float]:
    """What the pruned checkpoint does, built whole by transformers."""
    config = checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture))
    student = parts_of(build_model(config, cut_tensors(checkpoint, plan)), checkpoint.family)
    teacher = parts_of(load_model(checkpoint), checkpoint.family)
    metrics = HeadInputMetrics(1)
    with torch.no_grad():
        full, altered = teacher.logits_input(token_ids), student.logits_input(token_ids)
    for full_TH, altered_TH, labels_T in zip(full, altered, next_token_labels(token_ids), strict=True):
        metrics.add(full_TH, altered_TH[None], teacher.head.weight, labels_T)
    return {name: values.item() for name, values in metrics.result().items()}


def without(checkpoint: Checkpoint, *removed: int) -> Plan:
    source = checkpoint.architecture
    return removal_plans(source, [removed[0]], frozenset(removed[1:]))[0]


WIDTHS = {"ffn": (24, 36), "ssm_head": (2,), "kv_group": (1,)}
VARIANTS = [(axis, width) for axis, widths in WIDTHS.items() for width in widths]


@pytest.fixture(scope="module")
def with_variants(tiny_folder: Path) -> Scores:
    return measure(Checkpoint.open(tiny_folder), TOKENS, request=LayerRequest(widths=WIDTHS))


def test_widths_are_shares_or_numbers_of_units(tiny_checkpoint: Checkpoint) -> None:
    assert parse_widths(["ffn=75%,50%", "ssm_head=50%", "kv_group=1"], tiny_checkpoint.architecture) == WIDTHS


def test_variants_leave_the_scores_of_whole_layers(tiny_checkpoint: Checkpoint, with_variants: Scores) -> None:
    for metric, values in measure(tiny_checkpoint, TOKENS).layer.items():
        # A rise of the loss may be near zero; more streams share a tile, so that sums are added in another order.
        absolute = 1e-5 * np.abs(values).mean() if metric == "delta_loss" else 0
        np.testing.assert_allclose(with_variants.layer[metric], values, rtol=1e-6, atol=absolute, err_msg=metric)


@pytest.mark.parametrize(("axis", "width"), VARIANTS)
def test_a_variant_scores_what_the_pruned_checkpoint_does(
    tiny_checkpoint: Checkpoint, with_variants: Scores, axis: str, width: int
) -> None:
    source = tiny_checkpoint.architecture
    for layer_idx, layer in enumerate(source.layers):
        found = {m: with_variants.variants[f"{m}.{axis}.{width}"][layer_idx] for m in ("mse", "kl", "cosine")}
        if axis not in layer.sizes:
            assert set(found.values()) == {0}
            continue
        plan = make_plan(source, with_variants, kept_layers=range(7), widths={layer_idx: {axis: width}})
        wanted = score_of_cut_model_by_layer(tiny_checkpoint, plan, layer_idx)
        assert found == pytest.approx({m: wanted[m] for m in found}, rel=1e-4)


def test_a_variant_costs_itself_and_the_layers_above(tiny_checkpoint: Checkpoint, with_variants: Scores) -> None:
    layers = tiny_checkpoint.architecture.layers
    above = [7 - idx for axis, _ in VARIANTS for idx, layer in enumerate(layers) if axis in layer.sizes]
    assert len(above) == 3 + 3 + 3 + 1
    # L (L + 1) / 2 for whole layers, and L for the channels.
    assert json.loads(with_variants.metadata["counters"])["layer_applications"] == 28 + sum(above) + 7


def score_of_cut_model_by_layer(checkpoint: Checkpoint, plan: Plan, layer_idx: int) -> dict[str, float]:
    """One layer of the whole model exchanged for the one of a model that is cut alike in all layers of its kind."""
    source = checkpoint.architecture
    ((axis, by_layer),) = plan.kept_units.items()
    kind = source.layers[layer_idx].kind
    # Uniform configs describe only models that are cut everywhere: cut all alike, and take the one layer.
    uniform = replace(plan, kept_units={axis: dict.fromkeys(source.layer_indices(kind), by_layer[layer_idx])})
    config = checkpoint.family.write(checkpoint.config, uniform.apply(source))
    donor = parts_of(build_model(config, cut_tensors(checkpoint, uniform)), checkpoint.family)
    parts, full = (parts_of(load_model(checkpoint), checkpoint.family) for _ in range(2))
    parts.layers[layer_idx] = donor.layers[layer_idx]
    metrics = HeadInputMetrics(1)
    with torch.no_grad():
        states = full.logits_input(TOKENS), parts.logits_input(TOKENS)
        for full_TH, altered_TH, labels_T in zip(*states, next_token_labels(TOKENS), strict=True):
            metrics.add(full_TH, altered_TH[None], full.head.weight, labels_T)
    return {name: values.item() for name, values in metrics.result().items()}


def test_layers_are_removed_one_after_another_by_what_the_smaller_model_loses(tiny_checkpoint: Checkpoint) -> None:
    single = measure(tiny_checkpoint, TOKENS)
    scores = measure(tiny_checkpoint, TOKENS, request=LayerRequest(removals=2, metric="kl"))
    first, second = json.loads(scores.metadata["removed_layers"])
    assert first == int(np.argmin(single.layer["kl"]))
    assert scores.layer["kl"][first] == pytest.approx(single.layer["kl"][first], rel=1e-6)
    pairs = {i: score_of_cut_model(tiny_checkpoint, without(tiny_checkpoint, first, i)) for i in range(7) if i != first}
    assert second == min(pairs, key=lambda i: pairs[i]["kl"])
    assert scores.layer["kl"][second] == pytest.approx(pairs[second]["kl"], rel=1e-5)
    for layer_idx in set(range(7)) - {first, second}:
        wanted = score_of_cut_model(tiny_checkpoint, without(tiny_checkpoint, first, second, layer_idx))
        for metric in ("mse", "nmse", "cosine", "kl"):
            assert scores.layer[metric][layer_idx] == pytest.approx(wanted[metric], rel=1e-5)


@pytest.mark.parametrize("removed", [1, 3, 6])
def test_nothing_below_a_removed_layer_runs_again(tiny_checkpoint: Checkpoint, removed: int) -> None:
    source = tiny_checkpoint.architecture
    cache = StreamCache(max_bytes=2**30, num_slices=2)
    stack = LayerStack(tiny_checkpoint)
    score_plans(stack, removal_plans(source, range(7)), TOKENS, slice_samples=2, hooks=Hooks(cache=cache))
    before = stack.counters.layer_applications
    left = [i for i in range(7) if i != removed]
    plans = removal_plans(source, left, frozenset({removed}))
    found = score_plans(stack, plans, TOKENS, slice_samples=2, hooks=Hooks(cache=cache))
    levels = alteration_tree(source, plans).levels[removed:]
    assert stack.counters.layer_applications - before == 2 * sum(level.num_applications for level in levels)
    wanted = score_plans(LayerStack(tiny_checkpoint), plans, TOKENS, slice_samples=2)
    for metric, values in wanted.items():
        np.testing.assert_array_equal(found[metric], values, err_msg=metric)


def test_a_cache_without_room_changes_nothing(tiny_checkpoint: Checkpoint) -> None:
    plans = removal_plans(tiny_checkpoint.architecture, range(7))
    wanted = score_plans(LayerStack(tiny_checkpoint), plans, TOKENS)
    cache = StreamCache(max_bytes=10, num_slices=1)
    for _ in range(2):
        found = score_plans(LayerStack(tiny_checkpoint), plans, TOKENS, hooks=Hooks(cache=cache))
        np.testing.assert_array_equal(found["mse"], wanted["mse"])


def test_chosen_layers_cost_less_and_are_not_enough_to_search(tiny_checkpoint: Checkpoint) -> None:
    source = tiny_checkpoint.architecture
    layers = parse_layers("1, 3-4,attention", source)
    assert layers == (1, 3, 4)
    chosen = measure(tiny_checkpoint, TOKENS, request=LayerRequest(layers=layers))
    every = measure(tiny_checkpoint, TOKENS)
    np.testing.assert_allclose(chosen.layer["mse"][list(layers)], every.layer["mse"][list(layers)], rtol=1e-6)
    assert np.isnan(chosen.layer["mse"][[0, 2, 5, 6]]).all()
    assert json.loads(chosen.metadata["counters"])["layer_applications"] == 7 + 5 + 3 + 2 + 7
    with pytest.raises(MinipuzzleError, match="lack layers 0, 2, 5, 6"):
        chosen.check_against(source)


def score(*arguments: object) -> Any:
    return run_cli("score", *arguments)


def score_arguments(folder: Path, text: Path, out: Path, *extra: str) -> list[object]:
    measuring = ("--samples", 5, "--channel-samples", 6, "--sequence-length", 40, "--json", "-o", out)
    return ["score", folder, "--data", text, *measuring, *extra]


def run_command(folder: Path, text: Path, out: Path, *extra: str, processes: int = 1) -> Scores:
    arguments = score_arguments(folder, text, out, *extra)
    if processes == 1:
        result = run_cli(*arguments)
        assert result.exit_code == 0, result.output
        printed = result.stdout
    else:
        command = [*launcher(processes), "-m", "minipuzzle", *map(str, arguments)]
        printed = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True).stdout
    assert json.loads(printed)["processes"] == processes  # one process prints
    return read_scores(out)


def test_two_processes_give_the_scores_of_one(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    extra = ("--iterative", "1", "--variants", "ffn=50%")
    one = run_command(tiny_folder, text_file, tmp_path / "one.safetensors", *extra)
    two = run_command(tiny_folder, text_file, tmp_path / "two.safetensors", *extra, processes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]
    for table in ("layer", "variants", "units", "energies"):
        for name, values in getattr(one, table).items():
            np.testing.assert_allclose(getattr(two, table)[name], values, rtol=1e-6, atol=1e-9, err_msg=name)
    assert one.metadata["removed_layers"] == two.metadata["removed_layers"]
    assert one.metadata["token_ids_sha256"] == two.metadata["token_ids_sha256"]


@pytest.mark.parametrize("name", ["scores.png", "scores.svg"])
def test_a_picture_shows_the_scores(tiny_folder: Path, text_file: Path, tmp_path: Path, name: str) -> None:
    small = ("--samples", "2", "--sequence-length", "16", "-o", tmp_path / "s.safetensors")
    result = score(tiny_folder, "--data", text_file, *small, "--plot", tmp_path / name)
    assert result.exit_code == 0, result.output
    start = (tmp_path / name).read_bytes()[:400]
    assert start.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in start or b"<?xml" in start


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (["--layers", "9"], "no layer 9"),
        (["--layers", "two"], "'two' is no layer"),
        (["--variants", "ffn=100%"], "no width between 0 and 48"),
        (["--variants", "depth=50%"], "no axis of this model"),
        (["--iterative", "7"], "leaves none of the 7 layers"),
        (["--plot", "scores.txt"], "is no picture"),
    ],
)
def test_mistakes_are_named(tiny_folder: Path, text_file: Path, tmp_path: Path, extra: list[str], problem: str) -> None:
    result = score(tiny_folder, "--data", text_file, "-o", tmp_path / "s.safetensors", *extra)
    assert result.exit_code == 1
    assert problem in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_killed_process_is_continued_by_the_same_command(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    extra = ("--samples", "30", "--channel-samples", "2", "--device-memory", "1MiB")  # 15 slices
    wanted = run_command(tiny_folder, text_file, tmp_path / "whole.safetensors", *extra)
    out, left_over = tmp_path / "s.safetensors", tmp_path / "s.safetensors.partial-sums"
    stop_command_when(score_arguments(tiny_folder, text_file, out, *extra), left_over.is_file)
    assert not out.exists()
    continued = run_command(tiny_folder, text_file, out, *extra)
    for name, values in wanted.layer.items():
        np.testing.assert_array_equal(continued.layer[name], values)
    applications = [json.loads(scores.metadata["counters"])["layer_applications"] for scores in (continued, wanted)]
    assert applications[0] < applications[1]
    assert not left_over.exists()
