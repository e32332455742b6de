"""A blend: which sources of text a run reads, in which shares, in which phases, and how often at most.

A blend file is TOML; paths are relative to it:

    held_out = 0.01             # share of the documents that is kept for validation
    max_epochs = 4              # how often a source may be read at most, unless it says otherwise itself

    [sources.web]
    path = "web"                # a file or a folder, or a list of them
    [sources.maths]
    path = ["maths.jsonl", "proofs.parquet"]
    max_epochs = 8

    [[phases]]
    name = "broad"
    share = 0.6                 # of the run's tokens
    weights = {web = 3, maths = 1}
    [[phases]]
    name = "high quality"
    share = 0.4
    weights = {web = 1, maths = 2}

Source: two-phase pre-training, broad first and high quality last, with capped epochs (arXiv 2412.15285).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipuzzle.architecture.quantities import format_count
from minipuzzle.errors import MinipuzzleError
from minipuzzle.toml_files import read_toml

BLEND_SUFFIX = ".toml"
DEFAULT_MAX_EPOCHS = 4.0
ONLY = "data"  # the one source and the one phase of a run without a blend file


@dataclass(frozen=True, kw_only=True)
class Source:
    """Text that is drawn from as one. ``max_epochs`` is infinite where the user set no limit."""

    name: str
    paths: tuple[Path, ...]
    max_epochs: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of a run: its share of all tokens, and the share of each source in it; both sum to one."""

    name: str
    share: float
    weights: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Sources and phases in order. ``held_out``: share of the documents that is kept for validation."""

    sources: tuple[Source, ...]
    phases: tuple[Phase, ...]
    held_out: float = 0.0

    @property
    def paths(self) -> tuple[Path, ...]:
        """Everything that is read."""
        return tuple(path for source in self.sources for path in source.paths)


@dataclass(frozen=True, kw_only=True)
class PlannedShare:
    """What one phase reads of one source: windows, tokens, and how many epochs of the source these are."""

    phase: str
    source: str
    num_windows: int
    num_tokens: int
    epochs: float


def plain_blend(paths: tuple[Path, ...], held_out: float = 0.0) -> Blend:
    """All text as one source in one phase, read as often as the run asks for."""
    phase = Phase(name=ONLY, share=1.0, weights={ONLY: 1.0})
    return Blend(sources=(Source(name=ONLY, paths=paths),), phases=(phase,), held_out=held_out)


def read_blend(path: Path) -> Blend:
    """The blend of a file.

    Raises: MinipuzzleError naming the entry that is missing, unknown or out of range.
    """
    entries = read_toml(path, "‹data›")
    _refuse_unknown(path, "the file", entries, ("held_out", "max_epochs", "sources", "phases"))
    max_epochs = _number(path, "max_epochs", entries.get("max_epochs", DEFAULT_MAX_EPOCHS))
    held_out = _number(path, "held_out", entries.get("held_out", 0.0), least=0.0)
    if held_out >= 1:
        raise MinipuzzleError(f"{path}: held_out is {held_out}", "give a share below 1, such as 0.01")
    sources = tuple(_source(path, name, entry, max_epochs) for name, entry in _tables(path, entries, "sources"))
    phases = _phases(path, entries, {source.name for source in sources})
    return Blend(sources=sources, phases=phases, held_out=held_out)


def plan_blend(
    blend: Blend, windows_per_epoch: Mapping[str, int], *, total_windows: int, sequence_length: int
) -> list[PlannedShare]:
    """How many windows each phase reads of each source; they add up to ``total_windows`` exactly.

    Raises: MinipuzzleError if a source would be read more often than its ``max_epochs``, saying by how much.
    """
    phase_windows = _apportion(total_windows, [phase.share for phase in blend.phases])
    plan = []
    for phase, num_phase_windows in zip(blend.phases, phase_windows, strict=True):
        counts = _apportion(num_phase_windows, list(phase.weights.values()))
        for source, num_windows in zip(phase.weights, counts, strict=True):
            plan.append(
                PlannedShare(
                    phase=phase.name,
                    source=source,
                    num_windows=num_windows,
                    num_tokens=num_windows * sequence_length,
                    epochs=num_windows / windows_per_epoch[source],
                )
            )
    for source_entry in blend.sources:
        _check_cap(source_entry, plan, windows_per_epoch[source_entry.name], sequence_length)
    return plan


def _check_cap(source: Source, plan: list[PlannedShare], windows_per_epoch: int, sequence_length: int) -> None:
    num_windows = sum(share.num_windows for share in plan if share.source == source.name)
    epochs = num_windows / windows_per_epoch
    if epochs <= source.max_epochs:
        return
    excess_tokens = math.ceil((num_windows - source.max_epochs * windows_per_epoch) * sequence_length)
    raise MinipuzzleError(
        f"source {source.name} would be read {epochs:.2f} times, {epochs - source.max_epochs:.2f} epochs or "
        f"{format_count(excess_tokens)} tokens above its max_epochs of {source.max_epochs:g}",
        "lower its weights or ‹tokens›, add text to it, or raise max_epochs",
    )


def _apportion(total: int, shares: list[float]) -> list[int]:
    """Whole numbers in proportion to shares, adding up to ``total``: rounded down, then by largest remainder."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda idx: counts[idx] - exact[idx])
    for idx in by_remainder[: total - sum(counts)]:
        counts[idx] += 1
    return counts


