"""Finalists: the few candidates that short distillation decides between, and the table of how they did.

Before distillation the order of good candidates says little (arXiv 2504.03624, table 6: 63.3, 62.1 and 53.7 became
69.3, 69.6 and 69.5), so the finalists are made different on purpose, and the winner is the one that measures best
after every one of them has been trained on as many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minipuzzle.architecture import Architecture
from minipuzzle.corpus import EvaluationWindows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.plan import Plan
from minipuzzle.ranking import RankedPlan


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """A finalist after one round. ``tokens`` of training so far; ``loss``, ``kl`` in nats per validation token."""

    tokens: int
    loss: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class RaceResult:
    """Rounds of each finalist, in the order given, and the winner's trained checkpoint folder."""

    rounds: tuple[tuple[RoundResult, ...], ...]
    winner: int
    winner_folder: Path

    def __post_init__(self) -> None:
        assert 0 <= self.winner < len(self.rounds)


# Trains finalists, given as cut checkpoint folders, and measures them on the windows; keeps its work in the folder, so
# that an interrupted race continues.
Race = Callable[[Sequence[Path], EvaluationWindows, Path], RaceResult]


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """``tokens`` that each finalist trains on in all, and how. ``halving``: drop the worse half after each round."""

    tokens: int
    halving: bool = False
    learning_rate: float = 1e-4
    sequence_length: int = 512
    batch_sequences: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.tokens, self.sequence_length, self.batch_sequences) < 1 or self.learning_rate <= 0:
            raise MinipuzzleError(
                "a race needs tokens, a sequence length, a batch and a learning rate above zero",
                "check --race-tokens, --race-batch, --race-learning-rate and --sequence-length",
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch_sequences * self.sequence_length

    def tokens_of_rounds(self, num_finalists: int) -> tuple[int, ...]:
        """Tokens of each round: one round, or with halving as many equal ones as it takes to leave one finalist."""
        num_rounds = max(1, (num_finalists - 1).bit_length()) if self.halving else 1
        return (-(-self.tokens // num_rounds),) * num_rounds

    def total_steps(self, num_finalists: int) -> int:
        """Optimiser steps of the whole race."""
        total, active = 0, num_finalists
        for tokens in self.tokens_of_rounds(num_finalists):
            total += active * -(-tokens // self.tokens_per_step)
            active = -(-active // 2) if self.halving else active
        return total


def survivors(latest: dict[int, float]) -> list[int]:
    """The better half of some contenders (number -> loss), rounded up, by number; ties go to the smaller number."""
    ordered = sorted(latest, key=lambda contender: (latest[contender], contender))
    return sorted(ordered[: -(-len(ordered) // 2)])


def num_layers_different(source: Architecture, one: Plan, other: Plan) -> int:
    """Layers of the source that two plans treat differently: kept or not, or with other units."""

    def treatment(plan: Plan, layer_idx: int) -> object:
        if layer_idx not in plan.kept_layers:
            return None
        axes = ("hidden", *source.layers[layer_idx].sizes)
        return [(axis, units) for axis in axes if (units := plan.units(axis, layer_idx)) is not None]

    return sum(treatment(one, idx) != treatment(other, idx) for idx in range(len(source.layers)))


def pick_finalists(
    source: Architecture, ranked: Sequence[RankedPlan], number: int, min_different: int
) -> list[RankedPlan]:
    """The best candidates that differ from every better finalist in so many layers.

    Where there are too few such candidates, the best of the others fill the places.
    """
    chosen: list[RankedPlan] = []
    for item in ranked:
        others = (num_layers_different(source, item.plan, earlier.plan) for earlier in chosen)
        if len(chosen) < number and all(different >= min_different for different in others):
            chosen.append(item)
    fillers = [item for item in ranked if not any(item is earlier for earlier in chosen)]
    return chosen + fillers[: number - len(chosen)]


def finalist_table(finalists: Sequence[Mapping[str, Any]], result: RaceResult) -> list[dict[str, Any]]:
    """What is known of each finalist with its rounds, and which one won."""
    return [
        {**facts, "rounds": [asdict(done) for done in rounds], "is_winner": number == result.winner}
        for number, (facts, rounds) in enumerate(zip(finalists, result.rounds, strict=True))
    ]
