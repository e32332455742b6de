"""Guarantee: every family of the table works with everything, from its one entry.

For each of them, from its tiny config alone: names, shapes and counts equal the transformers model's, cache formulas
equal the cache it fills, layers run one by one give its hidden states, cutting nothing gives the same bytes, silent
units can go on every axis (float64, 1e-9, judged by transformers' own code), what is cut loads strictly, and layer
scores are what removing that layer does.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minipuzzle
from minipuzzle.architecture.families import FAMILIES, Config, Family, family_of, read_architecture
from minipuzzle.architecture.kinds import LAYER_KINDS, VOCABULARY, prunable_axes
from minipuzzle.architecture.layers import HIDDEN
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.plan import Plan, Units, keep_everything
from minipuzzle.cut.surgery import cut_tensors
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import untagged
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import LayerStack
from minipuzzle.runtime.meta_models import transformers_config
from minipuzzle.runtime.models import build_model, build_on_meta, load_model, parts_of
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from tests.support.cuts import half_of_the_units, owners_of, plan_keeping
from tests.support.oracles import caches_of, exact_logits_of, never_route, silence
from tests.support.scoring import score_layers
from tests.support.text import random_tokens
from tests.support.tiny_models import EVERY_CONFIG, NORM_EPSILONS, TINY_CONFIGS, save_tensors, write_family_checkpoint

Tensors = dict[str, torch.Tensor]
UNIT_AXES = [axis for axis in prunable_axes() if axis != VOCABULARY]  # tokens go with their tokenizer
EVERY_AXIS = [
    (name, axis)
    for name in EVERY_CONFIG
    for axis in UNIT_AXES
    if read_architecture(TINY_CONFIGS[name]).width(axis) is not None
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write_family_checkpoint(root / name, name) for name in EVERY_CONFIG}


@pytest.fixture(params=EVERY_CONFIG)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(name: str) -> Config:
    return TINY_CONFIGS[name]


@pytest.fixture
def family(config: Config) -> Family:
    return family_of(config)


@pytest.fixture
def checkpoint(name: str, folders: dict[str, Path]) -> Checkpoint:
    return Checkpoint.open(folders[name])


def test_names_and_shapes_equal_the_transformers_model(family: Family, config: Config) -> None:
    model = build_on_meta(config, torch.bfloat16)
    architecture = family.read(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if architecture.tied_embeddings:
        del expected[f"{family.modules.head}.weight"]
    assert {family.modules.module_name(t.name): t.shape for t in architecture.tensors()} == expected


def test_parameter_count_equals_the_transformers_model(family: Family, config: Config) -> None:
    """As transformers builds it, before any of its tensors is taken apart."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **settings))
    assert family.read(config).num_parameters == num_stored(model)


@pytest.mark.parametrize(
    ("model_type", "sizes", "published"),
    [  # blocks, hidden, ffn, heads, key-value heads, vocabulary; whether the head is tied
        ("llama", (32, 4096, 14336, 32, 8, 128256, False), 8_030_261_248),  # Llama 3.1 8B
        ("llama", (30, 576, 1536, 9, 3, 49152, True), 134_515_008),  # SmolLM2 135M
        ("mistral", (32, 4096, 14336, 32, 8, 32000, False), 7_241_732_096),  # Mistral 7B
        ("qwen2", (28, 3584, 18944, 28, 4, 152064, False), 7_615_616_512),  # Qwen2.5 7B
        ("qwen3", (36, 4096, 12288, 32, 8, 151936, False), 8_190_735_360),  # Qwen3 8B
        ("phi3", (32, 3072, 8192, 32, 32, 32064, False), 3_821_079_552),  # Phi-3-mini
        ("smollm3", (36, 2048, 11008, 16, 4, 128256, True), 3_075_098_624),  # SmolLM3 3B
    ],
)
def test_known_models_have_their_published_parameter_counts(model_type: str, sizes: Any, published: int) -> None:
    fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = {key: value for key, value in TINY_CONFIGS[model_type].items() if key != "head_dim"}
    config |= dict(zip((*fields, "vocab_size", "tie_word_embeddings"), sizes, strict=True))
    assert read_architecture(config).num_parameters == published


