"""``minipuzzle demo``: the whole path on a small trained hybrid, from measuring to FP8, with one table at the end."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from minipuzzle.commands.options.shared import (
    COUNT,
    FOLDER_OR_FILE,
    dry_run_option,
    echo_json,
    json_option,
    out_option,
    overwrite_option,
)
from minipuzzle.errors import MinipuzzleError

if TYPE_CHECKING:
    from minipuzzle.files.checkpoint import Checkpoint
    from minipuzzle.workflows.choosing.compare import Choice
    from minipuzzle.workflows.demo import Audience, DemoSettings

MODEL = Path(__file__).parents[3] / "examples" / "tiny_hybrid" / "model"
PICTURE = "demo.png"


@click.command(short_help="Run the whole path on a small trained hybrid.")
@click.option("--memory", default="75%", show_default=True, help="Budget of the pruned model.")
@click.option("--tokens", type=COUNT, default=200_000, show_default=True, help="Tokens of distillation.")
@click.option("--samples", type=COUNT, default=64, show_default=True, help="Calibration samples of 256 tokens.")
@click.option("--model", type=FOLDER_OR_FILE, default=MODEL, help="Teacher; default: the embedded model.")
@out_option()
@overwrite_option
@dry_run_option
@json_option
def demo(
    memory: str,
    tokens: int,
    samples: int,
    model: Path,
    out: Path,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure, prune, compensate, distil and export a small trained hybrid, and show what each step cost and kept.

    Runs on the model and text of examples/tiny_hybrid in a few minutes on two CPU cores, without a network.
    """
    from minipuzzle.files.checkpoint import Checkpoint
    from minipuzzle.files.outputs import check_target_folder, output_folder
    from minipuzzle.progress import silent
    from minipuzzle.runtime.compute import Compute
    from minipuzzle.show.bars import drawn_bar
    from minipuzzle.show.demo import draw_stages, print_stages
    from minipuzzle.workflows.demo import DEPLOYMENT, Audience, DemoSettings, run_demo

    if not model.is_dir():
        raise MinipuzzleError(f"the embedded model is not at {model}", "run the demo from a clone of the repository")
    teacher = Checkpoint.open(model)
    teacher.require_plain_weights()
    check_target_folder(out, overwrite=overwrite)
    settings = DemoSettings(memory=memory, tokens=tokens, samples=samples)
    if dry_run:
        _print_dry_run(teacher, settings, as_json)
        return
    compute = Compute(progress=silent if as_json else drawn_bar)
    audience = Audience() if as_json else _audience(teacher)
    start = time.perf_counter()
    provenance = {"command": "demo", "teacher_fingerprint": teacher.fingerprint, "settings": asdict(settings)}
    with output_folder(out, provenance, overwrite=overwrite) as folder:
        stages = run_demo(teacher, folder, settings, compute, audience)
        draw_stages(stages, folder / PICTURE)
    seconds = time.perf_counter() - start
    peak_bytes = compute.own_device.peak_bytes
    if as_json:
        stages_json = [stage.to_json() for stage in stages]
        echo_json({"seconds": seconds, "peak_rss_bytes": peak_bytes, "stages": stages_json})
        return
    print_stages(stages, DEPLOYMENT.describe() + " (FP8: weights fp8)")
    click.echo(f"{seconds:.0f} s, peak memory {peak_bytes / 2**30:.2f} GiB; picture: {out / PICTURE}")


def _audience(teacher: Checkpoint) -> Audience:
    """People at a terminal."""
    from minipuzzle.show.distill import distill_progress
    from minipuzzle.show.report import print_compensation, print_plan
    from minipuzzle.workflows.demo import DEPLOYMENT, Audience

    def see_cut(choice: Choice) -> None:
        source = teacher.architecture
        if choice.compensation is not None:
            print_compensation(choice.compensation)
        else:
            print_plan(source, choice.plan.apply(source), source.layers_besides(choice.plan.kept_layers), DEPLOYMENT)

    return Audience(
        say=lambda step: click.echo(click.style(f"» {step}", bold=True), err=True),
        see_cut=see_cut,
        watch=distill_progress,
    )


def _print_dry_run(teacher: Checkpoint, settings: DemoSettings, as_json: bool) -> None:
    from minipuzzle.search.request import SearchRequest
    from minipuzzle.workflows.demo import DEPLOYMENT
    from minipuzzle.workflows.prune import check_feasible

    num_fitting = len(check_feasible(teacher, SearchRequest(memory=settings.memory), DEPLOYMENT))
    facts = {"model": str(teacher.folder), "pattern": teacher.architecture.pattern, **asdict(settings)}
    facts |= {"candidates_that_fit": num_fitting}
    if as_json:
        echo_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):<22} {value}")
    click.echo("dry run: nothing was written")
