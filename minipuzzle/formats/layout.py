"""What of an architecture an export stores how: which modules are quantised, which share scales, what stays BF16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property

from minipuzzle.architecture.families import FAMILIES
from minipuzzle.architecture.model import Architecture, PlacedTensor
from minipuzzle.errors import MinipuzzleError
from minipuzzle.formats.choices import PLAIN, RECIPES, SCHEMES, format_of
from minipuzzle.formats.flavours import FLAVOURS, DescribedLayout, Flavour, StoredTensor
from minipuzzle.formats.schemes import NVFP4_CLOSEST, Scheme

WEIGHT = ".weight"


@dataclass(frozen=True, kw_only=True)
class ExportLayout:
    """What of an architecture is quantised. Module names are those on disk, without ``.weight``.

    ``ignored``: modules with a matrix that stay BF16. ``fused``: the modules that engines fuse into one matrix with
    one scale, by each of them. ``cache_scales``: the scales of an FP8 cache by the module that computes what is cached;
    none without one. ``scheme`` and ``flavour`` are None where nothing is quantised.
    """

    scheme: Scheme | None = None
    flavour: Flavour | None = None
    quantized: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cache_scales: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.scheme is None) == (self.flavour is None)
        for entry in self.ignored:
            assert entry.isprintable(), f"ignore list: {entry!r} holds unprintable characters"
            # vLLM leaves out every module whose name contains an entry: "backbone.layers.1" would hit layers 10 to 19.
            caught = next((module for module in self.quantized if entry in module), None)
            assert caught is None, f"ignore list: {entry!r} would also catch {caught}"

    @property
    def described(self) -> DescribedLayout:
        """What both config files say of it; only where something is quantised."""
        assert self.scheme is not None
        return DescribedLayout(scheme=self.scheme.name, ignore=self.ignored, fp8_kv_cache=self.fp8_kv_cache)

    @property
    def fp8_kv_cache(self) -> bool:
        """Whether scales of an FP8 cache are stored."""
        return bool(self.cache_scales)

    @property
    def needs_calibration(self) -> bool:
        """Whether some scale must be measured on text."""
        return self.fp8_kv_cache or (self.scheme is not None and self.scheme.has_tensor_scale)

    @property
    def calibrated_inputs(self) -> tuple[str, ...]:
        """Modules whose inputs have a stored scale."""
        return self.quantized if self.scheme is not None and self.scheme.has_tensor_scale else ()

    @property
    def form(self) -> tuple[StoredTensor, ...]:
        """How a quantised weight is stored; empty where nothing is quantised."""
        return self.flavour.forms[self.scheme.name].tensors if self.scheme and self.flavour else ()

    @property
    def format(self) -> str:
        """The format's name; BF16 where nothing is quantised."""
        return PLAIN if self.scheme is None else format_of(self.scheme.name)

    def scale_group(self, module: str) -> tuple[str, ...]:
        """The quantised modules that share scales with one, itself included."""
        return tuple(name for name in self.fused.get(module, (module,)) if name in self._quantized_set)

    @cached_property
    def _quantized_set(self) -> frozenset[str]:
        return frozenset(self.quantized)

    def is_quantized(self, module: str) -> bool:
        """Whether a module is quantised."""
        return module in self._quantized_set


def export_layout(
    architecture: Architecture,
    *,
    scheme: str = PLAIN,
    flavour: str = "modelopt",
    recipe: str = "default",
    overrides: Sequence[tuple[str, str]] = (),
    fp8_kv_cache: bool = False,
) -> ExportLayout:
    """The layout of an export. ``overrides``: (pattern of module names, the scheme or ``bf16``), later ones win.

    Raises: MinipuzzleError for an unknown recipe, an override that matches nothing or splits what engines fuse, a width
    that the format cannot hold, or an FP8 cache where there is none or the flavour has no place for its scales.
    """
    if scheme == PLAIN:
        return ExportLayout(ignored=tuple(module_of(t) for t in (*_matrices(architecture), *_carried(architecture))))
    chosen_scheme, chosen_flavour, chosen_recipe = SCHEMES[scheme], FLAVOURS[flavour], RECIPES[recipe]
    if fp8_kv_cache and (obstacle := cache_scales_obstacle(architecture, chosen_flavour)) is not None:
        raise MinipuzzleError(*obstacle)
    is_quantized = {
        module_of(tensor): chosen_recipe.takes(tensor.part, is_linear=tensor.spec.quantized)
        for tensor in _matrices(architecture)
    }
    linear = {module_of(t) for t in _matrices(architecture) if _is_linear(t)}
    for pattern, wanted in overrides:
        _apply_override(is_quantized, linear, pattern, wanted, scheme)
    fused = _fused_modules(architecture)
    _check_fused(is_quantized, fused)
    _check_widths(architecture, is_quantized, chosen_scheme)
    layout = ExportLayout(
        scheme=chosen_scheme,
        flavour=chosen_flavour,
        quantized=tuple(module for module, quantized in is_quantized.items() if quantized),
        ignored=(
            *(name for name, quantized in is_quantized.items() if not quantized),
            *_tied_head(architecture),
            *map(module_of, _carried(architecture)),
        ),
        fused=fused,
        cache_scales=_cache_scales(architecture) if fp8_kv_cache else {},
    )
    if not layout.quantized:
        raise MinipuzzleError("the overrides leave nothing to quantise", "use ‹bf16›, or narrower patterns")
    return layout


def with_closest_scales(layout: ExportLayout) -> ExportLayout:
    """An NVFP4 layout whose block scales are those of the least squared error."""
    return replace(layout, scheme=NVFP4_CLOSEST)


def _is_linear(tensor: PlacedTensor) -> bool:
    return tensor.spec.quantized or tensor.part == "head"


