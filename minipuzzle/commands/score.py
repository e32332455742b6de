"""``minipuzzle score``: measure how much the model loses without each layer, channel and head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import click

from minipuzzle.commands.options.generate import (
    SectionedCommand,
    compute_of,
    compute_options,
    from_options,
    settings_options,
)
from minipuzzle.commands.options.shared import FOLDER_OR_FILE, dry_run_option, echo_json, json_option, model_argument
from minipuzzle.workflows.settings import ScoreSettings, paths_of


@click.command(cls=SectionedCommand)
@model_argument()
@settings_options(ScoreSettings)
@compute_options(
    dtype="float32",
    dtype_help="Precision of the computation; bfloat16 is much faster on GPUs and loses digits of small scores.",
    memory_help="Memory to use, e.g. 16GiB, for weights and hidden states together; where it does not hold the whole "
    "model, one layer at a time is read. Default: most of what is free.",
)
@click.option("--plot", type=FOLDER_OR_FILE, default=None, help="Also draw the layer scores into a .png, .svg or .pdf.")
@dry_run_option
@json_option
def score(model: Path, plot: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Measure what the model loses without each layer, channel and head.

    The score file serves any number of `minipuzzle search` and `minipuzzle prune` runs on the same model. A layer
    scores by the change of the LM head's input when it is skipped; all metrics are measured in one pass. An
    interrupted run continues when the same command is given again. `torchrun --nproc-per-node N -m minipuzzle score
    ...` shares the samples among N processes, on a GPU each where there are any.

    With --iterative N a removed layer keeps the score at which it was removed, and the others have those of the last
    round; all are distances to the whole model.
    """
    from minipuzzle.runtime.processes import joined_processes
    from minipuzzle.show.pictures import check_picture_target
    from minipuzzle.show.scores import draw_scores, print_planned_scoring, print_scores
    from minipuzzle.workflows.score import plan_score, run_score
    from minipuzzle.workflows.verbs import open_plain

    compute = compute_of(options, is_quiet=as_json)
    settings = from_options(ScoreSettings, options)
    checkpoint = open_plain(model)
    if plot is not None:
        inputs = [checkpoint.folder, *paths_of(settings.data)]
        check_picture_target(plot, overwrite=settings.overwrite, inputs=inputs)
    with joined_processes(compute.device) as processes:
        settings = replace(settings, compute=compute.among(processes))
        if dry_run:
            planned = plan_score(checkpoint, settings)
            if processes.is_first:
                echo_json(planned.to_json()) if as_json else print_planned_scoring(planned)
            return
        scores = run_score(checkpoint, settings)
        if not processes.is_first:
            return
        if plot is not None:
            draw_scores(checkpoint.architecture, scores, plot)
    if as_json:
        kinds = [layer.kind for layer in checkpoint.architecture.layers]
        echo_json({"out": str(settings.out), "kinds": kinds, **scores.to_json()})
        return
    print_scores(checkpoint.architecture, scores)
    names = [quote(str(path)) for path in (model, settings.out)]
    click.echo(f"written to {settings.out}\nnext: minipuzzle search {names[0]} --scores {names[1]} --memory ...")
