"""Guarantee: --device-memory bounds every step of prune and export; dry runs refuse what runs would refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from minipuzzle.commands.cli import main

SMALL = ["--memory", "90%", "--context", "64", "--samples", "2", "--sequence-length", "16", "--granularity", "16"]
RACE = ["--finalists", "2", "--race-tokens", "64", "--race-batch", "1"]
ONE_LAYER_BYTES = 700_000  # enough to measure one layer of the tiny model at a time, too little to train it


def prune(model: Path, text: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["prune", str(model), "--data", str(text), *SMALL, "-o", str(out), *more])


@pytest.mark.parametrize("how", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("limited", [("1KiB", "--candidates", "1"), (f"{ONE_LAYER_BYTES}B", *RACE)], ids=str)
def test_too_little_memory_is_refused_by_name(
    tiny_folder: Path, text_file: Path, tmp_path: Path, limited: tuple[str, ...], how: tuple[str, ...]
) -> None:
    result = prune(tiny_folder, text_file, tmp_path / "out", "--device-memory", *limited, *how)
    assert result.exit_code == 1, result.output
    assert "may be used" in result.stderr and "--device-memory" in result.stderr
    assert not (tmp_path / "out").exists()


def test_measuring_and_comparing_keep_within_the_limit(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    limit = ("--device-memory", f"{ONE_LAYER_BYTES}B", "--json")
    planned = json.loads(prune(tiny_folder, text_file, tmp_path / "out", *limit, "--dry-run").stdout)
    assert planned["memory_while_measuring_bytes"] <= ONE_LAYER_BYTES
    resident = json.loads(prune(tiny_folder, text_file, tmp_path / "out", "--dry-run", "--json").stdout)
    assert resident["memory_while_measuring_bytes"] > ONE_LAYER_BYTES
    assert resident["weights_to_read_bytes"] < planned["weights_to_read_bytes"]
    assert prune(tiny_folder, text_file, tmp_path / "out", *limit).exit_code == 0


@pytest.mark.parametrize("how", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_calibration_and_its_dry_run_are_refused_alike(
    tiny_folder: Path, text_file: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    calibrating = ["--fp8", "--data", str(text_file), "--samples", "2", "--sequence-length", "16"]
    arguments = ["export", str(tiny_folder), *calibrating, "-o", str(tmp_path / "out"), "--device-memory", "1KiB", *how]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "may be used" in result.stderr, result.output
    assert not (tmp_path / "out").exists()
