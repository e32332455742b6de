"""Guarantee: `minipuzzle export` writes a complete folder or nothing, and says what it measured; its BF16 folders load
strictly in transformers and hold each tensor of the source, rounded once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipuzzle.cut.plan import PLAN_FILE, Plan
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.calibration import ActivationAmax
from minipuzzle.export.model_card import index_ranges, read_front_matter
from minipuzzle.export.verify import verify_plain
from minipuzzle.export.write import ExportTensors
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.safetensors_files import SINGLE_FILE
from minipuzzle.formats.layout import export_layout
from minipuzzle.runtime.meta_models import prepare_layers
from minipuzzle.runtime.models import load_model
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from tests.support.cli import run_cli
from tests.support.tiny_models import write_tiny_checkpoint

CALIBRATION = ("--samples", "4", "--sequence-length", "32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    (root / "text.txt").write_text("Calibration text should look like what the model will see. " * 8)
    return write_tiny_checkpoint(root / "source")


def test_the_fp8_command_reports_what_verification_measured(source: Path, tmp_path: Path) -> None:
    data = ("--data", source.parent / "text.txt", *CALIBRATION)
    result = run_cli("export", source, "--fp8", *data, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["verification"]["relative_difference"] == 0.0
    assert report["verification"]["num_tokens"] == 4 * 32
    assert report["num_tensors"] == len(Checkpoint.open(tmp_path / "out").entries)
    text = run_cli("export", source, "--fp8", *data, "-o", tmp_path / "again").output
    assert "verified: reloaded and run on 128 tokens" in text
    assert f"KL {report['verification']['kl_from_source']:.4g}" in text


def test_the_card_says_what_the_model_is_made_of_and_how(source: Path, tmp_path: Path) -> None:
    arguments = ("--data", source.parent / "text.txt", *CALIBRATION, "--base-model", "someone/model: big")
    run_cli("export", source, "--fp8", *arguments, "-o", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    fields = read_front_matter(tmp_path / "out/README.md")
    assert fields["library_name"] == "transformers" and fields["pipeline_tag"] == "text-generation"
    assert fields["base_model"] == "someone/model: big" and fields["base_model_relation"] == "quantized"
    for fact in ("M-M*-M-", "`backbone.layers.0.mixer.conv1d`", "`lm_head`", "4 windows of 32 tokens", "nats/token"):
        assert fact in card
    record = json.loads((tmp_path / "out/minipuzzle.json").read_text())
    assert record["source_fingerprint"] == Checkpoint.open(source).fingerprint and record["recipe"] == "default"


def test_a_bf16_card_keeps_the_licence_and_base_of_its_source(source: Path, tmp_path: Path) -> None:
    pruned = write_tiny_checkpoint(tmp_path / "pruned")
    (pruned / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: someone/big\n---\n# Model\n")
    quality = {"speeches": {"bits_per_byte": 1.25, "num_tokens": 4000, "kl": None}}
    request = ExportRequest(quality=quality, command="minipuzzle export x --bf16")
    export_checkpoint(Checkpoint.open(pruned), tmp_path / "out", request)
    fields = read_front_matter(tmp_path / "out/README.md")
    assert (fields["license"], fields["base_model"]) == ("apache-2.0", "someone/big")
    assert fields["base_model_relation"] == "finetune"
    card = (tmp_path / "out/README.md").read_text()
    assert "| speeches | 1.25 | 4,000 |" in card and "minipuzzle export x --bf16" in card


def test_the_card_of_a_pruned_model_says_what_was_cut(source: Path, tmp_path: Path) -> None:
    pruned = write_tiny_checkpoint(tmp_path / "pruned", pattern="M-*-", intermediate_size=24)
    kept = tuple(range(24))
    plan = Plan(
        source_fingerprint=Checkpoint.open(source).fingerprint,
        kept_layers=(0, 1, 3, 4),
        kept_units={"ffn": {1: kept, 4: kept}},
    )
    (pruned / PLAN_FILE).write_text(plan.to_json())
    export_checkpoint(Checkpoint.open(pruned), tmp_path / "out", ExportRequest())
    card = (tmp_path / "out/README.md").read_text()
    assert "| layers kept, by their index in the original | 0-1, 3-4 |" in card
    assert "| ffn kept | 24 |" in card
    assert index_ranges((2,)) == "2" and index_ranges((0, 2, 3, 4, 9)) == "0, 2-4, 9"


def test_a_bf16_export_loads_strictly_in_transformers_and_computes_the_same(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = run_cli("export", source, "--bf16", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    checkpoint = Checkpoint.open(source)
    prepare_layers(loaded, checkpoint.config)
    expected = load_model(Checkpoint.open(tmp_path / "out"))
    token_ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(token_ids).logits, expected(token_ids).logits)
    for name, tensor in load_file(tmp_path / "out" / SINGLE_FILE).items():
        assert torch.equal(tensor, checkpoint.tensor(name).to(torch.bfloat16)), name


def test_exporting_bf16_twice_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    first, second = (tmp_path / name / "out" for name in ("first", "second"))  # the page names its folder
    for folder in (first, second):
        export_checkpoint(Checkpoint.open(source), folder, ExportRequest())
    names = sorted(file.name for file in first.iterdir())
    assert {"README.md", "config.json", "minipuzzle.json", SINGLE_FILE, "tokenizer.json"} <= set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_bf16_tensor_that_was_written_wrongly_is_found(source: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(source)
    export_checkpoint(checkpoint, tmp_path / "out", ExportRequest())
    tensors = load_file(tmp_path / "out" / SINGLE_FILE)
    tensors["backbone.layers.2.mixer.D"][1] += 0.25
    save_file(tensors, tmp_path / "out" / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(MinipuzzleError, match=r"layers\.2\.mixer\.D was not written correctly"):
        verify_plain(
            ExportTensors(checkpoint, export_layout(checkpoint.architecture), ActivationAmax()), tmp_path / "out"
        )


def test_the_format_and_its_data_must_be_said(source: Path, tmp_path: Path) -> None:
    data = ("--data", source.parent / "text.txt")
    for arguments, problem in (
        ((), "--bf16, --fp8, --nvfp4"),
        (("--fp8",), "--fp8 needs --data"),
        (("--nvfp4", "--flavour", "compressed-tensors"), "--nvfp4 needs --data"),
        (("--nvfp4", *data, "--activations", "dynamic"), "one calibrated scale"),
        (("--bf16", "--kv-cache", "fp8"), "--kv-cache belongs to --fp8 and --nvfp4"),
        (("--fp8", *data, "--override", "lm_head"), "is not PATTERN=FORMAT"),
    ):
        result = run_cli("export", source, *arguments, "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert problem in result.stderr
    assert not list(tmp_path.iterdir())


def test_neither_the_model_itself_nor_a_foreign_folder_is_replaced(source: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for out, problem in ((source, "which is an input"), (foreign, "not written by minipuzzle")):
        result = run_cli("export", source, "--bf16", "-o", out, "--overwrite")
        assert result.exit_code == 1
        assert problem in result.stderr
    assert (foreign / "thesis.txt").exists() and (source / SINGLE_FILE).exists()


def test_an_fp8_cache_needs_attention_layers(source: Path, tmp_path: Path) -> None:
    plain = write_tiny_checkpoint(tmp_path / "plain", pattern="M-M")
    arguments = ("--data", source.parent / "text.txt", *CALIBRATION, "-o", tmp_path / "out")
    result = run_cli("export", plain, "--fp8", "--kv-cache", "fp8", *arguments)
    assert result.exit_code == 1
    assert "no attention layer" in result.stderr
    assert run_cli("export", plain, "--fp8", *arguments).exit_code == 0


@pytest.mark.parametrize("options", [("--bf16",), ("--fp8",), ("--nvfp4", "--flavour", "compressed-tensors")])
def test_dry_run_predicts_the_size_and_writes_nothing(source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    data = () if options == ("--bf16",) else ("--data", source.parent / "text.txt", *CALIBRATION)
    arguments = ("export", source, *options, *data, "-o", tmp_path / "out", "--json")
    dry_run = run_cli(*arguments, "--dry-run")
    assert dry_run.exit_code == 0, dry_run.output
    assert not list(tmp_path.iterdir())
    assert run_cli(*arguments).exit_code == 0
    assert json.loads(dry_run.stdout)["disk_bytes"] == Checkpoint.open(tmp_path / "out").weight_bytes
