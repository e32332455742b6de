"""Mamba-2 (arXiv 2405.21060), as laid out in Nemotron-H checkpoints."""

from __future__ import annotations

from minipuzzle.architecture.layers import (
    HIDDEN,
    CacheSpec,
    Dimension,
    LayerKind,
    LayerSpec,
    Role,
    Segment,
    dimension_length,
)

_INNER: Segment = ("ssm_head", "ssm_head_channel")
_B_OR_C: Segment = ("ssm_group", "ssm_state")
_CONV: Dimension = (_INNER, _B_OR_C, _B_OR_C)
_HEADS: Dimension = (("ssm_head",),)
_BIASES = frozenset({"bias"})


def _caches(layer: LayerSpec) -> tuple[CacheSpec, ...]:
    sizes = layer.sizes
    # Engines keep kernel - 1 columns of the convolution's input; transformers' own cache keeps one more.
    conv_elements = dimension_length(_CONV, sizes) * (sizes["conv_kernel"] - 1)
    ssm_elements = sizes["ssm_head"] * sizes["ssm_head_channel"] * sizes["ssm_state"]
    return (
        CacheSpec(name="ssm_state", num_elements=ssm_elements, per_token=False),
        CacheSpec(name="conv_state", num_elements=conv_elements, per_token=False),
    )


MAMBA = LayerKind(
    name="mamba",
    symbol="M",
    color="#17becf",
    roles=(
        Role(
            name="in",
            module="in_proj",
            dims=((_INNER, _INNER, _B_OR_C, _B_OR_C, ("ssm_head",)), HIDDEN),
            biases=_BIASES,
            quantized=True,
        ),
        Role(name="out", module="out_proj", dims=(HIDDEN, (_INNER,)), biases=_BIASES, quantized=True),
        Role(name="conv", module="conv1d", dims=(_CONV, ((),), (("conv_kernel",),)), biases=frozenset({"conv_bias"})),
        Role(name="decay", module="A_log", dims=(_HEADS,), is_bare=True),
        Role(name="skip", module="D", dims=(_HEADS,), is_bare=True),
        Role(name="step", module="dt_bias", dims=(_HEADS,), is_bare=True),
        Role(name="norm", module="norm", dims=((_INNER,),), rms_groups="ssm_group"),
    ),
    prunable_axes=("ssm_head", "ssm_head_channel"),
    kept_per_output=5,  # counted without kernels
    caches=_caches,
    unit_groups={"ssm_head": "ssm_group"},
    inner_norm_energy="ssm",
)
