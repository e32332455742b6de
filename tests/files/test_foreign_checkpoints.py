"""Guarantee: a checkpoint as others store it computes here what it computes in transformers, and so does its cut.

Heads that are tied and stored all the same, windows by layer, names of other versions, and fields that are missing.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import minipuzzle
from minipuzzle.cut.folder import write_pruned
from minipuzzle.cut.plan import keep_everything, plan_without
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import document_tokens, evaluation_windows
from minipuzzle.errors import MinipuzzleError, MinipuzzleWarning
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.runtime.models import load_tokenizer
from tests.support.cli import run_cli
from tests.support.tiny_models import change_config, change_tensors, write_family_checkpoint, write_tiny_checkpoint

TOKEN_IDS = torch.arange(3, 35)[None]


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKEN_IDS, use_cache=False).logits
    return found


def transformers_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa"))


def cut_of(folder: Path, target: Path, layers: tuple[int, ...]) -> Path:
    checkpoint = Checkpoint.open(folder)
    checkpoint.require_plain_weights()
    target.mkdir()
    write_pruned(checkpoint, plan_without(checkpoint.architecture, layers), target)
    return target


@pytest.mark.parametrize("family", ["llama", "qwen2", "granitemoehybrid"])
def test_an_equal_copy_of_a_tied_head_is_accepted(tmp_path: Path, family: str) -> None:
    folder = write_family_checkpoint(tmp_path / "model", family)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.architecture.tied_embeddings and "lm_head.weight" not in checkpoint.entries
    torch.testing.assert_close(logits(minipuzzle.load(folder)), transformers_logits(folder), rtol=0, atol=1e-4)
    cut = cut_of(folder, tmp_path / "cut", (4, 5))
    assert "lm_head.weight" not in load_file(cut / "model.safetensors")


def test_a_head_alone_serves_as_embeddings(tmp_path: Path) -> None:
    folder = write_family_checkpoint(tmp_path / "model", "llama")
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(logits(minipuzzle.load(folder)), transformers_logits(folder))


def test_a_tied_head_with_weights_of_its_own_is_kept_apart_aloud(tmp_path: Path) -> None:
    folder = write_family_checkpoint(tmp_path / "model", "llama")
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0)}))
    with pytest.warns(MinipuzzleWarning, match="kept apart"):
        assert not Checkpoint.open(folder).architecture.tied_embeddings
    with pytest.warns(MinipuzzleWarning):
        cut = cut_of(folder, tmp_path / "cut", (4, 5))
    assert read_json(cut / "config.json")["tie_word_embeddings"] is False
    assert torch.equal(logits(minipuzzle.load(cut)), transformers_logits(cut))
    result = run_cli("prune", folder, "--plan", cut / "plan.json", "-o", tmp_path / "other")
    assert "warning:" in result.stderr and result.exit_code == 0


def test_a_tokenizer_that_adds_no_first_token_gets_none(tmp_path: Path) -> None:
    folder = write_family_checkpoint(tmp_path / "model", "llama")
    opening = load_tokenizer(folder)
    assert document_tokens(opening, "some text") == opening("some text")["input_ids"]
    assert document_tokens(opening, "some text")[0] == opening.bos_token_id
    spelled = read_json(folder / "tokenizer.json")
    write_json(folder / "tokenizer.json", {**spelled, "post_processor": None})
    plain = load_tokenizer(folder)
    assert plain.bos_token_id is not None
    assert document_tokens(plain, "some text") == plain("some text")["input_ids"]
    windows = evaluation_windows(plain, ["some text"], sequence_length=16)
    assert windows.num_bytes == windows.num_predictions == len("some text") - 1


TYPES = ["full_attention", "sliding_attention", "full_attention"]


def test_mistral_layers_keep_the_windows_that_layer_types_gives_them(tmp_path: Path) -> None:
    from transformers import MinistralForCausalLM

    folder = write_family_checkpoint(tmp_path / "model", "mistral", layer_types=TYPES)
    architecture = Checkpoint.open(folder).architecture
    windows = [layer.sizes.get("window") for layer in architecture.layers if layer.kind == "attention"]
    assert windows == [None, 9, None]
    oracle = logits(MinistralForCausalLM.from_pretrained(folder, attn_implementation="sdpa"))
    torch.testing.assert_close(logits(minipuzzle.load(folder)), oracle, rtol=0, atol=1e-5)
    cut = cut_of(folder, tmp_path / "cut", (0, 1))
    assert read_json(cut / "config.json")["layer_types"] == TYPES[1:]
    oracle = logits(MinistralForCausalLM.from_pretrained(cut, attn_implementation="sdpa"))
    torch.testing.assert_close(logits(minipuzzle.load(cut)), oracle, rtol=0, atol=1e-5)


def test_prune_leaves_one_file_of_weights_beside_config_json(tmp_path: Path) -> None:
    folder = write_family_checkpoint(tmp_path / "model", "llama")
    text = tmp_path / "text.txt"
    text.write_text("a few words, and then some more of them. " * 20, encoding="utf-8")
    measured = ["--data", text, "--samples", 4, "--sequence-length", 16, "--device", "cpu"]
    result = run_cli("prune", folder, "--params", "80%", *measured, "-o", tmp_path / "cut")
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "cut").glob("*.safetensors")] == ["model.safetensors"]
    assert (tmp_path / "cut" / "minipuzzle" / "scores.safetensors").is_file()


@pytest.mark.parametrize("family", ["qwen2", "granitemoehybrid", "phi3", "llama"])
def test_a_cut_that_an_engine_would_not_load_is_said_before_it_is_written(tmp_path: Path, family: str) -> None:
    checkpoint = Checkpoint.open(write_family_checkpoint(tmp_path / "model", family))
    layers: dict[int | None, Any] = dict.fromkeys(checkpoint.architecture.layer_indices("attention"), (0,))
    plan = replace(keep_everything(checkpoint.architecture), kept_units={"kv_group": layers})
    (tmp_path / "cut").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MinipuzzleWarning)
        write_pruned(checkpoint, plan, tmp_path / "cut")
    said = [str(item.message) for item in caught]
    assert len(said) == (family != "llama") and all("32 / 2 here, not 8" in text for text in said)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cut_says_the_dtype_of_its_weights_where_the_source_is_silent(tmp_path: Path, dtype: str) -> None:
    folder = write_family_checkpoint(tmp_path / "model", "llama", dtype=dtype)
    change_config(folder, drop=("dtype", "torch_dtype"))
    assert read_json(cut_of(folder, tmp_path / "cut", (0, 1)) / "config.json")["dtype"] == dtype


def test_a_null_quantization_config_is_none(tmp_path: Path) -> None:
    folder = change_config(write_family_checkpoint(tmp_path / "model", "llama"), quantization_config=None)
    assert not Checkpoint.open(folder).is_quantized
    assert "quantization_config" not in read_json(cut_of(folder, tmp_path / "cut", (0, 1)) / "config.json")


@pytest.mark.parametrize(
    ("ours", "other"), [("backbone.", "model."), ("backbone.embeddings.", "backbone.embedding."), ("backbone.", "")]
)
def test_names_of_other_versions_are_read(tmp_path: Path, ours: str, other: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model")
    expected = logits(minipuzzle.load(folder))

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(ours)]:
            tensors[other + name.removeprefix(ours)] = tensors.pop(name)

    change_tensors(folder, rename)
    assert torch.equal(logits(minipuzzle.load(folder)), expected)


def test_layers_that_predict_several_tokens_are_left_aside_aloud(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model", num_nextn_predict_layers=1)
    expected = logits(minipuzzle.load(folder))
    change_tensors(folder, lambda t: t.update({f"mtp.layers.{idx}.norm.weight": torch.ones(32) for idx in (0, 1)}))
    with pytest.warns(MinipuzzleWarning, match="2 tensors"):
        assert torch.equal(logits(minipuzzle.load(folder)), expected)
    with pytest.warns(MinipuzzleWarning):
        cut = cut_of(folder, tmp_path / "cut", (4, 5))
    assert "num_nextn_predict_layers" not in json.loads((cut / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("stored", "hint"),
    [("pytorch_model.bin", "transformers"), ("model-00001-of-00002.safetensors", "index"), ("model.gguf", "save it")],
)
def test_weights_of_another_kind_are_named(tmp_path: Path, stored: str, hint: str) -> None:
    folder = write_family_checkpoint(tmp_path / "model", "llama")
    (folder / "model.safetensors").rename(folder / stored)
    with pytest.raises(MinipuzzleError, match=stored) as caught:
        Checkpoint.open(folder)
    assert hint in caught.value.hint


def test_licences_and_more_templates_come_along(tmp_path: Path) -> None:
    folder = write_family_checkpoint(tmp_path / "model", "llama")
    (folder / "additional_chat_templates").mkdir()
    names = ("NOTICE", "LICENSE.md", "tekken.json", "preprocessor_config.json", "additional_chat_templates/tools.jinja")
    for name in names:
        (folder / name).write_text("{}", encoding="utf-8")
    cut = cut_of(folder, tmp_path / "cut", (0, 1))
    assert all((cut / name).read_text(encoding="utf-8") == "{}" for name in names)


def test_files_of_a_data_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    for name in ("README.md", "LICENSE.txt", ".hidden/x.txt", "b.jsonl.gz", "c.csv", "a.txt", "notes.md"):
        (tmp_path / name).write_text(f"text of {name}", encoding="utf-8")
    with pytest.warns(MinipuzzleWarning) as caught:
        assert read_documents([tmp_path]) == ["text of a.txt", "text of notes.md"]
    message = str(caught[0].message)
    assert all(name in message for name in ("README.md", "LICENSE.txt", ".hidden/x.txt", "b.jsonl.gz", "c.csv"))


def test_messages_are_read_where_the_text_of_a_parquet_row_is_null(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    tokenizer = load_tokenizer(write_family_checkpoint(tmp_path / "model", "llama"))
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    rows = [{"text": None, "messages": [{"role": "user", "content": "hello"}]}, {"text": "plain", "messages": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_documents([tmp_path / "rows.parquet"], tokenizer) == ["hello", "plain"]
