"""The registry of layer kinds, one file each: what a layer is made of, what it caches, and what of it may be cut."""

from __future__ import annotations

from functools import cache

from minipuzzle.architecture.layers import LayerKind
from minipuzzle.table import Table

LAYER_KINDS: Table[LayerKind] = Table(
    "kind of layer",
    "kinds",
    lazy={
        "mamba": "minipuzzle.architecture.kinds.mamba:MAMBA",
        "gated_delta_net": "minipuzzle.architecture.kinds.gated_delta_net:GATED_DELTA_NET",
        "attention": "minipuzzle.architecture.kinds.attention:ATTENTION",
        "mlp": "minipuzzle.architecture.kinds.mlp:MLP",
        "moe": "minipuzzle.architecture.kinds.moe:MOE",
    },
)
VOCABULARY = "vocabulary"
# What lies around the layers. It owns the axes that no layer has alone, and has no position among them.
TRUNK = LayerKind(
    name="trunk",
    symbol="",
    color="white",
    roles=(),
    prunable_axes=("hidden", VOCABULARY),
    kept_per_output=0,
    inner_norm_energy="hidden",
)


@cache
def prunable_axes() -> tuple[str, ...]:
    """All axes that a plan may narrow."""
    return tuple(axis for kind in (*LAYER_KINDS.values(), TRUNK) for axis in kind.prunable_axes)


def kind_of_axis(axis: str) -> LayerKind:
    """The kind that owns an axis: that of the layers that have it, or TRUNK."""
    return next(kind for kind in (*LAYER_KINDS.values(), TRUNK) if axis in kind.prunable_axes)


def owner_of_axis(axis: str, layer_idx: int) -> int | None:
    """Whose units of an axis a layer has: its own, or those of the whole model (None)."""
    return None if axis in TRUNK.prunable_axes else layer_idx
