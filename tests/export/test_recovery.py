"""Guarantee: an export that is killed leaves nothing at its target, and the same command finishes it without writing
finished files again; `minipuzzle verify` states what a folder holds and computes, and refuses a damaged one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipuzzle.export.calibration import ActivationAmax
from minipuzzle.export.shards import TensorHeader, plan_shards, write_index
from minipuzzle.export.write import ExportTensors, write_export
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.safetensors_files import SINGLE_FILE
from minipuzzle.formats.layout import export_layout
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from tests.support.cli import run_cli
from tests.support.kills import run_command, start, stop_when
from tests.support.tiny_models import change_tensors, write_tiny_checkpoint
from tests.support.watched import watched

OPTIONS = ("--fp8", "--samples", "4", "--sequence-length", "32", "--max-shard-size", "20kB")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    (root / "text.txt").write_text("Calibration text should look like what the model will see. " * 8)
    return write_tiny_checkpoint(root / "source", pattern="M-*-" * 4)


def export_slowly(*arguments: str) -> None:
    """Writing is slowed down from outside, so that a kill falls between two files on any machine."""
    write = ExportTensors.write

    def write_slowly(*given: Any) -> None:
        time.sleep(0.02)
        write(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExportTensors, "write", write_slowly)
        run_command(*arguments)


def test_a_killed_export_leaves_no_target_and_the_same_command_finishes_it(source: Path, tmp_path: Path) -> None:
    arguments = ["export", source, *OPTIONS, "--data", source.parent / "text.txt", "-o", tmp_path / "out"]
    partial = tmp_path / "out.partial"
    process = start(export_slowly, *map(str, arguments))
    assert stop_when(process, lambda: len(list(partial.glob("*.safetensors"))) >= 3), "it ended before it was killed"
    assert not (tmp_path / "out").exists()
    finished = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    result = run_cli(*arguments)
    assert result.exit_code == 0, result.output
    assert not partial.exists()
    files = {file.name: file for file in (tmp_path / "out").iterdir()}
    assert len(files) > len(finished)
    assert {name: files[name].stat().st_mtime_ns for name in finished} == finished
    assert run_cli(*arguments[:-1], tmp_path / "again").exit_code == 0
    for name, file in files.items():
        if name not in ("README.md", "minipuzzle.json", "report.html"):  # say the exact command
            assert file.read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert set(files) == {file.name for file in (tmp_path / "again").iterdir()}


def test_another_request_does_not_continue_an_interrupted_export(source: Path, tmp_path: Path) -> None:
    export_checkpoint(Checkpoint.open(source), tmp_path / "out", ExportRequest(scheme="fp8-dynamic"))
    (tmp_path / "out").rename(tmp_path / "other.partial")
    result = run_cli(
        "export", source, "--nvfp4", "--data", source.parent / "text.txt", *OPTIONS[1:5], "-o", tmp_path / "other"
    )
    assert result.exit_code == 4
    assert "another calibration" in result.stderr and not (tmp_path / "other").exists()


def test_planned_shards_are_what_safetensors_itself_reads(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "wide": torch.randn(3, 5),
        "scalar": torch.tensor(2.5),
        "narrow": torch.randn(4, 2).to(torch.bfloat16),
    }
    names = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
    headers = [
        [TensorHeader(name=name, dtype=names[tensor.dtype], shape=tuple(tensor.shape))]
        for name, tensor in tensors.items()
    ]
    for max_bytes, num_files in ((10**6, 1), (1, 4)):
        folder = tmp_path / str(num_files)
        folder.mkdir()
        shards = plan_shards(folder, headers, max_bytes)
        for shard in shards:
            with shard.open():
                for name in shard.headers:
                    rows = tensors[name].shape[0] if tensors[name].ndim else 1
                    for row in reversed(range(rows)) if tensors[name].ndim else ():
                        shard.write(name, tensors[name][row : row + 1], first_row=row)
                    if not tensors[name].ndim:
                        shard.write(name, tensors[name])
            assert shard.is_complete
        write_index(folder, shards)
        found = {name: tensor for shard in shards for name, tensor in load_file(shard.path).items()}
        assert found.keys() == tensors.keys() and len(shards) == num_files
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert not list(folder.glob("*.unfinished"))


def test_memory_used_for_tensors_does_not_grow_with_the_model(source: Path, tmp_path: Path) -> None:
    """Counted, not measured: no read of the source and no write is larger than a piece."""
    checkpoint = watched(source)
    layout, amax = export_layout(checkpoint.architecture, scheme="fp8-dynamic"), ActivationAmax()
    (tmp_path / "small").mkdir()
    write_export(ExportTensors(checkpoint, layout, amax, piece_elements=64), tmp_path / "small")
    largest = max(read.num_elements for read in checkpoint.reads)
    assert largest == 64  # rows of 32 and 48 elements; convolutions are smaller
    export_checkpoint(Checkpoint.open(source), tmp_path / "large", ExportRequest(scheme="fp8-dynamic", verifies=False))
    assert (tmp_path / "small" / SINGLE_FILE).read_bytes() == (tmp_path / "large" / SINGLE_FILE).read_bytes()


def test_verify_states_layout_modules_scales_and_the_cost_of_rounding(source: Path, tmp_path: Path) -> None:
    text = source.parent / "text.txt"
    arguments = ("export", source, *OPTIONS[:5], "--data", text, "--kv-cache", "fp8", "-o", tmp_path / "out", "--json")
    exported = json.loads(run_cli(*arguments).stdout)["verification"]
    windows = ("--samples", "4", "--sequence-length", "32")
    result = run_cli("verify", tmp_path / "out", "--against", source, "--data", text, *windows, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["flavour"], found["format"], found["fp8_kv_cache"]) == ("modelopt", "fp8", True)
    assert len(found["quantized_modules"]) == 4 * (2 + 2 + 4 + 2) and "lm_head" in found["ignored_modules"]
    assert 0 < found["smallest_weight_scale"] <= found["largest_weight_scale"]
    assert found["kl"] == pytest.approx(exported["kl_from_source"], rel=1e-6)
    assert found["agreement"] == exported["agreement_with_source"]
    assert found["against_loss"] == pytest.approx(exported["source_loss"], rel=1e-6)
    printed = run_cli("verify", tmp_path / "out").output
    assert "random tokens" in printed and "quantized modules      40: backbone.layers.0.mixer.in_proj" in printed
    plain = json.loads(run_cli("verify", source, "--json").stdout)
    assert plain["format"] == "bf16" and "kl" not in plain


def test_verify_refuses_a_damaged_folder_and_names_the_tensor(source: Path, tmp_path: Path) -> None:
    text = source.parent / "text.txt"
    run_cli("export", source, *OPTIONS[:5], "--data", text, "--no-verify", "-o", tmp_path / "out")
    whole = load_file(tmp_path / "out" / SINGLE_FILE)
    name = "backbone.layers.1.mixer.up_proj.input_scale"
    for value, problem in ((0.0, f"{name} holds 0.0"), (-1.0, f"{name} holds -1.0"), (float("nan"), f"{name} in ")):
        save_file({**whole, name: torch.tensor(value)}, tmp_path / "out" / SINGLE_FILE)
        result = run_cli("verify", tmp_path / "out")
        assert result.exit_code == 1
        assert problem in result.stderr
    codes = whole["backbone.layers.1.mixer.up_proj.weight"].clone()
    codes.view(torch.uint8)[0, 0] = 0x7F  # E4M3's NaN
    save_file({**whole, "backbone.layers.1.mixer.up_proj.weight": codes}, tmp_path / "out" / SINGLE_FILE)
    assert run_cli("verify", tmp_path / "out", "--dry-run").exit_code == 0
    result = run_cli("verify", tmp_path / "out")
    assert result.exit_code == 1 and "up_proj.weight holds codes that are not numbers" in result.stderr


def test_the_card_warns_of_an_unknown_licence_and_base_and_carries_known_ones(source: Path, tmp_path: Path) -> None:
    result = run_cli("export", source, "--bf16", "-o", tmp_path / "out", "--json")
    warnings = json.loads(result.stdout)["warnings"]
    assert any("licence" in warning for warning in warnings) and any("--base-model" in warning for warning in warnings)
    assert "states no licence" in (tmp_path / "out/README.md").read_text()
    licensed = write_tiny_checkpoint(tmp_path / "licensed", pattern="M-")
    (licensed / "LICENSE").write_text("All yours.")
    quality = tmp_path / "quality.json"
    quality.write_text(json.dumps({"heldout": {"loss": 1.0, "kl": 0.01, "num_tokens": 100}}))
    options = ("--base-model", "someone/big", "--quality", quality, "--fp8", "--activations", "dynamic")
    result = run_cli("export", licensed, *options, "-o", tmp_path / "fp8", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["warnings"] == []
    card = (tmp_path / "fp8/README.md").read_text()
    for fact in (
        'license_link: "LICENSE"',
        "| heldout |",
        "8,192 tokens, one sequence",
        "| loss (nats/token) |",
        "- fp8",
    ):
        assert fact in card, fact
    assert (tmp_path / "fp8/LICENSE").read_text() == "All yours."


def test_a_nan_in_the_source_stops_the_export_with_its_name(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["backbone.layers.1.mixer.down_proj.weight"][1, 2] = torch.nan

    broken = change_tensors(write_tiny_checkpoint(tmp_path / "broken", pattern="M-"), spoil)
    result = run_cli("export", broken, "--fp8", "--activations", "dynamic", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "down_proj.weight" in result.stderr
    assert not list(tmp_path.glob("out*"))
