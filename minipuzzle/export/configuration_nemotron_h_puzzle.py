"""The configuration of a Nemotron-H model whose layers differ in width, as engines read it.

A file like this one lies beside a config.json with ``block_configs`` and is named there under ``auto_map``; engines
that were told to trust it run it. What a layer has of its own overrides the fields of the whole model.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import NemotronHConfig


class NemotronHPuzzleConfig(NemotronHConfig):  # type: ignore[misc]
    """Nemotron-H with ``block_configs``: for each layer its ``block_type`` and the fields that it has of its own."""

    model_type = "nemotron_h_puzzle"
    block_configs: list[dict[str, Any]] | None = None

    def get_nemotron_h_config_for_layer(self, layer_idx: int) -> NemotronHPuzzleConfig:
        """The configuration of one layer; vLLM asks by this name."""
        config = copy.copy(self)
        for field, value in (self.block_configs or [])[layer_idx].items():
            if field != "block_type":
                setattr(config, field, value)
        return config
