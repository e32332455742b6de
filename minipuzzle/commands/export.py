"""``minipuzzle export``: a folder that serving engines load, in BF16, FP8 or NVFP4."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minipuzzle.commands.options.shared import (
    COUNT,
    FOLDER_OR_FILE,
    Function,
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
from minipuzzle.export.algorithms import ALGORITHMS, CalibrationMethod
from minipuzzle.formats.choices import FORMATS, RECIPES
from minipuzzle.formats.flavours import FLAVOURS

if TYPE_CHECKING:
    import torch

    from minipuzzle.files.checkpoint import Checkpoint
    from minipuzzle.workflows.export import ExportRequest


def _format_options(function: Function) -> Function:
    decorated: Any = function
    for name in reversed(FORMATS.names()):
        decorated = click.option(f"--{name}", "format_name", flag_value=name, help=FORMATS[name].help)(decorated)
    return decorated  # type: ignore[no-any-return]


def _overrides(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """PATTERN=FORMAT pairs."""
    found = []
    for value in values:
        pattern, equals, wanted = value.rpartition("=")
        if not equals or not pattern:
            raise click.BadParameter(f"{value!r} is not PATTERN=FORMAT", ctx, param)
        found.append((pattern, wanted))
    return tuple(found)


def _quantization_options(function: Function) -> Function:
    options: tuple[Callable[[Any], Any], ...] = (
        click.option(
            "--flavour",
            type=click.Choice(FLAVOURS.names()),
            default="modelopt",
            show_default=True,
            help="Layout: modelopt for vLLM, SGLang and TensorRT-LLM; compressed-tensors for vLLM and transformers.",
        ),
        click.option(
            "--recipe",
            type=click.Choice(RECIPES.names()),
            default="default",
            show_default=True,
            help="mamba-safe leaves attention in BF16; all adds the LM head.",
        ),
        click.option(
            "--override",
            "overrides",
            metavar="PATTERN=FORMAT",
            multiple=True,
            callback=_overrides,
            help="Linear layers whose names fit the pattern: bf16, or the format of this export. Repeatable; the last "
            "that fits counts. Example: 'backbone.layers.0.*=bf16'.",
        ),
        click.option(
            "--activations",
            type=click.Choice(["static", "dynamic"]),
            help="FP8: one calibrated scale a layer, or one scale a token found while serving, which needs no --data. "
            "Default: static for modelopt, dynamic for compressed-tensors.",
        ),
        click.option(
            "--kv-cache",
            type=click.Choice(["bf16", "fp8"]),
            default="bf16",
            show_default=True,
            help="fp8 stores scales for an FP8 KV cache, which engines then use.",
        ),
        click.option(
            "--calibration",
            "algorithm",
            type=click.Choice(ALGORITHMS.names()),
            default="max",
            show_default=True,
            help="How the largest activation is found, by ModelOpt's calibrators.",
        ),
        click.option(
            "--percentile",
            type=click.FloatRange(min=0, max=100, min_open=True),
            default=99.99,
            show_default=True,
            help="Of --calibration percentile.",
        ),
    )
    decorated: Any = function
    for option in reversed(options):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


@click.command(short_help="Write a BF16, FP8 or NVFP4 folder for serving.")
@model_argument()
@_format_options
@out_option()
@_quantization_options
@click.option(
    "--puzzle",
    is_flag=True,
    help="For nemotron_h models whose layers differ in width (Mamba layers may not): config.json as vLLM's "
    "NemotronHPuzzleForCausalLM reads it, and its class beside it, which vLLM runs with --trust-remote-code only.",
)
@data_option(required=False)
@click.option("--samples", type=COUNT, default=64, show_default=True, help="Calibration windows.")
@click.option("--sequence-length", type=COUNT, default=512, show_default=True, help="Tokens of a calibration window.")
@click.option(
    "--device-memory",
    help="Memory that calibration and verification may use, e.g. 24GiB; default: most of what is free. If the model "
    "does not fit, one layer at a time is in memory.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Size of a file of weights at most.")
@click.option("--no-verify", is_flag=True, help="Do not read the result back and compare what it computes.")
@click.option("--base-model", help="The base model's name on a model hub, for the model card.")
@click.option(
    "--quality",
    type=FOLDER_OR_FILE,
    metavar="FILE",
    help="What `minipuzzle evaluate --json` printed, for the model card.",
)
@device_option
@overwrite_option
@json_option
@dry_run_option
def export(
    model: Path, format_name: str | None, out: Path, data: tuple[Path, ...], dry_run: bool, **params: Any
) -> None:
    """Write MODEL as a folder for deployment, checked by reading it back.

    --fp8 and --nvfp4 measure activations on --data, write codes and their scales, load the result and compare what it
    computes with MODEL rounded the same way. Memory stays bounded: nothing needs the whole model at once.
    """
    if format_name is None:
        raise click.UsageError("say which format: " + ", ".join(f"--{name}" for name in FORMATS))
    _check_usage(format_name, data, params)

    from minipuzzle.files.checkpoint import Checkpoint
    from minipuzzle.workflows.export import check_export_target

    request = _request(format_name, params)
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain_weights()
    layout = request.layout(checkpoint)
    check_export_target(checkpoint, out, overwrite=params["overwrite"])
    if layout.needs_calibration and not data:
        raise click.UsageError(f"--{format_name} needs --data: text like what the model will see")
    token_ids = _calibration_tokens(checkpoint, data, params) if data else None
    if dry_run:
        _print_dry_run(checkpoint, request, token_ids, as_json=params["as_json"])
    else:
        _export(checkpoint, request, token_ids, out, params)


def _check_usage(format_name: str, data: tuple[Path, ...], params: dict[str, Any]) -> None:
    context = click.get_current_context()
    quantization = ("flavour", "recipe", "overrides", "activations", "kv_cache", "algorithm", "percentile")
    names = {"overrides": "override", "kv_cache": "kv-cache", "algorithm": "calibration"}
    given = [name for name in quantization if context.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
    if format_name == "bf16" and given:
        raise click.UsageError(f"--{names.get(given[0], given[0])} belongs to --fp8 and --nvfp4")
    if format_name == "nvfp4" and params["activations"] == "dynamic":
        raise click.UsageError("--activations dynamic belongs to --fp8; NVFP4 needs one calibrated scale a layer")


def _request(format_name: str, params: dict[str, Any]) -> ExportRequest:
    from minipuzzle.architecture.quantities import parse_bytes
    from minipuzzle.workflows.export import ExportRequest

    activations = params["activations"] or FLAVOURS[params["flavour"]].default_activations
    scheme = FORMATS[format_name].schemes.get(activations, format_name)
    method = CalibrationMethod(algorithm=params["algorithm"], percentile=params["percentile"])
    memory = params["device_memory"]
    return ExportRequest(
        scheme=scheme,
        flavour=params["flavour"],
        recipe=params["recipe"],
        overrides=tuple(
            (pattern, scheme if wanted == format_name else wanted) for pattern, wanted in params["overrides"]
        ),
        fp8_kv_cache=params["kv_cache"] == "fp8",
        is_puzzle=params["puzzle"],
        method=method,
        verifies=not params["no_verify"],
        device=default_device(params["device"]),
        device_memory_bytes=None if memory is None else parse_bytes(memory),
        max_shard_bytes=parse_bytes(params["max_shard_size"]),
        base_model=params["base_model"],
        quality=_quality(params["quality"]),
        command=shlex.join(["minipuzzle", *sys.argv[1:]]),
    )


def _quality(path: Path | None) -> dict[str, Any]:
    from minipuzzle.errors import MinipuzzleError
    from minipuzzle.files.json_files import read_json

    if path is None:
        return {}
    rows = read_json(path)
    if not all(isinstance(row, dict) for row in rows.values()):
        raise MinipuzzleError(f"{path} holds no table of quality", "give what `minipuzzle evaluate --json` printed")
    return json.loads(json.dumps(rows))  # type: ignore[no-any-return]


def _calibration_tokens(checkpoint: Checkpoint, data: tuple[Path, ...], params: dict[str, Any]) -> torch.Tensor:
    from minipuzzle.data.documents import read_documents
    from minipuzzle.data.windows import check_token_ids, sample_windows
    from minipuzzle.runtime.models import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.folder)
    documents = read_documents(data, tokenizer)
    token_ids = sample_windows(
        tokenizer, documents, num_samples=params["samples"], sequence_length=params["sequence_length"]
    )
    check_token_ids(token_ids, checkpoint.architecture.vocabulary)
    return token_ids


def _print_dry_run(
    checkpoint: Checkpoint, request: ExportRequest, token_ids: torch.Tensor | None, *, as_json: bool
) -> None:
    import torch

    from minipuzzle.architecture.quantities import format_gib
    from minipuzzle.export.calibration import calibration_bytes
    from minipuzzle.export.write import export_headers
    from minipuzzle.runtime.layer_stack import largest_part_bytes, resident_weight_bytes

    layout = request.layout(checkpoint)
    architecture = checkpoint.architecture
    facts = {
        "num_quantized_modules": len(layout.quantized),
        "disk_bytes": sum(header.num_bytes for header in export_headers(architecture, layout).values()),
        "calibration_tokens": 0,
        "memory_bytes": 0,
        "least_memory_bytes": 0,
    }
    if token_ids is not None:
        beside_weights = calibration_bytes(checkpoint, token_ids)
        facts |= {
            "calibration_tokens": token_ids.numel() if layout.needs_calibration else 0,
            "memory_bytes": beside_weights + resident_weight_bytes(architecture, torch.float32),
            "least_memory_bytes": beside_weights + largest_part_bytes(architecture, torch.float32),
        }
    if as_json:
        echo_json(facts)
        return
    click.echo(f"disk: {format_gib(facts['disk_bytes'])}")
    click.echo(f"would quantise {facts['num_quantized_modules']} linear layers")
    if token_ids is not None:
        click.echo(
            f"would calibrate on {facts['calibration_tokens']:,} tokens\nmemory: {format_gib(facts['memory_bytes'])}, "
            f"or at least {format_gib(facts['least_memory_bytes'])} with one layer at a time"
        )


def _export(
    checkpoint: Checkpoint, request: ExportRequest, token_ids: torch.Tensor | None, out: Path, params: dict[str, Any]
) -> None:
    from minipuzzle.architecture.quantities import format_gib
    from minipuzzle.progress import progress_bar
    from minipuzzle.workflows.export import export_checkpoint, total_steps

    with progress_bar("exporting", total_steps(checkpoint, request), quiet=params["as_json"]) as advance:
        exported = export_checkpoint(
            checkpoint,
            out,
            request,
            calibration_token_ids=token_ids,
            overwrite=params["overwrite"],
            advance=advance,
        )
    for warning in exported.warnings:
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {warning}", err=True)
    if params["as_json"]:
        echo_json(exported.to_json())
        return
    click.echo(f"{exported.folder}: {exported.num_tensors} tensors, {format_gib(exported.weight_bytes)}")
    if not request.verifies:
        click.echo("not verified: run `minipuzzle verify` before deploying it")
        return
    if request.scheme == "bf16":
        click.echo("verified: every tensor read back and compared with the source, rounded once to BF16")
    if found := exported.verification:
        click.echo(
            f"verified: reloaded and run on {found.num_tokens:,} tokens; differs from the source rounded alike by "
            f"{found.relative_difference:.1e}\n"
            f"cost of {request.scheme}: KL {found.kl_from_source:.4g} nats/token from the source, "
            f"agreement {found.agreement_with_source:.2%}, loss {found.source_loss:.4f} -> {found.loss:.4f}"
        )
