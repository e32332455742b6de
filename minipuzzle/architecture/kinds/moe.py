"""Mixture of experts: routed ones of which the router picks a few a token, and one that all tokens use, if there is one
(arXiv 2401.06066; with a projection to a latent width around the routed experts if "latent" is among the sizes).

Options: ``gated`` experts; a ``softmax_router`` rather than sigmoids with a correction of the choice, with a
``router_bias``; ``expert_bias``; ``shared_gate``, which weighs the shared expert; ``fused_shared``, if its gate and
input lie in one matrix.
"""

from __future__ import annotations

from minipuzzle.architecture.layers import HIDDEN, Dimension, LayerKind, Role

_EXPERTS: Dimension = (("expert",),)
_FFN: Dimension = (("expert_ffn",),)
_SHARED: Dimension = (("shared_ffn",),)
_LATENT: Dimension = (("latent",),)
_ONE: Dimension = ((),)
_BIASES, _IF_LATENT, _IF_SHARED = frozenset({"bias"}), frozenset({"latent"}), frozenset({"shared_ffn"})
_GATED, _FUSED = frozenset({"gated"}), frozenset({"fused_shared"})
_NOTHING: frozenset[str] = frozenset()


def _routed(width: Dimension, *, needs: frozenset[str] = _NOTHING, lacks: frozenset[str] = _NOTHING) -> list[Role]:
    return [
        Role(
            name=f"expert_{name}",
            module=f"experts.{{unit}}.{name}_proj",
            dims=dims,
            biases=frozenset({"expert_bias"}),
            needs=needs | gated,
            lacks=lacks,
            quantized=True,
            fused="" if name == "down" else "gate_up",
            each="expert",
        )
        for name, dims, gated in (
            ("gate", (_FFN, width), _GATED),
            ("up", (_FFN, width), _NOTHING),
            ("down", (width, _FFN), _NOTHING),
        )
    ]


def _dense(
    name: str, module: str, dims: tuple[Dimension, ...], needs: frozenset[str], *, is_split: bool = False
) -> Role:
    lacks, fused = (_FUSED, "gate_up") if is_split else (_NOTHING, "")
    return Role(
        name=name, module=module, dims=dims, biases=_BIASES, needs=needs, lacks=lacks, quantized=True, fused=fused
    )


MOE = LayerKind(
    name="moe",
    symbol="E",
    color="#2ca02c",
    roles=(
        Role(name="router", module="gate", dims=(_EXPERTS, HIDDEN), biases=frozenset({"router_bias"})),
        Role(
            name="router_correction",
            module="gate.e_score_correction_bias",
            dims=(_EXPERTS,),
            lacks=frozenset({"softmax_router"}),
            is_bare=True,
        ),
        *_routed(HIDDEN, lacks=_IF_LATENT),
        *_routed(_LATENT, needs=_IF_LATENT),
        _dense("shared_gate", "shared_experts.gate_proj", (_SHARED, HIDDEN), _IF_SHARED | _GATED, is_split=True),
        _dense("shared_up", "shared_experts.up_proj", (_SHARED, HIDDEN), _IF_SHARED, is_split=True),
        _dense("shared_gate_up", "shared_experts.gate_up_proj", ((*_SHARED, *_SHARED), HIDDEN), _IF_SHARED | _FUSED),
        _dense("shared_down", "shared_experts.down_proj", (HIDDEN, _SHARED), _IF_SHARED),
        Role(name="shared_weight", module="shared_expert_gate", dims=(_ONE, HIDDEN), needs=frozenset({"shared_gate"})),
        _dense("into_latent", "fc1_latent_proj", (_LATENT, HIDDEN), _IF_LATENT),
        _dense("out_of_latent", "fc2_latent_proj", (HIDDEN, _LATENT), _IF_LATENT),
    ),
    prunable_axes=("expert", "expert_ffn", "shared_ffn"),
    kept_per_output=2,
    unit_groups={"expert": "expert_group"},
    chosen_by_unit={"expert_ffn": "expert"},
)
