"""``minipuzzle score``: measure how much the model loses without each layer, channel and head."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minipuzzle.architecture.quantities import format_gib, parse_bytes
from minipuzzle.commands.options.shared import (
    COUNT,
    FOLDER_OR_FILE,
    data_option,
    default_device,
    device_option,
    dry_run_option,
    echo_json,
    json_option,
    model_argument,
    out_option,
)
from minipuzzle.cut.layer_metrics import LAYER_METRICS
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.outputs import check_target_file, fingerprint_files, output_file
from minipuzzle.runtime.compute import DTYPES

if TYPE_CHECKING:
    import torch

    from importance.alterations import LayerRequest
    from minipuzzle.cut.scores import Scores
    from minipuzzle.files.checkpoint import Checkpoint
    from minipuzzle.runtime.processes import Processes

KIND_COLORS = {"mamba": "cyan", "attention": "magenta", "mlp": "yellow"}
BAR_COLUMNS = 10


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How much to measure, and with what."""

    samples: int
    channel_samples: int
    sequence_length: int
    seed: int
    dtype: str
    device: str
    device_memory_bytes: int | None

    def __post_init__(self) -> None:
        if min(self.samples, self.channel_samples) < 1 or self.sequence_length < 2:
            raise MinipuzzleError(
                f"{self.samples} samples ({self.channel_samples} for channels) of {self.sequence_length} tokens "
                "measure nothing",
                "give --samples and --channel-samples of at least 1 and --sequence-length of at least 2",
            )


@click.command()
@model_argument()
@data_option()
@click.option("--samples", type=COUNT, default=128, help="Calibration samples for layers.", show_default=True)
@click.option(
    "--channel-samples",
    type=COUNT,
    default=None,
    help="Calibration samples for channels and heads (published: 1024). Default: those for layers.",
)
@click.option("--sequence-length", type=COUNT, default=512, help="Tokens a sample.", show_default=True)
@click.option("--seed", type=int, default=0, help="Seed of the sampling.", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES.names()),
    default="float32",
    help="Precision of the computation; bfloat16 is much faster on GPUs and loses digits of small scores.",
    show_default=True,
)
@click.option("--layers", default=None, help="Layers to leave out, e.g. 0-5,9,attention. Default: each.")
@click.option(
    "--variants",
    multiple=True,
    metavar="AXIS=WIDTHS",
    help="Also score each layer at smaller widths, e.g. ffn=75%,50%: what a per-layer search needs. Repeatable.",
)
@click.option(
    "--iterative",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Remove the layer with the lowest score and score the others again, N times.",
)
@click.option(
    "--remove-by",
    type=click.Choice(LAYER_METRICS.names()),
    default="mse",
    help="Score by which --iterative removes.",
    show_default=True,
)
@device_option
@click.option(
    "--device-memory",
    default=None,
    help="Memory to use, e.g. 16GiB, for weights and hidden states together; where it does not hold the whole model, "
    "one layer at a time is read. Default: most of what is free.",
)
@click.option("--plot", type=FOLDER_OR_FILE, default=None, help="Also draw the layer scores into a .png, .svg or .pdf.")
@out_option("score file (.safetensors)")
@dry_run_option
@json_option
def score(
    model: Path,
    data: tuple[Path, ...],
    channel_samples: int | None,
    device: str | None,
    device_memory: str | None,
    dry_run: bool,
    layers: str | None,
    variants: tuple[str, ...],
    iterative: int,
    remove_by: str,
    plot: Path | None,
    out: Path,
    as_json: bool,
    **measuring: Any,
) -> None:
    """Measure what the model loses without each layer, channel and head.

    The score file serves any number of `minipuzzle search` and `minipuzzle prune` runs on the same model. A layer
    scores by the change of the LM head's input when it is skipped; all metrics are measured in one pass. An
    interrupted run continues when the same command is given again. `torchrun --nproc-per-node N -m minipuzzle score
    ...` shares the samples among N processes, on a GPU each where there are any.

    With --iterative N a removed layer keeps the score at which it was removed, and the others have those of the last
    round; all are distances to the whole model.
    """
    from importance.alterations import LayerRequest, parse_layers, parse_widths
    from minipuzzle.files.checkpoint import Checkpoint
    from minipuzzle.runtime.processes import joined_processes
    from minipuzzle.show.score_plot import check_plot_path

    settings = ScoreSettings(
        channel_samples=measuring["samples"] if channel_samples is None else channel_samples,
        device=default_device(device),
        device_memory_bytes=None if device_memory is None else parse_bytes(device_memory),
        **measuring,
    )
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain_weights()
    source = checkpoint.architecture
    request = LayerRequest(
        layers=None if layers is None else parse_layers(layers, source),
        widths=parse_widths(variants, source),
        removals=iterative,
        metric=remove_by,
    )
    request.candidates(source)
    if plot is not None:
        check_plot_path(plot)
    with joined_processes(settings.device) as processes:
        if processes.is_first:
            check_target_file(out)
        token_ids = _sample(checkpoint, data, settings)
        if dry_run:
            if processes.is_first:
                _print_work(checkpoint, settings, request, processes, as_json)
            return
        scores = _measure(checkpoint, token_ids, settings, request, processes, out, as_json)
        if not processes.is_first:
            return
        provenance = {"data_fingerprint": fingerprint_files(list(data)), "seed": str(settings.seed)}
        scores = replace(scores, metadata={**scores.metadata, **provenance})
        _write(checkpoint, scores, out, plot)
    if as_json:
        echo_json({"out": str(out), **_summary(checkpoint, scores)})
        return
    _print_scores(checkpoint, scores)
    click.echo(f"written to {out}\nnext: minipuzzle search {model} --scores {out} --memory ...")


