"""Mixture of experts: routed ones of which the router picks a few a token, and one that all tokens use
(arXiv 2401.06066; with a projection to a latent width around the routed experts if "latent" is among the sizes)."""

from __future__ import annotations

from minipuzzle.architecture.layers import HIDDEN, Dimension, LayerKind, Role

_EXPERTS: Dimension = (("expert",),)
_FFN: Dimension = (("expert_ffn",),)
_SHARED: Dimension = (("shared_ffn",),)
_LATENT: Dimension = (("latent",),)
_BIASES, _IF_LATENT = frozenset({"bias"}), frozenset({"latent"})


def _routed(
    width: Dimension, *, needs: frozenset[str] = frozenset(), lacks: frozenset[str] = frozenset()
) -> tuple[Role, ...]:
    return tuple(
        Role(
            name=f"expert_{name}",
            module=f"experts.{{unit}}.{name}_proj",
            dims=dims,
            needs=needs,
            lacks=lacks,
            quantized=True,
            each="expert",
        )
        for name, dims in (("up", (_FFN, width)), ("down", (width, _FFN)))
    )


def _dense(name: str, module: str, dims: tuple[Dimension, ...], needs: frozenset[str] = frozenset()) -> Role:
    return Role(name=name, module=module, dims=dims, biases=_BIASES, needs=needs, quantized=True)


MOE = LayerKind(
    name="moe",
    symbol="E",
    color="#2ca02c",
    roles=(
        Role(name="router", module="gate", dims=(_EXPERTS, HIDDEN)),
        Role(name="router_correction", module="gate.e_score_correction_bias", dims=(_EXPERTS,), is_bare=True),
        *_routed(HIDDEN, lacks=_IF_LATENT),
        *_routed(_LATENT, needs=_IF_LATENT),
        _dense("shared_up", "shared_experts.up_proj", (_SHARED, HIDDEN)),
        _dense("shared_down", "shared_experts.down_proj", (HIDDEN, _SHARED)),
        _dense("into_latent", "fc1_latent_proj", (_LATENT, HIDDEN), _IF_LATENT),
        _dense("out_of_latent", "fc2_latent_proj", (HIDDEN, _LATENT), _IF_LATENT),
    ),
    prunable_axes=("expert", "expert_ffn", "shared_ffn"),
    kept_per_output=2,
    unit_groups={"expert": "expert_group"},
    chosen_by_unit={"expert_ffn": "expert"},
)
