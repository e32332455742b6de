"""Guarantee: evaluation gives the figures that a direct computation over whole logits gives, for the text and nothing
but the text: padding, batch size and chunking change nothing.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from minipuzzle.architecture.families import FAMILIES
from minipuzzle.data.windows import IGNORE, EvaluationWindows, document_tokens, evaluation_windows
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.quality.evaluate import combine, documents_within, evaluate
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import load_model, load_tokenizer
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from tests.support.cli import run_cli
from tests.support.oracles import logits_of
from tests.support.tiny_models import change_tensors, write_tiny_checkpoint

FAMILY = FAMILIES["nemotron_h"]
DOCUMENTS = ("What is measured can be mended.", "Größe zählt in Bytes, nicht in Zeichen. " * 4, "ab")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_tiny_checkpoint(root / "teacher", seed=1)
    for name, text in (("first", DOCUMENTS[0]), ("second", DOCUMENTS[1])):
        (root / f"{name}.txt").write_text(text, encoding="utf-8")
    return write_tiny_checkpoint(root / "student")


@pytest.fixture(scope="module")
def student(folder: Path) -> torch.nn.Module:
    return load_model(Checkpoint.open(folder))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> torch.nn.Module:
    return load_model(Checkpoint.open(folder.parent / "teacher"))


@pytest.fixture(scope="module")
def windows(folder: Path) -> EvaluationWindows:
    return evaluation_windows(load_tokenizer(folder), DOCUMENTS, sequence_length=32)


def counted_logits_of(model: torch.nn.Module, windows: EvaluationWindows) -> torch.Tensor:
    """Whole float64 logits of the positions that count, by transformers' own forward pass."""
    return logits_of(model, windows.token_ids).double()[windows.labels != IGNORE]


def test_loss_accuracy_and_bits_per_byte_equal_a_computation_over_whole_logits(
    student: torch.nn.Module, windows: EvaluationWindows
) -> None:
    found = evaluate(student, FAMILY, windows, batch=3)
    logits, labels = counted_logits_of(student, windows), windows.labels[windows.labels != IGNORE]
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(loss * len(labels) / math.log(2) / num_bytes, rel=1e-6)
    assert found.accuracy == (logits.argmax(-1) == labels).double().mean().item()
    assert (found.num_tokens, found.num_bytes) == (len(labels), num_bytes)
    assert found.tokens_per_second > 0
    assert found.kl is None and found.agreement is None


def test_divergence_from_a_teacher_equals_a_computation_over_whole_logits(
    student: torch.nn.Module, teacher: torch.nn.Module, windows: EvaluationWindows
) -> None:
    found = evaluate(student, FAMILY, windows, against=teacher)
    student_logits, teacher_logits = counted_logits_of(student, windows), counted_logits_of(teacher, windows)
    teacher_log, student_log = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    kl = (teacher_log.exp() * (teacher_log - student_log)).sum(-1).mean().item()
    assert found.kl == pytest.approx(kl, rel=1e-5)
    agreement = (teacher_logits.argmax(-1) == student_logits.argmax(-1)).double().mean().item()
    assert found.agreement == agreement


def test_a_model_evaluated_against_itself_has_no_divergence(
    student: torch.nn.Module, windows: EvaluationWindows
) -> None:
    found = evaluate(student, FAMILY, windows, against=student)
    assert found.kl == 0.0
    assert found.agreement == 1.0


def test_batch_size_chunks_and_more_padding_change_nothing(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    windows: EvaluationWindows,
) -> None:
    whole = evaluate(student, FAMILY, windows, against=teacher, batch=2)
    padded = EvaluationWindows(
        token_ids=torch.nn.functional.pad(windows.token_ids, (0, 7)),
        labels=torch.nn.functional.pad(windows.labels, (0, 7), value=IGNORE),
        num_bytes=windows.num_bytes,
    )
    compute = Compute(memory_bytes=256 * 5 * 272)  # for the logits of five tokens
    advanced: list[int] = []
    chunked = evaluate(student, FAMILY, padded, compute, against=teacher, batch=1, advance=advanced.append)
    assert sum(advanced) == len(windows.token_ids)
    for figure in ("loss", "kl", "bits_per_byte", "accuracy", "agreement", "num_tokens"):
        assert getattr(chunked, figure) == pytest.approx(getattr(whole, figure), rel=1e-5), figure


def test_parts_combine_to_the_evaluation_of_the_whole(
    folder: Path, student: torch.nn.Module, teacher: torch.nn.Module, windows: EvaluationWindows
) -> None:
    tokenizer = load_tokenizer(folder)
    parts = [evaluation_windows(tokenizer, [text], sequence_length=32) for text in DOCUMENTS]
    found = combine([evaluate(student, FAMILY, part, against=teacher) for part in parts])
    expected = evaluate(student, FAMILY, windows, against=teacher)
    for figure in ("loss", "kl", "bits_per_byte", "accuracy", "agreement", "num_tokens", "num_bytes"):
        assert getattr(found, figure) == pytest.approx(getattr(expected, figure), rel=1e-5), figure


def test_a_model_that_computes_nan_is_an_error(folder: Path, windows: EvaluationWindows) -> None:
    broken = load_model(Checkpoint.open(folder))
    with torch.no_grad():
        broken.get_submodule("lm_head").weight = torch.nn.Parameter(torch.full((272, 32), torch.nan))
    with pytest.raises(MinipuzzleError, match="nan nats/token"):
        evaluate(broken, FAMILY, windows)


