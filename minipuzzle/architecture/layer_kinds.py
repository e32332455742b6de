"""The registry of layer kinds: what a layer is made of, what it caches, and what of it may be cut.

Every dimension of every tensor is written as a row of segments, and every segment as a product of named axes:
the rows of Mamba-2's ``in_proj`` are ``ssm_head x ssm_head_channel`` (z), the same again (x),
``ssm_group x ssm_state`` (B), the same again (C) and ``ssm_head`` (dt). Parameter counts, cache bytes, the rows
and columns that survive a cut, and the set of quantised tensors all follow from these tables and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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

    ``quantized``: a linear weight that FP8 and FP4 exports shrink. ``rms_groups``: for the weight of an RMS norm,
    the number of groups that are averaged separately (0: not such a weight). Cutting channels changes that average.
    ``norm_offset``: what such a norm adds to its stored weight before it multiplies by it.
    ``routed``: weights of routed experts, of which a token uses ``experts_per_token`` of ``expert``.
    ``unit``: (axis, index) of the one unit that the tensor belongs to as a whole, such as an expert; it goes with it.
    """

    name: str
    dims: tuple[Dimension, ...]
    quantized: bool = False
    rms_groups: int = 0
    routed: bool = False
    norm_offset: float = 0.0
    unit: tuple[str, int] | None = None

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
class LayerKind:
    """What all layers of one kind have in common. ``unit_groups`` maps an axis to the axis whose groups it may not
    leave: as many ``ssm_head`` must survive in each ``ssm_group``, or B and C would be shared wrongly.
    ``inner_norm_energy`` names the measured mean squares under the norm inside the mixer, where there is one.
    ``chosen_by_unit`` maps an axis to the axis each of whose units has its own choice: neuron 7 of one expert has
    nothing to do with neuron 7 of another, so each keeps its best, all equally many."""

    name: str
    symbol: str
    tensors: Callable[[LayerSpec], tuple[TensorSpec, ...]]
    caches: Callable[[LayerSpec], tuple[CacheSpec, ...]]
    prunable_axes: tuple[str, ...]
    unit_groups: Mapping[str, str] = field(default_factory=dict)
    inner_norm_energy: str = ""
    chosen_by_unit: Mapping[str, str] = field(default_factory=dict)


def dimension_length(dimension: Dimension, sizes: Mapping[str, int]) -> int:
    """Elements along one dimension."""
    return sum(prod(sizes[axis] for axis in segment) for segment in dimension)


def _with_biases(linears: tuple[TensorSpec, ...], has_bias: bool) -> tuple[TensorSpec, ...]:
    if not has_bias:
        return linears
    biases = (TensorSpec(name=t.name.removesuffix("weight") + "bias", dims=t.dims[:1]) for t in linears)
    return (*linears, *biases)


def _no_caches(_layer: LayerSpec) -> tuple[CacheSpec, ...]:
    return ()


# --- Mamba-2 (arXiv 2405.21060), as laid out in Nemotron-H checkpoints ---------------------------------------------

_SSM_INNER: Segment = ("ssm_head", "ssm_head_channel")
_SSM_B_OR_C: Segment = ("ssm_group", "ssm_state")
_SSM_CONV: Dimension = (_SSM_INNER, _SSM_B_OR_C, _SSM_B_OR_C)


def _mamba_tensors(layer: LayerSpec) -> tuple[TensorSpec, ...]:
    linears = (
        TensorSpec(
            name="in_proj.weight",
            dims=((_SSM_INNER, _SSM_INNER, _SSM_B_OR_C, _SSM_B_OR_C, ("ssm_head",)), HIDDEN),
            quantized=True,
        ),
        TensorSpec(name="out_proj.weight", dims=(HIDDEN, (_SSM_INNER,)), quantized=True),
    )
    conv_bias = (TensorSpec(name="conv1d.bias", dims=(_SSM_CONV,)),) if "conv_bias" in layer.options else ()
    return (
        *_with_biases(linears, "bias" in layer.options),
        TensorSpec(name="conv1d.weight", dims=(_SSM_CONV, ((),), (("conv_kernel",),))),
        *conv_bias,
        TensorSpec(name="A_log", dims=((("ssm_head",),),)),
        TensorSpec(name="D", dims=((("ssm_head",),),)),
        TensorSpec(name="dt_bias", dims=((("ssm_head",),),)),
        TensorSpec(name="norm.weight", dims=((_SSM_INNER,),), rms_groups=layer.sizes["ssm_group"]),
    )


def _mamba_caches(layer: LayerSpec) -> tuple[CacheSpec, ...]:
    sizes = layer.sizes
    # Engines keep kernel - 1 columns of the convolution's input; transformers' own cache keeps one more.
    conv_elements = dimension_length(_SSM_CONV, sizes) * (sizes["conv_kernel"] - 1)
    ssm_elements = sizes["ssm_head"] * sizes["ssm_head_channel"] * sizes["ssm_state"]
    return (
        CacheSpec(name="ssm_state", num_elements=ssm_elements, per_token=False),
        CacheSpec(name="conv_state", num_elements=conv_elements, per_token=False),
    )


# --- Grouped-query attention; "window" among the sizes makes it slide ---------------------------------------------

_QUERY_ROWS: Dimension = (("kv_group", "queries_per_group", "head_dim"),)
_KEY_ROWS: Dimension = (("kv_group", "head_dim"),)


