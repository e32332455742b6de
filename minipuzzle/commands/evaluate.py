"""``minipuzzle evaluate``: how well a model predicts text, and how far it is from a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minipuzzle.commands.options.shared import (
    COUNT,
    FOLDER_OR_FILE,
    data_option,
    default_device,
    device_option,
    dry_run_option,
    echo_json,
    json_option,
    model_argument,
)
from minipuzzle.runtime.compute import DTYPES

if TYPE_CHECKING:
    from minipuzzle.data.windows import EvaluationWindows
    from minipuzzle.files.checkpoint import Checkpoint
    from minipuzzle.quality.evaluate import Evaluation

TOTAL = "total"


@click.command(short_help="Measure loss, bits per byte, KL and agreement on text.")
@model_argument()
@click.option(
    "--against", type=FOLDER_OR_FILE, metavar="TEACHER", help="A model with the same vocabulary to compare with."
)
@data_option()
@click.option("--sequence-length", type=COUNT, default=512, show_default=True, help="Tokens of context at most.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Windows run at once.")
@click.option("--max-tokens", type=COUNT, help="Use about this many tokens of each --data; default: all.")
@device_option
@click.option(
    "--dtype",
    type=click.Choice(DTYPES.names()),
    help="Precision of the computation; default: float32 on a CPU, bfloat16 elsewhere.",
)
@json_option
@dry_run_option
def evaluate(model: Path, against: Path | None, data: tuple[Path, ...], dry_run: bool, **params: Any) -> None:
    """Measure MODEL on text: loss, perplexity, bits per byte, next-token accuracy, speed.

    With --against also the KL divergence from a teacher and how often both find the same token most likely. MODEL
    may be an FP8 export; its rounding is computed as serving engines do. Several --data give a row each and a total.
    """
    from minipuzzle.export.reader import check_readable
    from minipuzzle.files.checkpoint import Checkpoint

    student = Checkpoint.open(model)
    teacher = Checkpoint.open(against) if against else None
    for checkpoint in (student, teacher):
        if checkpoint is not None:
            check_readable(checkpoint)
    if teacher is not None:
        _check_same_vocabulary(student, teacher)
    windows = _windows_by_name(student, data, params)
    if dry_run:
        _print_dry_run(windows, params["as_json"])
        return
    rows = _evaluate_rows(student, teacher, windows, params)
    if params["as_json"]:
        echo_json({name: row.to_json() for name, row in rows.items()})
    else:
        _print_table(rows, has_teacher=teacher is not None)


def _check_same_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    from minipuzzle.errors import MinipuzzleError
    from minipuzzle.runtime.models import load_tokenizer

    found, wanted = student.architecture.vocabulary, teacher.architecture.vocabulary
    if found != wanted:
        raise MinipuzzleError(
            f"{student.folder} has a vocabulary of {found:,}, but --against {teacher.folder} one of {wanted:,}",
            "KL and agreement need one vocabulary: give the model that this one was made from",
        )
    if (teacher.folder / "tokenizer.json").is_file() and (
        load_tokenizer(student.folder).get_vocab() != load_tokenizer(teacher.folder).get_vocab()
    ):
        raise MinipuzzleError(
            f"{student.folder} and --against {teacher.folder} have different tokenizers",
            "KL and agreement need one vocabulary: give the model that this one was made from",
        )


def _windows_by_name(
    student: Checkpoint, data: tuple[Path, ...], params: dict[str, Any]
) -> dict[str, EvaluationWindows]:
    from minipuzzle.data.documents import read_documents
    from minipuzzle.data.windows import evaluation_windows
    from minipuzzle.errors import MinipuzzleError
    from minipuzzle.quality.evaluate import documents_within
    from minipuzzle.runtime.models import load_tokenizer

    tokenizer = load_tokenizer(student.folder)
    windows = {}
    for path in data:
        documents = read_documents([path], tokenizer)
        if params["max_tokens"]:
            documents = documents_within(tokenizer, documents, params["max_tokens"])
        name = path.stem if path.stem not in windows else str(path)
        windows[name] = evaluation_windows(tokenizer, documents, sequence_length=params["sequence_length"])
        largest = int(windows[name].token_ids.max())
        if largest >= student.architecture.vocabulary:
            raise MinipuzzleError(
                f"the tokenizer gives token {largest}, but the model knows {student.architecture.vocabulary:,}",
                "the folder's tokenizer belongs to another model",
            )
    return windows


def _evaluate_rows(
    student: Checkpoint, teacher: Checkpoint | None, windows: dict[str, EvaluationWindows], params: dict[str, Any]
) -> dict[str, Evaluation]:
    import torch

    from minipuzzle.export.reader import load_any_model
    from minipuzzle.progress import progress_bar
    from minipuzzle.quality.evaluate import combine
    from minipuzzle.quality.evaluate import evaluate as evaluate_model

    device = default_device(params["device"])
    dtype = getattr(torch, params["dtype"] or ("float32" if device == "cpu" else "bfloat16"))
    model = load_any_model(student, dtype=dtype, device=device)
    against = load_any_model(teacher, dtype=dtype, device=device) if teacher is not None else None
    num_windows = sum(len(part.token_ids) for part in windows.values())
    rows = {}
    with progress_bar("evaluating", num_windows, quiet=params["as_json"]) as advance:
        for name, part in windows.items():
            rows[name] = evaluate_model(
                model,
                student.family,
                part,
                against=against,
                against_family=teacher.family if teacher is not None else None,
                batch=params["batch"],
                device=device,
                advance=advance,
            )
    return {**rows, TOTAL: combine(list(rows.values()))} if len(rows) > 1 else rows


def _print_dry_run(windows: dict[str, EvaluationWindows], as_json: bool) -> None:
    counts = {name: part.num_predictions for name, part in windows.items()}
    if as_json:
        echo_json({"predicted_tokens": counts})
        return
    for name, count in counts.items():
        click.echo(f"{name}: would predict {count:,} tokens")


def _print_table(rows: dict[str, Evaluation], *, has_teacher: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    formats = {
        "num_tokens": ("tokens", "{:,}"),
        "loss": ("loss (nats/token)", "{:.4f}"),
        "perplexity": ("perplexity", "{:.4g}"),
        "bits_per_byte": ("bits per byte", "{:.4f}"),
        "next_token_accuracy": ("next-token accuracy", "{:.2%}"),
        "kl": ("KL from teacher (nats/token)", "{:.4g}"),
        "top1_agreement": ("agreement with teacher", "{:.2%}"),
        "tokens_per_second": ("tokens per second", "{:,.0f}"),
    }
    # One column for each --data: terminals are wide enough for a few of these, not for all the figures side by side.
    table = Table("", *rows)
    for column in table.columns[1:]:
        column.justify = "right"
        column.overflow = "fold"
    found = {name: row.to_json() for name, row in rows.items()}
    for figure, (label, shown_as) in formats.items():
        if has_teacher or figure not in ("kl", "top1_agreement"):
            table.add_row(label, *(shown_as.format(found[name][figure]) for name in rows))
    Console().print(table)
