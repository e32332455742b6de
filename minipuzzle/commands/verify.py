"""``minipuzzle verify``: whether a folder for deployment is whole, and what it computes."""

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

if TYPE_CHECKING:
    import torch

    from minipuzzle.files.checkpoint import Checkpoint

_NAMES_SHOWN = 4


@click.command(short_help="Check an exported folder and what it computes.")
@model_argument("folder", "FOLDER")
@click.option("--against", type=FOLDER_OR_FILE, metavar="MODEL", help="The model it was exported from.")
@data_option(required=False)
@click.option("--samples", type=COUNT, default=4, show_default=True, help="Windows of text to run.")
@click.option("--sequence-length", type=COUNT, default=512, show_default=True, help="Tokens of a window.")
@click.option("--device-memory", help="Memory to use at most, e.g. 24GiB; default: most of what is free.")
@device_option
@json_option
@dry_run_option
def verify(folder: Path, against: Path | None, data: tuple[Path, ...], dry_run: bool, **params: Any) -> None:
    """Read FOLDER with minipuzzle's own reader: its layout, its scales, every weight, and what it computes.

    Refuses missing, unknown or misshapen tensors, and scales or codes that are zero or not numbers, naming the tensor.
    Runs the model on --data, or on random tokens without it; with --against it prints KL and agreement. --dry-run
    checks names, shapes and configuration, and reads no weights.
    """
    from minipuzzle.errors import MinipuzzleError
    from minipuzzle.export.verify import open_any

    checkpoint = open_any(folder)
    other = open_any(against) if against is not None else None
    if other is not None and other.architecture.vocabulary != checkpoint.architecture.vocabulary:
        raise MinipuzzleError(
            f"{folder} has a vocabulary of {checkpoint.architecture.vocabulary:,}, {against} one of "
            f"{other.architecture.vocabulary:,}",
            "give the model that the folder was exported from",
        )
    facts = _layout_facts(checkpoint)
    if not dry_run:
        token_ids = _tokens(checkpoint, data, params)
        facts |= {"text": "text" if data else "random tokens", **_run(checkpoint, other, token_ids, params)}
    if params["as_json"]:
        echo_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):<22} {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"{len(value)}: " + ", ".join(value[:_NAMES_SHOWN]) + (", ..." if len(value) > _NAMES_SHOWN else "")
    return str(value)


def _layout_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    from minipuzzle.export.reader import QuantizedCheckpoint
    from minipuzzle.export.verify import scale_figures

    facts: dict[str, Any] = {"folder": str(checkpoint.folder), "flavour": "plain", "format": "bf16"}
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return facts
    layout = checkpoint.layout
    assert layout.flavour is not None and layout.scheme is not None
    return facts | {
        "flavour": layout.flavour.name,
        "format": layout.scheme.name,
        "fp8_kv_cache": layout.fp8_kv_cache,
        "quantized_modules": list(layout.quantized),
        "ignored_modules": list(layout.ignored),
        **scale_figures(checkpoint),
    }


def _tokens(checkpoint: Checkpoint, data: tuple[Path, ...], params: dict[str, Any]) -> torch.Tensor:
    from minipuzzle.data.documents import read_documents
    from minipuzzle.data.windows import sample_windows
    from minipuzzle.runtime.models import load_tokenizer
    from minipuzzle.workflows.export import check_calibration, random_tokens

    if not data:
        return random_tokens(checkpoint)
    tokenizer = load_tokenizer(checkpoint.folder)
    token_ids = sample_windows(
        tokenizer,
        read_documents(data, tokenizer),
        num_samples=params["samples"],
        sequence_length=params["sequence_length"],
    )
    check_calibration(checkpoint, token_ids)
    return token_ids


def _run(
    checkpoint: Checkpoint, other: Checkpoint | None, token_ids: torch.Tensor, params: dict[str, Any]
) -> dict[str, Any]:
    from minipuzzle.architecture.quantities import parse_bytes
    from minipuzzle.export.verify import compare_folders

    memory = params["device_memory"]
    found = compare_folders(
        checkpoint,
        other,
        token_ids,
        device=default_device(params["device"]),
        device_memory_bytes=None if memory is None else parse_bytes(memory),
    )
    return {name: value for name, value in found.to_json().items() if value is not None}
