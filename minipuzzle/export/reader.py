"""Our own reader of exports: plain, FP8 and NVFP4 folders of both layouts, computed as engines compute them.

transformers has no reader for ModelOpt's layout: it takes the codes for weights, ignores the scales, and does not fail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minipuzzle.architecture.configs.family import ModulePaths
from minipuzzle.errors import MinipuzzleError, warn
from minipuzzle.export.write import WeightScales, export_headers, piece_rows
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json
from minipuzzle.formats.decoding import decoded
from minipuzzle.formats.e4m3 import fake_quantize
from minipuzzle.formats.flavours import CODES, HF_QUANT_CONFIG, INPUT_SCALE, SCALES, TENSOR_SCALE
from minipuzzle.formats.layout import WEIGHT, ExportLayout, is_known_layout, read_layout
from minipuzzle.formats.schemes import Scheme
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import load_model
from minipuzzle.runtime.rounded_linear import RoundedLinear

_PLAIN_DTYPES = ("BF16", "F16", "F32")
_MISMATCH = "config.json and the weights do not belong together; export again"
_ONE = torch.tensor(1.0)


class QuantizedCheckpoint(Checkpoint):
    """A quantised export that reads like a plain checkpoint: each weight is the float32 values its codes stand for.

    Only float32 holds them exactly. Activations are rounded by ``round_activations``, once a model is built.
    """

    def __init__(self, source: Checkpoint) -> None:
        """Check an export's headers and read its scales of whole tensors.

        Raises: MinipuzzleError naming what is missing, unexpected or wrong.
        """
        self.layout = check_quantized(source)
        self._source = source
        self._stored = {stored.role: stored for stored in self.layout.form}
        codes = self._stored[CODES].suffix
        of_modules = {f"{module}.{stored.suffix}" for module in self.layout.quantized for stored in self.layout.form}
        of_caches = set(self.layout.cache_scales.values())
        entries = {name: entry for name, entry in source.entries.items() if name not in of_modules | of_caches}
        entries |= {module + WEIGHT: source.entries[f"{module}.{codes}"] for module in self.layout.quantized}
        super().__init__(source.folder, source.config, entries)
        self._module_of_weight = {module + WEIGHT: module for module in self.layout.quantized}
        self.scales = WeightScales(
            weights={module: self._single_scale(module, TENSOR_SCALE) for module in self.layout.quantized},
            inputs={module: self._single_scale(module, INPUT_SCALE) for module in self.layout.calibrated_inputs},
            caches={module: self._checked_scale(name) for module, name in self.layout.cache_scales.items()},
        )

    @property
    def apart(self) -> tuple[str, ...]:
        """Weights whose scales of whole tensors differ from those of what engines fuse them with: they would be rounded
        a second time, or run with the largest."""
        firsts = {module: self.layout.scale_group(module)[0] for module in self.layout.quantized}
        scales = (self.scales.weights, self.scales.inputs)
        return tuple(
            module + WEIGHT
            for module, first in firsts.items()
            if any(module in of and float(of[module]) != float(of[first]) for of in scales)
        )

    def say_what_is_apart(self) -> None:
        """Warn of weights that engines would round a second time, as they do those of ModelOpt's own exports."""
        if apart := self.apart:
            warn(
                f"{self.folder}: {len(apart)} weights, such as {apart[0]}, have other scales than those that engines "
                "fuse them with: they round them again to the largest scale, so that quality differs a little from here"
            )

    def require_plain_weights(self) -> None:
        """Nothing to refuse: the headers were checked when this was made."""

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor: decoded to float32 where it is quantised, else as stored.

        Raises: MinipuzzleError if it holds codes or scales that are not numbers, or scales that are not positive.
        """
        module = self._module_of_weight.get(name)
        if module is None:
            return super().tensor(name)
        assert self.layout.scheme is not None
        row_scales = self._checked_scale(f"{module}.{self._stored[SCALES].suffix}") if SCALES in self._stored else None
        pieces = list(piece_rows(self.entries[name].shape))
        values_RC = torch.empty(0)
        for first, end in pieces:  # whole tensors of codes would be scattered over the C library's heaps
            codes = self._source.rows(f"{module}.{self._stored[CODES].suffix}", first, end)
            parts = {CODES: codes, TENSOR_SCALE: self.scales.weights[module]}
            if row_scales is not None:
                parts[SCALES] = row_scales[first:end]
            decoded = self.layout.scheme.decode(parts)
            if not all(map(math.isfinite, torch.stack(decoded.aminmax()).tolist())):
                raise MinipuzzleError(f"{name} holds codes that are not numbers", "export again")
            if not len(values_RC):
                values_RC = decoded.new_empty(pieces[-1][1], *decoded.shape[1:])
            values_RC[first:end] = decoded
        return values_RC

    def _single_scale(self, module: str, role: str) -> torch.Tensor:
        if role not in self._stored:
            return _ONE
        scale = self._checked_scale(f"{module}.{self._stored[role].suffix}").float().reshape(())
        return 1 / scale if self._stored[role].is_reciprocal else scale

    def _checked_scale(self, name: str) -> torch.Tensor:
        scale = self._source.tensor(name)
        values = scale.float()
        if not bool((values > 0).all()) or not bool(torch.isfinite(values).all()):  # also false for NaN
            worst = values.flatten()[~((values > 0) & torch.isfinite(values)).flatten()][0]
            raise MinipuzzleError(f"{name} holds {float(worst)}; a scale must be positive", "export again")
        return scale


def load_any_model(
    source: Path | Checkpoint, compute: Compute = Compute(), *, rounds_activations: bool = True
) -> nn.Module:
    """The whole model of a checkpoint with plain weights or of a quantised export, in evaluation mode.

    Weights of an export are decoded. ``rounds_activations``: also round inputs of its linear layers (and keys and
    values for an FP8 cache) as engines do, where the layout is one that exports have.

    Raises: MinipuzzleError for an unknown format, or names, shapes, precisions or values that are wrong.
    """
    checkpoint = open_any(source)
    if isinstance(checkpoint, QuantizedCheckpoint):
        checkpoint.say_what_is_apart()
    model = load_model(checkpoint, compute)
    if rounds_activations and isinstance(checkpoint, QuantizedCheckpoint):
        round_activations(model, checkpoint.family.modules, checkpoint.layout, checkpoint.scales)
    return model


def open_any(source: Path | Checkpoint, *, is_export: bool = False) -> Checkpoint:
    """A checkpoint whose tensors read as numbers, those of a quantised one decoded, after checking its headers.

    ``is_export``: a quantised one must have a layout that exports have, whose scales of inputs are known, too.

    Raises: MinipuzzleError naming what is missing, unexpected or wrong.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    if isinstance(checkpoint, QuantizedCheckpoint):
        return checkpoint
    if checkpoint.is_quantized and (is_export or is_known_layout(checkpoint.config["quantization_config"])):
        return QuantizedCheckpoint(checkpoint)
    checkpoint = decoded(checkpoint)
    checkpoint.require_plain_weights()
    return checkpoint


