"""Sums of the samples done so far, in a small file, so that an interrupted measurement continues where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minipuzzle.errors import InputChangedError
from minipuzzle.files.digests import CHECKSUM, digest_of_arrays
from minipuzzle.files.json_files import parse_json
from minipuzzle.files.outputs import require_same_inputs, write_whole

Arrays = dict[str, NDArray[Any]]


class PartialSums:
    """A file with the sums over finished slices of every stage of a measurement.

    ``identity`` is what must agree for the sums to be continued.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        """Read what an interrupted measurement left.

        Raises: InputChangedError naming the field in which that measurement differs, or for sums that are no longer
        what was written.
        """
        self.path = path
        self.identity = dict(identity)
        self._arrays: Arrays = {}
        if path.is_file():
            earlier = self._read()
            require_same_inputs(path, {name: earlier.get(name) for name in self.identity}, self.identity)

    def _read(self) -> dict[str, str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="numpy") as file:
                self._arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                metadata = dict(file.metadata() or {})
        except SafetensorError as error:
            raise self._damaged(str(error)) from None
        if metadata.get(CHECKSUM) != digest_of_arrays(self._arrays, metadata):
            raise self._damaged("it is not as it was written")
        return dict(parse_json(metadata["identity"], str(self.path)))

    def _damaged(self, problem: str) -> InputChangedError:
        return InputChangedError(f"{self.path} cannot be continued: {problem}", f"remove {self.path} to measure afresh")

    def stage(self, stage: str) -> Arrays | None:
        """The sums of one stage, if it has begun."""
        prefix = f"{stage}/"
        found = {name.removeprefix(prefix): a for name, a in self._arrays.items() if name.startswith(prefix)}
        return found or None

    def write(self, stage: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace the sums of one stage; numbers survive exactly, and a kill while writing harms nothing."""
        from safetensors.numpy import save_file

        kept = {name: array for name, array in self._arrays.items() if not name.startswith(f"{stage}/")}
        self._arrays = {**kept, **{f"{stage}/{name}": np.ascontiguousarray(array) for name, array in arrays.items()}}
        metadata = {"identity": json.dumps(self.identity)}
        metadata[CHECKSUM] = digest_of_arrays(self._arrays, metadata)
        with write_whole(self.path) as path:
            save_file(self._arrays, path, metadata=metadata)

    def remove(self) -> None:
        """Forget the sums; the result is complete."""
        self.path.unlink(missing_ok=True)
