"""Guarantee: memory is bytes. Weight terms equal the data of safetensors files, cache terms the real cache tensors.

Checked on the embedded model and on cuts of it, for every precision that is written or computed here; NVFP4 against
the tensors of modelopt's own quantiser too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minipuzzle.architecture.families import FAMILIES, read_architecture
from minipuzzle.architecture.kinds import LAYER_KINDS
from minipuzzle.architecture.layers import LayerSpec, Role
from minipuzzle.architecture.memory import (
    PRECISIONS,
    TERMS,
    WEIGHT_TERMS,
    Deployment,
    MemoryBreakdown,
    layer_bytes,
    memory_breakdown,
    outer_bytes,
)
from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.plan import Plan, keep_everything
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from tests.support.tiny_models import write_family_checkpoint

EMBEDDED_MODEL = Path(__file__).parents[2] / "examples" / "tiny_hybrid" / "model"
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def bytes_of(breakdown: MemoryBreakdown, terms: tuple[str, ...]) -> int:
    labels = {TERMS[term] for term in terms}
    return sum(term.num_bytes for term in breakdown.terms if term.name in labels)


def every_term_in(precision: str) -> dict[str, Any]:
    return dict.fromkeys(("weights", "embeddings", "head", "other"), precision)


def cuts_of(source: Architecture) -> dict[str, Plan]:
    """The whole model, one without some layers of each kind, and one that is narrower on every axis as well."""
    whole = keep_everything(source)
    fewer = replace(whole, kept_layers=tuple(idx for idx in whole.kept_layers if idx not in (2, 3, 7, 8)))
    widths = {"ffn": range(384), "ssm_head": (0, 1, 4, 5), "ssm_head_channel": range(16), "kv_group": (1,)}
    units: dict[str, Any] = {
        axis: {idx: tuple(kept) for idx in fewer.kept_layers if axis in source.layers[idx].sizes}
        for axis, kept in widths.items()
    }
    units["hidden"] = {None: tuple(range(0, 128, 2))}
    return {"whole": whole, "fewer layers": fewer, "narrower": replace(fewer, kept_units=units)}


@pytest.fixture(scope="module")
def embedded() -> Checkpoint:
    return Checkpoint.open(EMBEDDED_MODEL)


@pytest.mark.parametrize("precision", TORCH_DTYPES)
@pytest.mark.parametrize("cut", ["whole", "fewer layers", "narrower"])
def test_weight_terms_are_the_data_of_the_safetensors_files(
    embedded: Checkpoint, cut: str, precision: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from minipuzzle.cut.surgery import cut_tensors

    plan = cuts_of(embedded.architecture)[cut]
    file = tmp_path / "model.safetensors"
    tensors = cut_tensors(embedded, plan)
    save_file({name: tensor.to(TORCH_DTYPES[precision]).contiguous() for name, tensor in tensors}, file)
    header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    breakdown = memory_breakdown(plan.apply(embedded.architecture), Deployment(**every_term_in(precision)))
    assert bytes_of(breakdown, WEIGHT_TERMS) == file.stat().st_size - header_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cut", ["whole", "fewer layers", "narrower"])
def test_cache_terms_are_the_bytes_of_the_filled_cache(embedded: Checkpoint, cut: str, precision: str) -> None:
    from minipuzzle.cut.surgery import cut_tensors
    from minipuzzle.runtime.models import build_model

    plan, context, batch = cuts_of(embedded.architecture)[cut], 70, 3
    target = plan.apply(embedded.architecture)
    config = embedded.family.write(embedded.config, target)
    model = build_model(
        config, cut_tensors(embedded, plan), Compute(dtype=str(TORCH_DTYPES[precision]).removeprefix("torch."))
    )
    with torch.no_grad():
        cache = model(torch.ones(batch, context, dtype=torch.long), use_cache=True).past_key_values
    real: Counter[str] = Counter()
    for held, layer in zip(cache.layers, target.layers, strict=True):
        if layer.kind == "attention":
            real["kv_cache"] += held.keys.nbytes + held.values.nbytes
        elif layer.kind == "mamba":
            real["ssm_state"] += held.recurrent_states[0].nbytes
            columns = held.conv_states[0]  # transformers keeps the newest input too, engines only those before it
            real["conv_state"] += columns[..., 1:].contiguous().nbytes
    deployment = Deployment(context_tokens=context, batch=batch, kv_cache=precision, conv_state=precision)
    breakdown = memory_breakdown(target, deployment)
    assert {term: bytes_of(breakdown, (term,)) for term in ("kv_cache", "ssm_state", "conv_state")} == dict(real)


@pytest.mark.parametrize(("scheme", "fp8_kv_cache"), [("fp8", False), ("fp8", True), ("nvfp4", True)])
def test_weight_terms_are_the_data_of_a_quantized_export(
    embedded: Checkpoint, scheme: str, fp8_kv_cache: bool, tmp_path: Path
) -> None:
    """Shared by the whole model and a cut of it, because an export calibrates and runs what it writes."""
    from minipuzzle.cut.folder import write_pruned
    from minipuzzle.files.safetensors_files import read_safetensors_header
    from minipuzzle.workflows.export import ExportRequest, export_checkpoint

    pruned = tmp_path / "pruned"
    pruned.mkdir()
    write_pruned(embedded, cuts_of(embedded.architecture)["narrower"], pruned)
    for source in (embedded, Checkpoint.open(pruned)):
        out = tmp_path / f"{source.folder.name}-quantized"
        tokens = torch.arange(64).reshape(2, 32)
        request = ExportRequest(scheme=scheme, fp8_kv_cache=fp8_kv_cache)
        export_checkpoint(source, out, request, calibration_token_ids=tokens)
        stored = sum(
            entry.num_bytes for file in out.glob("*.safetensors") for entry in read_safetensors_header(file).values()
        )
        deployment = Deployment(weights=scheme, kv_cache="fp8" if fp8_kv_cache else "bf16")
        assert bytes_of(memory_breakdown(source.architecture, deployment), WEIGHT_TERMS) == stored


def test_nvfp4_weights_are_the_bytes_that_modelopt_packs(embedded: Checkpoint) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    layer_weights = [tensor for tensor in embedded.architecture.layer_tensors(1) if tensor.spec.quantized]
    assert layer_weights
    for tensor in layer_weights:
        packed, block_scales, tensor_scale = NVFP4QTensor.quantize(embedded.tensor(tensor.name).float(), 16)
        real = packed._quantized_data.nbytes + block_scales.nbytes
        assert PRECISIONS["nvfp4"].num_bytes(tensor.shape) == real
        assert tensor_scale.float().nbytes == 4


def test_a_model_needs_the_sum_of_its_layers_and_what_lies_around_them() -> None:
    architecture = Checkpoint.open(EMBEDDED_MODEL).architecture
    deployment = Deployment(context_tokens=1000, batch=2, weights="nvfp4", kv_cache="fp8", head="fp8")
    total = outer_bytes(architecture, deployment)
    for layer_idx in range(len(architecture.layers)):
        total += layer_bytes(architecture, layer_idx, deployment)
    assert memory_breakdown(architecture, deployment).total_bytes == total.total()


def test_each_kind_of_memory_has_its_own_precision() -> None:
    architecture = Checkpoint.open(EMBEDDED_MODEL).architecture
    plain = memory_breakdown(architecture, Deployment())
    for field, term in (
        *((name, name) for name in ("embeddings", "head", "other", "kv_cache", "conv_state", "ssm_state")),
        ("weights", "weights"),
    ):
        precision: dict[str, Any] = {field: "fp32" if field != "ssm_state" else "bf16"}
        changed = memory_breakdown(architecture, Deployment(**precision))
        different = [new.name for new, old in zip(changed.terms, plain.terms, strict=True) if new != old]
        assert different == [TERMS[term]]


def test_the_ssm_state_is_kept_as_config_json_says() -> None:
    config = {**FAMILIES["nemotron_h"].tiny_config, "mamba_ssm_cache_dtype": "bfloat16"}
    state = next(t for t in memory_breakdown(read_architecture(config), Deployment()).terms if t.name == "SSM state")
    forced = Deployment(ssm_state="fp32")
    wide = next(t for t in memory_breakdown(read_architecture(config), forced).terms if t.name == "SSM state")
    assert (state.precision, wide.precision, 2 * state.num_bytes) == ("bf16", "fp32", wide.num_bytes)
    with pytest.raises(MinipuzzleError, match="mamba_ssm_cache_dtype"):
        read_architecture({**config, "mamba_ssm_cache_dtype": "int3"})


@pytest.mark.parametrize(("family", "is_served_tied"), [("llama", True), ("nemotron_h", False)])
def test_a_tied_head_is_counted_once_unless_exports_give_it_weights_of_its_own(
    family: str, is_served_tied: bool, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(write_family_checkpoint(tmp_path / "tied", family, tie_word_embeddings=True))
    breakdown = memory_breakdown(checkpoint.architecture, Deployment(**every_term_in("fp32")))
    embedding_bytes = checkpoint.entries[checkpoint.architecture.names.embeddings].num_bytes
    assert bytes_of(breakdown, ("head",)) == (0 if is_served_tied else embedding_bytes)
    assert bytes_of(breakdown, WEIGHT_TERMS) == checkpoint.weight_bytes + bytes_of(breakdown, ("head",))


def test_a_token_uses_its_share_of_the_routed_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the registry alone: a kind with routed tensors, whatever its name, counts them once in total and by share."""
    source = read_architecture(FAMILIES["nemotron_h"].tiny_config)
    assert source.num_active_parameters == source.num_parameters
    weight = ((("ffn",),), (("hidden",),))
    routed_role = Role(name="up", module="experts.{unit}", dims=weight, quantized=True, each="expert")
    kinds = {**LAYER_KINDS, "mlp": replace(LAYER_KINDS["mlp"], roles=(routed_role,))}
    monkeypatch.setattr("minipuzzle.architecture.model.LAYER_KINDS", kinds)
    sizes = {"hidden": source.hidden, "ffn": 48, "expert": 8, "experts_per_token": 2}
    routed = replace(source, layers=(LayerSpec(kind="mlp", sizes=sizes),))
    all_experts = 8 * 48 * source.hidden
    assert routed.num_parameters - routed.num_active_parameters == all_experts - all_experts // 4


def test_the_estimate_is_apart_from_what_budgets_count() -> None:
    breakdown = memory_breakdown(Checkpoint.open(EMBEDDED_MODEL).architecture, Deployment())
    assert breakdown.total_bytes == sum(term.num_bytes for term in breakdown.terms)
    assert all("estimate" in term.name and term.num_bytes > 0 for term in breakdown.estimates)
