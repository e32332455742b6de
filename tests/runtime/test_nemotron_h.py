"""Guarantee: what the registry says of Nemotron-H models is what they are, for irregular layer patterns too.

Parameters and shapes equal the transformers model's, counts equal modelopt's own formula, cache bytes equal those of
the cache that transformers really fills, and config.json is one that all engines read.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch

from minipuzzle.architecture.families import FAMILIES, Family, read_architecture
from minipuzzle.architecture.model import Architecture
from minipuzzle.errors import MinipuzzleError
from minipuzzle.runtime.models import build_on_meta
from tests.support.oracles import caches_of

PATTERNS = ("M-M*-M-", "M---MM---M*-", "M", "*-", "M-M")


@pytest.fixture
def family() -> Family:
    return FAMILIES["nemotron_h"]


def with_pattern(family: Family, pattern: str) -> dict[str, Any]:
    return {**family.tiny_config, "hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tensor_names_and_shapes_equal_the_transformers_model(family: Family, pattern: str) -> None:
    config = with_pattern(family, pattern)
    model = build_on_meta(config, torch.bfloat16)
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    found = {family.modules.module_name(tensor.name): tensor.shape for tensor in read_architecture(config).tensors()}
    assert found == expected


def test_biases_and_gates_follow_the_config(family: Family) -> None:
    config = {**family.tiny_config, "use_bias": True, "mlp_bias": True, "use_conv_bias": False}
    model = build_on_meta(config, torch.float32)
    assert read_architecture(config).num_parameters == sum(p.numel() for p in model.parameters())


def modelopt_parameter_count(architecture: Architecture) -> int:
    """modelopt's closed-form count. Its module imports Megatron at the top only for unrelated helpers."""
    names = ("megatron", "megatron.core", "megatron.core.models", "megatron.core.models.hybrid")
    stubs: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    hybrid, parallel = "megatron.core.models.hybrid.hybrid_model", "megatron.core.parallel_state"
    stubs |= {hybrid: types.ModuleType(hybrid), parallel: types.ModuleType(parallel)}
    stubs[hybrid].HybridModel = object
    for kind in ("expert_tensor_and_model", "pipeline_model", "tensor_model"):
        setattr(stubs[parallel], f"get_{kind}_parallel_group", None)
    for kind in ("expert_tensor", "tensor_model"):
        setattr(stubs[parallel], f"get_{kind}_parallel_rank", None)
    before = set(sys.modules)
    importlib.import_module("modelopt.torch.nas")  # without the stubs, so that no plugin is registered for them
    sys.modules.update(stubs)
    try:
        module = importlib.import_module("modelopt.torch.nas.plugins.megatron_model_stats")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "megatron" and name not in before]:
            del sys.modules[name]
    total, _active = module.mcore_param_count(
        types.SimpleNamespace(
            hidden_size=architecture.hidden,
            num_layers=len(architecture.layers),
            num_attention_heads=(architecture.width("kv_group") or 1) * (architecture.width("queries_per_group") or 1),
            num_query_groups=architecture.width("kv_group"),
            kv_channels=architecture.width("head_dim"),
            ffn_hidden_size=architecture.width("ffn"),
            mamba_num_heads=architecture.width("ssm_head"),
            mamba_head_dim=architecture.width("ssm_head_channel"),
            mamba_num_groups=architecture.width("ssm_group"),
            mamba_state_dim=architecture.width("ssm_state"),
            normalization="RMSNorm",
        ),
        vocab_size=architecture.vocabulary,
        hybrid_layer_pattern=architecture.pattern,
    )
    return int(total)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_parameter_count_equals_modelopts(family: Family, pattern: str) -> None:
    architecture = read_architecture(with_pattern(family, pattern))
    assert architecture.num_parameters == modelopt_parameter_count(architecture)


def test_nemotron_nano_9b_has_its_published_parameter_count() -> None:
    """8.888e9 parameters: 56 layers, 27 Mamba, 25 MLP and 4 attention, hidden 4480 (arXiv 2508.14444)."""
    config = {
        **FAMILIES["nemotron_h"].tiny_config,
        "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        "num_hidden_layers": 56,
        "vocab_size": 131072,
        "hidden_size": 4480,
        "intermediate_size": 15680,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 80,
        "n_groups": 8,
        "ssm_state_size": 128,
    }
    architecture = read_architecture(config)
    assert architecture.layer_counts == {"mamba": 27, "attention": 4, "mlp": 25}
    assert architecture.num_parameters == pytest.approx(8.888e9, rel=1e-3)


# transformers 5.23 refuses to count the tokens of a cache without attention layers.
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if "*" in pattern])
def test_cache_elements_equal_those_of_the_filled_cache(family: Family, pattern: str, tokens: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = with_pattern(family, pattern)
    settings = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **settings))
    cache = model(torch.ones(2, tokens, dtype=torch.long), use_cache=True).past_key_values
    real = {"kv": 0, "ssm_state": 0, "conv_state": 0}
    for layer_idx, layer in enumerate(read_architecture(config).layers):
        held = cache.layers[layer_idx]
        if layer.kind == "attention":
            real["kv"] += held.keys.numel() + held.values.numel()
        elif layer.kind == "mamba":
            real["ssm_state"] += held.recurrent_states[0].numel()
            # Its convolution state has one column more than engines keep (or than its window, if that is shorter).
            columns = held.conv_states[0]
            real["conv_state"] += columns.numel() // columns.shape[-1] * (layer.sizes["conv_kernel"] - 1)
    expected = dict.fromkeys(real, 0)
    for spec in caches_of(read_architecture(config)):
        expected[spec.name] += 2 * spec.num_elements * (tokens if spec.per_token else 1)
    assert expected == real


def test_written_config_is_portable_whatever_transformers_put_into_the_source() -> None:
    from transformers import AutoConfig

    family = FAMILIES["nemotron_h"]
    settings = {key: value for key, value in family.tiny_config.items() if key != "model_type"}
    source = AutoConfig.for_model("nemotron_h", **settings).to_dict()
    written = family.write(source, family.read(source))
    assert written["hybrid_override_pattern"] == "M-M*-M-"
    assert written["num_hidden_layers"] == 7
    assert written["tie_word_embeddings"] is False
    assert written["dtype"] == written["torch_dtype"]
    misleading = ("layers_block_type", "layer_types", "time_step_limit", "auto_map")
    assert not [key for key in written if "expert" in key or "moe" in key or "mtp" in key or key in misleading]


def test_layer_names_of_transformers_and_of_nvidia_describe_the_same_model() -> None:
    family = FAMILIES["nemotron_h"]
    without_pattern = {key: value for key, value in family.tiny_config.items() if key != "hybrid_override_pattern"}
    for names in (("linear_attention", "full_attention"), ("mamba", "attention")):
        by_symbol = {"M": names[0], "*": names[1], "-": "mlp"}
        blocks = [by_symbol[symbol] for symbol in family.tiny_config["hybrid_override_pattern"]]
        assert family.read({**without_pattern, "layers_block_type": blocks}) == family.read(family.tiny_config)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hybrid_override_pattern": "M-X"}, "'X'"),
        ({"hybrid_override_pattern": ""}, "no layers"),
        ({"mamba_num_heads": 5}, "multiple"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"hidden_size": "32"}, "hidden_size"),
    ],
)
def test_a_config_that_cannot_be_read_is_an_error_that_names_the_field(change: dict[str, Any], word: str) -> None:
    with pytest.raises(MinipuzzleError, match=word):
        read_architecture({**FAMILIES["nemotron_h"].tiny_config, **change})