def _attention_tensors(layer: LayerSpec) -> tuple[TensorSpec, ...]:
    linears = (
        TensorSpec(name="q_proj.weight", dims=(_QUERY_ROWS, HIDDEN), quantized=True),
        TensorSpec(name="k_proj.weight", dims=(_KEY_ROWS, HIDDEN), quantized=True),
        TensorSpec(name="v_proj.weight", dims=(_KEY_ROWS, HIDDEN), quantized=True),
        TensorSpec(name="o_proj.weight", dims=(HIDDEN, _QUERY_ROWS), quantized=True),
    )
    if "qk_norm" in layer.options:  # over the channels of each head, which are not cut
        norms = tuple(TensorSpec(name=f"{name}_norm.weight", dims=((("head_dim",),),)) for name in ("q", "k"))
    else:
        norms = ()
    if "qkv_bias" in layer.options:
        return (*_with_biases(linears[:3], True), linears[3], *norms)
    return (*_with_biases(linears, "bias" in layer.options), *norms)


def _attention_caches(layer: LayerSpec) -> tuple[CacheSpec, ...]:
    keys_and_values = 2 * layer.sizes["kv_group"] * layer.sizes["head_dim"]
    window = layer.sizes.get("window")
    return (CacheSpec(name="kv", num_elements=keys_and_values, per_token=True, max_tokens=window),)


# --- Feed-forward --------------------------------------------------------------------------------------------------


def _mlp_tensors(layer: LayerSpec) -> tuple[TensorSpec, ...]:
    ffn: Dimension = (("ffn",),)
    if "fused_gate" in layer.options:  # gate and input in one matrix, the gate's rows first
        return (
            TensorSpec(name="input_linear.weight", dims=((("ffn",), ("ffn",)), HIDDEN), quantized=True),
            TensorSpec(name="output_linear.weight", dims=(HIDDEN, ffn), quantized=True),
        )
    inputs = ("gate_proj.weight", "up_proj.weight") if "gated" in layer.options else ("up_proj.weight",)
    linears = (
        *(TensorSpec(name=name, dims=(ffn, HIDDEN), quantized=True) for name in inputs),
        TensorSpec(name="down_proj.weight", dims=(HIDDEN, ffn), quantized=True),
    )
    return _with_biases(linears, "bias" in layer.options)


# --- Mixture of experts: routed ones of which the router picks a few a token, and one that all tokens use -----------
# (arXiv 2401.06066; with a projection to a latent width around the routed experts if "latent" is among the sizes)


def _moe_tensors(layer: LayerSpec) -> tuple[TensorSpec, ...]:
    ffn: Dimension = (("expert_ffn",),)
    shared: Dimension = (("shared_ffn",),)
    width: Dimension = (("latent",),) if "latent" in layer.sizes else HIDDEN
    dense: tuple[TensorSpec, ...] = (
        TensorSpec(name="shared_experts.up_proj.weight", dims=(shared, HIDDEN), quantized=True),
        TensorSpec(name="shared_experts.down_proj.weight", dims=(HIDDEN, shared), quantized=True),
    )
    if "latent" in layer.sizes:
        dense += (
            TensorSpec(name="fc1_latent_proj.weight", dims=(width, HIDDEN), quantized=True),
            TensorSpec(name="fc2_latent_proj.weight", dims=(HIDDEN, width), quantized=True),
        )
    routed = (
        TensorSpec(name=f"experts.{idx}.{name}.weight", dims=dims, quantized=True, routed=True, unit=("expert", idx))
        for idx in range(layer.sizes["expert"])
        for name, dims in (("up_proj", (ffn, width)), ("down_proj", (width, ffn)))
    )
    return (
        TensorSpec(name="gate.weight", dims=((("expert",),), HIDDEN)),
        TensorSpec(name="gate.e_score_correction_bias", dims=((("expert",),),)),
        *routed,
        *_with_biases(dense, "bias" in layer.options),
    )


_KINDS = (
    LayerKind(
        name="mamba",
        symbol="M",
        tensors=_mamba_tensors,
        caches=_mamba_caches,
        prunable_axes=("ssm_head", "ssm_head_channel"),
        unit_groups={"ssm_head": "ssm_group"},
        inner_norm_energy="ssm",
    ),
    LayerKind(
        name="attention",
        symbol="*",
        tensors=_attention_tensors,
        caches=_attention_caches,
        prunable_axes=("kv_group",),
    ),
    LayerKind(name="mlp", symbol="-", tensors=_mlp_tensors, caches=_no_caches, prunable_axes=("ffn",)),
    LayerKind(
        name="moe",
        symbol="E",
        tensors=_moe_tensors,
        caches=_no_caches,
        prunable_axes=("expert", "expert_ffn", "shared_ffn"),
        unit_groups={"expert": "expert_group"},
        chosen_by_unit={"expert_ffn": "expert"},
    ),
)

LAYER_KINDS: Mapping[str, LayerKind] = MappingProxyType({kind.name: kind for kind in _KINDS})

# All axes that a plan may narrow; `hidden` belongs to the whole model.
PRUNABLE_AXES: tuple[str, ...] = (*(axis for kind in _KINDS for axis in kind.prunable_axes), "hidden")


def kind_of_axis(axis: str) -> LayerKind | None:
    """The kind that owns an axis; None for ``hidden``, which belongs to the whole model."""
    return next((kind for kind in _KINDS if axis in kind.prunable_axes), None)
