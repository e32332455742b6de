"""A field of config.json that can describe no model is named with what it says, before anything is made of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from minipuzzle.architecture.families import FAMILIES, read_architecture
from minipuzzle.errors import MinipuzzleError

WRONG: dict[str, list[tuple[str, Any]]] = {
    "nemotron_h": [
        ("hybrid_override_pattern", 7),
        ("hybrid_override_pattern", [1, "a"]),
        ("num_hidden_layers", 10**15),
        ("num_hidden_layers", "seven"),
        ("layer_norm_epsilon", math.inf),
        ("chunk_size", -3),
        ("head_dim", 0),
        ("dtype", 7),
    ],
    "llama": [
        ("num_hidden_layers", 10**15),
        ("rms_norm_eps", math.inf),
        ("rope_theta", -1.0),
        ("rope_theta", "much"),
        ("rope_theta", True),
        ("torch_dtype", "seven"),
        ("head_dim", math.nan),
    ],
    "granitemoehybrid": [
        ("layer_types", 2.5),
        ("logits_scaling", 0),
        ("logits_scaling", math.inf),
        ("rms_norm_eps", math.inf),
    ],
}


@pytest.mark.parametrize(
    ("family", "field", "value"), [(family, *wrong) for family, cases in WRONG.items() for wrong in cases]
)
def test_a_wrong_field_is_named_with_its_value(family: str, field: str, value: Any) -> None:
    with pytest.raises(MinipuzzleError, match=field):
        read_architecture({**FAMILIES[family].tiny_config, field: value})


@pytest.mark.parametrize(
    ("family", "field"), [("nemotron_h", "hybrid_override_pattern"), ("granitemoehybrid", "layer_types")]
)
def test_numbers_of_layers_that_disagree_are_named_both(family: str, field: str) -> None:
    config = FAMILIES[family].tiny_config
    number = len(config[field])
    with pytest.raises(MinipuzzleError, match=f"{field} names {number} layers, num_hidden_layers {number + 1}"):
        read_architecture({**config, "num_hidden_layers": number + 1})
    without = {name: value for name, value in config.items() if name != "num_hidden_layers"}
    assert read_architecture(without) == read_architecture(config)


def test_nemotron_h_without_a_head_size_has_that_of_transformers() -> None:
    from transformers import NemotronHConfig

    config = {key: value for key, value in FAMILIES["nemotron_h"].tiny_config.items() if key != "head_dim"}
    assert read_architecture(config).width("head_dim") == NemotronHConfig(**config).head_dim
