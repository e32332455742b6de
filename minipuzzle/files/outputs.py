"""Output folders that appear whole or not at all, and interrupted runs that continue only on the same inputs.

Work happens in ``<out>.partial/``, which is renamed to ``<out>/`` at the end. The file ``minipuzzle.json`` inside
records what was asked and the fingerprints of all inputs; the same command run again picks up the partial folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minipuzzle.errors import InputChangedError, MinipuzzleError
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.version import __version__

PROVENANCE_FILE = "minipuzzle.json"
_WRITER_FILE = ".writer"  # holds the number of the process that writes

Provenance = Mapping[str, Any]


def check_target_folder(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that must not be replaced, before any work begins.

    Raises: MinipuzzleError if the folder has content and is not ours to overwrite, if it lies in a checkpoint, or if
    its parent is not writable.
    """
    kind = _kind_of_target(target)
    if kind is not None and not stat.S_ISDIR(kind):
        raise MinipuzzleError(f"{target} is not a folder", "choose another --out folder")
    if kind is not None and any(target.iterdir()):
        if not overwrite:
            raise MinipuzzleError(f"{target} is not empty", "choose another --out folder or pass --overwrite")
        if not (target / PROVENANCE_FILE).is_file():
            raise MinipuzzleError(
                f"{target} was not written by minipuzzle, so --overwrite does not replace it",
                "choose another --out folder or remove this one yourself",
            )
    _check_parent_writable(target)


def check_target_file(target: Path, *, overwrite: bool = False, is_ours: Callable[[Path], bool] | None = None) -> None:
    """Refuse a file that must not be replaced or cannot be written, before any work begins.

    ``overwrite``: replace a file that ``is_ours`` says is one of the kind that is written; without that test, any.

    Raises: MinipuzzleError if there is something else already, if it would lie in a checkpoint, or if the parent is not
    writable.
    """
    kind = _kind_of_target(target)
    if kind is not None and not stat.S_ISREG(kind):
        raise MinipuzzleError(f"{target} is a folder or a special file", "give the name of a new file")
    if kind is not None and not overwrite:
        raise MinipuzzleError(f"{target} exists", "choose another name or pass --overwrite")
    if kind is not None and is_ours is not None and not is_ours(target):
        raise MinipuzzleError(
            f"{target} is no such file as would be written, so --overwrite does not replace it",
            "choose another name, or remove the file yourself",
        )
    _check_parent_writable(target)


def _kind_of_target(target: Path) -> int | None:
    """The mode of what is there, links not followed; None if there is nothing.

    Raises: MinipuzzleError for a path that can name no output: none, too long a one, or one inside a checkpoint, whose
    readers would take it for a part of the model.
    """
    try:
        mode = target.lstat().st_mode if target.is_symlink() or target.exists() else None
        parents = (*target.absolute().parents, *target.resolve().parents)
        inside = next((parent for parent in parents if (parent / "config.json").is_file()), None)
    except (OSError, ValueError, RuntimeError) as error:
        raise MinipuzzleError(f"{str(target)!r} cannot be written: {error}", "choose another --out") from None
    if target.name in ("", ".."):
        raise MinipuzzleError(f"{str(target)!r} is no name for an output", "give the name of a new one with --out")
    if inside is not None:
        raise MinipuzzleError(f"{target} lies in {inside}, which holds a model", "choose another place for --out")
    return mode


def _check_parent_writable(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, probe = tempfile.mkstemp(prefix=".minipuzzle-", dir=target.parent)
        os.close(descriptor)
        Path(probe).unlink()
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
    with _only_writer(partial):
        try:
            yield partial
        except MinipuzzleError:
            if is_fresh:
                shutil.rmtree(partial)
            raise
    _replace(target, partial)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes while the block runs; a process that was killed holds nothing.

    Raises: MinipuzzleError with the number of the process that writes into it.
    """
    path = folder / _WRITER_FILE
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise MinipuzzleError(
                f"process {file.read() or '?'} is writing {folder}", "wait for it, stop it, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
        path.unlink(missing_ok=True)


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
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise MinipuzzleError(f"{partial} is in the way and was not written by minipuzzle", "move it away")
    if not partial.exists() or set(partial.iterdir()) <= {unfinished, partial / _WRITER_FILE}:
        partial.mkdir(exist_ok=True)
        with write_whole(provenance) as path:
            write_json(path, record)
        return True
    if not provenance.is_file():
        raise MinipuzzleError(f"{partial} is in the way and was not written by minipuzzle", "move it away")
    earlier = read_json(provenance)
    wanted = json.loads(json.dumps(record))  # tuples become lists, as in the file
    require_same_inputs(partial, earlier, wanted)
    return False


def require_same_inputs(unfinished: Path, earlier: Provenance, wanted: Provenance) -> None:
    """Refuse to continue a run that began with other inputs or settings.

    Raises: InputChangedError naming the first field that differs.
    """
    for field in sorted(earlier.keys() | wanted.keys()):
        if earlier.get(field) != wanted.get(field):
            raise InputChangedError(
                f"{unfinished} holds an interrupted run with another {field}: "
                + "; ".join(_differences(earlier.get(field), wanted.get(field))),
                f"restore it to continue that run, or remove {unfinished} to start afresh",
            )


def _differences(earlier: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """What differs between two JSON values, down to the fields that do: old and new."""
    if isinstance(earlier, dict) and isinstance(wanted, dict):
        for key in sorted(earlier.keys() | wanted.keys()):
            if earlier.get(key) != wanted.get(key):
                yield from _differences(earlier.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    else:
        yield f"{f'{name} ' if name else ''}{earlier!r} then, {wanted!r} now"


@contextmanager
def output_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; it becomes ``target`` once the block ends without an error.

    What the user must not lose is for ``check_target_file`` to find before work begins. The file has the mode that new
    files have.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def write_whole(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target``, in a folder of ours; it becomes ``target`` when the block ends without an error.

    What a killed run leaves there is overwritten when the same file is written again.
    """
    unfinished = target.with_name(target.name + ".unfinished")
    yield unfinished
    unfinished.replace(target)


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
