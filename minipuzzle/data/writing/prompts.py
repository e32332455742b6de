"""Prompts are data: TOML files of ours, which a user may replace by a file with the same keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from minipuzzle.data.endpoint.questions import Question, chat
from minipuzzle.errors import MinipuzzleError
from minipuzzle.toml_files import read_toml

_OPEN, _CLOSE = "<<<", ">>>"  # around text that is data; longer where the text holds them


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Templates by name, with a system prompt for all. ``{name}`` in a template stands for a value."""

    system: str
    templates: Mapping[str, str]
    hash: str

    def question(self, name: str, settings: Mapping[str, Any], **values: str) -> Question:
        """The question of a template. ``text`` among the values is data: it is set between marks that it lacks.

        Raises: MinipuzzleError for a template that there is not.
        """
        if name not in self.templates:
            problem = f"the prompts have no {name!r}"
            raise MinipuzzleError(problem, f"they have {', '.join(self.templates)}")
        filled = self.templates[name]
        for key, value in values.items():
            filled = filled.replace("{" + key + "}", marked(value) if key == "text" else value)
        return chat(self.system, filled, **settings)


def marked(text: str) -> str:
    """A text between marks that do not occur in it, so that nothing in it can be taken for the end of it."""
    length = 3
    while "<" * length in text or ">" * length in text:
        length += 1
    return f"{_OPEN[0] * length}\n{text}\n{_CLOSE[0] * length}"


def read_prompts(name: str, override: Path | None = None) -> Prompts:
    """The prompts of a step. ``override``: a file whose entries take the place of ours.

    Raises: MinipuzzleError for a file that is no TOML, or has entries that the step does not know.
    """
    place = files("minipuzzle.data.writing") / "prompts" / f"{name}.toml"
    with_ours = read_toml(Path(str(place)), "‹prompts›")
    if override is not None:
        theirs = read_toml(override, "‹prompts›")
        if unknown := sorted(theirs.keys() - with_ours.keys()):
            raise MinipuzzleError(f"{override} has {unknown[0]!r}", f"it may have {', '.join(with_ours)}")
        with_ours |= theirs
    if not all(isinstance(value, str) for value in with_ours.values()):
        raise MinipuzzleError(f"{override} has an entry that is no text", "mend the file")
    system = with_ours.pop("system")
    digest = hashlib.sha256(json.dumps([system, with_ours], sort_keys=True).encode()).hexdigest()[:16]
    return Prompts(system=system, templates=with_ours, hash=digest)
