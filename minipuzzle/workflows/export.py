"""From a checkpoint to a verified folder for deployment, in bounded memory; an interrupted run continues.

No step needs the whole model in memory: tensors are written piece by piece, and calibration and verification run layer
by layer where the memory holds no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minipuzzle.architecture.quantities import parse_bytes
from minipuzzle.cut.budget import read_serving_budget
from minipuzzle.data.windows import check_token_ids
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.algorithms import CalibrationMethod
from minipuzzle.export.budget import (
    FP8_CACHE,
    asks_for_fp8_cache,
    format_of_budget,
    recipe_of_budget,
    require_budget,
)
from minipuzzle.export.calibration import ActivationAmax, calibration_bytes, measure_amax, open_stack
from minipuzzle.export.digests import record_digests
from minipuzzle.export.model_card import CardFacts, PrecisionFacts, write_model_card
from minipuzzle.export.request import ExportRequest as ExportRequest
from minipuzzle.export.verify import Verification, expected_states, verification_slice, verify_against, verify_plain
from minipuzzle.export.write import ExportTensors, export_headers, write_export
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.files.outputs import check_target_folder, output_folder, write_whole
from minipuzzle.files.records import complete_record
from minipuzzle.formats.choices import FORMATS, MAX, PLAIN, RECIPES
from minipuzzle.formats.flavours import FLAVOURS
from minipuzzle.formats.layout import ExportLayout, module_of
from minipuzzle.progress import Advance
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.layer_stack import largest_part_bytes, resident_weight_bytes
from minipuzzle.show.page.facts import deployment_of, model_facts
from minipuzzle.show.page.page import write_page
from minipuzzle.workflows.settings import EXPORT_SAMPLES, ExportSettings, QualityFile, paths_of
from minipuzzle.workflows.verbs import Model, open_plain, sample_text, verb_with
from minipuzzle.workflows.verify import random_tokens

CALIBRATION_FILE = "calibration.unfinished.json"  # lives in the partial folder only


@dataclass(frozen=True, kw_only=True)
class ExportedFolder:
    """A finished export with what its verification measured."""

    folder: Path
    num_tensors: int
    weight_bytes: int
    verification: Verification | None
    warnings: Sequence[str] = ()

    @property
    def checkpoint(self) -> Checkpoint:
        """What was written."""
        return Checkpoint.open(self.folder)

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            "out": str(self.folder),
            "num_tensors": self.num_tensors,
            "weight_bytes": self.weight_bytes,
            "verification": self.verification.to_json() if self.verification else None,
            "warnings": list(self.warnings),
        }


def export_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    request: ExportRequest,
    compute: Compute = Compute(),
    *,
    calibration_token_ids: torch.Tensor | None = None,
    overwrite: bool = False,
) -> ExportedFolder:
    """Calibrate a checkpoint on tokens where its format needs it, write the folder, reload it and compare.

    Shapes: ``calibration_token_ids`` [windows, tokens] int64; without them a format that needs none is verified on
    random tokens. ``compute.memory_bytes`` limits calibration and verification. Progress: a step for each layer of the
    calibration and each tensor written.

    Raises: MinipuzzleError for a quantised or damaged source, a target that may not be replaced, activations that are
    not finite, or a written folder that does not compute what was calibrated.
    """
    checkpoint.require_plain_weights()
    layout = request.layout(checkpoint)
    if calibration_token_ids is not None:
        check_token_ids(calibration_token_ids, checkpoint.architecture.vocabulary)
    elif layout.needs_calibration:
        raise MinipuzzleError(f"{request.scheme} needs text to calibrate on", "give ‹data›")
    check_target_folder(out, overwrite=overwrite, inputs=(checkpoint.folder,))
    num_steps = sum(1 for _ in checkpoint.architecture.deployed.tensors())
    num_steps += len(checkpoint.architecture.layers) if layout.needs_calibration else 0
    with output_folder(out, request.provenance(checkpoint, calibration_token_ids), overwrite=overwrite) as partial:
        with compute.progress("exporting", num_steps) as advance:
            amax = ActivationAmax()
            if layout.needs_calibration and calibration_token_ids is not None:
                amax = _calibrate(checkpoint, layout, request.method, calibration_token_ids, partial, compute, advance)
            tensors = ExportTensors(checkpoint, layout, amax)
            write_export(
                tensors,
                partial,
                is_puzzle=request.is_puzzle,
                max_shard_bytes=request.max_shard_bytes,
                workers=request.workers,
                advance=advance,
            )
            verification = _verify(tensors, calibration_token_ids, partial, compute) if request.verifies else None
        facts = _card_facts(layout, request, calibration_token_ids, verification)
        warnings = write_model_card(partial, checkpoint, facts)
        record_digests(partial)
        (partial / CALIBRATION_FILE).unlink(missing_ok=True)
        written = Checkpoint.open(partial)
        exported = ExportedFolder(
            folder=out,
            num_tensors=len(written.entries),
            weight_bytes=written.weight_bytes,
            verification=verification,
            warnings=warnings,
        )
        results = {name: value for name, value in exported.to_json().items() if name != "out"}
        results["model"] = _stored_model(checkpoint, layout)
        complete_record(partial, results, before=(checkpoint.folder,), device=compute.device)
        write_page(partial)
    return exported


def _stored_model(checkpoint: Checkpoint, layout: ExportLayout) -> dict[str, Any]:
    """The facts of what an export serves, each layer by the format of most of its weights."""
    architecture, formats = checkpoint.architecture.deployed, dict[int, str]()
    for layer_idx in range(len(architecture.layers)):
        elements = {True: 0, False: 0}
        for tensor in architecture.layer_tensors(layer_idx):
            elements[layout.is_quantized(module_of(tensor))] += tensor.num_elements
        formats[layer_idx] = layout.format if elements[True] > elements[False] else PLAIN
    cache = "fp8" if layout.fp8_kv_cache else "bf16"
    deployment = replace(deployment_of(checkpoint.folder), weights=layout.format, kv_cache=cache)
    return model_facts(architecture, deployment, formats)


def export_request(checkpoint: Checkpoint, format_name: str | None, settings: ExportSettings) -> ExportRequest:
    """What settings ask for in a format; what they leave open is as the model was cut for.

    Raises: MinipuzzleError for an unknown format or flavour, none at all where the model was cut for none, or
    activations that the format does not have; InfeasibleBudgetError for what the model was not cut for.
    """
    made_for = read_serving_budget(checkpoint.folder)
    format_name = format_name or format_of_budget(made_for)
    FORMATS.check(format_name)
    fp8_kv_cache = settings.kv_cache == FP8_CACHE
    if settings.kv_cache is None and format_name != PLAIN:
        fp8_kv_cache = asks_for_fp8_cache(made_for, checkpoint.architecture, settings.flavour)
    activations = settings.activations or FLAVOURS[settings.flavour].default_activations
    schemes = FORMATS[format_name].schemes
    if settings.activations and schemes and settings.activations not in schemes:
        raise MinipuzzleError(
            f"{format_name} has no {settings.activations} activations", f"there are {', '.join(schemes)}"
        )
    scheme = schemes.get(activations, format_name)
    if settings.block_scales != MAX and scheme != "nvfp4":
        raise MinipuzzleError(f"{format_name} has no blocks of values", "drop ‹block_scales›, or export to nvfp4")
    request = ExportRequest(
        scheme=scheme,
        flavour=settings.flavour,
        recipe=settings.recipe or recipe_of_budget(made_for, format_name),
        overrides=tuple(
            (pattern, scheme if wanted == format_name else wanted) for pattern, wanted in settings.overrides
        ),
        fp8_kv_cache=fp8_kv_cache,
        is_puzzle=settings.puzzle,
        method=CalibrationMethod(algorithm=settings.calibration, percentile=settings.percentile),
        verifies=not settings.no_verify,
        max_shard_bytes=parse_bytes(settings.max_shard_size),
        block_scales=settings.block_scales,
        workers=settings.workers,
        base_model=settings.base_model,
        quality=_quality(settings.quality),
        command=settings.command,
    )
    if not settings.over_budget:
        require_budget(checkpoint.architecture, request.layout(checkpoint), made_for)
    return request


def _quality(quality: QualityFile) -> Mapping[str, Mapping[str, float | None]]:
    rows = read_json(Path(quality)) if isinstance(quality, str | Path) else quality or {}
    if not all(isinstance(row, Mapping) for row in rows.values()):
        raise MinipuzzleError(f"{quality} holds no table of quality", "give what `minipuzzle evaluate --json` printed")
    return rows


def run_export(model: Model, format_name: str | None, settings: ExportSettings) -> ExportedFolder:
    """Write a model as a folder for deployment in a format (bf16, fp8, nvfp4), and check it by reading it back.

    Without a format it is the one that the model was cut for.

    Raises: as ``export_checkpoint``.
    """
    checkpoint, request, token_ids = _prepared(model, format_name, settings)
    return export_checkpoint(
        checkpoint,
        Path(settings.out),
        request,
        settings.compute,
        calibration_token_ids=token_ids,
        overwrite=settings.overwrite,
    )


# The format may be left out, for a model that was cut for one.
export = verb_with(ExportSettings, run_export)


def plan_export(model: Model, format_name: str | None, settings: ExportSettings) -> dict[str, int]:
    """What an export will hold and take, after all checks that need no weights.

    Raises: as ``export_checkpoint``.
    """
    checkpoint, request, token_ids = _prepared(model, format_name, settings)
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
        open_stack(checkpoint, token_ids, settings.compute)  # refuses too little memory
        beside_weights = calibration_bytes(checkpoint, token_ids)
        facts |= {
            "calibration_tokens": token_ids.numel() if layout.needs_calibration else 0,
            "memory_bytes": beside_weights + resident_weight_bytes(architecture, torch.float32),
            "least_memory_bytes": beside_weights + largest_part_bytes(architecture, torch.float32),
        }
    return facts


def _prepared(
    model: Model, format_name: str | None, settings: ExportSettings
) -> tuple[Checkpoint, ExportRequest, torch.Tensor | None]:
    """A checkpoint that can be exported so, and the tokens to calibrate on where there is text."""
    checkpoint, data = open_plain(model), paths_of(settings.data)
    request = export_request(checkpoint, format_name, settings)
    if request.layout(checkpoint).needs_calibration and not data:
        raise MinipuzzleError(
            f"{request.scheme} needs text to calibrate on", "give ‹data›: text like what the model will see"
        )
    inputs = [checkpoint.folder, *data, *([Path(settings.quality)] if isinstance(settings.quality, str | Path) else ())]
    check_target_folder(Path(settings.out), overwrite=settings.overwrite, inputs=inputs)
    if not data:
        return checkpoint, request, None
    token_ids = sample_text(
        checkpoint,
        data,
        samples=settings.samples,
        default_samples=EXPORT_SAMPLES,
        sequence_length=settings.sequence_length,
    )
    return checkpoint, request, token_ids


def _calibrate(
    checkpoint: Checkpoint,
    layout: ExportLayout,
    method: CalibrationMethod,
    token_ids: torch.Tensor,
    partial: Path,
    compute: Compute,
    advance: Advance,
) -> ActivationAmax:
    """What an interrupted run has measured, or a measurement."""
    path = partial / CALIBRATION_FILE
    if path.is_file():
        advance(len(checkpoint.architecture.layers))
        return ActivationAmax(**read_json(path))
    stack = open_stack(checkpoint, token_ids, compute)
    amax = measure_amax(
        stack,
        token_ids,
        input_modules=layout.calibrated_inputs,
        output_modules=tuple(layout.cache_scales),
        method=method,
        advance=advance,
    )
    with write_whole(path) as unfinished:
        write_json(unfinished, amax.to_json())
    return amax


def _verify(
    tensors: ExportTensors, token_ids: torch.Tensor | None, folder: Path, compute: Compute
) -> Verification | None:
    if tensors.layout.scheme is None:
        verify_plain(tensors, folder)
        if token_ids is None:
            return None
    tokens_BT = random_tokens(tensors.checkpoint) if token_ids is None else verification_slice(token_ids)
    return verify_against(tensors, folder, tokens_BT, expected_states(tensors, tokens_BT, compute), compute)


def _card_facts(
    layout: ExportLayout, request: ExportRequest, token_ids: torch.Tensor | None, verification: Verification | None
) -> CardFacts:
    precision = None
    if layout.scheme is not None:
        calibration = "none needed"
        if token_ids is not None and layout.needs_calibration:
            num_windows, num_tokens = token_ids.shape
            calibration = f"{num_windows:,} windows of {num_tokens:,} tokens, {request.method.describe()}"
        recipe = f"{request.recipe}: {RECIPES[request.recipe].description}"
        if request.overrides:
            recipe += "; " + ", ".join(f"`{pattern}` {wanted}" for pattern, wanted in request.overrides)
        wants_head = RECIPES[request.recipe].takes("head", is_linear=False)
        precision = PrecisionFacts(layout=layout, recipe=recipe, wants_head=wants_head, calibration=calibration)
    return CardFacts(
        relation="finetune" if precision is None else "quantized",
        is_puzzle=request.is_puzzle,
        base_model=request.base_model,
        precision=precision,
        verification=verification,
        verified_on="random tokens" if token_ids is None else "the calibration text",
        quality=request.quality,
        command=request.command,
    )
