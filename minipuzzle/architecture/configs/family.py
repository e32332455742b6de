"""What a model family is, and what entries of the table share: fields of config.json, checked as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minipuzzle.architecture.model import Architecture, TensorNames
from minipuzzle.errors import MinipuzzleError

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModulePaths:
    """Where transformers keeps the parts of a model in memory, and how tensor names on disk map there.

    ``layers`` is the list of decoder blocks. ``rotary``: the module of position embeddings, if there is one.
    """

    layers: str
    embeddings: str
    final_norm: str
    head: str
    disk_prefix: str
    module_prefix: str
    rotary: str = ""

    def module_name(self, disk_name: str) -> str:
        """The parameter name in memory of a tensor on disk."""
        if disk_name.startswith(self.disk_prefix):
            return self.module_prefix + disk_name.removeprefix(self.disk_prefix)
        return disk_name


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    ``read`` turns config.json into an Architecture. ``write`` turns the source's config.json into that of a cut
    model. ``fields``: those of config.json with the size of an axis, by layer kind and axis. ``embedding_scale``,
    ``residual_scale`` and ``logit_divisor``: fields of config.json with factors that
    transformers applies beside the embeddings, to what a layer adds, and to the logits.
    ``tiny_config`` is a config.json small enough for tests; ``tiny_variants`` are others, with what it does not have.
    """

    model_type: str
    names: TensorNames
    modules: ModulePaths
    read: Callable[[Config], Architecture]
    write: Callable[[Config, Architecture], dict[str, Any]]
    tiny_config: Config
    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    embedding_scale: str = ""
    residual_scale: str = ""
    logit_divisor: str = ""
    tiny_variants: Mapping[str, Config] = field(default_factory=dict)

    @property
    def tiny_configs(self) -> dict[str, Config]:
        """All configs for tests, by a name that begins with the model type."""
        variants = {f"{self.model_type}-{name}": config for name, config in self.tiny_variants.items()}
        return {self.model_type: self.tiny_config, **variants}


def require(config: Config, field: str) -> int:
    """A positive whole number of config.json.

    Raises: MinipuzzleError naming the field.
    """
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MinipuzzleError(f"config.json: {field} is {value!r}, not a positive whole number", "complete the file")
    return value


def require_one_of(config: Config, field: str, known: Sequence[str], default: str) -> str:
    """A name in config.json that is among those that are supported.

    Raises: MinipuzzleError naming the field.
    """
    value = config.get(field, default)
    if value not in known:
        raise MinipuzzleError(f"config.json: {field} {value!r} is not supported", f"supported: {', '.join(known)}")
    return str(value)


def divide(numerator: int, denominator: int, what: str) -> int:
    """An exact quotient.

    Raises: MinipuzzleError naming the fields where there is a remainder.
    """
    if numerator % denominator:
        problem = f"config.json: {what}: {numerator} is not a multiple of {denominator}"
        raise MinipuzzleError(problem, "correct the file")
    return numerator // denominator


def uniform_sizes(architecture: Architecture, kind: str) -> Mapping[str, int] | None:
    """The sizes that all layers of a kind share; None if there are no such layers. Windows may differ.

    Raises: MinipuzzleError if others differ.
    """
    layers = [layer for layer in architecture.layers if layer.kind == kind]
    if not layers:
        return None
    widths = [{axis: size for axis, size in layer.sizes.items() if axis != "window"} for layer in layers]
    if any(other != widths[0] for other in widths):
        raise MinipuzzleError(
            f"the {kind} layers differ in width, which config.json of {architecture.model_type} cannot say",
            "give all layers of a kind the same widths",
        )
    return widths[0]


def require_whole_blocks(architecture: Architecture) -> None:
    """Refuse a model in which a decoder block lacks one of its layers.

    Raises: MinipuzzleError naming the first such block.
    """
    for block_idx, block in enumerate(architecture.blocks):
        if len(block) < architecture.names.layers_per_block:
            kinds = " and ".join(architecture.layers[idx].kind for idx in block)
            raise MinipuzzleError(
                f"block {block_idx} has {kinds} only, which config.json of {architecture.model_type} cannot say",
                "keep or remove whole blocks",
            )
