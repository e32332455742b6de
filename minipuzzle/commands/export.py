"""``minipuzzle export``: a folder that serving engines load, in BF16 or FP8."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minipuzzle.options import (
    COUNT,
    data_option,
    default_device,
    device_option,
    dry_run_option,
    echo_json,
    json_option,
    model_argument,
    out_option,
    overwrite_option,
)

if TYPE_CHECKING:
    import torch

    from minipuzzle.checkpoint import Checkpoint


@click.command(short_help="Write a BF16 or FP8 folder for serving.")
@model_argument()
@click.option("--fp8", "layout", flag_value="fp8", help="FP8 weights and activations, for vLLM, SGLang, TensorRT-LLM.")
@click.option("--bf16", "layout", flag_value="bf16", help="BF16 weights, for every engine.")
@out_option()
@data_option(required=False)
@click.option("--samples", type=COUNT, default=64, show_default=True, help="Calibration windows (--fp8).")
@click.option(
    "--sequence-length", type=COUNT, default=512, show_default=True, help="Tokens of a calibration window (--fp8)."
)
@click.option(
    "--device-memory",
    help="Memory that calibration may use, e.g. 24GiB; default: most of what is free. If the model does not fit, one "
    "layer at a time is in memory (--fp8).",
)
@click.option(
    "--recipe",
    type=click.Choice(["default", "mamba-safe"]),
    default="default",
    show_default=True,
    help="mamba-safe leaves the attention layers in BF16 (--fp8).",
)
@click.option("--kv-cache-fp8", is_flag=True, help="Store scales for an FP8 KV cache, which engines then use (--fp8).")
@click.option("--base-model", help="The base model's name on a model hub, for the model card.")
@device_option
@overwrite_option
@json_option
@dry_run_option
def export(model: Path, layout: str | None, out: Path, data: tuple[Path, ...], dry_run: bool, **params: Any) -> None:
    """Write MODEL as a folder for deployment, checked by reading it back.

    --fp8 measures activations on --data, writes E4M3 codes and their scales, loads the result and compares what it
    computes with MODEL rounded the same way.
    """
    if layout is None:
        raise click.UsageError("say which format: --fp8 or --bf16")
    if layout == "fp8" and not data:
        raise click.UsageError("--fp8 needs --data: text like what the model will see, to measure its activations on")
    if layout == "bf16" and (data or params["kv_cache_fp8"] or params["recipe"] != "default"):
        raise click.UsageError("--data, --recipe and --kv-cache-fp8 belong to --fp8")

    from minipuzzle.checkpoint import Checkpoint
    from minipuzzle.export.bf16 import check_export_target

    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain_weights()
    check_export_target(checkpoint, out, overwrite=params["overwrite"])
    token_ids = _calibration_tokens(checkpoint, data, params) if layout == "fp8" else None
    if dry_run:
        _print_dry_run(checkpoint, token_ids, params)
    elif token_ids is not None:
        _export_fp8(checkpoint, token_ids, out, params)
    else:
        _export_bf16(checkpoint, out, params)


def _calibration_tokens(checkpoint: Checkpoint, data: tuple[Path, ...], params: dict[str, Any]) -> torch.Tensor:
    from minipuzzle.corpus import read_documents, sample_windows
    from minipuzzle.export.fp8 import check_calibration
    from minipuzzle.models import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.folder)
    documents = read_documents(data, tokenizer)
    token_ids = sample_windows(
        tokenizer, documents, num_samples=params["samples"], sequence_length=params["sequence_length"]
    )
    check_calibration(checkpoint, token_ids)
    return token_ids


def _command_line() -> str:
    return shlex.join(["minipuzzle", *sys.argv[1:]])


def _print_dry_run(checkpoint: Checkpoint, token_ids: torch.Tensor | None, params: dict[str, Any]) -> None:
    import torch

    from minipuzzle.export.bf16 import deployed_architecture
    from minipuzzle.export.calibration import calibration_bytes
    from minipuzzle.export.layout import WEIGHT, fp8_layout, scale_names
    from minipuzzle.streaming import largest_part_bytes, resident_weight_bytes
    from minipuzzle.units import format_gib

    architecture = deployed_architecture(checkpoint.architecture)
    disk_bytes = 2 * architecture.num_parameters
    facts = {"num_fp8_modules": 0, "calibration_tokens": 0, "memory_bytes": 0, "least_memory_bytes": 0}
    if token_ids is not None:
        layout = fp8_layout(architecture, recipe=params["recipe"], fp8_kv_cache=params["kv_cache_fp8"])
        fp8_weights = {module + WEIGHT for module in layout.quantized}
        disk_bytes -= sum(t.num_elements for t in architecture.tensors() if t.name in fp8_weights)
        disk_bytes += 4 * sum(1 for _ in scale_names(layout))
        beside_weights = calibration_bytes(checkpoint, token_ids)
        facts = {
            "num_fp8_modules": len(layout.quantized),
            "calibration_tokens": token_ids.numel(),
            "memory_bytes": beside_weights + resident_weight_bytes(architecture, torch.float32),
            "least_memory_bytes": beside_weights + largest_part_bytes(architecture, torch.float32),
        }
    facts["disk_bytes"] = disk_bytes
    if params["as_json"]:
        echo_json(facts)
        return
    click.echo(f"disk: {format_gib(disk_bytes)}")
    if token_ids is not None:
        click.echo(
            f"would calibrate on {token_ids.numel():,} tokens and write {facts['num_fp8_modules']} linear layers in "
            f"FP8\nmemory: {format_gib(facts['memory_bytes'])}, or at least {format_gib(facts['least_memory_bytes'])} "
            "with one layer at a time"
        )


def _export_fp8(checkpoint: Checkpoint, token_ids: torch.Tensor, out: Path, params: dict[str, Any]) -> None:
    from minipuzzle.export.fp8 import export_fp8
    from minipuzzle.progress import progress_bar
    from minipuzzle.units import parse_bytes

    device = default_device(params["device"])
    num_layers = len(checkpoint.architecture.layers)
    memory_limit = params["device_memory"]
    with progress_bar("calibrating", num_layers, quiet=params["as_json"]) as advance:
        exported = export_fp8(
            checkpoint,
            token_ids,
            out,
            recipe=params["recipe"],
            fp8_kv_cache=params["kv_cache_fp8"],
            device=device,
            device_memory_bytes=None if memory_limit is None else parse_bytes(memory_limit),
            overwrite=params["overwrite"],
            base_model=params["base_model"],
            command=_command_line(),
            advance=advance,
        )
    if params["as_json"]:
        echo_json(exported.to_json())
        return
    found = exported.verification
    _print_summary(exported.to_json())
    click.echo(
        f"verified: reloaded and run on {found.num_tokens:,} tokens; differs from the source rounded alike by "
        f"{found.relative_difference:.1e}\n"
        f"cost of FP8: KL {found.kl_from_source:.4g} nats/token from the source, "
        f"agreement {found.agreement_with_source:.2%}"
    )


def _export_bf16(checkpoint: Checkpoint, out: Path, params: dict[str, Any]) -> None:
    from minipuzzle.export.bf16 import deployed_architecture, export_bf16
    from minipuzzle.progress import progress_bar

    num_tensors = sum(1 for _ in deployed_architecture(checkpoint.architecture).tensors())
    with progress_bar("writing", num_tensors, quiet=params["as_json"]) as advance:
        exported = export_bf16(
            checkpoint,
            out,
            overwrite=params["overwrite"],
            base_model=params["base_model"],
            command=_command_line(),
            advance=advance,
        )
    if params["as_json"]:
        echo_json(exported.to_json())
        return
    _print_summary(exported.to_json())
    click.echo("verified: every tensor read back and compared with the source, rounded once to BF16")


def _print_summary(exported: dict[str, Any]) -> None:
    from minipuzzle.units import format_gib

    click.echo(f"{exported['out']}: {exported['num_tensors']} tensors, {format_gib(exported['weight_bytes'])}")
