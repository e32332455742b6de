"""Guarantee: a name on the hub stands wherever a folder does; only what is needed is fetched, once, and the rest of it
after an interruption; and a finished folder is uploaded without the places of this machine.

Hugging Face's own client talks to a small server here, in one process of its own: it reads its environment at import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minipuzzle.cut.plan import plan_without
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.hub import is_hub_id
from tests.support.cli import run_cli
from tests.support.hub import HubServer, hub_server
from tests.support.tiny_models import write_tiny_checkpoint

JOB = """
import json, sys
from pathlib import Path
from tests.support.cli import run_cli

def run(*arguments):
    result = run_cli(*arguments)
    return [result.exit_code, result.stdout[-2000:], result.stderr[-2000:]]

work = Path(sys.argv[1])
of = ["--data", work / "text.txt", "--samples", 2, "--sequence-length", 24]
found = {}
for name, arguments in {
    "inspect": ["inspect", "org/tiny@v1", "--json"],
    "prune": ["prune", "org/tiny@v1", "--keep", "mlp=2", *of, "-o", work / "cut", "--push-to-hub", "me/cut"],
    "export": ["export", "me/cut", "--bf16", "-o", work / "deploy"],
    "distill": ["distill", work / "cut", "--tokens", 96, "--batch", 4, "--sequence-length", 24, "--data",
                work / "text.txt", "-o", work / "out", "--dry-run"],
    "gone": ["inspect", "org/gone"],
    "no revision": ["inspect", "org/tiny@v9"],
}.items():
    if name in sys.argv[2:]:
        found[name] = run(*arguments)
print("FOUND" + json.dumps(found))
"""


def run_job(server: HubServer, work: Path, *names: str, **environment: str) -> dict[str, list[object]]:
    """Commands by name in a process that knows this server as the hub."""
    variables = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(work / "home"), "HF_TOKEN": "hf_test"}
    variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(work), *names], env=variables, capture_output=True, text=True, check=False
    )
    assert "FOUND" in done.stdout, done.stderr
    found: dict[str, list[object]] = json.loads(done.stdout.split("FOUND")[1])
    return found


def test_models_of_a_hub_are_read_cut_and_given_back(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "hub/org/tiny")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    (tmp_path / "text.txt").write_text("What is measured can be mended. " * 50, encoding="utf-8")
    with hub_server(tmp_path / "hub") as server:
        server.cut_after = 10_000  # breaks the download of the weights once
        found = run_job(server, tmp_path, "inspect", "prune", "export", "gone", "no revision")
    for name in ("inspect", "prune", "export"):
        assert found[name][0] == 0, found[name]
    fetched = [request.rpartition("/")[2] for request in server.requests if request.startswith("GET /org/tiny/resolve")]
    assert fetched[0] == "config.json"  # of which inspect needs no more
    assert fetched.count("model.safetensors") == 2  # the first was cut off
    assert "pytorch_model.bin" not in fetched
    assert server.cut_after is None
    record = json.loads((tmp_path / "cut/minipuzzle.json").read_text())
    assert record["teacher"] == "org/tiny@v1"
    uploaded = {path.relative_to(tmp_path / "hub/me/cut").as_posix() for path in (tmp_path / "hub/me/cut").rglob("*.*")}
    assert {"config.json", "model.safetensors", "minipuzzle.json", "report.html", "plan.json"} <= uploaded
    for path in (tmp_path / "hub/me/cut").rglob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert "neither a folder nor a model on the hub" in str(found["gone"][2])
    assert "org/tiny has no revision v9" in str(found["no revision"][2])
    # The cache is enough afterwards, for the teacher that the cut remembers too.
    offline = run_job(server, tmp_path, "inspect", "distill", HF_HUB_OFFLINE="1")
    assert [code for code, *_ in offline.values()] == [0, 0], offline


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("org/name", True),
        ("org/name@v1.0", True),
        ("name", False),
        ("/org/name", False),
        ("./org/name", False),
        ("org/name/deeper", False),
        ("org/../name", False),
        ("tests/gone", False),  # a folder that exists here holds what is named
    ],
)
def test_names_on_the_hub_are_told_from_paths(name: str, is_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert is_hub_id(name) is is_one


def test_an_output_does_not_tell_others_where_its_teacher_lies(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "secret" / "model")
    (tmp_path / "plan.json").write_text(plan_without(Checkpoint.open(model).architecture, (1,)).to_json())
    result = run_cli("prune", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "cut")
    assert result.exit_code == 0, result.output
    told = {path.name for path in (tmp_path / "cut").rglob("*.*") if b"secret" in path.read_bytes()}
    assert told == {"places.json"}
