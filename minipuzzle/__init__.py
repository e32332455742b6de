"""MiniPuzzle makes large language models smaller: measure, search, cut, distil, export.

The Python API: a verb takes what it is done to by position and how by keyword, named like the fields of its settings,
and returns a frozen value with ``to_json()``. torch is imported when a verb is used for the first time.
"""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import Signature, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from minipuzzle.architecture.memory import Deployment as Deployment
    from minipuzzle.files.checkpoint import Checkpoint as Checkpoint
    from minipuzzle.runtime.compute import Compute as Compute
    from minipuzzle.workflows.abilities.run import abilities as abilities
    from minipuzzle.workflows.data import api as data  # noqa: F401
    from minipuzzle.workflows.distill import distill as distill
    from minipuzzle.workflows.evaluate import evaluate as evaluate
    from minipuzzle.workflows.export import export as export
    from minipuzzle.workflows.prune import prune as prune
    from minipuzzle.workflows.score import score as score
    from minipuzzle.workflows.search import search as search
    from minipuzzle.workflows.verbs import Model
    from minipuzzle.workflows.verbs import open_model as open  # noqa: F401
    from minipuzzle.workflows.verify import verify as verify

_VERBS = ("score", "search", "prune", "distill", "export", "verify", "evaluate")
_PLACES = {
    "open": "minipuzzle.workflows.verbs:open_model",
    **{verb: f"minipuzzle.workflows.{verb}:{verb}" for verb in _VERBS},
    "abilities": "minipuzzle.workflows.abilities.run:abilities",
    "Checkpoint": "minipuzzle.files.checkpoint:Checkpoint",
    "Compute": "minipuzzle.runtime.compute:Compute",
    "Deployment": "minipuzzle.architecture.memory:Deployment",
}
__all__ = [
    *("Checkpoint", "Compute", "Deployment"),
    *("abilities", "data", "distill", "evaluate", "export", "load", "open", "prune", "score", "search", "verify"),
]


def load(
    model: Model, *, dtype: torch.dtype | None = None, device: str = "cpu", rounds_activations: bool = True
) -> nn.Module:
    """A runnable transformers model from a checkpoint folder or from any export of ours, in evaluation mode.

    The weights of a quantised export are decoded. ``rounds_activations``: activations are rounded as serving engines
    round them; False leaves the decoded weights alone. ``dtype``: float32 by default, which alone holds decoded weights
    exactly. torch is imported when this is called.

    Raises: MinipuzzleError naming the tensor, if the folder is damaged.
    """
    from minipuzzle.export.reader import load_any_model
    from minipuzzle.runtime.compute import Compute
    from minipuzzle.runtime.experts import join_experts
    from minipuzzle.workflows.verbs import open_model

    compute = Compute(device=device, dtype=str(dtype or "float32").removeprefix("torch."))
    checkpoint = open_model(model)
    loaded = load_any_model(checkpoint, compute, rounds_activations=rounds_activations)
    if not checkpoint.is_quantized:
        join_experts(loaded)
    return loaded


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute)


class _VerbAndPackage:
    """``search`` and ``export`` are packages too: called, one is the verb; its attributes are the package's."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def __signature__(self) -> Signature:
        return signature(__getattr__(self._name))

    def __call__(self, *what: Any, **how: Any) -> Any:
        return __getattr__(self._name)(*what, **how)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(f"{__name__}.{self._name}"), attribute)


class _Api(ModuleType):
    """Without the setters Python would put the packages in the place of the verbs as soon as they are imported."""

    abilities = property(lambda _self: _VerbAndPackage("abilities"), lambda _self, _package: None)
    search = property(lambda _self: _VerbAndPackage("search"), lambda _self, _package: None)
    export = property(lambda _self: _VerbAndPackage("export"), lambda _self, _package: None)
    data = property(lambda _self: import_module("minipuzzle.workflows.data.api"), lambda _self, _package: None)


_api = _Api(__name__)
_api.__dict__.update(globals())
sys.modules[__name__] = _api
