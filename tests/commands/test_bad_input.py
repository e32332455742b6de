"""Guarantee: whatever is wrong with the input, the user reads what and how to mend it, and nothing is half-written.

Every case ends with its stated exit code, a line "error:", a line "hint:", no traceback, and no output folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.outputs import output_folder
from minipuzzle.files.safetensors_files import ShardWriter
from tests.support.cli import run_cli
from tests.support.kills import stop_command_when


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def prune_arguments(model: Path, text: Path, out: Path) -> list[str | Path]:
    small = ["--context", "64", "--samples", "2", "--sequence-length", "16", "--granularity", "16", "--candidates", "2"]
    return ["prune", model, "--memory", "85%", "--data", text, *small, "-o", out]


def assert_refused(result: Result, out: Path, *words: str, exit_code: int = 1) -> None:
    assert result.exit_code == exit_code, result.output
    assert "error:" in result.output
    assert "hint:" in result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


def shard(model: Path) -> Path:
    """Split the single file of a checkpoint into shards; returns the second one."""
    checkpoint = Checkpoint.open(model)
    writer = ShardWriter(model, max_shard_bytes=50_000)
    for name in checkpoint.entries:
        writer.add(name, checkpoint.tensor(name))
    writer.finish()
    (model / "model.safetensors").unlink()
    return sorted(model.glob("model-*.safetensors"))[1]


def break_shard_missing(model: Path) -> str:
    missing = shard(model)
    missing.unlink()
    return missing.name


def break_shard_truncated(model: Path) -> str:
    path = shard(model)
    path.write_bytes(path.read_bytes()[:-100])
    return "truncated"


def break_header(model: Path) -> str:
    (model / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all!")
    return "header"


def break_empty_file(model: Path) -> str:
    (model / "model.safetensors").write_bytes(b"")
    return "truncated"


def break_index(model: Path) -> str:
    shard(model)
    index_path = model / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    outside = model.parent / "elsewhere.safetensors"
    shutil.copy(next(model.glob("model-*.safetensors")), outside)
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../elsewhere.safetensors"
    index_path.write_text(json.dumps(index))
    return "outside"


def break_weight_nan(model: Path) -> str:
    tensors = load_file(model / "model.safetensors")
    tensors["backbone.layers.4.mixer.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors")
    return "backbone.layers.4.mixer.up_proj.weight"


def break_tensor_missing(model: Path) -> str:
    tensors = load_file(model / "model.safetensors")
    del tensors["backbone.layers.0.mixer.D"]
    save_file(tensors, model / "model.safetensors")
    return "backbone.layers.0.mixer.D is missing"


def break_tensor_unexpected(model: Path) -> str:
    tensors = load_file(model / "model.safetensors")
    tensors["backbone.layers.7.mixer.D"] = torch.ones(4)
    save_file(tensors, model / "model.safetensors")
    return "unexpected"


def break_tensor_shape(model: Path) -> str:
    tensors = load_file(model / "model.safetensors")
    tensors["backbone.layers.0.mixer.D"] = torch.ones(5)
    save_file(tensors, model / "model.safetensors")
    return "[5], not [4]"


def change_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def break_model_type(model: Path) -> str:
    change_config(model, model_type="gpt_unheard_of")
    return "gpt_unheard_of"


def break_layer_type(model: Path) -> str:
    change_config(model, hybrid_override_pattern="M-M*-MX")
    return "'X'"


def break_config_json(model: Path) -> str:
    (model / "config.json").write_text("{")
    return "not valid JSON"


def break_config_missing(model: Path) -> str:
    (model / "config.json").unlink()
    return "does not exist"


def break_tokenizer_missing(model: Path) -> str:
    (model / "tokenizer.json").unlink()
    return "no tokenizer"


BREAKS = [value for name, value in sorted(globals().items()) if name.startswith("break_")]


@pytest.mark.parametrize("break_model", BREAKS, ids=lambda function: function.__name__)
def test_a_broken_model_is_refused_by_name(
    break_model: Callable[[Path], str], model: Path, text_file: Path, tmp_path: Path
) -> None:
    word = break_model(model)
    out = tmp_path / "out"
    assert_refused(run_cli(*prune_arguments(model, text_file, out)), out, word)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("empty.jsonl", "", "empty"),
        ("blank.txt", " \n\n", "empty"),
        ("broken.jsonl", '{"text": "fine"}\n{"text": broken}\n', "line 2"),
        ("textless.jsonl", '{"text": "fine"}\n{"title": "no text"}\n', "line 2"),
        ("table.csv", "a,b\n", "unknown format"),
        ("short.txt", "too short", "tokens"),
    ],
)
def test_bad_data_is_refused_with_file_and_line(
    name: str, content: str, word: str, model: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / name, tmp_path / "out"
    data.write_text(content)
    assert_refused(run_cli(*prune_arguments(model, data, out)), out, word)


def test_data_that_is_not_there_or_not_text_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(run_cli(*prune_arguments(model, tmp_path / "nowhere.txt", out)), out, "nowhere.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    assert_refused(run_cli(*prune_arguments(model, tmp_path / "binary.txt", out)), out, "UTF-8")
    (tmp_path / "folder").mkdir()
    assert_refused(run_cli(*prune_arguments(model, tmp_path / "folder", out)), out, "holds no")


def test_a_budget_that_is_too_small_says_what_would_fit(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = prune_arguments(model, text_file, out)
    arguments[3] = "20%"
    assert_refused(run_cli(*arguments), out, "smallest candidate", "GiB", exit_code=3)


def test_wrong_options_are_usage_errors(model: Path, tmp_path: Path) -> None:
    assert run_cli("prune", model, "--keep", "mamba", "-o", tmp_path / "out").exit_code == 2
    assert run_cli("prune", model, "--context", "lots", "-o", tmp_path / "out").exit_code == 2
    assert run_cli("nonsense").exit_code == 2


def test_nothing_asked_and_too_much_asked_are_refused(model: Path, text_file: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    assert_refused(run_cli("prune", model, "--data", text_file, "-o", out), out, "how small")
    assert_refused(run_cli("prune", model, "--memory", "80%", "-o", out), out, "nothing to measure")
    assert_refused(run_cli("prune", model, "--memory", "80%", "--plan", plan, "-o", out), out, "plan.json")


def test_plans_and_scores_that_are_not_there_or_broken_are_refused(model: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "file.json"
    for content in (None, "{", "[]", '{"schema_version": 1}'):
        if content is not None:
            file.write_text(content)
        assert_refused(run_cli("prune", model, "--plan", file, "-o", out), out, "file.json")
        assert_refused(run_cli("prune", model, "--memory", "85%", "--context", "64", "--scores", file, "-o", out), out)


def test_a_non_empty_target_is_left_alone(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    arguments = prune_arguments(model, text_file, out)
    for extra in ([], ["--overwrite"]):
        result = run_cli(*arguments, *extra)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_overwrite_replaces_what_this_tool_wrote(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = prune_arguments(model, text_file, out)
    assert run_cli(*arguments).exit_code == 0
    (out / "model.safetensors").unlink()
    assert run_cli(*arguments).exit_code == 1
    assert run_cli(*arguments, "--overwrite").exit_code == 0
    assert (out / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_target_that_cannot_be_written_is_refused(model: Path, text_file: Path, tmp_path: Path) -> None:
    """Also where the user is root, whom permissions do not stop: a file stands where a folder should be."""
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    result = run_cli(*prune_arguments(model, text_file, out))
    assert result.exit_code == 1
    assert "cannot write" in result.output
    assert "Traceback" not in result.output


def test_json_errors_are_json(model: Path, text_file: Path, tmp_path: Path) -> None:
    change_config(model, model_type="gpt_unheard_of")
    command = [sys.executable, "-m", "minipuzzle", *map(str, prune_arguments(model, text_file, tmp_path / "out"))]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert json.loads(result.stdout)["exit_code"] == 1


def test_a_user_error_takes_its_partial_folder_along_and_a_crash_leaves_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(MinipuzzleError), output_folder(out, {"step": 1}):
        raise MinipuzzleError("wrong")
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), output_folder(out, {"step": 1}):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def kill_half_way(arguments: list[str | Path], out: Path) -> None:
    """Start a command and kill it as soon as it has begun its partial folder."""
    partial = out.with_name(out.name + ".partial")
    stop_command_when(arguments, (partial / "minipuzzle.json").is_file)
    assert partial.is_dir() and not out.exists()


def test_a_killed_prune_leaves_no_target_and_the_same_command_completes_it(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    kill_half_way(prune_arguments(model, text_file, out), out)
    assert run_cli(*prune_arguments(model, text_file, out)).exit_code == 0
    assert run_cli(*prune_arguments(model, text_file, whole)).exit_code == 0
    for name in ("model.safetensors", "config.json", "plan.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_killed_prune_does_not_continue_on_another_model(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_half_way(prune_arguments(model, text_file, out), out)
    change_config(model, bos_token_id=2)
    result = run_cli(*prune_arguments(model, text_file, out))
    assert result.exit_code == 4, result.output
    assert "teacher_fingerprint" in result.output
    assert not out.exists()
