"""Composites: models around a language model, such as one that sees. config.json has a ``text_config`` of its own.

The language model is measured, cut and trained as one of its family. All other tensors are carried along as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from minipuzzle.architecture.configs.family import Config, Family, ModulePaths
from minipuzzle.architecture.model import Architecture, TensorNames
from minipuzzle.errors import MinipuzzleError

TEXT_CONFIG = "text_config"
_SHARED = ("tie_word_embeddings", "dtype", "torch_dtype")  # of the whole, where it has them


@dataclass(frozen=True, kw_only=True)
class Composite:
    """How a composite holds its language model.

    ``text_model_type``: of a ``text_config`` that does not say. ``prefix`` and ``outer_prefix``: of the language
    model's tensors on disk, and of its head. ``other_prefixes``: as in ModulePaths. ``follows``: beginnings of names of
    carried tensors, with the axis whose size they share. ``dispensable``: such beginnings with the axes in question and
    the field of ``text_config`` that counts what goes if one of them is cut.
    """

    model_type: str
    text_model_type: str
    ties_head: bool
    prefix: str = "model.language_model."
    outer_prefix: str = ""
    other_prefixes: Mapping[str, str] = field(default_factory=dict)
    follows: Mapping[str, str] = field(default_factory=dict)
    dispensable: Mapping[str, tuple[frozenset[str], str]] = field(default_factory=dict)

    def text_config(self, config: Config) -> dict[str, Any]:
        """The config.json of the language model alone.

        Raises: MinipuzzleError where there is none.
        """
        text = config.get(TEXT_CONFIG)
        if not isinstance(text, Mapping):
            raise MinipuzzleError(f"config.json: {TEXT_CONFIG} is {text!r}, not an object", "complete the file")
        shared = {name: config[name] for name in _SHARED if config.get(name) is not None}
        return {"model_type": self.text_model_type, **text, "tie_word_embeddings": self.ties_head, **shared}

    def around(self, base: Family) -> CompositeFamily:
        """The composites around language models of a family."""
        data = {field.name: getattr(base, field.name) for field in fields(Family)}
        data |= {"names": self._names(base), "modules": self._modules(base.modules)}
        return CompositeFamily(**data, base=base, composite=self)

    def _names(self, base: Family) -> TensorNames:
        def inside(name: str) -> str:
            return self.prefix + name.removeprefix(base.modules.disk_prefix)

        names = base.names
        return replace(
            names,
            block_prefix=inside(names.block_prefix),
            embeddings=inside(names.embeddings),
            final_norm=inside(names.final_norm),
            head=self.outer_prefix + names.head,
        )

    def _modules(self, modules: ModulePaths) -> ModulePaths:
        return replace(
            modules,
            disk_prefix=self.prefix,
            outer_prefix=self.outer_prefix,
            other_prefixes=self.other_prefixes,
            ignored="",
        )


@dataclass(frozen=True, kw_only=True)
class CompositeFamily(Family):
    """The composites around language models of one family."""

    base: Family
    composite: Composite

    def language_config(self, config: Config) -> dict[str, Any]:
        """config.json of the language model alone."""
        return self.composite.text_config(config)

    def carries(self, name: str) -> bool:
        """Whether a tensor is none of the language model's."""
        return not name.startswith(self.modules.disk_prefix) and name != self.names.head

    def followed_axes(self, name: str) -> tuple[frozenset[str], bool]:
        """The axes that a carried tensor depends on, and whether it may go if one of them is cut."""
        for start, (axes, _count) in self.composite.dispensable.items():
            if name.startswith(start):
                return axes, True
        return frozenset(axis for start, axis in self.composite.follows.items() if name.startswith(start)), False

    def read(self, config: Config) -> Architecture:
        """The architecture of the language model.

        Raises: MinipuzzleError naming the field that is missing, wrong or not supported.
        """
        return replace(self.base.read(self.language_config(config)), names=self.names)

    def write(self, source: Config, architecture: Architecture) -> dict[str, Any]:
        """config.json of a cut composite: what is said of the language model changes, nothing else.

        Raises: MinipuzzleError for what the family's own config.json cannot say.
        """
        text = self.base.write(self.language_config(source), architecture)
        for start, (_axes, count) in self.composite.dispensable.items():
            if text.get(count) and not any(placed.name.startswith(start) for placed in architecture.carried):
                text[count] = 0
        whole = {name: text[name] for name in _SHARED if name in source or name != "tie_word_embeddings"}
        return {**{key: value for key, value in source.items() if key not in self.drops}, TEXT_CONFIG: text, **whole}


def inside_language_model(model_type: str, text_model_type: str, *, ties_head: bool, follows: str) -> Composite:
    """A composite in the layout of files in which the language model lies with its head in ``language_model``, and
    other parts beside it. transformers 4.52 and later can also write all of them into ``model``.

    ``follows``: beginning of the names of tensors from other parts that have the hidden size.
    """
    return Composite(
        model_type=model_type,
        text_model_type=text_model_type,
        ties_head=ties_head,
        prefix="language_model.model.",
        outer_prefix="language_model.",
        other_prefixes={
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.vision_tower.": "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        },
        follows={follows: "hidden"},
    )
