"""Output folders that appear whole or not at all, and interrupted runs that continue only on the same inputs.

Work happens in ``<out>.partial/``, which is renamed to ``<out>/`` at the end. The file ``minipuzzle.json`` inside
records what was asked and the fingerprints of all inputs; the same command run again picks up the partial folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minipuzzle.errors import InputChangedError, MinipuzzleError
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.version import __version__

PROVENANCE_FILE = "minipuzzle.json"

Provenance = Mapping[str, Any]


def check_target_folder(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that must not be replaced.

    Raises: MinipuzzleError if the folder has content and is not ours to overwrite, or its parent is not writable.
    """
    if target.exists() and not target.is_dir():
        raise MinipuzzleError(f"{target} is a file", "choose another --out folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise MinipuzzleError(f"{target} is not empty", "choose another --out folder or pass --overwrite")
        if not (target / PROVENANCE_FILE).is_file():
            raise MinipuzzleError(
                f"{target} was not written by minipuzzle, so --overwrite does not replace it",
                "choose another --out folder or remove this one yourself",
            )
    _check_parent_writable(target)


def check_target_file(target: Path) -> None:
    """Refuse a file that cannot be written.

    Raises: MinipuzzleError if the path is a folder or its parent is not writable.
    """
    _check_parent_writable(target)
    if target.is_dir():
        raise MinipuzzleError(f"{target} is a folder", "give a file name")


def _check_parent_writable(target: Path) -> None:
    probe = target.with_name(f".{target.name}.minipuzzle-probe")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MinipuzzleError(
            f"cannot write {target}: {error.strerror}", "choose another --out that you may write"
        ) from None


@contextmanager
def output_folder(target: Path, provenance: Provenance, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield ``<target>.partial/`` to write into; rename it to ``target`` once the block ends without an error.

    A partial folder of an interrupted run with the same provenance is yielded as it was left. A run that ends with a
    MinipuzzleError takes the partial folder that it began with it: its inputs must change before it can succeed.

    Raises: InputChangedError naming the field, if the interrupted run had other inputs or settings.
    """
    check_target_folder(target, overwrite=overwrite)
    partial = target.with_name(target.name + ".partial")
    is_fresh = _open_partial(partial, output_record(provenance))
    try:
        yield partial
    except MinipuzzleError:
        if is_fresh:
            shutil.rmtree(partial)
        raise
    _replace(target, partial)


def output_record(provenance: Provenance) -> dict[str, Any]:
    """What an output's minipuzzle.json says."""
    return {"minipuzzle_version": __version__, **provenance}


def _replace(target: Path, partial: Path) -> None:
    """Put ``partial`` in the place of ``target``; there is no moment at which neither of them is whole."""
    retired = target.with_name(target.name + ".replaced")
    if target.exists():
        target.rename(retired)
    partial.rename(target)
    shutil.rmtree(retired, ignore_errors=True)


def _open_partial(partial: Path, record: dict[str, Any]) -> bool:
    """Begin a partial folder, or check that it can be continued; says whether it was begun."""
    provenance, unfinished = partial / PROVENANCE_FILE, partial / (PROVENANCE_FILE + ".unfinished")
    if not partial.exists() or set(partial.iterdir()) <= {unfinished}:
        partial.mkdir(exist_ok=True)
        write_json(unfinished, record)
        unfinished.rename(provenance)
        return True
    if not provenance.is_file():
        raise MinipuzzleError(f"{partial} is in the way and was not written by minipuzzle", "move it away")
    earlier = read_json(provenance)
    wanted = json.loads(json.dumps(record))  # tuples become lists, as in the file
    for field in sorted(earlier.keys() | wanted.keys()):
        if earlier.get(field) != wanted.get(field):
            raise InputChangedError(
                f"{partial} holds an interrupted run with another {field}: "
                f"{earlier.get(field)!r} then, {wanted.get(field)!r} now",
                f"restore it to continue that run, or remove {partial} to start afresh",
            )
    return False


@contextmanager
def output_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; rename it over ``target`` once the block ends without an error."""
    check_target_file(target)
    partial = target.with_name(target.name + ".partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def fingerprint_files(paths: list[Path]) -> str:
    """A hash of the contents of data files or folders of them, independent of where they lie."""
    import hashlib

    digest = hashlib.sha256()
    for path in paths:
        members = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for member in members:
            digest.update(member.name.encode())
            with member.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:16]
