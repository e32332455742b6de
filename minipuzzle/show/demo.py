"""What the demo shows at its end: one table and one picture of the five stages of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console

from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.model import Architecture
from minipuzzle.architecture.quantities import GIB, format_count
from minipuzzle.show.pictures import picture
from minipuzzle.show.tables import figures_table

if TYPE_CHECKING:
    from minipuzzle.quality.record import Quality

STAGE_COLORS = ("#4c566a", "#bf616a", "#d08770", "#5e81ac", "#88c0d0")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the table: a model, what it needs when served, and its quality by domain and over all."""

    name: str
    architecture: Architecture
    memory_bytes: int
    by_domain: Mapping[str, Quality]
    overall: Quality

    @property
    def layers(self) -> str:
        """Layers by kind, e.g. ``9M 8- 3*``."""
        counts = self.architecture.layer_counts
        return " ".join(f"{count}{LAYER_KINDS[kind].symbol}" for kind, count in counts.items())

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            "name": self.name,
            "layers": self.architecture.layer_counts,
            "ffn": self.architecture.width("ffn"),
            "num_parameters": self.architecture.num_parameters,
            "memory_bytes": self.memory_bytes,
            "by_domain": {domain: evaluation.to_json() for domain, evaluation in self.by_domain.items()},
            "overall": self.overall.to_json(),
        }


def print_stages(stages: Sequence[Stage], deployment: str) -> None:
    """Print the table."""
    domains = list(stages[0].by_domain)
    headers = ("layers", "params", "GiB", *domains, "KL", "agree", "tok/s")
    table = figures_table("", *headers, box=SIMPLE_HEAD, padding=0)  # within 80 columns
    for column in table.columns:
        column.no_wrap = True
    for stage in stages:
        overall = stage.overall
        table.add_row(
            stage.name,
            stage.layers,
            format_count(stage.architecture.num_parameters),
            f"{stage.memory_bytes / GIB:.4f}",
            *(f"{stage.by_domain[domain].bits_per_byte:.3f}" for domain in domains),
            f"{overall.kl or 0:.4f}",
            f"{overall.agreement or 0:.1%}",
            f"{overall.tokens_per_second:,.0f}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{' and '.join(domains)}: bits per byte of held-out text. KL (nats/token) and agreement on the best next "
        f"token: against the teacher, over both texts. GiB: memory at {deployment}. FP8 arithmetic is emulated here; "
        "its tok/s says nothing about a GPU.",
        style="dim",
    )


def draw_stages(stages: Sequence[Stage], path: Path) -> None:
    """Draw memory, bits per byte by domain, and KL to the teacher as bars."""
    domains = list(stages[0].by_domain)
    with picture(path, (11, 3.6), widths=(1, 1.6, 1)) as (memory, quality, divergence):
        names = [stage.name for stage in stages]
        _bars(memory, names, [stage.memory_bytes / GIB for stage in stages], "{:.4f}")
        memory.set_title("memory when served, GiB")
        _bars(divergence, names[1:], [stage.overall.kl or 0 for stage in stages[1:]], "{:.3f}", STAGE_COLORS[1:])
        divergence.set_title("KL to the teacher, nats/token")
        width = 0.8 / len(stages)
        for idx, stage in enumerate(stages):
            positions = [domain_idx + (idx - (len(stages) - 1) / 2) * width for domain_idx in range(len(domains))]
            values = [stage.by_domain[domain].bits_per_byte for domain in domains]
            bars = quality.bar(positions, values, width * 0.92, label=stage.name, color=STAGE_COLORS[idx])
            quality.bar_label(bars, fmt="{:.2f}", fontsize=8, padding=1)
        quality.set_xticks(range(len(domains)), domains)
        quality.set_title("bits per byte of held-out text (lower is better)")
        quality.legend(ncols=len(stages), fontsize=8, frameon=False, loc="upper center")
        quality.set_ylim(0, 1.25 * max(value.bits_per_byte for stage in stages for value in stage.by_domain.values()))
        for axes in (memory, quality, divergence):
            axes.title.set_fontsize(10)


def _bars(
    axes: Any, names: Sequence[str], values: Sequence[float], label: str, colors: Sequence[str] = STAGE_COLORS
) -> None:
    bars = axes.bar(names, values, color=colors, width=0.7)
    axes.bar_label(bars, fmt=label, fontsize=8, padding=1)
    axes.tick_params(axis="x", labelsize=8, labelrotation=20)
    axes.set_ylim(0, 1.12 * max(values))
