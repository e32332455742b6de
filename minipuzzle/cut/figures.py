"""The figures that a plan was chosen by: what the model that it leaves costs, and what it should lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from minipuzzle.architecture.memory import Deployment, MemoryTerm
from minipuzzle.files.json_files import record_of


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known of the model that a plan leaves, at the deployment that it was searched for.

    ``tokens_per_second``: None without measured times. ``layout``, ``limits`` (by cost) and ``metric``: what was
    searched for, and by which scores; ``predicted_loss``: by that metric.
    """

    pattern: str
    num_parameters: int
    num_active_parameters: int
    memory_bytes: int
    memory_terms: tuple[MemoryTerm, ...]
    deployment: Deployment
    tokens_per_second: float | None = None
    layout: str
    limits: Mapping[str, float]
    predicted_loss: float
    metric: str

    def to_json(self) -> dict[str, Any]:
        """All figures by name, without a speed that is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Figures:
        """The inverse of ``to_json``.

        Raises: ValueError naming the field that cannot be; MinipuzzleError for a deployment that cannot be.
        """
        return record_of(cls, record, "figures")

    def __post_init__(self) -> None:
        """Refuse sizes and speeds below zero.

        Raises: ValueError.
        """
        sizes = {name: getattr(self, name) for name in ("num_parameters", "num_active_parameters", "memory_bytes")}
        for name, size in {**sizes, "tokens_per_second": self.tokens_per_second or 0}.items():
            if size < 0:
                raise ValueError(f"{name} is {size}")


FIGURES = {field.name for field in fields(Figures)}
REQUIRED_FIGURES = FIGURES - {"tokens_per_second"}