def _tables(path: Path, entries: Mapping[str, Any], name: str) -> list[tuple[str, Mapping[str, Any]]]:
    tables = entries.get(name)
    if not isinstance(tables, dict) or not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise MinipuzzleError(f"{path} has no {name}", f"add a table [{name}.NAME] for each")
    return list(tables.items())


def _source(path: Path, name: str, entry: Mapping[str, Any], max_epochs: float) -> Source:
    where = f"source {name}"
    _refuse_unknown(path, where, entry, ("path", "max_epochs"))
    given = entry.get("path")
    members = [given] if isinstance(given, str) else given
    if not isinstance(members, list) or not members or not all(isinstance(member, str) for member in members):
        raise MinipuzzleError(f"{path}: {where} has no path", 'write path = "FILE_OR_FOLDER" or a list of them')
    own_max = _number(path, f"max_epochs of {where}", entry.get("max_epochs", max_epochs))
    return Source(name=name, paths=tuple(path.parent / member for member in members), max_epochs=own_max)


def _phases(path: Path, entries: Mapping[str, Any], sources: set[str]) -> tuple[Phase, ...]:
    given = entries.get("phases")
    if not isinstance(given, list) or not given or not all(isinstance(entry, dict) for entry in given):
        raise MinipuzzleError(f"{path} has no phases", "add a table [[phases]] for each, in their order")
    phases = []
    for number, entry in enumerate(given, start=1):
        name = str(entry.get("name", f"phase {number}"))
        _refuse_unknown(path, name, entry, ("name", "share", "weights"))
        weights = entry.get("weights")
        if not isinstance(weights, dict) or not weights:
            raise MinipuzzleError(f"{path}: {name} has no weights", "write weights = {SOURCE = NUMBER, ...}")
        if unknown := weights.keys() - sources:
            raise MinipuzzleError(
                f"{path}: {name} weighs unknown sources: {', '.join(sorted(unknown))}",
                f"the sources are {', '.join(sorted(sources))}",
            )
        numbers = {source: _number(path, f"weight of {source} in {name}", w) for source, w in weights.items()}
        total = sum(numbers.values())
        share = _number(path, f"share of {name}", entry.get("share", 1.0))
        phases.append(Phase(name=name, share=share, weights={source: w / total for source, w in numbers.items()}))
    _check_phases(path, phases, sources)
    return tuple(phases)


def _check_phases(path: Path, phases: list[Phase], sources: set[str]) -> None:
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names):
        raise MinipuzzleError(f"{path}: two phases have one name: {', '.join(names)}", "give each its own name")
    total = sum(phase.share for phase in phases)
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise MinipuzzleError(f"{path}: the shares of the phases add up to {total:g}", "make them add up to 1")
    if unused := sources - {source for phase in phases for source in phase.weights}:
        raise MinipuzzleError(
            f"{path}: no phase weighs {', '.join(sorted(unused))}", "give it a weight in a phase, or remove it"
        )


def _refuse_unknown(path: Path, where: str, entry: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := entry.keys() - set(known):
        raise MinipuzzleError(
            f"{path}: {where} has unknown entries: {', '.join(sorted(unknown))}", f"known are {', '.join(known)}"
        )


def _number(path: Path, name: str, value: object, *, least: float | None = None) -> float:
    """A finite positive number, or one of at least ``least``."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (float(value) <= 0 if least is None else float(value) < least):  # type: ignore[arg-type]
        raise MinipuzzleError(f"{path}: {name} is {value!r}", "give a positive number")
    return float(value)  # type: ignore[arg-type]
