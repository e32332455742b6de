"""``minipuzzle evaluate``: how well a model predicts text, and how far it is from a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minipuzzle.commands.options.generate import (
    SectionedCommand,
    compute_of,
    compute_options,
    from_options,
    settings_options,
)
from minipuzzle.commands.options.shared import dry_run_option, echo_json, json_option, model_argument
from minipuzzle.workflows.settings import EvaluateSettings


@click.command(cls=SectionedCommand, short_help="Measure loss, bits per byte, KL and agreement on text.")
@model_argument()
@settings_options(EvaluateSettings)
@compute_options(dtype_help="Precision of the computation; default: float32 on a CPU, bfloat16 elsewhere.")
@json_option
@dry_run_option
def evaluate(model: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Measure MODEL on text: loss, perplexity, bits per byte, next-token accuracy, speed.

    With --against also the KL divergence from a teacher and how often both find the same token most likely. MODEL
    may be an FP8 export; its rounding is computed as serving engines do. Several --data give a row each and a total.

    --tasks runs tasks of lm-eval (EleutherAI's harness) instead; `minipuzzle-lm-eval` is all of its command line.
    """
    from minipuzzle.show.quality import print_quality, print_tasks
    from minipuzzle.workflows.evaluate import plan_evaluate, run_evaluate

    compute = compute_of(options, is_quiet=as_json)
    settings = from_options(EvaluateSettings, options, compute=compute)
    if dry_run:
        counts = plan_evaluate(model, settings)
        if as_json:
            echo_json({"predicted_tokens": counts})
            return
        for name, count in counts.items():
            click.echo(f"{name}: would predict {count:,} tokens")
        return
    found = run_evaluate(model, settings)
    if as_json:
        echo_json(found.to_json())
        return
    print_tasks(found.tasks) if found.tasks else print_quality(found.rows)
    if settings.out is not None:
        click.echo(f"written to {settings.out}; its report.html shows the run")