def _measure(
    checkpoint: Checkpoint,
    token_ids: torch.Tensor,
    settings: ScoreSettings,
    request: LayerRequest,
    processes: Processes,
    out: Path,
    quiet: bool,
) -> Scores:
    from importance.measure import measure

    return measure(
        checkpoint,
        token_ids,
        request=request,
        layer_samples=settings.samples,
        channel_samples=settings.channel_samples,
        device=processes.device(settings.device),
        dtype=settings.dtype,
        device_memory_bytes=settings.device_memory_bytes,
        partial_file=out.with_name(f"{out.name}.partial-sums"),
        processes=processes,
        quiet=quiet,
    )


def _write(checkpoint: Checkpoint, scores: Scores, out: Path, plot: Path | None) -> None:
    from minipuzzle.cut.scores import write_scores
    from minipuzzle.show.score_plot import draw_scores

    with output_file(out) as path:
        write_scores(scores, path)
    if plot is not None:
        draw_scores(checkpoint.architecture, scores, plot)


def _sample(checkpoint: Checkpoint, data: tuple[Path, ...], settings: ScoreSettings) -> torch.Tensor:
    """Windows of tokens in random order, so that the first few are a fair sample of them."""
    import torch

    from minipuzzle.data.documents import read_documents
    from minipuzzle.data.windows import sample_windows
    from minipuzzle.runtime.models import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.folder)
    token_ids = sample_windows(
        tokenizer,
        read_documents(data, tokenizer),
        num_samples=max(settings.samples, settings.channel_samples),
        sequence_length=settings.sequence_length,
        seed=settings.seed,
    )
    return token_ids[torch.randperm(len(token_ids), generator=torch.Generator().manual_seed(settings.seed))]


