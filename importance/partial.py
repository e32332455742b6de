"""Sums of the samples done so far, in a small file, so that an interrupted measurement of layers continues."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from importance.metrics import HeadInputMetrics
from minipuzzle.checkpoint import read_json, write_json
from minipuzzle.errors import InputChangedError


class PartialSums:
    """A file with the sums over finished slices. ``identity`` is what must agree for the sums to be continued."""

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path = path
        self.identity = dict(identity)

    def read(self) -> HeadInputMetrics | None:
        """The sums of an interrupted measurement, if there was one.

        Raises: InputChangedError naming the field in which that measurement differs.
        """
        if not self.path.is_file():
            return None
        record = read_json(self.path)
        earlier = record.get("identity", {})
        for name, wanted in self.identity.items():
            if earlier.get(name) != wanted:
                raise InputChangedError(
                    f"{self.path} holds an interrupted measurement with another {name}: "
                    f"{earlier.get(name)!r} then, {wanted!r} now",
                    f"restore it to continue, or remove {self.path} to start afresh",
                )
        return HeadInputMetrics.from_record(record["sums"])

    def write(self, metrics: HeadInputMetrics) -> None:
        """Replace the file by the sums so far; numbers survive exactly."""
        unfinished = self.path.with_name(self.path.name + ".new")
        write_json(unfinished, {"identity": self.identity, "sums": metrics.to_record()})
        unfinished.replace(self.path)

    def remove(self) -> None:
        """Forget the sums; the result is complete."""
        self.path.unlink(missing_ok=True)
