"""The Python API gives what the commands give: the lines of docs/python.md run, and are held against the commands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import minipuzzle as mp
from tests.support.cli import run_json

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
# The page speaks of real models; the tiny one has a few kilobytes of text and layers of a few channels.
SMALLER = {
    "samples=128, sequence_length=512": "samples=8, sequence_length=24",
    'memory="75%"': 'memory="85%", granularity=16, min_ffn_fraction=0.5, deployment=mp.Deployment(context_tokens=64)',
    'tokens="1B"': "tokens=256, sequence_length=32, batch_sequences=4",
    'data=["calibration.jsonl"], out': 'data=["calibration.jsonl"], samples=8, sequence_length=24, out',
}


def lines_of_the_page() -> str:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    assert len(code.strip().splitlines()) <= 12
    for real, small in SMALLER.items():
        assert real in code
        code = code.replace(real, small)
    return str(code)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_weights(one: Path, other: Path) -> None:
    found, wanted = weights(one), weights(other)
    assert found.keys() == wanted.keys() and len(found) > 0
    for name, tensor in wanted.items():
        assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (found[name], tensor))), name


def without_speed(facts: Any) -> Any:
    return {name: value for name, value in facts.items() if name not in ("tokens_per_second", "folder")}


def test_the_page_runs_and_gives_what_the_commands_give(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "big")
    Path("corpus").mkdir()
    lines = text_file.read_text(encoding="utf-8").splitlines(keepends=True)
    for name in ("calibration.jsonl", "heldout.jsonl", "corpus/text.jsonl"):
        Path(name).write_text("".join(lines[:2] if name == "heldout.jsonl" else lines[2:]), encoding="utf-8")
    names: dict[str, Any] = {}
    exec(lines_of_the_page(), names)

    of = ("--data", "calibration.jsonl", "--samples", 8, "--sequence-length", 24)
    run_json("score", "big", *of, "-o", "scores.safetensors")
    target = ("--memory", "85%", "--granularity", 16, "--min-ffn", 0.5, "--context", 64)
    run_json("search", "big", "--scores", "scores.safetensors", *target, "-o", "plan.json")
    run_json("prune", "big", "--plan", "plan.json", "-o", "pruned-2")
    heldout = ("--validation", "heldout.jsonl", "--tokens", 256, "--sequence-length", 32, "--batch", 4)
    distilled = run_json("distill", "pruned-2", "--data", "corpus", *heldout, "-o", "recovered-2")
    run_json("export", "recovered-2", "--fp8", *of, "-o", "deploy-2")
    verified = run_json("verify", "deploy-2", "--against", "recovered-2")
    evaluated = run_json("evaluate", "recovered-2", "--against", "big", "--data", "heldout.jsonl")

    plan = json.loads(Path("plan.json").read_text(encoding="utf-8"))
    assert json.loads(names["found"].best.plan.to_json()) == plan == json.loads(names["pruned"].plan.to_json())
    for folder in ("pruned", "recovered", "deploy"):
        assert_same_weights(Path(folder), Path(f"{folder}-2"))
    for name in ("validation_kl_before", "validation_kl_after", "validation_loss_after", "steps"):
        assert names["distilled"].to_json()[name] == distilled[name]
    assert without_speed(names["verified"].to_json()) == without_speed(verified)
    assert without_speed(names["quality"].to_json()["heldout"]) == without_speed(evaluated["heldout"])


def test_prune_measures_and_searches_as_the_command_does(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    pruned = mp.prune(
        tiny_folder,
        memory="85%",
        granularity=16,
        min_ffn_fraction=0.5,
        deployment=mp.Deployment(context_tokens=64),
        data=text_file,
        samples=8,
        sequence_length=24,
        out=tmp_path / "one",
    )
    target = ("--memory", "85%", "--granularity", 16, "--min-ffn", 0.5, "--context", 64)
    of = ("--data", text_file, "--samples", 8, "--sequence-length", 24)
    found = run_json("prune", tiny_folder, *target, *of, "-o", tmp_path / "two")
    assert {**json.loads(json.dumps(pruned.to_json())), "out": ""} == {**found, "out": ""}
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_verbs_come_without_torch_and_stay_verbs_when_packages_of_their_names_are_imported() -> None:
    code = (
        "import sys, minipuzzle as mp; names = mp.__all__; assert 'torch' not in sys.modules;"
        "import minipuzzle.search.engine as engine, minipuzzle.export.verify, inspect;"
        "assert mp.search.engine is engine and callable(mp.search) and callable(mp.export);"
        "assert 'memory' in inspect.signature(mp.search).parameters;"
        "assert all(hasattr(mp, name) for name in names)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_and_help_load_little() -> None:
    """Modules are counted, not seconds: torch alone would load 1,500 more; 0.25 s of CPU where nothing else runs."""
    code = (
        "import sys, minipuzzle, minipuzzle.commands.cli as cli; cli.main(['--help'], standalone_mode=False);"
        "sys.exit(len(sys.modules) > 450 or bool({'torch', 'transformers', 'pyarrow', 'scipy'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0
