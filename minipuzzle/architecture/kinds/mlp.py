"""Feed-forward layers, gated or not; gate and input may lie in one matrix, the gate's rows first."""

from __future__ import annotations

from minipuzzle.architecture.layers import HIDDEN, Dimension, LayerKind, Role, Segment

_FFN: Segment = ("ffn",)
_ROWS: Dimension = (_FFN,)
_BIASES = frozenset({"bias"})
_GATED, _FUSED = frozenset({"gated"}), frozenset({"fused_gate"})

MLP = LayerKind(
    name="mlp",
    symbol="-",
    color="#bcbd22",
    roles=(
        Role(
            name="gate",
            module="gate_proj",
            dims=(_ROWS, HIDDEN),
            biases=_BIASES,
            needs=_GATED,
            lacks=_FUSED,
            quantized=True,
            fused="gate_up",
        ),
        Role(
            name="up",
            module="up_proj",
            dims=(_ROWS, HIDDEN),
            biases=_BIASES,
            lacks=_FUSED,
            quantized=True,
            fused="gate_up",
        ),
        Role(
            name="gate_up",
            module="gate_up_proj",
            dims=((_FFN, _FFN), HIDDEN),
            biases=_BIASES,
            needs=_FUSED,
            quantized=True,
        ),
        Role(name="down", module="down_proj", dims=(HIDDEN, _ROWS), biases=_BIASES, quantized=True),
    ),
    prunable_axes=("ffn",),
    kept_per_output=2,
)
