"""Guarantee: tables, charts and pictures show each number in its place, and budgets that nothing fits as such."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from importance.work import PlannedScoring, Work
from minipuzzle.architecture.memory import Deployment
from minipuzzle.architecture.quantities import GIB, format_gib
from minipuzzle.cut.selection import make_plan
from minipuzzle.search.engine import find_candidates
from minipuzzle.search.request import SearchRequest
from minipuzzle.search.sweep import FrontierPoint
from minipuzzle.show.bars import ProgressLines
from minipuzzle.show.frontier import frontier_chart, plot_frontier, write_frontier_csv
from minipuzzle.show.report import (
    colored_pattern,
    print_architecture,
    print_candidates,
    print_finalists,
    print_plan,
)
from minipuzzle.show.scores import print_planned_scoring
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


def test_the_best_candidates_are_listed_with_what_each_takes_and_loses(capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_architecture("M-M*-")
    request = SearchRequest(memory="90%", granularity=16, min_kept_fraction=0)
    found = find_candidates(source, random_scores(source), request, Deployment(context_tokens=64))
    print_candidates(found[:2], len(found))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"2 best of {len(found)} candidates" in shown
    for candidate in found[:2]:
        assert f"{candidate.predicted_loss:.4g}" in shown and format_gib(candidate.memory_bytes) in shown


def test_a_race_shows_every_finalist_and_marks_the_winner(capsys: pytest.CaptureFixture[str]) -> None:
    common = {"num_parameters": 2_000_000, "before": {"kl": 0.5}}
    rounds = [{"tokens": 1000, "kl": 0.4, "loss": 2.4}, {"tokens": 2000, "kl": 0.3, "loss": 2.3}]
    print_finalists(
        [
            {**common, "pattern": "M-M*", "is_winner": True, "rounds": rounds},
            {**common, "pattern": "M-*-", "is_winner": False, "rounds": rounds[:1]},
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    (winner,), (loser,) = ([line for line in lines if pattern in line] for pattern in ("M-M*", "M-*-"))
    assert "2.3000 ◂" in winner and "0.3000" in winner and "2.00 k" in winner
    assert "2.4000" in loser and "◂" not in loser and "0.5000" in loser


def test_planned_work_says_what_is_a_bound_and_what_is_of_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    work = Work(
        layer_applications=28,
        layer_slices=2,
        channel_slices=1,
        weight_bytes_read=GIB,
        peak_bytes=GIB // 2,
        weights_stay_in_memory=False,
    )
    print_planned_scoring(PlannedScoring(work=work, memory_limit_bytes=GIB, processes=2, scan="torch", removals=1))
    lines = {line[:20].strip(): line[20:].strip() for line in capsys.readouterr().out.splitlines()}
    assert lines["layer applications"] == "at most 28"
    assert lines["memory, estimated"] == "0.5000 GiB of 1.00 GiB"
    assert lines["weights to read"] == "1.00 GiB, one layer in memory at a time"
    assert lines["processes"] == "2; the figures are those of one"


def test_a_job_without_a_terminal_says_each_half_minute_how_far_it_is() -> None:
    seconds, said = [0.0], list[str]()
    lines = ProgressLines("scoring", 1000, done=100, clock=lambda: seconds[0], write=said.append)
    for now, done in ((10, 50), (31, 50), (40, 100), (62, 100)):
        seconds[0] = now
        lines.advance(done, "loss 1.5")
    assert said == [
        "scoring: 200 of 1,000, loss 1.5, 3.23 a second, 0:04:08 left",
        "scoring: 400 of 1,000, loss 1.5, 4.84 a second, 0:02:04 left",
    ]
