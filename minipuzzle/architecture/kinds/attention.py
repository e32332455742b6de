"""Grouped-query attention; "window" among the sizes makes it slide. With the option ``sinks``, each query head can look
at nothing, by a learned weight. With "query_and_gate" among the sizes, the rows of each head's query are followed by as
many that gate its output (arXiv 2505.06708)."""

from __future__ import annotations

from minipuzzle.architecture.layers import HIDDEN, CacheSpec, Dimension, LayerKind, LayerSpec, Role, Segment

_QUERY: Segment = ("kv_group", "queries_per_group", "head_dim")
_KEY: Segment = ("kv_group", "head_dim")
_HEADS: Dimension = (("kv_group", "queries_per_group"),)
_GATED_QUERY: Segment = ("kv_group", "queries_per_group", "query_and_gate", "head_dim")
_CHANNELS: Dimension = (("head_dim",),)  # of one head; not cut
_BIASES = frozenset({"bias", "qkv_bias"})
_FUSED, _NORMED, _GATED = frozenset({"fused_qkv"}), frozenset({"qk_norm"}), frozenset({"query_and_gate"})


def _caches(layer: LayerSpec) -> tuple[CacheSpec, ...]:
    keys_and_values = 2 * layer.sizes["kv_group"] * layer.sizes["head_dim"]
    window = layer.sizes.get("window")
    return (CacheSpec(name="kv", num_elements=keys_and_values, per_token=True, max_tokens=window),)


def _input(
    name: str,
    rows: Segment,
    cache_scale: str = "",
    *,
    needs: frozenset[str] = frozenset(),
    lacks: frozenset[str] = frozenset(),
) -> Role:
    return Role(
        name=name,
        module=f"{name}_proj",
        dims=((rows,), HIDDEN),
        biases=_BIASES,
        needs=needs,
        lacks=_FUSED | lacks,
        quantized=True,
        fused="qkv",
        cache_scale=cache_scale,
    )


ATTENTION = LayerKind(
    name="attention",
    symbol="*",
    color="#d6448f",
    roles=(
        _input("q", _QUERY, lacks=_GATED),
        _input("q", _GATED_QUERY, needs=_GATED),
        _input("k", _KEY, "k_scale"),
        _input("v", _KEY, "v_scale"),
        Role(
            name="qkv",
            module="qkv_proj",
            dims=((_QUERY, _KEY, _KEY), HIDDEN),
            biases=_BIASES,
            needs=_FUSED,
            quantized=True,
        ),
        Role(name="o", module="o_proj", dims=(HIDDEN, (_QUERY,)), biases=frozenset({"bias"}), quantized=True),
        Role(name="sinks", module="sinks", dims=(_HEADS,), needs=frozenset({"sinks"}), is_bare=True),
        Role(name="q_norm", module="q_norm", dims=(_CHANNELS,), needs=_NORMED),
        Role(name="k_norm", module="k_norm", dims=(_CHANNELS,), needs=_NORMED),
    ),
    prunable_axes=("kv_group",),
    kept_per_output=1,
    caches=_caches,
)