def num_stored(model: torch.nn.Module) -> int:
    """Elements of all that a checkpoint stores; tied weights once."""
    return sum({id(weight): weight.numel() for weight in model.state_dict(keep_vars=True).values()}.values())


def test_every_kind_of_a_family_is_in_the_registry(family: Family, config: Config) -> None:
    assert set(family.read(config).names.mixers) <= set(LAYER_KINDS)


def test_config_survives_the_way_there_and_back(family: Family, config: Config) -> None:
    architecture = family.read(config)
    assert family.read(family.write(config, architecture)) == architecture


def test_config_as_transformers_saves_it_says_the_same(family: Family, config: Config) -> None:
    saved = untagged(json.loads(transformers_config(config).to_json_string()))
    assert family.read(saved) == family.read(config)


def tensors_in(cache_layer: Any, name: str) -> list[torch.Tensor]:
    """What transformers' cache keeps of one layer under a name: a tensor, several of them, or nothing."""
    held = getattr(cache_layer, name, None)
    several = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else [held]
    return [tensor for tensor in several if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("tokens", [1, 40])
def test_cache_elements_equal_those_of_the_filled_cache(checkpoint: Checkpoint, tokens: int) -> None:
    cache = load_model(checkpoint)(random_tokens(tokens=tokens), use_cache=True).past_key_values
    real = dict.fromkeys(("kv", "ssm_state", "conv_state"), 0)
    for layer in cache.layers:
        real["kv"] += sum(t.numel() for name in ("keys", "values") for t in tensors_in(layer, name))
        real["ssm_state"] += sum(t.numel() for t in tensors_in(layer, "recurrent_states"))
        # transformers keeps one column of the convolution's input more than engines do.
        real["conv_state"] += sum(t[..., 1:].numel() for t in tensors_in(layer, "conv_states"))
    expected = dict.fromkeys(real, 0)
    for spec in caches_of(checkpoint.architecture):
        # transformers keeps one token less of a window: the newest needs no place while it is computed.
        window_kept = tokens if spec.max_tokens is None else min(tokens, spec.max_tokens - 1)
        assert spec.num_tokens(tokens) - (window_kept if spec.per_token else 1) in (0, 1)
        expected[spec.name] += 2 * spec.num_elements * (window_kept if spec.per_token else 1)
    assert expected == real


def test_layers_run_one_by_one_give_the_hidden_states_of_the_whole_model(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint)
    stack = LayerStack(checkpoint)
    with torch.no_grad():
        expected_BTV = model(random_tokens()).logits
        hidden_BTH = parts_of(model, checkpoint.family).logits_input(random_tokens())
        streamed_BTH = stack.embed(random_tokens())
        for layer_idx in range(stack.num_layers):
            stack.apply(layer_idx, streamed_BTH, out=streamed_BTH)
    assert torch.allclose(model.get_submodule("lm_head")(hidden_BTH), expected_BTV, rtol=1e-4, atol=1e-5)
    assert torch.allclose(stack.final_norm(streamed_BTH), hidden_BTH, rtol=1e-4, atol=1e-5)


def test_cutting_nothing_is_byte_identical(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_pruned(checkpoint, keep_everything(checkpoint.architecture), tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (checkpoint.folder / name).read_bytes()


@pytest.fixture
def silenced(tmp_path: Path) -> Any:
    def make(name: str, axis: str) -> tuple[Checkpoint, tuple[int, ...]]:
        # An epsilon in the norm would not scale along; 1e-30 leaves the exact statement.
        epsilons: dict[str, Any] = {field: 1e-30 for field in NORM_EPSILONS if field in TINY_CONFIGS[name]}
        folder = write_family_checkpoint(tmp_path / "source", name, dtype="float64", **epsilons)
        checkpoint = Checkpoint.open(folder)
        source, kept = checkpoint.architecture, half_of_the_units(checkpoint.architecture, axis)
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.entries}
        # A LayerNorm subtracts the mean of all units, so the one that equals it is silent.
        to_mean = axis == "hidden" and source.names.norm.is_centered
        norms = {placed.name.removesuffix("weight") for placed in source.tensors() if placed.spec.rms_groups}
        for placed in source.tensors():
            is_in_stream = placed.name.removesuffix("bias") not in norms
            silence(tensors[placed.name], placed, axis, kept, to_mean=to_mean and is_in_stream)
        if axis == "expert":
            never_route(tensors, source, kept)
        save_tensors(folder, dict(checkpoint.config), tensors)
        return Checkpoint.open(folder), kept

    return make


@pytest.mark.parametrize(("name", "axis"), EVERY_AXIS)
def test_removing_silent_units_keeps_the_logits(silenced: Any, name: str, axis: str) -> None:
    checkpoint, kept = silenced(name, axis)
    plan = plan_keeping(checkpoint.architecture, axis, kept)
    config = checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture))
    before = exact_logits_of(load_model(checkpoint, Compute(dtype="float64")), random_tokens())
    after = exact_logits_of(
        build_model(config, cut_tensors(checkpoint, plan), Compute(dtype="float64")), random_tokens()
    )
    assert (before - after).abs().max() < 1e-9 * before.abs().max()
    assert before.std() > 0.1


