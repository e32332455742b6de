"""Output folders that appear whole or not at all, and interrupted runs that continue only on the same inputs.

Work happens in ``<out>.partial/``, which is renamed to ``<out>/`` at the end. The file ``minipuzzle.json`` inside
records what was asked and the fingerprints of all inputs; the same command run again picks up the partial folder.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minipuzzle.errors import InputChangedError, MinipuzzleError
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.version import __version__

PROVENANCE_FILE = "minipuzzle.json"
ADDED_FIELDS = ("made", "results", "lineage")  # of finished outputs; an interrupted one may have them already
_WRITER_FILE = ".writer"  # holds the number of the process that writes

Provenance = Mapping[str, Any]


def _has_provenance(folder: Path) -> bool:
    return (folder / PROVENANCE_FILE).is_file()


def check_target_folder(
    target: Path,
    *,
    overwrite: bool,
    inputs: Sequence[Path] = (),
    is_ours: Callable[[Path], bool] = _has_provenance,
) -> None:
    """Refuse a target that must not be replaced or added to, before any work begins.

    ``inputs``: files and folders that the command reads.

    Raises: MinipuzzleError if the folder has content and is not ours to overwrite, if it lies in a checkpoint, if it
    is an input, lies in one or holds one, or if it cannot be written.
    """
    kind = _kind_of_target(target, inputs)
    if kind is not None and not stat.S_ISDIR(kind):
        raise MinipuzzleError(f"{target} is not a folder", "choose another one")
    if kind is not None and any(target.iterdir()):
        if not overwrite:
            raise MinipuzzleError(f"{target} is not empty", "choose another folder or pass ‹overwrite›")
        if not is_ours(target):
            raise MinipuzzleError(
                f"{target} was not written by minipuzzle, which does not replace it",
                "choose another folder or remove this one yourself",
            )
        _check_writable(target, target)
    _check_writable(target.parent, target)


def check_target_file(
    target: Path, *, overwrite: bool = False, read: Callable[[Path], object], inputs: Sequence[Path] = ()
) -> None:
    """Refuse a file that must not be replaced or cannot be written, before any work begins.

    ``overwrite``: replace a file of the kind that is written, which ``read`` can read. ``inputs``: as above.

    Raises: MinipuzzleError if there is something else already, if it would lie in a checkpoint, if it is an input or
    lies in one, or if the parent is not writable.
    """
    kind = _kind_of_target(target, inputs)
    if kind is not None and not stat.S_ISREG(kind):
        raise MinipuzzleError(f"{target} is a folder or a special file", "give the name of a new file")
    if kind is not None and not overwrite:
        raise MinipuzzleError(f"{target} exists", "choose another name or pass ‹overwrite›")
    if kind is not None:
        try:
            read(target)
        except MinipuzzleError as error:
            raise MinipuzzleError(
                f"{target} is no such file as would be written, so ‹overwrite› does not replace it: {error.problem}",
                "choose another name, or remove the file yourself",
            ) from None
    _check_writable(target.parent, target)


def _kind_of_target(target: Path, inputs: Sequence[Path]) -> int | None:
    """The mode of what is there, links not followed; None if there is nothing.

    Raises: MinipuzzleError for a path that can name no output: none, too long a one, one inside a checkpoint, whose
    readers would take it for a part of the model, or an input.
    """
    try:
        mode = target.lstat().st_mode if target.is_symlink() or target.exists() else None
        parents = (*target.absolute().parents, *target.resolve().parents)
        inside = next((parent for parent in parents if _holds_model(parent)), None)
    except (OSError, ValueError, RuntimeError) as error:
        raise MinipuzzleError(f"{str(target)!r} cannot be written: {error}", "choose another name") from None
    if target.name in ("", ".."):
        raise MinipuzzleError(f"{str(target)!r} is no name for an output", "give the name of a new one")
    for path in inputs:
        _require_apart(target, path)
    if inside is not None:
        raise MinipuzzleError(f"{target} lies in {inside}, which holds a model", "choose another place")
    return mode


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors*"))


def _require_apart(target: Path, path: Path) -> None:
    output, read = target.resolve(), path.resolve()
    relations = {"is": output == read, "lies in": read in output.parents, "holds": output in read.parents}
    if relation := next((name for name, holds in relations.items() if holds), None):
        raise MinipuzzleError(f"{target} {relation} {path}, which is an input", "choose another name")


def _check_writable(folder: Path, target: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, probe = tempfile.mkstemp(prefix=".minipuzzle-", dir=folder)
        os.close(descriptor)
        Path(probe).unlink()
    except OSError as error:
        raise MinipuzzleError(f"cannot write {target}: {error.strerror}", "choose one that you may write") from None


@contextmanager
def output_folder(target: Path, provenance: Provenance, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield ``<target>.partial/`` to write into; rename it to ``target`` once the block ends without an error.

    A partial folder of an interrupted run with the same provenance is yielded as it was left; one with another is begun
    anew if ``overwrite``. A run that ends with a MinipuzzleError takes the partial folder that it began with it: its
    inputs must change before it can succeed.

    Raises: InputChangedError naming the fields, if the interrupted run had other inputs or settings.
    """
    check_target_folder(target, overwrite=overwrite)
    partial = target.with_name(target.name + ".partial")
    try:
        is_fresh = _open_partial(partial, output_record(provenance))
    except InputChangedError:
        if not overwrite:
            raise
        with only_writer(partial, lock=partial / _WRITER_FILE):
            shutil.rmtree(partial)
        is_fresh = _open_partial(partial, output_record(provenance))
    with only_writer(partial, lock=partial / _WRITER_FILE):
        try:
            yield partial
        except MinipuzzleError:
            if is_fresh:
                shutil.rmtree(partial)
            raise
    _replace(target, partial)


@contextmanager
def only_writer(target: Path, *, lock: Path) -> Iterator[None]:
    """Hold an output against other processes while the block runs; a process that was killed holds nothing.

    Raises: MinipuzzleError with the number of the process that writes it.
    """
    with lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise MinipuzzleError(
                f"process {file.read() or '?'} is writing {target}", "wait for it, stop it, or choose another ‹out›"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


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

    Raises: InputChangedError naming the fields that differ.
    """
    names = sorted((earlier.keys() | wanted.keys()) - set(ADDED_FIELDS))
    if differing := [name for name in names if earlier.get(name) != wanted.get(name)]:
        is_one = len(differing) == 1
        found = (_differences(earlier.get(name), wanted.get(name), "" if is_one else name) for name in differing)
        raise InputChangedError(
            f"{unfinished} holds an interrupted run with another {' and '.join(differing)}: "
            + "; ".join(itertools.chain.from_iterable(found)),
            "restore that to continue the run, or pass ‹overwrite› to start afresh",
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
