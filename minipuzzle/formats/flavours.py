"""The table of on-disk layouts: names, precisions and shapes of what is stored, and what both config files say.

``modelopt`` is NVIDIA ModelOpt's, read by vLLM, SGLang and TensorRT-LLM; ``compressed-tensors`` is read by vLLM and,
with the package of that name, by plain transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from minipuzzle.architecture.memory import NVFP4_BLOCK as BLOCK
from minipuzzle.errors import MinipuzzleError
from minipuzzle.table import Table

# What a quantised weight is made of. CODES and SCALES run along its rows; TENSOR_SCALE and INPUT_SCALE are single.
CODES, SCALES, TENSOR_SCALE, INPUT_SCALE = "codes", "scales", "tensor_scale", "input_scale"
HF_QUANT_CONFIG = "hf_quant_config.json"
# Shapes of stored tensors, from numbers of outputs and inputs.
SHAPES: Mapping[str, Callable[[int, int], tuple[int, ...]]] = {
    "whole": lambda out, inputs: (out, inputs),
    "halved": lambda out, inputs: (out, inputs // 2),
    "blocks": lambda out, inputs: (out, inputs // BLOCK),
    "rows": lambda out, _inputs: (out,),
    "column": lambda out, _inputs: (out, 1),
    "scalar": lambda _out, _inputs: (),
    "one": lambda _out, _inputs: (1,),
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a quantised module: its name after the module's, what it is, and safetensors' name of its type.

    ``form``: a name in SHAPES. ``is_reciprocal``: the file holds 1 / scale.
    """

    suffix: str
    role: str
    dtype: str
    form: str
    is_reciprocal: bool = False

    def shape(self, out: int, inputs: int) -> tuple[int, ...]:
        """For a module of so many outputs and inputs."""
        return SHAPES[self.form](out, inputs)


@dataclass(frozen=True, kw_only=True)
class StoredForm:
    """How one scheme is stored: the tensors of a quantised module, and what the layout's config says of it.

    ``algorithm``: the layout's name of the scheme. ``weights``, ``inputs``: fields of its ``config_groups``.
    """

    scheme: str
    algorithm: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]


def _by_scheme(*forms: StoredForm) -> Mapping[str, StoredForm]:
    return {form.scheme: form for form in forms}


@dataclass(frozen=True, kw_only=True)
class DescribedLayout:
    """What a ``quantization_config`` says. ``ignore``: entries for the modules that stay as they are."""

    scheme: str
    ignore: Sequence[str]
    fp8_kv_cache: bool


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One layout on disk.

    ``forms``: how it stores the schemes that it knows. ``config``: config.json's ``quantization_config``.
    ``side_files``: further files by name. ``read``: the inverse of ``config``, None where it says something else.
    ``matches``: whether an entry of the ignore list means a module. ``default_activations``: of an FP8 export.
    """

    name: str
    engines: str
    forms: Mapping[str, StoredForm]
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


# --- ModelOpt ------------------------------------------------------------------------------------------------------

# The layout's name and version, by which engines choose their reader.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_STATIC_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_NVFP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
_MODELOPT_FORMS = _by_scheme(
    StoredForm(
        scheme="fp8",
        algorithm="FP8",
        weights=_STATIC_FP8,
        inputs=_STATIC_FP8,
        tensors=(
            StoredTensor(suffix="weight", role=CODES, dtype="F8_E4M3", form="whole"),
            StoredTensor(suffix="weight_scale", role=TENSOR_SCALE, dtype="F32", form="scalar"),
            StoredTensor(suffix="input_scale", role=INPUT_SCALE, dtype="F32", form="scalar"),
        ),
    ),
    StoredForm(
        scheme="fp8-dynamic",
        algorithm="FP8_PER_CHANNEL_PER_TOKEN",
        weights={**_STATIC_FP8, "strategy": "channel"},
        inputs={**_STATIC_FP8, "dynamic": True, "strategy": "token"},
        tensors=(
            StoredTensor(suffix="weight", role=CODES, dtype="F8_E4M3", form="whole"),
            StoredTensor(suffix="weight_scale", role=SCALES, dtype="F32", form="rows"),
        ),
    ),
    StoredForm(
        scheme="nvfp4",
        algorithm="NVFP4",
        weights=_NVFP4,
        inputs=_NVFP4,
        tensors=(
            StoredTensor(suffix="weight", role=CODES, dtype="U8", form="halved"),
            StoredTensor(suffix="weight_scale", role=SCALES, dtype="F8_E4M3", form="blocks"),
            StoredTensor(suffix="weight_scale_2", role=TENSOR_SCALE, dtype="F32", form="scalar"),
            StoredTensor(suffix="input_scale", role=INPUT_SCALE, dtype="F32", form="scalar"),
        ),
    ),
)


def _modelopt_config(layout: DescribedLayout) -> dict[str, Any]:
    form = _MODELOPT_FORMS[layout.scheme]
    group = {"input_activations": form.inputs, "weights": form.weights, "targets": ["Linear"]}
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": form.algorithm,
        "ignore": list(layout.ignore),
        "config_groups": {"group_0": group},
        "producer": _PRODUCER,
        **_group_size(form),
    }
    if layout.fp8_kv_cache:
        config |= {"kv_cache_quant_algo": "FP8", "kv_cache_scheme": _STATIC_FP8}
    return config


def _group_size(form: StoredForm) -> dict[str, Any]:
    return {name: value for name, value in form.weights.items() if name == "group_size"}


def _modelopt_side_files(layout: DescribedLayout) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, which TensorRT-LLM and older engines read."""
    form = _MODELOPT_FORMS[layout.scheme]
    quantization = {
        "quant_algo": form.algorithm,
        "kv_cache_quant_algo": "FP8" if layout.fp8_kv_cache else None,
        "exclude_modules": list(layout.ignore),
        **_group_size(form),
    }
    return {HF_QUANT_CONFIG: {"producer": _PRODUCER, "quantization": quantization}}


