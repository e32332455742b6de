"""Guarantee: experts are scored by what they add, cut with their rows of the router, and each keeps its own neurons.

Scores are compared with plain formulas over all experts and tokens, counts with published ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import minipuzzle
from importance.channels import UNIT_DEFINITIONS, score_channels
from minipuzzle.architecture.families import FAMILIES, read_architecture
from minipuzzle.architecture.memory import Deployment
from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.plan import KeptUnits, Plan, keep_everything, read_plan
from minipuzzle.cut.scores import Scores
from minipuzzle.cut.selection import make_plan
from minipuzzle.cut.surgery import cut_tensors
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.models import build_model, load_model
from minipuzzle.runtime.narrowed_layers import NarrowedLayers, layer_cut
from minipuzzle.search.engine import find_candidates, plan_of
from minipuzzle.search.request import SearchRequest
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from tests.support.oracles import logits_of
from tests.support.published import PUBLISHED, published_config
from tests.support.text import random_tokens
from tests.support.tiny_models import EVERY_CONFIG, TINY_CONFIGS, save_tensors, write_family_checkpoint

MOE_LAYERS = (1, 3)  # of the pattern ME*E-
EXPERTS, NEURONS = 8, 24
EXPERT_CONFIGS = [name for name in EVERY_CONFIG if "moe" in read_architecture(TINY_CONFIGS[name]).layer_counts]


TOKEN_IDS = random_tokens(3, 19, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_checkpoint(tmp_path_factory.mktemp("moe") / "model", "nemotron_h-moe")


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder)


def test_nemotron_3_nano_has_its_published_counts() -> None:
    """31.6e9 parameters, 3.6e9 of them used for a token (arXiv 2512.20848)."""
    config = {
        **TINY_CONFIGS["nemotron_h-moe"],
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "num_hidden_layers": 52,
        "vocab_size": 131072,
        "hidden_size": 2688,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "moe_latent_size": None,
        "n_group": 1,
    }
    architecture = read_architecture(config)
    assert architecture.layer_counts == {"mamba": 23, "attention": 6, "moe": 23}
    assert architecture.num_parameters == pytest.approx(31.6e9, rel=2e-3)
    assert architecture.num_active_parameters == pytest.approx(3.6e9, rel=2e-2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_counts(name: str) -> None:
    architecture = read_architecture(published_config(name))
    assert (architecture.num_parameters, architecture.num_active_parameters) == PUBLISHED[name][2:]


@pytest.fixture(params=EXPERT_CONFIGS)
def any_checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_family_checkpoint(tmp_path / "model", request.param))


def test_experts_are_scored_by_every_criterion_as_its_formula_says(any_checkpoint: Checkpoint) -> None:
    """From transformers' own module of all experts, which is asked what each expert makes of every token."""
    units, _ = score_channels(LayerStack(any_checkpoint), TOKEN_IDS, slice_samples=2)
    model = minipuzzle.load(any_checkpoint)
    paths = [path for path, module in model.named_modules() if path.endswith(".experts")]
    calls: dict[str, tuple[torch.Tensor, ...]] = {}
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(lambda _m, args, path=path: calls.update({path: args}))
    logits_of(model, TOKEN_IDS)
    captured = dict(calls)
    source = any_checkpoint.architecture
    for path, layer_idx in zip(paths, source.layer_indices("moe"), strict=True):
        tokens_NH, experts_NK, weights_NK = captured[path]
        shares_NK = (weights_NK / weights_NK.sum(1, keepdim=True)).double()
        for expert_idx in range(source.layers[layer_idx].sizes["expert"]):
            chosen = torch.full((len(tokens_NH), 1), expert_idx)
            with torch.no_grad():
                output_NH = model.get_submodule(path)(tokens_NH, chosen, torch.ones(chosen.shape))
            given_NK = experts_NK == expert_idx
            given_N, norms_N = given_NK.any(1), output_NH.norm(dim=1).double()
            num_given = max(1, int(given_N.sum()))
            wanted = {
                "expert": float((norms_N * (weights_NK * given_NK).sum(1)).mean()),
                "expert_reap": float((norms_N * (shares_NK * given_NK).sum(1)).sum() / num_given),
                "expert_man": float((norms_N * given_N).sum() / num_given),
                "expert_msan": float((norms_N.square() * given_N).sum() / num_given),
                "expert_frequency": float(given_N.double().mean()),
            }
            found = {axis: units[f"{axis}.{layer_idx}"][expert_idx] for axis in wanted}
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-12), (path, expert_idx)
    assert wanted.keys() <= set(UNIT_DEFINITIONS)


