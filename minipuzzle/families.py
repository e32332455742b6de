"""The table of model families: how each maps config.json to an Architecture and back, and where its modules live.

Adding a family means adding one entry to FAMILIES; everything else works from the Architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from minipuzzle.architecture import Architecture, TensorNames
from minipuzzle.errors import MinipuzzleError
from minipuzzle.layer_kinds import LAYER_KINDS, LayerSpec

if TYPE_CHECKING:
    from torch import nn

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModulePaths:
    """Where transformers keeps the parts of a model in memory, and how tensor names on disk map there."""

    layers: str
    embeddings: str
    final_norm: str
    head: str
    disk_prefix: str
    module_prefix: str

    def module_name(self, disk_name: str) -> str:
        """The parameter name in memory of a tensor on disk."""
        if disk_name.startswith(self.disk_prefix):
            return self.module_prefix + disk_name.removeprefix(self.disk_prefix)
        return disk_name


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    ``read`` turns config.json into an Architecture. ``write`` turns the source's config.json into that of a cut
    model. ``prepare`` adjusts a loaded module so that it computes what serving engines compute.
    ``tiny_config`` is a config.json small enough for tests.
    """

    model_type: str
    modules: ModulePaths
    read: Callable[[Config], Architecture]
    write: Callable[[Config, Architecture], dict[str, Any]]
    prepare: Callable[[nn.Module], None]
    tiny_config: Config


