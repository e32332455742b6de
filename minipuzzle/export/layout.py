"""ModelOpt's FP8 layout on disk: which modules are quantised, which share scales, what both config files say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from minipuzzle.architecture import Architecture, PlacedTensor
from minipuzzle.errors import MinipuzzleError

HF_QUANT_CONFIG = "hf_quant_config.json"
WEIGHT = ".weight"
RECIPES: Mapping[str, str] = {
    "default": "all linear layers of Mamba, attention and MLP in FP8",
    "mamba-safe": "linear layers of Mamba and MLP in FP8, attention in BF16",
}
# Engines fuse these into one matrix with one scale; with unequal scales they would round the weights a second time.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Where an FP8 cache's scales are stored: with the module that computes what is cached.
CACHE_SCALES: Mapping[str, str] = {"k_proj": "k_scale", "v_proj": "v_scale"}
# The layout's name and version, by which engines choose their reader.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_STATIC_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}


@dataclass(frozen=True, kw_only=True)
class Fp8Layout:
    """What of an architecture is FP8. Module names are those on disk, without ``.weight``.

    ``ignored``: modules with a matrix that stay BF16. ``fp8_kv_cache``: whether scales for the cache are stored.
    """

    quantized: tuple[str, ...]
    ignored: tuple[str, ...]
    fp8_kv_cache: bool = False

    def __post_init__(self) -> None:
        for entry in self.ignored:
            assert entry.isprintable(), f"ignore list: {entry!r} holds unprintable characters"
            # vLLM leaves out every module whose name contains an entry: "backbone.layers.1" would hit layers 10 to 19.
            caught = next((module for module in self.quantized if entry in module), None)
            assert caught is None, f"ignore list: {entry!r} would also catch {caught}"

    @property
    def cached(self) -> tuple[str, ...]:
        """Modules whose outputs an FP8 cache keeps; none without one."""
        # Keys and values are cached in FP8 whether or not attention's own weights are.
        modules = (*self.quantized, *self.ignored) if self.fp8_kv_cache else ()
        return tuple(module for module in modules if _last(module) in CACHE_SCALES)

    def scale_group(self, module: str) -> tuple[str, ...]:
        """The quantised modules that share scales with one, itself included."""
        parent = module.removesuffix(_last(module))
        siblings = next((group for group in _FUSED if _last(module) in group), (_last(module),))
        return tuple(parent + name for name in siblings if parent + name in self.quantized)


def fp8_layout(architecture: Architecture, *, recipe: str, fp8_kv_cache: bool) -> Fp8Layout:
    """The layout that a recipe gives an architecture.

    Raises: MinipuzzleError for an unknown recipe, or an FP8 cache where no layer has a KV cache.
    """
    if recipe not in RECIPES:
        raise MinipuzzleError(f"unknown recipe {recipe!r}", f"use one of {', '.join(RECIPES)}")
    if fp8_kv_cache and not architecture.layer_indices("attention"):
        raise MinipuzzleError("the model has no attention layer, so no KV cache", "leave out --kv-cache-fp8")
    matrices = [tensor for tensor in architecture.tensors() if len(tensor.shape) > 1]
    is_fp8 = {module_of(tensor): _is_quantized(tensor, recipe) for tensor in matrices}
    return Fp8Layout(
        quantized=tuple(module for module, quantized in is_fp8.items() if quantized),
        ignored=tuple(module for module, quantized in is_fp8.items() if not quantized),
        fp8_kv_cache=fp8_kv_cache,
    )


def _is_quantized(tensor: PlacedTensor, recipe: str) -> bool:
    return tensor.spec.quantized and not (recipe == "mamba-safe" and tensor.part == "attention")


def module_of(tensor: PlacedTensor) -> str:
    """The module that a matrix belongs to, by its name on disk."""
    assert tensor.name.endswith(WEIGHT), f"{tensor.name} is a matrix but not a weight"
    return tensor.name.removesuffix(WEIGHT)


def quantization_config(layout: Fp8Layout) -> dict[str, Any]:
    """The ``quantization_config`` of config.json."""
    group = {"input_activations": _STATIC_FP8, "weights": _STATIC_FP8, "targets": ["Linear"]}
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": list(layout.ignored),
        "config_groups": {"group_0": group},
        "producer": _PRODUCER,
    }
    if layout.fp8_kv_cache:
        config |= {"kv_cache_quant_algo": "FP8", "kv_cache_scheme": _STATIC_FP8}
    return config


def hf_quant_config(layout: Fp8Layout) -> dict[str, Any]:
    """The content of hf_quant_config.json, which TensorRT-LLM and older engines read."""
    return {
        "producer": _PRODUCER,
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8" if layout.fp8_kv_cache else None,
            "exclude_modules": list(layout.ignored),
        },
    }


def read_layout(architecture: Architecture, config: Mapping[str, Any]) -> Fp8Layout:
    """The layout that a ``quantization_config`` describes.

    Raises: MinipuzzleError for any other format, or an ignore list that fits no known engine.
    """
    found = f"{config.get('quant_method')!r}/{config.get('quant_algo')!r}"
    if (config.get("quant_method"), config.get("quant_algo")) != ("modelopt", "FP8"):
        raise MinipuzzleError(
            f"weights quantised as {found} cannot be read",
            "plain weights can, and FP8 exports in ModelOpt's layout ('modelopt'/'FP8')",
        )
    ignore = config.get("ignore")
    if not isinstance(ignore, Sequence) or not all(isinstance(name, str) and name.isprintable() for name in ignore):
        raise MinipuzzleError("config.json: the ignore list of quantization_config is damaged", "export again")
    linear = [module_of(tensor) for tensor in architecture.tensors() if tensor.spec.quantized]
    other = [module_of(t) for t in architecture.tensors() if len(t.shape) > 1 and not t.spec.quantized]
    plain = {module for module in linear if any(fnmatchcase(module, entry) for entry in ignore)}
    return Fp8Layout(
        quantized=tuple(module for module in linear if module not in plain),
        ignored=(*(module for module in linear if module in plain), *other),
        fp8_kv_cache=config.get("kv_cache_scheme") is not None,
    )


def scale_names(layout: Fp8Layout) -> Iterator[str]:
    """The names of all scales on disk."""
    for module in layout.quantized:
        yield f"{module}.weight_scale"
        yield f"{module}.input_scale"
    for module in layout.cached:
        yield cache_scale_name(module)


def cache_scale_name(module: str) -> str:
    """The name on disk of the scale of what a module puts into an FP8 cache."""
    return f"{module}.{CACHE_SCALES[_last(module)]}"


def _last(module: str) -> str:
    return module.rpartition(".")[2]