@pytest.mark.parametrize("name", EXPERT_CONFIGS)
def test_a_share_of_experts_stays_by_the_criterion_asked_for_and_as_many_of_each_group(name: str) -> None:
    source, random = read_architecture(TINY_CONFIGS[name]), np.random.default_rng(3)
    layers = source.layer_indices("moe")
    units = {f"{axis}.{idx}": random.random(EXPERTS, np.float32) for axis in ("expert", "expert_man") for idx in layers}
    scores = Scores(layer={"mse": np.zeros(len(source.layers))}, units=units).ranking_experts_by("man")
    best = find_candidates(source, scores, SearchRequest(experts="60%"), Deployment())[0]
    plan, groups = plan_of(source, scores, best, metric="mse"), source.layers[layers[0]].sizes["expert_group"]
    for layer_idx in layers:
        by_group = units[f"expert_man.{layer_idx}"].reshape(groups, -1)
        wanted = np.argsort(-by_group, axis=1)[:, : 6 // groups if groups > 1 else 5]
        offsets = np.arange(groups)[:, None] * (EXPERTS // groups)
        assert plan.kept_units["expert"][layer_idx] == tuple(np.sort((wanted + offsets).ravel()))
    with pytest.raises(MinipuzzleError, match="nothing of experts by msan"):
        scores.ranking_experts_by("msan")
    with pytest.raises(MinipuzzleError, match="router"):
        too_few = find_candidates(source, scores, SearchRequest(experts="1"), Deployment())[0]
        FAMILIES[source.model_type].write(TINY_CONFIGS[name], too_few.architecture)


def test_files_with_all_experts_of_a_block_in_one_tensor_are_read_and_written_as_such(tmp_path: Path) -> None:
    apart = Checkpoint.open(write_family_checkpoint(tmp_path / "apart", "qwen3_moe"))
    tensors = {name: apart.tensor(name) for name in apart.entries}
    folder = write_family_checkpoint(tmp_path / "together", "qwen3_moe")
    save_tensors(folder, dict(apart.config), tensors, is_fused=True)
    together = Checkpoint.open(folder)
    assert together.is_fused and not apart.is_fused
    together.require_plain_weights()
    assert all(torch.equal(together.tensor(name), tensor) for name, tensor in tensors.items())
    everything = keep_everything(together.architecture)
    for source, plan in ((together, everything), (apart, everything)):
        out = tmp_path / f"cut-{source.folder.name}"
        out.mkdir()
        write_pruned(source, plan, out)
        assert (out / "model.safetensors").read_bytes() == (source.folder / "model.safetensors").read_bytes()
    kept: KeptUnits = {"expert": {1: (0, 1, 2, 5)}, "expert_ffn": {1: tuple(range(0, NEURONS, 2))}}
    cut = [dict(cut_tensors(source, replace(everything, kept_units=kept))) for source in (apart, together)]
    assert all(torch.equal(tensor, cut[1][name]) for name, tensor in cut[0].items())
    exported = export_checkpoint(
        together, tmp_path / "bf16", ExportRequest(scheme="bf16"), calibration_token_ids=TOKEN_IDS
    )
    assert exported.verification is not None and Checkpoint.open(tmp_path / "bf16").is_fused
    damaged = {**load_file(folder / "model.safetensors"), "model.layers.0.mlp.experts.down_proj": torch.ones(8, 3)}
    save_file(damaged, folder / "model.safetensors")
    with pytest.raises(MinipuzzleError, match=r"experts\.down_proj has shape"):
        Checkpoint.open(folder)


def inputs_of_moe_layers(checkpoint: Checkpoint, token_ids_BT: torch.Tensor) -> dict[int, torch.Tensor]:
    """What the experts' layers see after their norm, from the whole model."""
    model, seen = load_model(checkpoint), {}
    for layer_idx in MOE_LAYERS:
        mixer = model.get_submodule(f"model.layers.{layer_idx}.mixer")
        mixer.register_forward_pre_hook(lambda _module, args, layer_idx=layer_idx: seen.update({layer_idx: args[0]}))
    with torch.no_grad():
        model(token_ids_BT, use_cache=False)
    return seen


def test_scores_of_experts_and_their_neurons_are_what_the_formulas_say(checkpoint: Checkpoint) -> None:
    units, _ = score_channels(LayerStack(checkpoint), TOKEN_IDS, slice_samples=2)
    model = load_model(checkpoint)
    for layer_idx, hidden_BTH in inputs_of_moe_layers(checkpoint, TOKEN_IDS).items():
        flat = hidden_BTH.flatten(0, 1)
        mixer = f"model.layers.{layer_idx}.mixer"
        with torch.no_grad():
            _, weights_NK, indices_NK = model.get_submodule(f"{mixer}.gate")(hidden_BTH)
            latent = model.get_submodule(f"{mixer}.fc1_latent_proj")(flat)
        for expert_idx in range(EXPERTS):
            up, down = (model.get_parameter(f"{mixer}.experts.{expert_idx}.{n}_proj.weight") for n in ("up", "down"))
            weight_N = torch.where(indices_NK == expert_idx, weights_NK, 0).sum(1).double()
            inner_NF = (latent @ up.T).relu().square().double()
            wanted = (weight_N * (inner_NF @ down.double().T).norm(dim=1)).mean().detach()
            assert units[f"expert.{layer_idx}"][expert_idx] == pytest.approx(float(wanted), rel=1e-4)
            wanted_F = (inner_NF * (weight_N > 0)[:, None]).mean(0).detach()
            np.testing.assert_allclose(units[f"expert_ffn.{layer_idx}"][expert_idx], wanted_F, rtol=1e-4, atol=1e-7)
        assert units[f"shared_ffn.{layer_idx}"].shape == (40,)
    measured = {key.partition(".")[0] for key in units}
    assert {"expert", "expert_ffn", "shared_ffn"} <= measured <= set(UNIT_DEFINITIONS)


def test_every_expert_has_a_gradient_though_no_token_is_given_to_it(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint)
    model(TOKEN_IDS[:1, :2], use_cache=False).logits.sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if ".experts." in name]
    assert all(gradient is not None for gradient in gradients)
    assert any(not gradient.any() for gradient in gradients if gradient is not None)


def plan_of_own_neurons(checkpoint: Checkpoint, scores: dict[str, NDArray[np.float32]]) -> Plan:
    widths = {layer_idx: {"expert_ffn": 8, "expert": 4} for layer_idx in MOE_LAYERS}
    source = checkpoint.architecture
    return make_plan(source, Scores(layer={}, units=scores), kept_layers=range(len(source.layers)), widths=widths)


def random_scores() -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(5)
    scores = {f"expert.{idx}": generator.random(EXPERTS, np.float32) for idx in MOE_LAYERS}
    return {**scores, **{f"expert_ffn.{i}": generator.random((EXPERTS, NEURONS), np.float32) for i in MOE_LAYERS}}


def test_each_expert_keeps_its_own_best_neurons(checkpoint: Checkpoint, tmp_path: Path) -> None:
    scores = random_scores()
    plan = plan_of_own_neurons(checkpoint, scores)
    cut = dict(cut_tensors(checkpoint, plan))
    for layer_idx in MOE_LAYERS:
        by_group = np.argsort(-scores[f"expert.{layer_idx}"].reshape(2, -1), axis=1)[:, :2] + [[0], [4]]
        kept_experts = np.sort(by_group.ravel())
        mixer = f"backbone.layers.{layer_idx}.mixer"
        for new_idx, old_idx in enumerate(kept_experts):
            best = np.sort(np.argsort(-scores[f"expert_ffn.{layer_idx}"][old_idx])[:8])
            wanted = checkpoint.tensor(f"{mixer}.experts.{old_idx}.up_proj.weight")[best]
            assert torch.equal(cut[f"{mixer}.experts.{new_idx}.up_proj.weight"], wanted)
        for name in ("gate.weight", "gate.e_score_correction_bias"):
            assert torch.equal(cut[f"{mixer}.{name}"], checkpoint.tensor(f"{mixer}.{name}")[kept_experts])
        assert f"{mixer}.experts.4.up_proj.weight" not in cut
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert read_plan(tmp_path / "plan.json") == plan


def test_removing_neurons_that_are_silent_in_their_own_expert_keeps_the_logits(tmp_path: Path) -> None:
    folder = write_family_checkpoint(tmp_path, "nemotron_h-moe")
    checkpoint = Checkpoint.open(folder)
    plan = replace(plan_of_own_neurons(checkpoint, random_scores()))
    plan = replace(plan, kept_units={"expert_ffn": plan.kept_units["expert_ffn"]})  # all experts stay
    tensors = load_file(folder / "model.safetensors")
    for layer_idx in MOE_LAYERS:
        for expert_idx, kept in enumerate(plan.chosen_units["expert_ffn"][layer_idx]):
            silent = np.setdiff1d(np.arange(NEURONS), kept)
            tensors[f"backbone.layers.{layer_idx}.mixer.experts.{expert_idx}.up_proj.weight"][silent] = 0
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture))
    with torch.no_grad():
        before = load_model(checkpoint)(TOKEN_IDS, use_cache=False).logits
        after = build_model(config, cut_tensors(checkpoint, plan))(TOKEN_IDS, use_cache=False).logits
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5)


