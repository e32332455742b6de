"""Guarantee: `verify` ends with ok or not ok. Recorded digests tell what has changed since it was exported, and the
source tells what is not it, rounded alike.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from minipuzzle.errors import ExitCode
from minipuzzle.export.digests import DIGESTS_FILE
from tests.support.cli import run_cli
from tests.support.tiny_models import change_tensors, write_tiny_checkpoint

EXPORTS = {
    "bf16": ("--bf16",),
    "fp8": ("--fp8",),
    "fp8-ct": ("--fp8", "--flavour", "compressed-tensors"),
    "nvfp4": ("--nvfp4",),
    "nvfp4-ct": ("--nvfp4", "--flavour", "compressed-tensors"),
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, other weights of the same shapes, and exports of the source."""
    root = tmp_path_factory.mktemp("verdicts")
    (root / "text.txt").write_text("Words like those that will be read. " * 40)
    write_tiny_checkpoint(root / "source", pattern="M-*-")
    write_tiny_checkpoint(root / "other", pattern="M-*-", seed=1)
    write_tiny_checkpoint(root / "shorter", pattern="M-*")
    measured = ("--data", root / "text.txt", "--samples", 2, "--sequence-length", 16)
    for name, options in EXPORTS.items():
        result = run_cli("export", root / "source", *options, *measured, "--no-verify", "-o", root / name)
        assert result.exit_code == 0, result.output
    return root


def copied(folders: Path, name: str, to: Path, *, with_digests: bool) -> Path:
    shutil.copytree(folders / name, to)
    if not with_digests:
        (to / DIGESTS_FILE).unlink()
    return to


def scaled(tensors: Tensors) -> None:
    """One scale of one weight, or one weight, is 4 times what it was."""
    name = sorted(tensors, key=lambda name: ("weight" in name and "scale" in name, "down_proj" in name, name))[-1]
    tensors[name] = (tensors[name].float() * 4).to(tensors[name].dtype)


def flipped(tensors: Tensors) -> None:
    """One bit of one code."""
    name = next(name for name in sorted(tensors) if ".down_proj.weight" in name and "scale" not in name)
    tensors[name].view(torch.uint8).flatten()[3:4].bitwise_xor_(8)


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("against", [(), ("--against", "source")], ids=["alone", "against"])
def test_what_was_written_is_ok_and_what_has_changed_is_not(
    folders: Path, name: str, against: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    whole = run_cli("verify", name, *against, "--json")
    assert whole.exit_code == 0 and json.loads(whole.stdout)["verdict"] == "ok", whole.output
    for damage in (scaled, flipped):
        folder = copied(folders, name, tmp_path / damage.__name__, with_digests=True)
        change_tensors(folder, damage)
        found = run_cli("verify", folder, *against, "--json")
        assert found.exit_code == ExitCode.NOT_OK, found.output
        assert len(json.loads(found.stdout)["differing"]) == 1


@pytest.mark.parametrize("name", EXPORTS)
def test_without_digests_that_is_said_and_the_source_tells(folders: Path, name: str, tmp_path: Path) -> None:
    folder = copied(folders, name, tmp_path / "copy", with_digests=False)
    for against in ((), ("--against", folders / "source")):
        found = run_cli("verify", folder, *against)
        assert found.exit_code == 0 and "no digests recorded" in found.output, found.output
    change_tensors(folder, scaled)
    found = run_cli("verify", folder, "--against", folders / "source")
    assert found.exit_code == ExitCode.NOT_OK and "not ok" in found.output, found.output


@pytest.mark.parametrize("other", ["other", "shorter"])
@pytest.mark.parametrize("name", ["bf16", "fp8", "nvfp4-ct"])
def test_another_model_is_not_the_source(folders: Path, name: str, other: str) -> None:
    found = run_cli("verify", folders / name, "--against", folders / other, "--json")
    assert found.exit_code == ExitCode.NOT_OK and json.loads(found.stdout)["differing"], found.output
