"""Guarantee: a recipe is checked whole before anything starts, does what its steps' commands would do, and continues
where it was interrupted; a command prints itself as a recipe that does the same.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import click
import pytest

from minipuzzle.commands.cli import command_of
from minipuzzle.commands.whole_runs.recipes import STEPS, read_recipe
from minipuzzle.errors import MinipuzzleError
from minipuzzle.toml_files import read_toml
from tests.support.cli import run_cli, run_json
from tests.support.tiny_models import write_tiny_checkpoint

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.toml"))
RECIPE = """
model = "model"
out = "unused"
data = ["text.txt"]
sequence_length = 32

[score]
samples = 4

[prune]
samples = 4
no_compensate = true
candidates = 1
granularity = 16
[prune.keep]
mlp = 2

[distill]
tokens = 512
batch = 4
micro_batch = 4

[export]
format = "fp8"
samples = 4

[evaluate]
max_tokens = 100
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipe")
    write_tiny_checkpoint(root / "model")
    (root / "text.txt").write_text("What is measured can be mended. " * 100, encoding="utf-8")
    (root / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return root


def test_a_recipe_runs_its_steps_and_passes_over_those_that_are_done(folder: Path) -> None:
    planned = run_json("run", folder / "recipe.toml", "-o", folder / "out", "--dry-run")
    assert list(planned["steps"]) == list(STEPS)
    assert not (folder / "out").exists()
    first = run_json("run", folder / "recipe.toml", "-o", folder / "out")
    assert [facts["was_done"] for facts in first["steps"].values()] == [False] * 5
    kept = json.loads((folder / "out/pruned/minipuzzle.json").read_text())["results"]["kept_layers"]
    model = json.loads((folder / "out/recovered/minipuzzle.json").read_text())["results"]["model"]
    assert len(kept) == len(model["layers"]) == 6
    assert first["steps"]["evaluate"]["result"]["text"]["kl"] > 0  # against the model of the recipe
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    assert "made by prune, distill, export" in page
    before = {path: path.stat().st_mtime_ns for path in folder.glob("out/*/model.safetensors")}
    assert len(before) == 3

    shutil.rmtree(folder / "out/quality")  # as if the run had been interrupted in its last step
    again = run_json("run", folder / "recipe.toml", "-o", folder / "out")
    assert [facts["was_done"] for facts in again["steps"].values()] == [True] * 4 + [False]
    assert {path: path.stat().st_mtime_ns for path in before} == before

    (folder / "changed.toml").write_text(RECIPE.replace("mlp = 2", "mlp = 1"), encoding="utf-8")
    result = run_cli("run", folder / "changed.toml", "-o", folder / "out")
    assert result.exit_code == 4
    assert "pruned was made by another recipe" in result.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('out = "unused"', ""), ""),  # -o stands in its place
        (("[export]", "[exporting]"), "there is no step [exporting]"),
        (("samples = 4\n\n[prune]", "sampels = 4\n\n[prune]"), "[score]: there is no option sampels"),
        (("tokens = 512", "tokens = -1"), "tokens"),
        (('format = "fp8"', 'format = "fp3"'), "fp3"),
        (('data = ["text.txt"]', 'data = ["gone.txt"]'), "gone.txt does not exist"),
        (("no_compensate = true", 'no_compensate = true\ncriterion = "obs"'), "OBS"),
        (("sequence_length = 32", "sequence_length = 32\nlayers_to_cut = 3"), "no step has an option layers_to_cut"),
        (("mlp = 2", "mlp = 200"), "mlp"),
    ],
)
def test_what_is_wrong_is_found_before_anything_starts(folder: Path, change: tuple[str, str], said: str) -> None:
    path = folder / "wrong.toml"
    path.write_text(RECIPE.replace(*change), encoding="utf-8")
    result = run_cli("run", path, "-o", folder / "nothing", "--dry-run")
    assert said in result.output
    assert (result.exit_code == 0) is (not said), result.output
    assert not (folder / "nothing").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_examples_are_right(path: Path, tmp_path: Path) -> None:
    """Their files are made up where they are not ours."""
    copy = tmp_path / "examples" / "recipes" / path.name
    copy.parent.mkdir(parents=True)
    copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    for name in re.findall(r'"([\w./-]+\.jsonl|corpus)"', copy.read_text(encoding="utf-8")):
        (copy.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (copy.parent / name).write_text('{"text": "a"}\n')
    steps = read_recipe(copy).steps
    assert [step.name for step in steps] == [name for name in STEPS if f"[{name}]" in copy.read_text(encoding="utf-8")]


def test_a_command_prints_the_recipe_that_does_the_same(folder: Path) -> None:
    typed = ["--keep", "mlp=1", "--keep", "mamba=3", "--data", folder / "text.txt", "--samples", 4, "--refine"]
    typed += ["--context", "4k", "-o", folder / "elsewhere"]
    result = run_cli("prune", folder / "model", *typed, "--print-recipe")
    assert result.exit_code == 0, result.output
    path = folder / "printed.toml"
    path.write_text(result.stdout, encoding="utf-8")
    assert read_toml(path, "it")["prune"]["keep"] == {"mlp": 1, "mamba": 3}
    (step,) = read_recipe(path, folder / "out2").steps
    command = command_of("prune")
    by_hand = command.make_context("prune", [str(folder / "model"), *map(str, typed)]).params
    assert {**step.params, "out": None} == {**by_hand, "out": None}


def test_every_step_can_be_printed() -> None:
    for name in STEPS:
        assert "--print-recipe" in command_of(name).get_help(click.Context(command_of(name)))
    with pytest.raises(MinipuzzleError, match="cannot read"):
        read_recipe(Path("no such recipe.toml"))
