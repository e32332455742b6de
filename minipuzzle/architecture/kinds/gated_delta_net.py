"""Gated delta nets (arXiv 2412.06464), as laid out in Qwen3.5 checkpoints: linear attention whose key heads serve
several value heads each. Norms are those of single value heads, so that cutting heads changes none."""

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

_KEY: Segment = ("gdn_key_group", "gdn_key_channel")
_VALUE: Segment = ("gdn_key_group", "gdn_value_head", "gdn_value_channel")
_QKV: Dimension = (_KEY, _KEY, _VALUE)
_HEADS: Dimension = (("gdn_key_group", "gdn_value_head"),)


def _caches(layer: LayerSpec) -> tuple[CacheSpec, ...]:
    sizes = layer.sizes
    state_elements = dimension_length((_VALUE,), sizes) * sizes["gdn_key_channel"]
    # As engines keep it: transformers' own cache keeps one column more.
    conv_elements = dimension_length(_QKV, sizes) * (sizes["conv_kernel"] - 1)
    return (
        CacheSpec(name="ssm_state", num_elements=state_elements, per_token=False),
        CacheSpec(name="conv_state", num_elements=conv_elements, per_token=False),
    )


def _input(name: str, rows: Dimension, *, quantized: bool = False) -> Role:
    fused = "qkvz" if quantized else ""
    return Role(name=name, module=f"in_proj_{name}", dims=(rows, HIDDEN), quantized=quantized, fused=fused)


GATED_DELTA_NET = LayerKind(
    name="gated_delta_net",
    symbol="D",
    color="#1f77b4",
    roles=(
        _input("qkv", _QKV, quantized=True),
        _input("z", (_VALUE,), quantized=True),
        _input("b", _HEADS),
        _input("a", _HEADS),
        Role(name="conv", module="conv1d", dims=(_QKV, ((),), (("conv_kernel",),))),
        Role(name="decay", module="A_log", dims=(_HEADS,), is_bare=True),
        Role(name="step", module="dt_bias", dims=(_HEADS,), is_bare=True),
        Role(name="norm", module="norm", dims=((("gdn_value_channel",),),)),
        Role(name="out", module="out_proj", dims=(HIDDEN, (_VALUE,)), quantized=True),
    ),
    prunable_axes=("gdn_key_group", "gdn_value_head"),
    kept_per_output=9,  # counted without kernels, with two value heads a key head
    caches=_caches,
    # Value heads of one key head have nothing to do with those of another.
    chosen_by_unit={"gdn_value_head": "gdn_key_group"},
)