def test_a_narrowed_layer_computes_what_the_pruned_checkpoint_does(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = plan_of_own_neurons(checkpoint, random_scores())
    write_pruned(checkpoint, plan, tmp_path)
    stack, pruned = LayerStack(checkpoint), LayerStack(Checkpoint.open(tmp_path))
    hidden_BTH = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    narrowed = NarrowedLayers(stack)
    for layer_idx in MOE_LAYERS:
        with narrowed.modules([layer_cut(checkpoint.architecture, plan, layer_idx)]) as (module,):
            found = stack.apply(layer_idx, hidden_BTH, module=module)
        assert torch.allclose(found, pruned.apply(layer_idx, hidden_BTH), rtol=1e-5, atol=1e-6)


def test_too_few_experts_for_the_router_are_refused(checkpoint: Checkpoint) -> None:
    source = checkpoint.architecture
    layers = tuple(layer.resized(expert=2) if layer.kind == "moe" else layer for layer in source.layers)
    with pytest.raises(MinipuzzleError, match="too few for a router"):
        checkpoint.family.write(checkpoint.config, replace(checkpoint.architecture, layers=layers))


def test_unequal_choices_are_refused(checkpoint: Checkpoint) -> None:
    plan = replace(
        keep_everything(checkpoint.architecture),
        kept_units={"expert_ffn": {1: (0, 1)}},
        chosen_units={"expert_ffn": {1: ((0, 1), (2,)) * 4}},
    )
    with pytest.raises(MinipuzzleError, match="unequal"):
        plan.check_against(checkpoint.architecture)


def test_experts_are_calibrated_on_the_tokens_that_reach_them_and_others_like_their_neighbours(
    folder: Path, tmp_path: Path
) -> None:
    """The largest inputs of each expert, against transformers' router; an expert without tokens has the layer's."""
    checkpoint, few = Checkpoint.open(folder), TOKEN_IDS[:1, :6]
    found = export_checkpoint(checkpoint, tmp_path / "fp8", ExportRequest(scheme="fp8"), calibration_token_ids=few)
    assert found.verification is not None and found.verification.relative_difference == pytest.approx(0, abs=1e-5)
    stored, model = load_file(tmp_path / "fp8" / "model.safetensors"), load_model(checkpoint)
    num_unseen = 0
    for layer_idx, hidden_BTH in inputs_of_moe_layers(checkpoint, few).items():
        mixer = f"model.layers.{layer_idx}.mixer"
        with torch.no_grad():
            _, _, indices_NK = model.get_submodule(f"{mixer}.gate")(hidden_BTH)
            latent_NH = model.get_submodule(f"{mixer}.fc1_latent_proj")(hidden_BTH.flatten(0, 1))
        seen = [latent_NH[(indices_NK == expert_idx).any(1)].abs() for expert_idx in range(EXPERTS)]
        largest = max(float(values.max()) for values in seen if len(values))
        for expert_idx, values in enumerate(seen):
            num_unseen += not len(values)
            scale = stored[f"backbone.layers.{layer_idx}.mixer.experts.{expert_idx}.up_proj.input_scale"]
            expected = float(values.max()) if len(values) else largest
            assert float(scale) == pytest.approx(expected / 448, rel=1e-5), (layer_idx, expert_idx)
    assert num_unseen > 0
