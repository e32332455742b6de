"""Guarantee: a model cut to some tokens computes on text of these what its source computes, row by row of its head; the
cut counts in every budget; and teachers, scores and plans of the whole vocabulary go on being used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import minipuzzle as mp
from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.files.safetensors_files import SINGLE_FILE
from minipuzzle.runtime.models import load_model, load_tokenizer
from tests.support.cli import run_cli
from tests.support.tiny_models import write_family_checkpoint

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny_hybrid"
SPEECH = "The state of the Union is strong, and we shall keep it so. We have come to the end of a long year. " * 20
NUM_TOKENS = 700


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (path := tmp_path / "speech.txt").write_text(SPEECH)
    return path


def trained_model(folder: Path, *, tied: bool) -> Path:
    """A random model whose tokenizer was trained, with rows to spare and special tokens at its end, as Qwen's."""
    size: dict[str, Any] = {
        "vocab_size": NUM_TOKENS,
        "tie_word_embeddings": tied,
        "bos_token_id": 640,
        "eos_token_id": [641, 642],
    }
    write_family_checkpoint(folder, "llama", num_hidden_layers=3, **size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tokenizer.train_from_iterator((readme + SPEECH).splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens(["<s>", "</s>", "<end>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    by_id = {"643": {"content": "<pad>", "special": True}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "added_tokens_decoder": by_id}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": [641, 642], "pad_token_id": 643})
    return folder


def ids_of(folder: Path, text: str) -> list[int]:
    found: list[int] = load_tokenizer(folder)(text)["input_ids"]
    return found


def logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(Checkpoint.open(folder))(torch.tensor([list(ids)]), use_cache=False).logits
    return found[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_text_of_kept_tokens_has_the_sources_ids_renumbered_and_its_logits(
    tied: bool, text: Path, tmp_path: Path
) -> None:
    source = trained_model(tmp_path / "source", tied=tied)
    pruned = mp.prune(source, keep_vocab_from=text, out=tmp_path / "pruned")
    kept = pruned.plan.units("vocabulary", None)
    assert kept is not None and len(kept) == pruned.checkpoint.architecture.vocabulary == 320
    before, after = ids_of(source, SPEECH), ids_of(pruned.out, SPEECH)
    assert [kept[idx] for idx in after] == before
    assert torch.equal(logits(pruned.out, after[:80]), logits(source, before[:80])[:, list(kept)])
    assert ("lm_head.weight" in load_file(pruned.out / SINGLE_FILE)) is not tied
    # What names a token names it still.
    new_ids = {old: new for new, old in enumerate(kept)}
    config, generation = (read_json(pruned.out / name) for name in ("config.json", "generation_config.json"))
    ends = [new_ids[641], new_ids[642]]
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (320, new_ids[640], ends)
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (ends, new_ids[643])
    assert list(read_json(pruned.out / "tokenizer_config.json")["added_tokens_decoder"]) == [str(new_ids[643])]
    tokenizer = load_tokenizer(pruned.out)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (new_ids[640], new_ids[641])
    assert tokenizer.decode(tokenizer("Qwértz ✓")["input_ids"]) == "Qwértz ✓"


def test_the_embedded_model_loses_nothing_on_the_text_it_was_cut_for(tmp_path: Path) -> None:
    speeches = (EXAMPLE / "text" / "heldout_speeches.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (text := tmp_path / "text.txt").write_text(json.loads(speeches)["text"][:1500])
    source = Checkpoint.open(EXAMPLE / "model")
    pruned = mp.prune(source, keep_vocab_from=text, out=tmp_path / "pruned")
    assert pruned.checkpoint.architecture.vocabulary < source.architecture.vocabulary // 2
    before, after = mp.evaluate(source, data=text).total, mp.evaluate(pruned, against=source, data=text).total
    assert after.num_bytes == before.num_bytes and after.kl == pytest.approx(0, abs=1e-7) and after.agreement == 1
    assert before.num_tokens == after.num_tokens
    assert after.loss < before.loss  # what the others had of the probability is shared out


def pruned_to(folder: Path, text: Path, **changes: Any) -> Any:
    return mp.prune(
        trained_model(folder, tied=False), data=text, samples=4, sequence_length=32, granularity=16, **changes
    )


def test_budgets_count_the_smaller_vocabulary_and_are_shares_of_the_whole_model(text: Path, tmp_path: Path) -> None:
    deployment = Deployment(context_tokens=64)
    pruned = pruned_to(
        tmp_path / "source", text, vocab="320", memory="60%", deployment=deployment, out=tmp_path / "out"
    )
    whole, left = Checkpoint.open(tmp_path / "source").architecture, pruned.checkpoint.architecture
    assert left.vocabulary == 320
    used = memory_breakdown(left, deployment).total_bytes
    budget = memory_breakdown(whole, deployment).total_bytes * 60 // 100
    assert used == memory_breakdown(pruned.plan.apply(whole), deployment).total_bytes <= budget
    stored = sum(tensor.numel() for tensor in load_file(pruned.out / SINGLE_FILE).values())
    assert stored == left.num_parameters
    again = mp.prune(tmp_path / "source", pruned.plan, no_compensate=True, out=tmp_path / "again")
    assert again.checkpoint.architecture == left
    assert again.plan.units("vocabulary", None) == pruned.plan.units("vocabulary", None)


def test_scores_and_plans_of_the_whole_vocabulary_serve_the_cut_one(text: Path, tmp_path: Path) -> None:
    source = trained_model(tmp_path / "source", tied=True)
    mp.score(source, data=text, samples=4, sequence_length=32, out=tmp_path / "scores.safetensors")
    asked = ("--vocab", "50%", "--memory", "60%", "--context", "64", "--granularity", "16")
    scores = ("--scores", tmp_path / "scores.safetensors")
    found = run_cli("search", source / "config.json", *scores, *asked, "-o", tmp_path / "plan.json", "--json")
    assert found.exit_code == 0, found.output
    cut = ("--keep-vocab-from", text, "--no-compensate", "--context", "64")
    by_plan = run_cli("prune", source, "--plan", tmp_path / "plan.json", "--vocab", "50%", *cut, "-o", tmp_path / "a")
    by_scores = run_cli("prune", source, *scores, *asked, *cut, "--candidates", 1, "-o", tmp_path / "b")
    assert by_plan.exit_code == by_scores.exit_code == 0, by_plan.output + by_scores.output
    one, other = (Checkpoint.open(tmp_path / name) for name in ("a", "b"))
    assert one.architecture == other.architecture and one.architecture.vocabulary == NUM_TOKENS // 2
    deployment = Deployment(context_tokens=64)
    assert json.loads(found.stdout)["memory_bytes"] == memory_breakdown(one.architecture, deployment).total_bytes


def test_a_student_of_fewer_tokens_learns_from_its_teachers_rows_for_them(text: Path, tmp_path: Path) -> None:
    source = trained_model(tmp_path / "source", tied=False)
    pruned = mp.prune(source, keep_vocab_from=text, out=tmp_path / "pruned")
    result = mp.distill(
        pruned,
        data=text,
        validation=text,
        tokens=128,
        batch_sequences=2,
        sequence_length=32,
        learning_rate=1e-9,
        out=tmp_path / "out",
    )
    # Nothing else was cut, so nothing is to be learnt: over the kept tokens the teacher predicts what the student does.
    assert result.validation_kl_before == pytest.approx(0, abs=1e-7)
    exported = mp.export(result, "bf16", no_verify=True, out=tmp_path / "bf16")
    assert exported.checkpoint.architecture.vocabulary == pruned.checkpoint.architecture.vocabulary
    assert ids_of(exported.folder, SPEECH) == ids_of(pruned.out, SPEECH)


def test_a_tokenizer_of_another_kind_is_refused_before_anything_is_written(text: Path, tmp_path: Path) -> None:
    source = trained_model(tmp_path / "source", tied=False)
    result = run_cli("prune", source, "--vocab", "32k", "--data", text, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "has 700 tokens" in result.output, result.output
    record = read_json(source / "tokenizer.json")
    vocabulary = [[token, -1.0] for token in record["model"]["vocab"]]
    record["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": False}
    write_json(source / "tokenizer.json", record)
    result = run_cli("prune", source, "--keep-vocab-from", text, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "kind Unigram" in result.output and not (tmp_path / "out").exists(), result.output
