"""The table of on-disk layouts: names, precisions and shapes of what is stored, and what both config files say.

``modelopt`` is NVIDIA ModelOpt's, read by vLLM, SGLang and TensorRT-LLM; ``compressed-tensors`` is read by vLLM and,
with the package of that name, by plain transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from minipuzzle.errors import MinipuzzleError
from minipuzzle.formats.e2m1 import BLOCK
from minipuzzle.formats.schemes import CODES, INPUT_SCALE, SCALES, TENSOR_SCALE

HF_QUANT_CONFIG = "hf_quant_config.json"
Shape = Callable[[int, int], tuple[int, ...]]  # of (outputs, inputs)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a quantised module: its name after the module's, what it is, and safetensors' name of its type.

    ``is_reciprocal``: the file holds 1 / scale.
    """

    suffix: str
    role: str
    dtype: str
    shape: Shape
    is_reciprocal: bool = False


@dataclass(frozen=True, kw_only=True)
class DescribedLayout:
    """What a ``quantization_config`` says. ``ignore``: entries for the modules that stay as they are."""

    scheme: str
    ignore: Sequence[str]
    fp8_kv_cache: bool


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One layout on disk.

    ``forms``: by scheme, the tensors of a quantised module. ``config``: config.json's ``quantization_config``.
    ``side_files``: further files by name. ``read``: the inverse of ``config``, None where it says something else.
    ``matches``: whether an entry of the ignore list means a module. ``default_activations``: of an FP8 export.
    """

    name: str
    engines: str
    forms: Mapping[str, tuple[StoredTensor, ...]]
    config: Callable[[DescribedLayout], dict[str, Any]]
    side_files: Callable[[DescribedLayout], dict[str, dict[str, Any]]]
    read: Callable[[Mapping[str, Any]], DescribedLayout | None]
    matches: Callable[[str, str], bool]
    has_cache_scales: bool
    loads_in_transformers: bool
    default_activations: str


def _names(value: object) -> Sequence[str]:
    """The entries of an ignore list.

    Raises: MinipuzzleError if it is anything but a list of printable names.
    """
    if not isinstance(value, Sequence) or not all(isinstance(name, str) and name.isprintable() for name in value):
        raise MinipuzzleError("config.json: the ignore list of quantization_config is damaged", "export again")
    return value


def _whole(out: int, inputs: int) -> tuple[int, ...]:
    return (out, inputs)


def _packed(out: int, inputs: int) -> tuple[int, ...]:
    return (out, inputs // 2)


def _blocks(out: int, inputs: int) -> tuple[int, ...]:
    return (out, inputs // BLOCK)


def _scalar(_out: int, _inputs: int) -> tuple[int, ...]:
    return ()


def _one(_out: int, _inputs: int) -> tuple[int, ...]:
    return (1,)


# --- ModelOpt ------------------------------------------------------------------------------------------------------

# The layout's name and version, by which engines choose their reader.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_STATIC_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_NVFP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
_MODELOPT_ALGORITHMS = {"fp8": "FP8", "fp8-dynamic": "FP8_PER_CHANNEL_PER_TOKEN", "nvfp4": "NVFP4"}
_MODELOPT_GROUPS: Mapping[str, dict[str, Any]] = {
    "fp8": {"input_activations": _STATIC_FP8, "weights": _STATIC_FP8},
    "fp8-dynamic": {
        "input_activations": {**_STATIC_FP8, "dynamic": True, "strategy": "token"},
        "weights": {**_STATIC_FP8, "strategy": "channel"},
    },
    "nvfp4": {"input_activations": _NVFP4, "weights": _NVFP4},
}
_MODELOPT_FORMS = {
    "fp8": (
        StoredTensor(suffix="weight", role=CODES, dtype="F8_E4M3", shape=_whole),
        StoredTensor(suffix="weight_scale", role=TENSOR_SCALE, dtype="F32", shape=_scalar),
        StoredTensor(suffix="input_scale", role=INPUT_SCALE, dtype="F32", shape=_scalar),
    ),
    "fp8-dynamic": (
        StoredTensor(suffix="weight", role=CODES, dtype="F8_E4M3", shape=_whole),
        StoredTensor(suffix="weight_scale", role=SCALES, dtype="F32", shape=lambda out, _inputs: (out,)),
    ),
    "nvfp4": (
        StoredTensor(suffix="weight", role=CODES, dtype="U8", shape=_packed),
        StoredTensor(suffix="weight_scale", role=SCALES, dtype="F8_E4M3", shape=_blocks),
        StoredTensor(suffix="weight_scale_2", role=TENSOR_SCALE, dtype="F32", shape=_scalar),
        StoredTensor(suffix="input_scale", role=INPUT_SCALE, dtype="F32", shape=_scalar),
    ),
}


def _modelopt_config(layout: DescribedLayout) -> dict[str, Any]:
    scheme = layout.scheme
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": _MODELOPT_ALGORITHMS[scheme],
        "ignore": list(layout.ignore),
        "config_groups": {"group_0": {**_MODELOPT_GROUPS[scheme], "targets": ["Linear"]}},
        "producer": _PRODUCER,
    }
    if scheme == "nvfp4":
        config["group_size"] = BLOCK
    if layout.fp8_kv_cache:
        config |= {"kv_cache_quant_algo": "FP8", "kv_cache_scheme": _STATIC_FP8}
    return config


def _modelopt_side_files(layout: DescribedLayout) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, which TensorRT-LLM and older engines read."""
    quantization: dict[str, Any] = {
        "quant_algo": _MODELOPT_ALGORITHMS[layout.scheme],
        "kv_cache_quant_algo": "FP8" if layout.fp8_kv_cache else None,
        "exclude_modules": list(layout.ignore),
    }
    if layout.scheme == "nvfp4":
        quantization["group_size"] = BLOCK
    return {HF_QUANT_CONFIG: {"producer": _PRODUCER, "quantization": quantization}}