def cut_of_everything(source: Architecture) -> Plan:
    """A plan that keeps half of the units on every axis, and all blocks but one."""
    dropped = source.removable()[1]
    kept_layers = tuple(idx for idx in range(len(source.layers)) if idx not in dropped)
    kept_units: dict[str, dict[int | None, Units]] = {}
    for axis in UNIT_AXES:
        if source.width(axis) is not None:
            owners = [idx for idx in owners_of(source, axis) if idx is None or idx in kept_layers]
            kept_units[axis] = dict.fromkeys(owners, half_of_the_units(source, axis))
    return replace(keep_everything(source), kept_layers=kept_layers, kept_units=kept_units)


def test_a_cut_on_all_axes_loads_strictly_in_transformers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plan = cut_of_everything(checkpoint.architecture)
    write_pruned(checkpoint, plan, tmp_path)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert num_stored(model) == plan.apply(checkpoint.architecture).num_parameters
    with torch.no_grad():
        logits = model(random_tokens(), use_cache=False).logits
        ours = load_model(Checkpoint.open(tmp_path))(random_tokens(), use_cache=False).logits
    assert torch.allclose(logits, ours, rtol=1e-4, atol=1e-4)


def test_a_loaded_model_that_is_saved_computes_the_same_in_transformers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours: Any = minipuzzle.load(checkpoint.folder, dtype=torch.float64)
    ours.save_pretrained(tmp_path)
    eager = {"experts_implementation": "eager"}  # the other one has no float64
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True, **eager
    )
    assert not any(info.values()), info
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):  # transformers clamps dt in Nemotron-H, engines and we do not
            module.time_step_limit = (0.0, float("inf"))
    expected, found = (exact_logits_of(model, random_tokens()).log_softmax(-1) for model in (ours, theirs))
    assert (expected - found).abs().max() < 1e-5


def test_a_layer_score_is_what_removing_that_layer_does(checkpoint: Checkpoint) -> None:
    """Removed in transformers' model: whatever the layer writes into the hidden states is multiplied by zero."""
    found = score_layers(LayerStack(checkpoint), random_tokens())["mse"]
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.entries}

    def head_input(removed: int | None) -> torch.Tensor:
        changed = dict(tensors)
        for placed in checkpoint.architecture.layer_tensors(removed) if removed is not None else ():
            if placed.spec.dims[0] == HIDDEN and not placed.spec.rms_groups:
                changed[placed.name] = torch.zeros_like(tensors[placed.name])
        model = build_model(checkpoint.config, changed.items())
        with torch.no_grad():
            hidden_BTH: torch.Tensor = model.get_submodule("model")(random_tokens(), use_cache=False).last_hidden_state
        # What the head multiplies is scaled in our layers, the logits in transformers' model.
        return hidden_BTH.double() / float(checkpoint.config.get("logits_scaling", 1.0))

    full = head_input(None)
    wanted = [float((head_input(idx) - full).square().mean()) for idx in range(len(checkpoint.architecture.layers))]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert min(wanted) > 0