def test_max_tokens_keeps_whole_documents_and_cuts_only_the_last(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    kept = documents_within(tokenizer, DOCUMENTS, 100)
    assert kept[0] == DOCUMENTS[0] and DOCUMENTS[1].startswith(kept[1]) and len(kept) == 2
    assert sum(len(document_tokens(tokenizer, text)) for text in kept) == pytest.approx(100, abs=3)
    assert documents_within(tokenizer, DOCUMENTS, 10**6) == list(DOCUMENTS)


def test_the_command_gives_a_row_for_each_data_file_and_a_total(folder: Path) -> None:
    data = ("--data", folder.parent / "first.txt", "--data", folder.parent / "second.txt")
    result = run_cli("evaluate", folder, *data, "--against", folder, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert list(rows) == ["first", "second", "total"]
    assert rows["total"]["num_tokens"] == rows["first"]["num_tokens"] + rows["second"]["num_tokens"]
    assert rows["total"]["kl"] == 0.0 and rows["first"]["top1_agreement"] == 1.0
    table = run_cli("evaluate", folder, *data).output
    assert "bits per byte" in table and "teacher" not in table


def test_the_command_reads_fp8_exports_and_sees_their_rounding(folder: Path, tmp_path: Path) -> None:
    token_ids = torch.arange(3, 131).view(4, 32)
    request = ExportRequest(scheme="fp8")
    export_checkpoint(Checkpoint.open(folder), tmp_path / "fp8", request, calibration_token_ids=token_ids)
    arguments = ("--against", folder, "--data", folder.parent / "second.txt", "--json")
    result = run_cli("evaluate", tmp_path / "fp8", *arguments)
    assert result.exit_code == 0, result.output
    assert 0 < json.loads(result.stdout)["second"]["kl"] < 1


def test_heads_padded_to_different_lengths_are_compared_where_both_have_rows(folder: Path, tmp_path: Path) -> None:
    """The same model with 16 more rows of padding, likely ones: at a distance of nothing, from either side."""
    shutil.copytree(folder, tmp_path / "padded")

    def pad(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("lm_head.weight", "backbone.embeddings.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][-16:]])

    config = read_json(folder / "config.json")
    write_json(change_tensors(tmp_path / "padded", pad) / "config.json", {**config, "vocab_size": 288})
    for model, other in ((folder, tmp_path / "padded"), (tmp_path / "padded", folder)):
        data = ("--data", folder.parent / "first.txt", "--json")
        result = run_cli("evaluate", model, "--against", other, *data)
        assert "the first 272 are compared" in result.stderr
        found = json.loads(result.stdout)["first"]
        assert abs(found["kl"]) < 1e-6 and found["top1_agreement"] == 1


def test_a_head_too_short_for_the_tokenizer_is_refused_before_any_weight_is_read(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", vocab_size=200)
    result = run_cli("evaluate", folder, "--against", other, "--data", folder.parent / "first.txt")
    assert result.exit_code == 1
    assert "200 rows" in result.stderr and "259" in result.stderr


def test_another_tokenizer_with_as_many_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other")
    tokenizer = read_json(other / "tokenizer.json")
    symbols = tokenizer["model"]["vocab"]
    symbols["A"], symbols["B"] = symbols["B"], symbols["A"]
    write_json(other / "tokenizer.json", tokenizer)
    result = run_cli("evaluate", folder, "--against", other, "--data", folder.parent / "first.txt")
    assert result.exit_code == 1
    assert "different tokenizers" in result.stderr


def test_dry_run_counts_tokens_and_computes_nothing(folder: Path) -> None:
    result = run_cli("evaluate", folder, "--data", folder.parent / "first.txt", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.strip() == f"first: would predict {len(DOCUMENTS[0])} tokens"


def test_intervals_come_from_how_windows_differ(
    student: torch.nn.Module, teacher: torch.nn.Module, windows: EvaluationWindows
) -> None:
    """Against the ratio estimator written out, of losses that transformers' own logits give."""
    found = evaluate(student, FAMILY, windows, against=teacher, batch=2)
    counts, labels = windows.labels != IGNORE, windows.labels[windows.labels != IGNORE]
    window_of_token = counts.nonzero()[:, 0]
    log_probs = [counted_logits_of(model, windows).log_softmax(-1) for model in (student, teacher)]
    losses = [-each.gather(-1, labels[:, None])[:, 0] for each in log_probs]
    kl = (log_probs[1].exp() * (log_probs[1] - log_probs[0])).sum(-1)
    tokens = counts.sum(1).double()
    for values, mean, error in (
        (losses[0], found.loss, found.loss_error),
        (kl, found.kl, found.kl_error),
        (losses[0] - losses[1], found.loss_rise, found.loss_rise_error),
    ):
        assert mean == pytest.approx(float(values.mean()), rel=1e-4, abs=1e-6)
        residuals = torch.zeros(len(tokens), dtype=torch.float64).index_add(0, window_of_token, values)
        residuals -= float(values.mean()) * tokens
        wanted = math.sqrt(float((residuals**2).sum()) * len(tokens) / (len(tokens) - 1)) / float(tokens.sum())
        assert error == pytest.approx(wanted, rel=1e-3)


def test_intervals_of_independent_texts_add_up_by_squares(student: torch.nn.Module, windows: EvaluationWindows) -> None:
    part = evaluate(student, FAMILY, windows)
    together = combine([part, part])
    assert part.loss_error is not None
    assert together.loss_error == pytest.approx(part.loss_error / math.sqrt(2))
    assert together.kl_error is None  # there was no teacher