def _read_modelopt(config: Mapping[str, Any]) -> DescribedLayout | None:
    scheme = next((name for name, found in _MODELOPT_ALGORITHMS.items() if found == config.get("quant_algo")), None)
    if scheme is None:
        return None
    has_cache = config.get("kv_cache_scheme") is not None
    return DescribedLayout(scheme=scheme, ignore=_names(config.get("ignore")), fp8_kv_cache=has_cache)


# --- compressed-tensors --------------------------------------------------------------------------------------------

_CT_WEIGHTS: Mapping[str, dict[str, Any]] = {
    "fp8": {"num_bits": 8, "strategy": "tensor"},
    "fp8-dynamic": {"num_bits": 8, "strategy": "channel"},
    "nvfp4": {"num_bits": 4, "strategy": "tensor_group", "group_size": BLOCK},
}
_CT_INPUTS: Mapping[str, dict[str, Any]] = {
    "fp8": {"num_bits": 8, "strategy": "tensor", "dynamic": False},
    "fp8-dynamic": {"num_bits": 8, "strategy": "token", "dynamic": True},
    "nvfp4": {"num_bits": 4, "strategy": "tensor_group", "group_size": BLOCK, "dynamic": "local"},
}
_CT_FORMATS = {"fp8": "float-quantized", "fp8-dynamic": "float-quantized", "nvfp4": "nvfp4-pack-quantized"}
# transformers multiplies codes, cast to the model's BF16, with these scales: float32 ones would end in a type error.
_CT_FORMS = {
    "fp8": (
        StoredTensor(suffix="weight", role=CODES, dtype="F8_E4M3", shape=_whole),
        StoredTensor(suffix="weight_scale", role=TENSOR_SCALE, dtype="BF16", shape=_one),
        StoredTensor(suffix="input_scale", role=INPUT_SCALE, dtype="BF16", shape=_one),
    ),
    "fp8-dynamic": (
        StoredTensor(suffix="weight", role=CODES, dtype="F8_E4M3", shape=_whole),
        StoredTensor(suffix="weight_scale", role=SCALES, dtype="BF16", shape=lambda out, _inputs: (out, 1)),
    ),
    "nvfp4": (
        StoredTensor(suffix="weight_packed", role=CODES, dtype="U8", shape=_packed),
        StoredTensor(suffix="weight_scale", role=SCALES, dtype="F8_E4M3", shape=_blocks),
        StoredTensor(suffix="weight_global_scale", role=TENSOR_SCALE, dtype="F32", shape=_one, is_reciprocal=True),
        StoredTensor(suffix="input_global_scale", role=INPUT_SCALE, dtype="F32", shape=_one, is_reciprocal=True),
    ),
}


def _ct_config(layout: DescribedLayout) -> dict[str, Any]:
    scheme = layout.scheme
    common = {"type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "dynamic": False, **_CT_WEIGHTS[scheme]},
        "input_activations": {**common, **_CT_INPUTS[scheme]},
        "output_activations": None,
        "format": _CT_FORMATS[scheme],
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _CT_FORMATS[scheme],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [_ct_entry(module) for module in layout.ignore],
        "kv_cache_scheme": None,
    }


def _ct_entry(module: str) -> str:
    """An entry that fits the module's name on disk, in transformers and in vLLM, which differ in their first part."""
    first, dot, rest = module.partition(".")
    return rf"re:.*\.{re.escape(rest)}$" if dot else first


def _read_ct(config: Mapping[str, Any]) -> DescribedLayout | None:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    (group,) = groups.values()
    if not isinstance(group, Mapping) or group.get("targets") != ["Linear"] or config.get("kv_cache_scheme"):
        return None
    for scheme, weights in _CT_WEIGHTS.items():
        wanted = ((group.get("weights"), weights), (group.get("input_activations"), _CT_INPUTS[scheme]))
        if all(isinstance(found, Mapping) and expected.items() <= found.items() for found, expected in wanted):
            return DescribedLayout(scheme=scheme, ignore=_names(config.get("ignore")), fp8_kv_cache=False)
    return None


def _ct_matches(entry: str, module: str) -> bool:
    return bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module


def no_side_files(_layout: DescribedLayout) -> dict[str, dict[str, Any]]:
    """The side files of a layout that has none."""
    return {}


_FLAVOURS: Sequence[Flavour] = (
    Flavour(
        name="modelopt",
        engines="vLLM, SGLang, TensorRT-LLM",
        forms=_MODELOPT_FORMS,
        config=_modelopt_config,
        side_files=_modelopt_side_files,
        read=_read_modelopt,
        matches=lambda entry, module: fnmatchcase(module, entry),
        has_cache_scales=True,
        loads_in_transformers=False,
        default_activations="static",
    ),
    Flavour(
        name="compressed-tensors",
        engines="vLLM, transformers with the package compressed-tensors",
        forms=_CT_FORMS,
        config=_ct_config,
        side_files=no_side_files,
        read=_read_ct,
        matches=_ct_matches,
        has_cache_scales=False,
        loads_in_transformers=True,
        default_activations="dynamic",
    ),
)

FLAVOURS: Mapping[str, Flavour] = MappingProxyType({flavour.name: flavour for flavour in _FLAVOURS})
# (format asked for, activations asked for) -> scheme; NVFP4 has its own rule for activations.
SCHEME_OF: Mapping[tuple[str, str], str] = MappingProxyType(
    {("fp8", "static"): "fp8", ("fp8", "dynamic"): "fp8-dynamic", ("nvfp4", "static"): "nvfp4"}
)