def check_quantized(checkpoint: Checkpoint) -> ExportLayout:
    """Check names, shapes and precisions of a quantised export against its config.json, from headers alone.

    Raises: MinipuzzleError naming the first tensor that is missing, unexpected, misshapen or of another precision.
    """
    config = checkpoint.config["quantization_config"]
    if not isinstance(config, Mapping):
        raise MinipuzzleError("config.json: quantization_config is not an object", "restore the file")
    layout = read_layout(checkpoint.architecture, config)
    _check_second_config(checkpoint, config)
    quantized_names = {f"{module}.{stored.suffix}" for module in layout.quantized for stored in layout.form}
    expected = export_headers(checkpoint.architecture, layout)
    for name in sorted(expected.keys() - checkpoint.entries.keys()):
        raise MinipuzzleError(f"{checkpoint.folder}: tensor {name} is missing", _MISMATCH)
    for name in sorted(checkpoint.entries.keys() - expected.keys()):
        raise MinipuzzleError(f"{checkpoint.folder}: tensor {name} is unexpected", _MISMATCH)
    caches = set(layout.cache_scales.values())
    for name, header in expected.items():
        entry = checkpoint.entries[name]
        # Others store scales in the precision of their model.
        is_exact = (name in quantized_names or name in caches) and header.dtype not in _PLAIN_DTYPES
        dtypes = (header.dtype,) if is_exact else _PLAIN_DTYPES
        if entry.shape != header.shape:
            raise MinipuzzleError(f"{name} has shape {list(entry.shape)}, not {list(header.shape)}", _MISMATCH)
        if entry.dtype not in dtypes:
            raise MinipuzzleError(f"{name} is stored as {entry.dtype}, not {' or '.join(dtypes)}", _MISMATCH)
    return layout


def _check_second_config(checkpoint: Checkpoint, config: Mapping[str, object]) -> None:
    path = checkpoint.folder / HF_QUANT_CONFIG
    if not path.is_file():
        return
    found = read_json(path).get("quantization", {})
    for second, first in (("exclude_modules", "ignore"), ("quant_algo", "quant_algo")):
        if found.get(second) != config.get(first):
            raise MinipuzzleError(
                f"{path} and config.json disagree: {second} is not {first}",
                "engines read one or the other: export again",
            )


def _round_inputs(scheme: Scheme, scale: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scheme.round_inputs(values, scale)


def round_activations(model: nn.Module, modules: ModulePaths, layout: ExportLayout, scales: WeightScales) -> None:
    """Make the modules of a model round the activations that engines round."""
    scheme = layout.scheme
    assert scheme is not None
    for module in layout.quantized:
        name = modules.module_name(module)
        round_inputs = partial(_round_inputs, scheme, scales.inputs.get(module, _ONE))
        model.set_submodule(name, RoundedLinear(model.get_submodule(name), round_inputs=round_inputs))
    for module in layout.cache_scales:
        cache_scale = scales.caches[module]
        model.get_submodule(modules.module_name(module)).register_forward_hook(
            lambda _module, _args, output, scale=cache_scale: fake_quantize(output, scale)
        )
