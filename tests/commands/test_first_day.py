"""Guarantee: what people do on their first day ends in a result, or a message that names what is wrong.

Names of outputs, options that contradict each other, weights and tokenizers that other programs left.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from minipuzzle.commands.cli import main
from minipuzzle.cut.plan import keep_everything, read_plan
from minipuzzle.data.documents import read_documents
from minipuzzle.errors import MinipuzzleError, MinipuzzleWarning
from minipuzzle.files.checkpoint import Checkpoint
from tests.support.cli import run_cli
from tests.support.tiny_models import change_tensors

NORM = "backbone.layers.0.norm.weight"


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "a model"))


def refused(*arguments: object) -> str:
    result = run_cli(*arguments)
    assert result.exit_code in (1, 2), result.output
    assert "error:" in result.stderr.lower() and "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.stderr.split())


def test_scores_are_not_written_under_the_name_of_json(model: Path, text_file: Path, tmp_path: Path) -> None:
    assert ".safetensors" in refused("score", model, "--data", text_file, "-o", tmp_path / "scores.json")
    assert not (tmp_path / "scores.json").exists()


def test_an_export_has_one_format(model: Path, text_file: Path, tmp_path: Path) -> None:
    for two in (("--fp8", "--bf16"), ("--bf16", "--nvfp4")):
        said = refused("export", model, *two, "--data", text_file, "-o", tmp_path / "out")
        assert "one folder holds one format" in said and two[0] in said and two[1] in said


def test_a_weight_that_bf16_cannot_hold_is_no_verified_export(model: Path, tmp_path: Path) -> None:
    name = "backbone.layers.1.mixer.down_proj.weight"

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = 3.4e38

    change_tensors(model, enlarge)
    assert name in refused("export", model, "--bf16", "--device", "cpu", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_beside_a_tokenizer_does_not_run_whatever_is_answered(
    model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "evil.py").write_text("open('CANARY', 'w').close()\nclass Evil: pass\n")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(model)
    result = CliRunner().invoke(main, ["evaluate", str(model), "--data", str(text_file)], input="y\ny\n")
    assert result.exit_code == 1 and "code in the folder is never run" in " ".join(result.output.split())
    assert "[y/N]" not in result.output and not (model / "CANARY").exists()


@pytest.mark.parametrize("left", [(), ("vocab.json", "merges.txt"), ("tokenizer.model",)])
def test_a_tokenizer_that_cannot_be_read_is_named(model: Path, text_file: Path, left: tuple[str, ...]) -> None:
    (model / "tokenizer.json").unlink()
    for name in left:
        (model / name).write_bytes(b"{}" if name.endswith("json") else b"\n")
    assert "tokenizer" in refused("evaluate", model, "--data", text_file)


def test_next_steps_quote_paths_with_spaces(model: Path, text_file: Path, tmp_path: Path) -> None:
    measured = ("--data", text_file, "--samples", 2, "--sequence-length", 16)
    result = run_cli("score", model, *measured, "-o", tmp_path / "my scores.safetensors")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert f"search '{model}' --scores '{tmp_path / 'my scores.safetensors'}'" in said


@pytest.mark.parametrize("option", ["--tensorboard", "--teacher-cache"])
def test_a_file_in_the_way_of_a_folder_is_named(model: Path, text_file: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("precious")
    trained = ("--teacher", model, "--data", text_file, "--tokens", 64, "--sequence-length", 16, "--batch", 2)
    more = ("--top-k", 4) if option == "--teacher-cache" else ()
    for place in ("file", "file/below"):
        assert "file" in refused("distill", model, *trained, *more, option, tmp_path / place, "-o", tmp_path / "out")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "scales", [{NORM: (0.0,)}, {NORM: (-1.0,)}, {NORM: (1e30,)}, {NORM: (1.0, 1.0)}, {"x": (1.0,)}]
)
def test_norm_scales_that_no_cut_has_are_refused(model: Path, tmp_path: Path, scales: dict[str, tuple[float]]) -> None:
    plan = replace(keep_everything(Checkpoint.open(model).architecture), norm_scales=scales)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert read_plan(tmp_path / "plan.json") == plan
    assert next(iter(scales)) in refused("prune", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")


def test_links_to_nowhere_and_other_spellings_of_a_suffix_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("words")
    (folder / "b.JSONL").write_text('{"text": "more"}\n')
    (folder / "dead.txt").symlink_to("nowhere")
    with pytest.warns(MinipuzzleWarning, match=r"b\.JSONL, dead\.txt"):
        assert read_documents([folder]) == ["words"]


def test_a_dtype_that_hides_other_weights_is_refused(model: Path) -> None:
    change_tensors(model, lambda tensors: tensors.update({name: t.to(torch.int8) for name, t in tensors.items()}))
    with pytest.raises(MinipuzzleError, match="stored as I8"):
        Checkpoint.open(model).require_plain_weights()
