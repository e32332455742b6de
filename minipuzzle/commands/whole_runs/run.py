"""``minipuzzle run``: all steps of a recipe, one after another; an interrupted run continues in the step it was in."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import click

from minipuzzle.architecture.quantities import format_gib
from minipuzzle.commands.options.shared import FOLDER_OR_FILE, echo_json, json_option
from minipuzzle.commands.whole_runs.recipes import Recipe, RecipeStep, read_recipe
from minipuzzle.errors import InputChangedError
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.files.outputs import write_whole
from minipuzzle.files.records import COMMAND_LINE

RUN_FILE = "run.json"


@click.command(short_help="Run all steps of a recipe.")
@click.argument("recipe_path", metavar="RECIPE.toml", type=FOLDER_OR_FILE)
@click.option("-o", "--out", type=FOLDER_OR_FILE, help="Folder of all outputs, in the place of the recipe's own.")
@click.option("--dry-run", is_flag=True, help="Check the whole recipe, print what each step needs and takes, and stop.")
@json_option
def run(recipe_path: Path, out: Path | None, dry_run: bool, as_json: bool) -> None:
    """Run the steps of RECIPE.toml: score, prune, distill, export, evaluate, those of them that it holds.

    The file names a model and a folder for the outputs, then a table for each step, whose keys are the options of the
    command of that name. Keys above the tables hold for all steps that have such an option. Each step works on what
    the one before it wrote. Everything is checked before anything starts.

    Given again, the command passes over finished steps and continues inside the one that was interrupted. A page of
    the whole run lies beside the outputs. `--print-recipe` of any command prints its options as a recipe.
    """
    recipe = read_recipe(recipe_path, out)
    expected = _expected(recipe)
    if dry_run:
        _show_expected(recipe, expected, as_json=as_json)
        return
    recipe.out.mkdir(parents=True, exist_ok=True)
    steps = {}
    for step in recipe.steps:
        steps[step.name] = {"expected_seconds": round(expected[step.name]["seconds"], 1), **_run(recipe, step, as_json)}
    page = _write_page(recipe)
    if as_json:
        echo_json({"out": str(recipe.out), "page": str(page), "steps": steps})
        return
    for name, facts in steps.items():
        took = "done before" if facts["was_done"] else _time(facts["seconds"])
        click.echo(f"{name:<10} {took:>12}   expected {_time(facts['expected_seconds'])}")
    click.echo(f"next: open {page}")


def _run(recipe: Recipe, step: RecipeStep, as_json: bool) -> dict[str, Any]:
    """Run a step, unless an earlier run of the same recipe finished it."""
    path, key = recipe.out / RUN_FILE, recipe.key(step)
    finished = read_json(path) if path.is_file() else {}
    earlier = finished.get(step.name)
    if step.target.exists():
        if earlier is None or earlier["key"] != key:
            raise InputChangedError(
                f"{step.target} was made by another recipe or from other text",
                f"restore what was changed, remove {step.target} and what follows it, or choose another ‹out›",
            )
        return {"was_done": True, **earlier}
    click.echo(click.style(f"» {step.line}", bold=True), err=True)
    COMMAND_LINE.set((step.name, *step.arguments))
    start, printed = time.perf_counter(), StringIO()
    arguments = [*step.arguments, *(["--json"] if as_json else [])]
    with step.command.make_context(step.name, arguments, parent=click.get_current_context()) as context:
        if as_json:
            with redirect_stdout(printed):
                step.command.invoke(context)
        else:
            step.command.invoke(context)
    facts: dict[str, Any] = {"key": key, "seconds": round(time.perf_counter() - start, 1)}
    with write_whole(path) as unfinished:
        write_json(unfinished, {**finished, step.name: facts})
    return {"was_done": False, **facts, **({"result": json.loads(printed.getvalue())} if as_json else {})}


def _expected(recipe: Recipe) -> dict[str, dict[str, float]]:
    from minipuzzle.commands.whole_runs.expected import expected_work
    from minipuzzle.workflows.verbs import open_model

    checkpoint = open_model(recipe.model)
    checkpoint.require_plain_weights()
    found: dict[str, dict[str, float]] = expected_work(
        checkpoint, {step.name: step.settings() for step in recipe.steps}
    )
    return found


def _show_expected(recipe: Recipe, expected: dict[str, dict[str, float]], *, as_json: bool) -> None:
    disk_bytes = int(sum(facts["disk_bytes"] for facts in expected.values()))
    free_bytes = shutil.disk_usage(next(p for p in (recipe.out, *recipe.out.absolute().parents) if p.exists())).free
    if as_json:
        lines = {step.name: step.line for step in recipe.steps}
        steps = {name: {**facts, "command": lines[name]} for name, facts in expected.items()}
        echo_json({"steps": steps, "disk_bytes": disk_bytes, "free_bytes": free_bytes})
        return
    for step in recipe.steps:
        facts = expected[step.name]
        click.echo(f"{step.line}")
        needs = f"memory {format_gib(int(facts['memory_bytes']))}, disk {format_gib(int(facts['disk_bytes']))}"
        click.echo(f"  about {_time(facts['seconds'])}, {needs}")
    click.echo(f"disk in all: {format_gib(disk_bytes)} of {format_gib(free_bytes)} free")
    click.echo("times are estimates, by counted work and the matrix rate of this machine\ndry run: nothing was written")


def _write_page(recipe: Recipe) -> Path:
    from minipuzzle.show.page.facts import PAGE_FILE, read_run
    from minipuzzle.show.page.page import render_page

    page = recipe.out / PAGE_FILE
    folders = [step.target for step in recipe.steps if step.target.is_dir()]
    if folders:
        with write_whole(page) as path:
            path.write_text(render_page(read_run(folders)), encoding="utf-8")
    return page


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