def family_of(config: Config) -> Family:
    """The family of a config.json.

    Raises: MinipuzzleError for an unknown ``model_type``.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise MinipuzzleError(
            f"model_type {model_type!r} is not supported",
            f"supported families: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]


def read_architecture(config: Config) -> Architecture:
    """The architecture that a config.json describes."""
    return family_of(config).read(config)


# --- nemotron_h: Mamba-2, attention and MLP layers, one mixer a block ----------------------------------------------

_NEMOTRON_H_NAMES = TensorNames(
    layer_prefix="backbone.layers.{layer_idx}.",
    mixers=dict.fromkeys(("mamba", "attention", "mlp"), ("mixer.", "norm.weight")),
    embeddings="backbone.embeddings.weight",
    final_norm="backbone.norm_f.weight",
    head="lm_head.weight",
)
_KIND_OF_SYMBOL = {kind.symbol: kind.name for kind in LAYER_KINDS.values()}
_KIND_OF_BLOCK_TYPE = {
    "linear_attention": "mamba",
    "mamba": "mamba",
    "full_attention": "attention",
    "attention": "attention",
    "mlp": "mlp",
}
# Keys that make engines misread a dense cut model. transformers adds the MoE defaults to any file it saves, and
# llama.cpp then builds an MoE; SGLang and vLLM <= 0.31 reject layers_block_type; Infinity is not JSON.
_UNPORTABLE_KEYS = (
    "layers_block_type",
    "layer_types",
    "mtp_layers_block_type",
    "mtp_hybrid_override_pattern",
    "num_nextn_predict_layers",
    "time_step_limit",
    "auto_map",
    "_name_or_path",
    "transformers_version",
    "quantization_config",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_overlap",
    "routed_scaling_factor",
    "norm_topk_prob",
    "n_group",
    "topk_group",
    "output_router_logits",
)


def _nemotron_h_kinds(config: Config) -> list[str]:
    if "hybrid_override_pattern" in config:
        table, found = _KIND_OF_SYMBOL, list(config["hybrid_override_pattern"])
    else:
        table, found = _KIND_OF_BLOCK_TYPE, list(config.get("layers_block_type") or config.get("layer_types") or ())
    if not found:
        raise MinipuzzleError("config.json names no layers", "it needs hybrid_override_pattern or layers_block_type")
    for layer_idx, block_type in enumerate(found):
        if block_type not in table:
            raise MinipuzzleError(
                f"layer {layer_idx} has the unsupported type {block_type!r}",
                f"supported here: {', '.join(table)}",
            )
    return [table[block_type] for block_type in found]


def _require(config: Config, field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MinipuzzleError(f"config.json: {field} is {value!r}, not a positive whole number", "complete the file")
    return value


def _divide(numerator: int, denominator: int, what: str) -> int:
    if numerator % denominator:
        problem = f"config.json: {what}: {numerator} is not a multiple of {denominator}"
        raise MinipuzzleError(problem, "correct the file")
    return numerator // denominator


def _nemotron_h_layer(kind: str, config: Config) -> LayerSpec:
    hidden = _require(config, "hidden_size")
    if kind == "mamba":
        heads, groups = _require(config, "mamba_num_heads"), _require(config, "n_groups")
        _divide(heads, groups, "mamba_num_heads by n_groups")
        sizes = {
            "ssm_head": heads,
            "ssm_head_channel": _require(config, "mamba_head_dim"),
            "ssm_group": groups,
            "ssm_state": _require(config, "ssm_state_size"),
            "conv_kernel": _require(config, "conv_kernel"),
        }
        # transformers builds in_proj and out_proj with use_bias; mamba_proj_bias is read by other engines.
        flags = {"bias": config.get("use_bias", False), "conv_bias": config.get("use_conv_bias", True)}
    elif kind == "attention":
        queries, kv_groups = _require(config, "num_attention_heads"), _require(config, "num_key_value_heads")
        head_dim = config.get("head_dim") or config.get("attention_head_dim")
        sizes = {
            "kv_group": kv_groups,
            "queries_per_group": _divide(queries, kv_groups, "num_attention_heads by num_key_value_heads"),
            "head_dim": int(head_dim) if head_dim else _divide(hidden, queries, "hidden_size by num_attention_heads"),
        }
        flags = {"bias": config.get("attention_bias", False)}
    else:
        sizes, flags = {"ffn": _require(config, "intermediate_size")}, {"bias": config.get("mlp_bias", False)}
    options = frozenset(name for name, is_on in flags.items() if is_on)
    return LayerSpec(kind=kind, sizes={"hidden": hidden, **sizes}, options=options)


_PRECISION_OF_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _ssm_state_precision(config: Config) -> str:
    dtype = config.get("mamba_ssm_cache_dtype") or "float32"
    if dtype not in _PRECISION_OF_DTYPE:
        raise MinipuzzleError(
            f"config.json: mamba_ssm_cache_dtype is {dtype!r}", f"use one of {', '.join(_PRECISION_OF_DTYPE)}"
        )
    return _PRECISION_OF_DTYPE[dtype]


def _read_nemotron_h(config: Config) -> Architecture:
    return Architecture(
        model_type="nemotron_h",
        layers=tuple(_nemotron_h_layer(kind, config) for kind in _nemotron_h_kinds(config)),
        hidden=_require(config, "hidden_size"),
        vocabulary=_require(config, "vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        names=_NEMOTRON_H_NAMES,
        ssm_state_precision=_ssm_state_precision(config),
    )


def _uniform_sizes(architecture: Architecture, kind: str) -> Mapping[str, int] | None:
    layers = [layer for layer in architecture.layers if layer.kind == kind]
    if not layers:
        return None
    if any(layer.sizes != layers[0].sizes for layer in layers):
        raise MinipuzzleError(
            f"the {kind} layers differ in width, which config.json of {architecture.model_type} cannot say",
            "give all layers of a kind the same widths",
        )
    return layers[0].sizes


def _write_nemotron_h(source: Config, architecture: Architecture) -> dict[str, Any]:
    config = {key: value for key, value in source.items() if key not in _UNPORTABLE_KEYS}
    config |= {
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": architecture.pattern,
        "num_hidden_layers": len(architecture.layers),
        "hidden_size": architecture.hidden,
        "tie_word_embeddings": False,
    }
    if mamba := _uniform_sizes(architecture, "mamba"):
        config |= {"mamba_num_heads": mamba["ssm_head"], "mamba_head_dim": mamba["ssm_head_channel"]}
    if attention := _uniform_sizes(architecture, "attention"):
        config |= {
            "num_attention_heads": attention["kv_group"] * attention["queries_per_group"],
            "num_key_value_heads": attention["kv_group"],
            "head_dim": attention["head_dim"],
        }
    if mlp := _uniform_sizes(architecture, "mlp"):
        config["intermediate_size"] = mlp["ffn"]
    dtype = source.get("dtype") or source.get("torch_dtype") or "bfloat16"
    # Engines differ in which of the two names they read; keys with defaults are spelled out for mlx-lm.
    config |= {"dtype": dtype, "torch_dtype": dtype}
    defaults = {"mamba_proj_bias": False, "use_bias": False, "mlp_bias": False, "attention_bias": False}
    return {**defaults, "use_conv_bias": True, **config}


def _prepare_nemotron_h(model: nn.Module) -> None:
    # transformers clamps dt at time_step_min, which only serves initialisation; no engine and no kernel does.
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.__dict__["time_step_limit"] = (0.0, float("inf"))


_NEMOTRON_H = Family(
    model_type="nemotron_h",
    modules=ModulePaths(
        layers="model.layers",
        embeddings="model.embeddings",
        final_norm="model.norm_f",
        head="lm_head",
        disk_prefix="backbone.",
        module_prefix="model.",
    ),
    read=_read_nemotron_h,
    write=_write_nemotron_h,
    prepare=_prepare_nemotron_h,
    tiny_config={
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": "M-M*-M-",
        "num_hidden_layers": 7,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "mlp_hidden_act": "relu2",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "chunk_size": 16,
        "max_position_embeddings": 256,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "mlp_bias": False,
        "attention_bias": False,
        "mamba_proj_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
        "torch_dtype": "float32",
    },
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in (_NEMOTRON_H,)})
