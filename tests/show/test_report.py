"""Guarantee: tables, charts and pictures show each number in its place, and budgets that nothing fits as such."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from minipuzzle.architecture.memory import Deployment
from minipuzzle.architecture.quantities import GIB
from minipuzzle.cut.selection import make_plan
from minipuzzle.search.sweep import FrontierPoint
from minipuzzle.show.frontier import frontier_chart, plot_frontier, write_frontier_csv
from minipuzzle.show.report import colored_pattern, print_architecture, print_plan
from tests.support.scores import random_scores, tiny_architecture


def test_bars_are_as_long_as_losses_are_high(tmp_path: Path) -> None:
    losses = (4.0, 2.0, 0.0)
    points = [
        FrontierPoint(budget_bytes=idx * GIB, memory_bytes=idx * GIB, quality=loss)
        for idx, loss in enumerate(losses, 1)
    ]
    lengths = [line.count("█") for line in frontier_chart(points, quality="loss").splitlines()[1:]]
    assert lengths[0] == 2 * lengths[1] > 0 == lengths[2]
    nothing = [FrontierPoint(budget_bytes=GIB)]
    plot_frontier(nothing, tmp_path / "empty.png", quality="loss")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_a_table_has_a_row_for_each_budget(tmp_path: Path) -> None:
    points = [
        FrontierPoint(budget_bytes=GIB),
        FrontierPoint(budget_bytes=2 * GIB, memory_bytes=GIB + 1, num_parameters=7, quality=0.5, description="half"),
    ]
    write_frontier_csv(points, tmp_path / "frontier.csv", quality="kl")
    nothing, fitting = csv.DictReader((tmp_path / "frontier.csv").open(encoding="utf-8"))
    assert nothing == {"budget_bytes": str(GIB)} | dict.fromkeys(nothing.keys() - {"budget_bytes"}, "")
    assert (fitting["memory_bytes"], fitting["kl"], fitting["description"]) == (str(GIB + 1), "0.5", "half")
    assert "nothing fits" in frontier_chart(points, quality="kl").splitlines()[1]


def test_a_cut_is_shown_against_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_architecture("M-M*-")
    plan = make_plan(source, random_scores(source), kept_layers=(0, 1, 3, 4), widths={1: {"ffn": 32}, 4: {"ffn": 32}})
    target = plan.apply(source)
    print_plan(source, target, (2,), Deployment(context_tokens=64))
    shown = capsys.readouterr().out
    rows = {line[:30].strip(" │┃"): line.split() for line in shown.splitlines()}
    assert "M-M*-" in shown and "M-*-" in shown
    assert any("mamba" in name and "50%" in cells for name, cells in rows.items())
    assert any("ffn" in name and {"64", "32", "50%"} <= set(cells) for name, cells in rows.items())
    assert "[dim strike]M[/]" in colored_pattern(source, (2,))


def test_a_model_is_shown_with_the_share_of_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_architecture("M-*")
    deployment = Deployment(context_tokens=64)
    print_architecture(source, deployment)
    shown = capsys.readouterr().out
    parts = source.parameters_by_part()
    assert all(f"{count / source.num_parameters:.1%}" in shown for count in parts.values())
    assert deployment.describe() in " ".join(shown.split())
