"""What mending a cut found: for each layer new weights, other units, and what is missing without and with them.

Each finished layer can be kept in a file, so that an interrupted run takes up what it found: only the streams pass the
layers again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from minipuzzle.cut.plan import Plan, Units
from minipuzzle.files.outputs import write_whole


@dataclass(frozen=True, kw_only=True)
class LayerRefit:
    """What was done to the output projections of one layer of the source model.

    ``ridge``: None where the plain weights stayed. ``has_other_units``: than planned. ``missing_before`` and
    ``missing_after`` are of held-out tokens: the squared distance of the student's stream from the teacher's, in mean
    squares of the teacher's, summed. ``experts_refitted``: routed ones.
    """

    layer_idx: int
    ridge: float | None
    missing_before: float
    missing_after: float
    has_other_units: bool
    experts_refitted: int = 0

    @property
    def is_refitted(self) -> bool:
        """Whether any weight is new."""
        return self.ridge is not None or self.experts_refitted > 0


@dataclass(frozen=True, kw_only=True)
class MendedLayer:
    """A layer as it goes into the cut model: its record, (axis, units) that stay, and new weights by their names in
    the layer's module, in the precision of the source."""

    record: LayerRefit
    kept_units: tuple[tuple[str, Units], ...]
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Compensation:
    """The plan with the units that were chosen, new weights by their names in the cut checkpoint and in its precision,
    and what was done to each layer."""

    plan: Plan
    num_tokens: int
    weights: Mapping[str, torch.Tensor]
    layers: Sequence[LayerRefit]

    @property
    def num_refitted(self) -> int:
        """Layers with new weights; the others gained nothing on held-out text."""
        return sum(layer.is_refitted for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """A record of the run."""
        return {
            "tokens": self.num_tokens,
            "layers_refitted": self.num_refitted,
            "layers_left_plain": len(self.layers) - self.num_refitted,
            "layers": [asdict(layer) for layer in self.layers],
        }


@dataclass(frozen=True, kw_only=True)
class MendedLayers:
    """A folder of the layers that a run has mended, for one that continues it. Those of another run do not count."""

    folder: Path
    identity: str

    @classmethod
    def of(cls, folder: Path, plan: Plan, token_ids: torch.Tensor, *, may_choose: bool) -> MendedLayers:
        """Those of one plan mended on some tokens."""
        told = sha256(plan.to_json().encode())
        told.update(token_ids.numpy().tobytes() + bytes([may_choose]))
        return cls(folder=folder, identity=told.hexdigest())

    def _file(self, layer_idx: int) -> Path:
        return self.folder / f"{layer_idx}.safetensors"

    def read(self, layer_idx: int) -> MendedLayer | None:
        """A finished layer; None if it is not finished."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(layer_idx), framework="pt") as file:
                found = json.loads((file.metadata() or {}).get("mended", "{}"))
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (FileNotFoundError, SafetensorError):
            return None
        if found.get("identity") != self.identity:
            return None
        return MendedLayer(
            record=LayerRefit(**found["record"]),
            kept_units=tuple((axis, tuple(units)) for axis, units in found["kept_units"]),
            weights=weights,
        )

    def write(self, mended: MendedLayer) -> None:
        """Keep a finished layer."""
        from safetensors.torch import save_file

        self.folder.mkdir(exist_ok=True)
        record = {"identity": self.identity, "record": asdict(mended.record), "kept_units": mended.kept_units}
        with write_whole(self._file(mended.record.layer_idx)) as path:
            save_file(dict(mended.weights), path, metadata={"mended": json.dumps(record)})

    def weights(self, new_names: Mapping[int, Mapping[str, str]]) -> Mapping[str, torch.Tensor]:
        """The new weights of finished layers, each read when it is asked for. ``new_names``: by layer, names in the cut
        model -> names in the layer's module."""
        files = {new: (self._file(idx), own) for idx, names in new_names.items() for new, own in names.items()}
        return _StoredWeights(files)


class _StoredWeights(Mapping[str, torch.Tensor]):
    def __init__(self, files: Mapping[str, tuple[Path, str]]) -> None:
        self.files = files

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        path, own = self.files[name]
        with safe_open(path, framework="pt") as file:
            weight: torch.Tensor = file.get_tensor(own)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
