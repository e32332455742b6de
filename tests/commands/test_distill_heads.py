"""Guarantee: heads tied, untied or padded come out as engines read them, and other vocabularies are refused."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.runtime.models import load_model
from tests.support.distilling import crash_after_three_steps, distil_in_python, run_distill
from tests.support.tiny_models import write_family_checkpoint, write_tiny_checkpoint


def test_another_vocabulary_is_refused_before_weights_are_read(student: Path, text_file: Path, tmp_path: Path) -> None:
    short = write_tiny_checkpoint(tmp_path / "short", vocab_size=200)
    result = run_distill(student, text_file, tmp_path / "out", "--teacher", str(short))
    assert result.exit_code == 1
    assert "the teacher's vocabulary has 200 rows, and its tokenizer knows 259 tokens" in " ".join(
        result.stderr.split()
    )
    renumbered = write_tiny_checkpoint(tmp_path / "renumbered")
    tokenizer = json.loads((renumbered / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (renumbered / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = run_distill(student, text_file, tmp_path / "out", "--teacher", str(renumbered))
    assert result.exit_code == 1
    assert "different numbers" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_heads_padded_to_other_sizes_are_aligned_and_said_aloud(student: Path, text_file: Path, tmp_path: Path) -> None:
    larger = write_tiny_checkpoint(tmp_path / "larger", vocab_size=300)
    result = run_distill(student, text_file, tmp_path / "out", "--teacher", str(larger))
    assert result.exit_code == 0, result.output
    assert "272 rows in the student and 300 in the teacher: the first 272 are compared" in " ".join(
        result.stderr.split()
    )


def test_a_tied_head_stays_tied_where_engines_read_it(text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    student, teacher = (
        write_family_checkpoint(tmp_path / name, "llama", seed=seed, tie_word_embeddings=True)
        for seed, name in enumerate(("tied", "teacher"))
    )
    whole, out = tmp_path / "whole", tmp_path / "out"
    distil_in_python(student, teacher, text_file, whole)
    crash_after_three_steps(student, teacher, text_file, out)
    distil_in_python(student, teacher, text_file, out)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    before, after = Checkpoint.open(student), Checkpoint.open(out)
    after.require_plain_weights()
    assert after.architecture.num_parameters == before.architecture.num_parameters
    assert not torch.equal(after.tensor("model.embed_tokens.weight"), before.tensor("model.embed_tokens.weight"))
    ids, theirs = torch.arange(3, 20)[None], AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        torch.testing.assert_close(load_model(after)(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_another_tied_head_is_written_untied(text_file: Path, tmp_path: Path, tiny_folder: Path) -> None:
    tied = write_tiny_checkpoint(tmp_path / "tied", pattern="M-")
    tensors = load_file(tied / "model.safetensors")
    from safetensors.torch import save_file

    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, tied / "model.safetensors")
    write_json(tied / "config.json", {**read_json(tied / "config.json"), "tie_word_embeddings": True})
    out = tmp_path / "out"
    result = run_distill(tied, text_file, out, "--teacher", str(tiny_folder))
    assert result.exit_code == 0, result.output
    Checkpoint.open(out).require_plain_weights()
    written = load_file(out / "model.safetensors")
    assert not torch.equal(written["lm_head.weight"], written["backbone.embeddings.weight"])