def _apply_override(is_quantized: dict[str, bool], linear: set[str], pattern: str, wanted: str, scheme: str) -> None:
    if wanted not in (PLAIN, scheme):
        raise MinipuzzleError(
            f"override {pattern}={wanted}: one folder holds one format", f"use {PLAIN} or {scheme} after the ="
        )
    matched = [module for module in is_quantized if module in linear and fnmatchcase(module, pattern)]
    if not matched:
        raise MinipuzzleError(f"override {pattern!r} matches no linear layer", "names look like " + min(linear))
    is_quantized.update(dict.fromkeys(matched, wanted != PLAIN))


def _check_fused(is_quantized: Mapping[str, bool], fused: Mapping[str, tuple[str, ...]]) -> None:
    for group in fused.values():
        if len({is_quantized[module] for module in group}) > 1:
            parent = group[0].rpartition(".")[0]
            raise MinipuzzleError(
                f"{' and '.join(module.removeprefix(parent + '.') for module in group)} of {parent} must be quantised "
                "together: engines fuse them",
                "widen or narrow the override",
            )


def _check_widths(architecture: Architecture, is_quantized: Mapping[str, bool], scheme: Scheme) -> None:
    for tensor in _matrices(architecture):
        if is_quantized[module_of(tensor)] and tensor.shape[-1] % scheme.columns_multiple:
            raise MinipuzzleError(
                f"{module_of(tensor)} has {tensor.shape[-1]} inputs; {scheme.name} needs a multiple of "
                f"{scheme.columns_multiple}",
                f"leave it out: ‹overrides› '{module_of(tensor)}={PLAIN}'",
            )


def cache_scales_obstacle(architecture: Architecture, flavour: Flavour) -> tuple[str, str] | None:
    """Why no scales of an FP8 cache can be stored, and what to do; None where they can."""
    if FAMILIES[architecture.model_type].modules.rotary:
        # Engines cache keys after their rotation (and after a norm, where there is one), which is not measured here.
        return (
            f"scales of an FP8 KV cache are not measured for {architecture.model_type}, whose keys are rotated",
            "leave out ‹kv_cache› fp8",
        )
    if not _cache_scales(architecture):
        return "the model has no attention layer, so no KV cache", "leave out ‹kv_cache› fp8"
    if not flavour.has_cache_scales:
        return (
            f"the {flavour.name} layout has no place for cache scales that engines read in hybrid models",
            "use ‹flavour› modelopt, or leave out ‹kv_cache› fp8",
        )
    return None


def _matrices(architecture: Architecture) -> Iterator[PlacedTensor]:
    return (tensor for tensor in architecture.tensors() if len(tensor.shape) > 1)


def _carried(architecture: Architecture) -> Iterator[PlacedTensor]:
    return (tensor for tensor in architecture.carried if len(tensor.shape) > 1)


def module_of(tensor: PlacedTensor) -> str:
    """The module that a matrix belongs to, by its name on disk."""
    return tensor.name.removesuffix(WEIGHT)


def _tied_head(architecture: Architecture) -> tuple[str, ...]:
    """The head that stores nothing: readers make a linear module of it, and would quantise what is not listed."""
    return (architecture.names.head.removesuffix(WEIGHT),) if architecture.tied_embeddings else ()


def _fused_modules(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """What engines fuse, by each module of it; with unequal scales they would round the weights a second time."""
    groups: dict[object, list[str]] = {}
    for tensor in _matrices(architecture):
        if tensor.spec.fused:
            groups.setdefault((tensor.layer_idx, tensor.spec.unit, tensor.spec.fused), []).append(module_of(tensor))
    return {module: tuple(group) for group in groups.values() for module in group}


def _cache_scales(architecture: Architecture) -> dict[str, str]:
    """Names on disk of the scales of an FP8 cache by module; it is FP8 whether or not attention's weights are."""
    cached = [tensor for tensor in _matrices(architecture) if tensor.spec.cache_scale]
    return {module_of(tensor): f"{module_of(tensor)}.{tensor.spec.cache_scale}" for tensor in cached}


def is_known_layout(config: object) -> bool:
    """Whether a ``quantization_config`` is of a layout and a format that exports have."""
    flavour = FLAVOURS.get(str(config.get("quant_method"))) if isinstance(config, Mapping) else None
    return flavour is not None and isinstance(config, Mapping) and flavour.read(config) is not None


def read_layout(architecture: Architecture, config: Mapping[str, object]) -> ExportLayout:
    """The layout that a config.json's ``quantization_config`` describes.

    Raises: MinipuzzleError for any other format, or an ignore list that fits no known engine.
    """
    method = config.get("quant_method")
    flavour = FLAVOURS.get(str(method))
    described = flavour.read(config) if flavour is not None else None
    if flavour is None or described is None:
        raise MinipuzzleError(
            f"weights quantised as {method!r}/{config.get('quant_algo', config.get('format'))!r} cannot be read",
            "plain weights can, and FP8 and NVFP4 exports in the layouts " + " and ".join(FLAVOURS),
        )
    linear = [module_of(tensor) for tensor in _matrices(architecture) if _is_linear(tensor)]
    other = [module_of(tensor) for tensor in _matrices(architecture) if not _is_linear(tensor)]
    plain = {module for module in linear if any(flavour.matches(entry, module) for entry in described.ignore)}
    return ExportLayout(
        scheme=SCHEMES[described.scheme],
        flavour=flavour,
        quantized=tuple(module for module in linear if module not in plain),
        ignored=(
            *(module for module in linear if module in plain),
            *other,
            *_tied_head(architecture),
            *map(module_of, _carried(architecture)),
        ),
        fused=_fused_modules(architecture),
        cache_scales=_cache_scales(architecture) if described.fp8_kv_cache else {},
    )