def _read_modelopt(config: Mapping[str, Any]) -> DescribedLayout | None:
    form = next((form for form in _MODELOPT_FORMS.values() if form.algorithm == config.get("quant_algo")), None)
    if form is None:
        return None
    has_cache = config.get("kv_cache_scheme") is not None
    return DescribedLayout(scheme=form.scheme, ignore=_names(config.get("ignore")), fp8_kv_cache=has_cache)


# --- compressed-tensors --------------------------------------------------------------------------------------------

# transformers multiplies codes, cast to the model's BF16, with these scales: float32 ones would end in a type error.
_CT_FORMS = _by_scheme(
    StoredForm(
        scheme="fp8",
        algorithm="float-quantized",
        weights={"num_bits": 8, "strategy": "tensor"},
        inputs={"num_bits": 8, "strategy": "tensor", "dynamic": False},
        tensors=(
            StoredTensor(suffix="weight", role=CODES, dtype="F8_E4M3", form="whole"),
            StoredTensor(suffix="weight_scale", role=TENSOR_SCALE, dtype="BF16", form="one"),
            StoredTensor(suffix="input_scale", role=INPUT_SCALE, dtype="BF16", form="one"),
        ),
    ),
    StoredForm(
        scheme="fp8-dynamic",
        algorithm="float-quantized",
        weights={"num_bits": 8, "strategy": "channel"},
        inputs={"num_bits": 8, "strategy": "token", "dynamic": True},
        tensors=(
            StoredTensor(suffix="weight", role=CODES, dtype="F8_E4M3", form="whole"),
            StoredTensor(suffix="weight_scale", role=SCALES, dtype="BF16", form="column"),
        ),
    ),
    StoredForm(
        scheme="nvfp4",
        algorithm="nvfp4-pack-quantized",
        weights={"num_bits": 4, "strategy": "tensor_group", "group_size": BLOCK},
        inputs={
            "num_bits": 4,
            "strategy": "tensor_group",
            "group_size": BLOCK,
            "dynamic": "local",
            "scale_dtype": "torch.float8_e4m3fn",
        },
        tensors=(
            StoredTensor(suffix="weight_packed", role=CODES, dtype="U8", form="halved"),
            StoredTensor(suffix="weight_scale", role=SCALES, dtype="F8_E4M3", form="blocks"),
            StoredTensor(suffix="weight_global_scale", role=TENSOR_SCALE, dtype="F32", form="one", is_reciprocal=True),
            StoredTensor(suffix="input_global_scale", role=INPUT_SCALE, dtype="F32", form="one", is_reciprocal=True),
        ),
    ),
)


def _ct_config(layout: DescribedLayout) -> dict[str, Any]:
    form = _CT_FORMS[layout.scheme]
    common = {"type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "dynamic": False, **form.weights},
        "input_activations": {**common, **form.inputs},
        "output_activations": None,
        "format": form.algorithm,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form.algorithm,
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
    for form in _CT_FORMS.values():
        wanted = ((group.get("weights"), form.weights), (group.get("input_activations"), form.inputs))
        if all(isinstance(found, Mapping) and _says(found, expected) for found, expected in wanted):
            ignore = _names(config.get("ignore"))
            _check_patterns(ignore)
            return DescribedLayout(scheme=form.scheme, ignore=ignore, fp8_kv_cache=False)
    return None


def _says(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether fields are as expected; what older programs leave out of NVFP4 is what they mean."""
    given = {name: value for name, value in found.items() if value is not None}
    return all(given.get(name, value if name == "scale_dtype" else None) == value for name, value in expected.items())


def _check_patterns(ignore: Sequence[str]) -> None:
    for entry in ignore:
        try:
            re.compile(entry[3:] if entry.startswith("re:") else "")
        except (re.error, OverflowError, RecursionError) as error:
            raise MinipuzzleError(f"config.json: {entry!r} in the ignore list: {error}", "export again") from None


_FLAVOURS = (
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
        side_files=lambda _layout: {},
        read=_read_ct,
        matches=lambda entry, name: bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name,
        has_cache_scales=False,
        loads_in_transformers=True,
        default_activations="dynamic",
    ),
)

FLAVOURS = Table("flavour", "flavours", entries={flavour.name: flavour for flavour in _FLAVOURS})
