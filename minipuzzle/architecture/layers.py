"""What layers are made of: axes, dimensions, tensors, caches, and the record that describes a kind of layer.

Every dimension of every tensor is written as a row of segments, and every segment as a product of named axes:
the rows of Mamba-2's ``in_proj`` are ``ssm_head x ssm_head_channel`` (z), the same again (x),
``ssm_group x ssm_state`` (B), the same again (C) and ``ssm_head`` (dt). Parameter counts, cache bytes, the rows
and columns that survive a cut, and the set of quantised tensors all follow from the records of ``architecture/kinds``
and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod
from types import MappingProxyType

Segment = tuple[str, ...]  # the sizes of these axes multiply
Dimension = tuple[Segment, ...]  # the lengths of these segments add up

HIDDEN: Dimension = (("hidden",),)


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer of a given model: its kind, the size of each of its axes, and its yes/no options."""

    kind: str
    sizes: Mapping[str, int]
    options: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", MappingProxyType(dict(self.sizes)))

    def resized(self, **new_sizes: int) -> LayerSpec:
        """This layer with other sizes on some of its axes."""
        assert new_sizes.keys() <= self.sizes.keys(), f"{self.kind} has no axis {new_sizes.keys() - self.sizes.keys()}"
        return replace(self, sizes={**self.sizes, **new_sizes})


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor by its name and named dimensions.

    ``role``: of its module in layers of its kind. ``quantized``: a linear weight that FP8 and FP4 exports shrink.
    ``rms_groups``: for the weight of an RMS norm, the number of groups that are averaged separately (0: not such a
    weight). Cutting channels changes that average.
    ``norm_offset``: what such a norm adds to its stored weight before it multiplies by it.
    ``routed``: weights of routed experts, of which a token uses ``experts_per_token`` of ``expert``.
    ``follows``: axes whose size a tensor outside the language model shares; ``is_dispensable``: whether it then goes.
    ``unit``: (axis, index) of the one unit that the tensor belongs to as a whole, such as an expert; it goes with it.
    ``fused``, ``cache_scale``: as in its role.
    """

    name: str
    dims: tuple[Dimension, ...]
    role: str = ""
    quantized: bool = False
    rms_groups: int = 0
    routed: bool = False
    norm_offset: float = 0.0
    unit: tuple[str, int] | None = None
    fused: str = ""
    cache_scale: str = ""
    follows: frozenset[str] = frozenset()
    is_dispensable: bool = False

    @property
    def axes(self) -> frozenset[str]:
        """The axes of all dimensions."""
        return frozenset(axis for dimension in self.dims for segment in dimension for axis in segment)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Elements along each dimension."""
        return tuple(dimension_length(dimension, sizes) for dimension in self.dims)

    def num_elements(self, sizes: Mapping[str, int]) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape(sizes))


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """State kept by one layer while generating: elements per sequence, or per token of it.

    ``max_tokens``: of a sliding window, which keeps no more.
    """

    name: str  # "kv", "ssm_state" or "conv_state"; each has its own precision in a deployment
    num_elements: int
    per_token: bool
    max_tokens: int | None = None

    def num_tokens(self, context_tokens: int) -> int:
        """Times that ``num_elements`` are kept for one sequence."""
        if not self.per_token:
            return 1
        return context_tokens if self.max_tokens is None else min(context_tokens, self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """The norms of a family, before each layer and before the head.

    ``is_centered``: a LayerNorm, which subtracts the mean, rather than an RMS norm. ``weight_offset``: what is added to
    the stored weight; LayerNorm1P stores it minus one.
    """

    has_bias: bool = False
    is_centered: bool = False
    weight_offset: float = 0.0

    def tensors(self, name: str) -> tuple[TensorSpec, ...]:
        """The tensors of a norm over the hidden axis whose weight has a name."""
        weight = TensorSpec(name=name, dims=(HIDDEN,), rms_groups=1, norm_offset=self.weight_offset)
        bias = TensorSpec(name=name.removesuffix("weight") + "bias", dims=(HIDDEN,))
        return (weight, bias) if self.has_bias else (weight,)


@dataclass(frozen=True, kw_only=True)
class Role:
    """One module of a mixer by what it does: its weight, and a bias under any of the options in ``biases``.

    ``module``: its name, unless a family gives another; with ``{unit}`` where each unit of the axis ``each`` has its
    own. ``is_bare``: not a module but a tensor of that name. ``needs`` and ``lacks``: options (or axes) that a layer
    must or must not have for this role. ``fused``: engines fuse the weights with the same word here into one matrix
    with one scale. ``cache_scale``: the scale of an FP8 cache of what the module computes. ``rms_groups``: of the
    weight of an RMS norm, the axis of which it has as many groups.
    """

    name: str
    module: str
    dims: tuple[Dimension, ...]
    biases: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset()
    quantized: bool = False
    fused: str = ""
    cache_scale: str = ""
    rms_groups: str = ""
    is_bare: bool = False
    each: str = ""

    def is_in(self, layer: LayerSpec) -> bool:
        """Whether a layer has this role."""
        having = layer.options | layer.sizes.keys()
        return self.needs <= having and not self.lacks & having

    def tensors(self, layer: LayerSpec, module: str, unit_idx: int | None) -> Iterator[TensorSpec]:
        """What a layer keeps under this role, in a module of the name given."""
        name = module.format(unit=unit_idx)
        weight = TensorSpec(
            name=name if self.is_bare else f"{name}.weight",
            dims=self.dims,
            role=self.name,
            quantized=self.quantized,
            rms_groups=layer.sizes[self.rms_groups] if self.rms_groups else 0,
            routed=bool(self.each),
            unit=None if unit_idx is None else (self.each, unit_idx),
            fused=self.fused,
            cache_scale=self.cache_scale,
        )
        yield weight
        if self.biases & layer.options:
            yield TensorSpec(
                name=f"{name}.bias", dims=self.dims[:1], role=self.name, routed=weight.routed, unit=weight.unit
            )


def no_caches(_layer: LayerSpec) -> tuple[CacheSpec, ...]:
    """Of layers that keep nothing while generating."""
    return ()


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What all layers of one kind have in common. ``color``: in tables and pictures. ``kept_per_output``: values that
    autograd keeps a token for each output of a layer's linears. ``unit_groups`` maps an axis to the axis whose groups
    it may not leave: as many ``ssm_head`` must survive in each ``ssm_group``, or B and C would be shared wrongly.
    ``inner_norm_energy`` names the measured mean squares under the norm inside the mixer, where there is one.
    ``chosen_by_unit`` maps an axis to the axis each of whose units has its own choice: neuron 7 of one expert has
    nothing to do with neuron 7 of another, so each keeps its best, all equally many."""

    name: str
    symbol: str
    color: str
    roles: tuple[Role, ...]
    prunable_axes: tuple[str, ...]
    kept_per_output: int
    caches: Callable[[LayerSpec], tuple[CacheSpec, ...]] = no_caches
    unit_groups: Mapping[str, str] = field(default_factory=dict)
    inner_norm_energy: str = ""
    chosen_by_unit: Mapping[str, str] = field(default_factory=dict)

    def tensors(self, layer: LayerSpec, names: Mapping[str, str] | None = None) -> tuple[TensorSpec, ...]:
        """The tensors of a layer's mixer. ``names``: those that a family gives to modules, by role."""
        specs: list[TensorSpec] = []
        for axis, roles in groupby((role for role in self.roles if role.is_in(layer)), key=lambda role: role.each):
            named = [(role, (names or {}).get(role.name, role.module)) for role in roles]
            for unit_idx in range(layer.sizes[axis]) if axis else (None,):
                for role, module in named:
                    specs += role.tensors(layer, module, unit_idx)
        return tuple(specs)

    def unit_modules(self, layer: LayerSpec, names: Mapping[str, str] | None = None) -> dict[str, str]:
        """Modules of which each unit, such as an expert, has its own, by role, with ``{unit}`` in their names."""
        roles = (role for role in self.roles if role.each and role.is_in(layer))
        return {role.name: (names or {}).get(role.name, role.module) for role in roles}


def dimension_length(dimension: Dimension, sizes: Mapping[str, int]) -> int:
    """Elements along one dimension."""
    return sum(prod(sizes[axis] for axis in segment) for segment in dimension)