@pytest.mark.parametrize("model_type", ["gpt_new", None, 7])
def test_an_unknown_family_is_refused_by_its_name(model_type: Any) -> None:
    with pytest.raises(MinipuzzleError, match=repr(model_type)):
        read_architecture({"model_type": model_type})


@pytest.mark.parametrize("scheme", ["bf16", "fp8"])
def test_an_export_computes_what_its_source_does(checkpoint: Checkpoint, tmp_path: Path, scheme: str) -> None:
    """The exporter reads the folder back and compares: BF16 tensor by tensor, FP8 by what it computes."""
    exported = export_checkpoint(
        checkpoint, tmp_path / "out", ExportRequest(scheme=scheme), calibration_token_ids=random_tokens()
    )
    written = Checkpoint.open(tmp_path / "out").architecture
    assert written.tied_embeddings == (checkpoint.architecture.tied_embeddings and written.names.ties_head)
    assert exported.verification is not None
    assert exported.verification.relative_difference == pytest.approx(0, abs=1e-5)


def test_windows_follow_the_blocks_that_stay(folders: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(folders["qwen2"])
    assert [layer.sizes.get("window") for layer in checkpoint.architecture.layers[::2]] == [None, 9, 9]
    for kept_blocks, windows in (((1, 2), [9, 9]), ((0, 2), [None, 9]), ((0,), [None])):
        kept = tuple(idx for block_idx in kept_blocks for idx in checkpoint.architecture.blocks[block_idx])
        plan = replace(keep_everything(checkpoint.architecture), kept_layers=kept)
        written = read_architecture(checkpoint.family.write(checkpoint.config, plan.apply(checkpoint.architecture)))
        assert [layer.sizes.get("window") for layer in written.layers[::2]] == windows


def test_layers_that_stay_rotate_as_before(folders: dict[str, Path]) -> None:
    source = Checkpoint.open(folders["smollm3"])
    kept = tuple(idx for block_idx in (1, 2) for idx in source.architecture.blocks[block_idx])
    plan = replace(keep_everything(source.architecture), kept_layers=kept)
    written = source.family.write(source.config, plan.apply(source.architecture))
    assert written["no_rope_layers"] == [0, 1]
    assert read_architecture(written) == plan.apply(source.architecture)


def test_a_quantised_checkpoint_is_refused_with_the_field_named(folders: dict[str, Path]) -> None:
    source = Checkpoint.open(folders["llama"])
    quantised = Checkpoint(source.folder, {**source.config, "quantization_config": {}}, source.entries)
    with pytest.raises(MinipuzzleError, match="quantization_config"):
        LayerStack(quantised)


@pytest.mark.parametrize(
    ("model_type", "change", "word"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("nemotron", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, r"layer_types\[1\]"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"sliding_window": None}, "sliding_window"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_scaling"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("qwen3_5_text", {"layer_types": ["linear_attention", "mamba", "full_attention"]}, r"layer_types\[1\]"),
        ("qwen3_5_text", {"linear_num_value_heads": 6}, "linear_num_value_heads"),
        ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate"),
        ("qwen3_5_text", {"mamba_ssm_dtype": "int8"}, "mamba_ssm_dtype"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("mistral", {"head_dim": 0}, "head_dim"),
        ("qwen3_moe", {"num_experts": None}, "num_experts"),
        ("granitemoehybrid", {"layer_types": ["mamba", "rwkv"]}, r"layer_types\[1\]"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        ("nemotron_h", {"attention_bias": True}, "attention_bias"),
        ("nemotron_h", {"hybrid_override_pattern": "MXE"}, "layer 1 .*'X'"),
        ("nemotron_h", {"hybrid_override_pattern": "ME", "num_hidden_layers": 2}, "n_routed_experts"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_field_named(model_type: str, change: Any, word: str) -> None:
    with pytest.raises(MinipuzzleError, match=word):
        read_architecture({**FAMILIES[model_type].tiny_config, **change})