def _print_work(
    checkpoint: Checkpoint, settings: ScoreSettings, request: LayerRequest, processes: Processes, as_json: bool
) -> None:
    from importance.work import open_stack, predict_work
    from minipuzzle.runtime.mamba_scan import scan_path

    stack = open_stack(
        checkpoint,
        request=request,
        sequence_length=settings.sequence_length,
        device=processes.device(settings.device),
        dtype=settings.dtype,
        device_memory_bytes=settings.device_memory_bytes,
    )
    work = predict_work(
        stack,
        request=request,
        processes=processes,
        layer_samples=settings.samples,
        channel_samples=settings.channel_samples,
        sequence_length=settings.sequence_length,
    )
    if as_json:
        facts = {"memory_limit_bytes": stack.memory_bytes, "processes": processes.world_size}
        echo_json({**asdict(work), **facts, "scan": scan_path(stack.device)})
        return
    where = "all weights stay in memory" if work.weights_stay_in_memory else "one layer in memory at a time"
    lines = {
        "layer applications": f"{'at most ' if request.removals else ''}{work.layer_applications:,}",
        "slices": f"{work.layer_slices} for layers, {work.channel_slices} for channels",
        "weights to read": f"{format_gib(work.weight_bytes_read)}, {where}",
        "memory, estimated": f"{format_gib(work.peak_bytes)} of {format_gib(stack.memory_bytes)}",
        "Mamba-2 scan": scan_path(stack.device),
    }
    if processes.world_size > 1:
        lines["processes"] = f"{processes.world_size}; the figures are those of one"
    for name, value in lines.items():
        click.echo(f"{name:<20} {value}")
    click.echo("dry run: nothing was written")


def _summary(checkpoint: Checkpoint, scores: Scores) -> dict[str, Any]:
    metadata = scores.metadata
    return {
        "kinds": [layer.kind for layer in checkpoint.architecture.layers],
        # null: not among --layers
        "layer": {name: [None if v != v else v for v in values.tolist()] for name, values in scores.layer.items()},
        "variants": {name: values.tolist() for name, values in scores.variants.items()},
        "removed_layers": json.loads(metadata["removed_layers"]),
        "units": {name: values.size for name, values in scores.units.items()},
        "samples": int(metadata["samples"]),
        "channel_samples": int(metadata["channel_samples"]),
        "sequence_length": int(metadata["sequence_length"]),
        "model_fingerprint": metadata["model_fingerprint"],
        "token_ids_sha256": metadata["token_ids_sha256"],
        "scan": metadata["scan"],
        "processes": int(metadata["processes"]),
        "counters": json.loads(metadata["counters"]),
    }


def _print_scores(checkpoint: Checkpoint, scores: Scores, metric: str = "mse") -> None:
    """A column for each kind of layer: index, bar, score; the lowest score of each kind is marked."""
    from rich.console import Console
    from rich.table import Table

    architecture, values = checkpoint.architecture, scores.layer[metric]
    lengths = _bar_lengths(values.tolist())
    grid = Table.grid(padding=(0, 2))
    columns = []
    for kind in architecture.layer_counts:
        indices = [idx for idx in architecture.layer_indices(kind) if values[idx] == values[idx]]
        if not indices:
            continue
        lowest = min(indices, key=lambda idx: float(values[idx]))
        color = KIND_COLORS.get(kind, "white")
        lines = [f"    [bold {color}]{kind}[/]"]
        for idx in indices:
            bar = f"[{color}]{'█' * lengths[idx]:<{BAR_COLUMNS}}[/]"
            lines.append(f"{idx:>3} {bar} {values[idx]:.2e}{' ◂' if idx == lowest else ''}")
        columns.append("\n".join(lines))
    grid.add_row(*columns)
    counters = json.loads(scores.metadata["counters"])
    console = Console(highlight=False)
    console.print(f"[bold]layer scores[/] ({metric} of the LM head's input; logarithmic; ◂ lowest of its kind)")
    console.print(grid)
    removed = json.loads(scores.metadata["removed_layers"])
    if removed:
        console.print(f"removed one after another: {', '.join(map(str, removed))}")
    console.print(
        f"{len(values)} layers, {sum(v.size for v in scores.units.values()):,} unit scores; "
        f"{counters['layer_applications']:,} layer applications, {format_gib(counters['weight_bytes_read'])} read"
    )
    if "mamba" in architecture.layer_counts:
        console.print(f"Mamba-2 scan: {scores.metadata['scan']}")


def _bar_lengths(values: list[float]) -> list[int]:
    """Bars from 1 for the lowest to BAR_COLUMNS for the highest, on a logarithmic scale; nothing for zero."""
    from math import log

    logs = [log(value) for value in values if value > 0]
    if not logs:
        return [0] * len(values)
    lowest, span = min(logs), max(max(logs) - min(logs), 1e-9)
    return [1 + round((BAR_COLUMNS - 1) * (log(value) - lowest) / span) if value > 0 else 0 for value in values]
