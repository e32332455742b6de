"""Guarantee: no output replaces what the same command did not write there, and one process writes it at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minipuzzle.errors import InputChangedError, MinipuzzleError
from minipuzzle.files.outputs import check_target_file, check_target_folder, output_file, output_folder

HOLD = """
import sys, time
from pathlib import Path
from minipuzzle.files.outputs import output_folder
with output_folder(Path(sys.argv[1]), {"command": "test"}) as folder:
    print("holding", flush=True)
    time.sleep(60)
"""


def test_existing_files_are_replaced_on_request_only_and_only_by_their_own_kind(tmp_path: Path) -> None:
    target = tmp_path / "scores.safetensors"
    check_target_file(target, read=_read_ours)
    target.write_text("precious")
    with pytest.raises(MinipuzzleError, match="exists"):
        check_target_file(target, read=_read_ours)
    with pytest.raises(MinipuzzleError, match="no such file as would be written"):
        check_target_file(target, overwrite=True, read=_read_ours)
    assert target.read_text() == "precious"
    target.write_text("ours")
    check_target_file(target, overwrite=True, read=_read_ours)


def _read_ours(path: Path) -> None:
    if path.read_text() != "ours":
        raise MinipuzzleError(f"{path} is of others", "")


def test_an_output_is_apart_from_all_inputs(tmp_path: Path) -> None:
    texts = tmp_path / "all" / "texts"
    texts.mkdir(parents=True)
    (tmp_path / "link").symlink_to(texts)
    for target, relation in (
        ("all", "holds"),
        ("all/texts", "is"),
        ("all/texts/new", "lies in"),
        ("link/x", "lies in"),
    ):
        with pytest.raises(MinipuzzleError, match=f"{relation} .*, which is an input"):
            check_target_folder(tmp_path / target, overwrite=True, inputs=[texts])
    check_target_folder(tmp_path / "all" / "new", overwrite=False, inputs=[texts])


@pytest.mark.parametrize(
    "check",
    [lambda path: check_target_file(path, read=_read_ours), lambda path: check_target_folder(path, overwrite=True)],
)
def test_links_pipes_and_impossible_names_are_refused(tmp_path: Path, check: object) -> None:
    assert callable(check)
    (tmp_path / "input").write_text("precious")
    (tmp_path / "link").symlink_to("input")
    (tmp_path / "dead").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for target in ("link", "dead", "pipe", "input/below", "x" * 300, "a\0b"):
        with pytest.raises(MinipuzzleError):
            check(tmp_path / target)
    for place in (Path(), Path(".."), Path("/")):
        with pytest.raises(MinipuzzleError):
            check(place)


def test_nothing_is_written_into_a_model(tiny_folder: Path) -> None:
    for name in ("model.safetensors", "config.json", "new.json", "deeper/new"):
        with pytest.raises(MinipuzzleError):
            check_target_file(tiny_folder / name, overwrite=True, read=_read_ours)
        with pytest.raises(MinipuzzleError):
            check_target_folder(tiny_folder / name, overwrite=True)


def test_files_beside_the_target_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "plan.json.partial").write_text("precious")
    with output_file(tmp_path / "plan.json") as path:
        path.write_text("{}")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["plan.json", "plan.json.partial"]
    assert (tmp_path / "plan.json.partial").read_text() == "precious"
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_second_process_is_refused_by_the_number_of_the_first(tmp_path: Path) -> None:
    target = tmp_path / "out"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", HOLD, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as first:
        assert first.stdout is not None and first.stdout.readline() == "holding\n"
        with (
            pytest.raises(MinipuzzleError, match=f"process {first.pid} is writing"),
            output_folder(target, {"command": "test"}),
        ):
            pass
        first.kill()
    # A process that was killed holds nothing, and what it began is continued.
    with output_folder(target, {"command": "test"}) as folder:
        (folder / "result").write_text("x")
    assert sorted(item.name for item in target.iterdir()) == ["minipuzzle.json", "result"]


def test_a_refused_continuation_names_only_the_fields_that_differ(tmp_path: Path) -> None:
    settings = {"samples": 128, "seed": 0, "deep": {"rate": 0.1, "same": [1, 2]}}
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "out", {"settings": settings}):
        raise KeyboardInterrupt
    changed = {**settings, "samples": 64, "deep": {"rate": 0.2, "same": [1, 2]}}
    with pytest.raises(InputChangedError) as error, output_folder(tmp_path / "out", {"settings": changed}):
        pass
    assert error.value.problem.endswith("another settings: deep.rate 0.1 then, 0.2 now; samples 128 then, 64 now")
    with (
        pytest.raises(
            InputChangedError, match=r"another settings and teacher: settings\.seed 0 then, 1 now; teacher None"
        ),
        output_folder(tmp_path / "out", {"settings": {**settings, "seed": 1}, "teacher": "t"}),
    ):
        pass


def test_what_was_begun_with_other_settings_is_begun_anew_on_request(tmp_path: Path) -> None:
    for settings, kept in ((1, False), (1, True), (2, False)):
        with (
            pytest.raises(KeyboardInterrupt),
            output_folder(tmp_path / "out", {"a": settings}, overwrite=True) as folder,
        ):
            assert (folder / "result").is_file() == kept
            (folder / "result").write_text("x")
            raise KeyboardInterrupt
