"""``minipuzzle demo``: the whole path on a small trained hybrid, from measuring to FP8, with one table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minipuzzle.architecture.memory import Deployment
from minipuzzle.commands.options.shared import (
    COUNT,
    FOLDER_OR_FILE,
    dry_run_option,
    echo_json,
    json_option,
    out_option,
    overwrite_option,
)
from minipuzzle.cut.plan import OBS, PLAN_FILE
from minipuzzle.errors import MinipuzzleError
from minipuzzle.progress import silent
from minipuzzle.runtime.compute import Compute, peak_memory_bytes
from minipuzzle.show.bars import drawn_bar

if TYPE_CHECKING:
    from distill.settings import DistillSettings
    from minipuzzle.files.checkpoint import Checkpoint
    from minipuzzle.show.demo import Stage

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_hybrid"
DEPLOYMENT = Deployment(context_tokens=4096)
FP8_DEPLOYMENT = Deployment(context_tokens=4096, weights="fp8")
EVALUATION_WINDOW_TOKENS = 512
EVALUATION_TOKENS = 16_000  # of each domain
PICTURE = "demo.png"


@dataclass(frozen=True, kw_only=True)
class DemoTexts:
    """The embedded text. Held-out documents occur in none of the others, nor in the model's training."""

    calibration: Path = EXAMPLE / "text" / "calibration.jsonl"
    distillation: Path = EXAMPLE / "text" / "distillation.jsonl"
    validation: Path = EXAMPLE / "text" / "validation.jsonl"
    speeches: Path = EXAMPLE / "text" / "heldout_speeches.jsonl"
    code: Path = EXAMPLE / "text" / "heldout_code.jsonl"

    @property
    def domains(self) -> Mapping[str, Path]:
        """Held-out text by domain."""
        return {"speeches": self.speeches, "code": self.code}


@click.command(short_help="Run the whole path on a small trained hybrid.")
@click.option("--memory", default="75%", show_default=True, help="Budget of the pruned model.")
@click.option("--tokens", type=COUNT, default=200_000, show_default=True, help="Tokens of distillation.")
@click.option("--samples", type=COUNT, default=64, show_default=True, help="Calibration samples of 256 tokens.")
@click.option("--model", type=FOLDER_OR_FILE, default=EXAMPLE / "model", help="Teacher; default: the embedded model.")
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
    from minipuzzle.show.demo import draw_stages, print_stages

    if not model.is_dir():
        raise MinipuzzleError(f"the embedded model is not at {model}", "run the demo from a clone of the repository")
    teacher = Checkpoint.open(model)
    teacher.require_plain_weights()
    check_target_folder(out, overwrite=overwrite)
    settings = {"memory": memory, "tokens": tokens, "samples": samples}
    if dry_run:
        _print_dry_run(teacher, settings, as_json)
        return
    compute = Compute(progress=silent if as_json else drawn_bar)
    start = time.perf_counter()
    provenance = {"command": "demo", "teacher_fingerprint": teacher.fingerprint, "settings": settings}
    with output_folder(out, provenance, overwrite=overwrite) as folder:
        stages = run_demo(teacher, folder, memory=memory, tokens=tokens, samples=samples, compute=compute)
        draw_stages(stages, folder / PICTURE)
    seconds = time.perf_counter() - start
    peak_bytes = peak_memory_bytes(compute.torch_device)
    if as_json:
        stages_json = [stage.to_json() for stage in stages]
        echo_json({"seconds": seconds, "peak_rss_bytes": peak_bytes, "stages": stages_json})
        return
    print_stages(stages, DEPLOYMENT.describe() + " (FP8: weights fp8)")
    click.echo(f"{seconds:.0f} s, peak memory {peak_bytes / 2**30:.2f} GiB; picture: {out / PICTURE}")


def run_demo(
    teacher: Checkpoint, folder: Path, *, memory: str, tokens: int, samples: int, compute: Compute
) -> list[Stage]:
    """Prune, compensate, distil and export into subfolders of ``folder``; steps that an interrupted run finished are
    kept."""
    from minipuzzle.files.checkpoint import Checkpoint

    texts, quiet = DemoTexts(), compute.progress is silent
    if not (folder / "pruned").is_dir():
        _say("measuring, searching and cutting", quiet)
        prune_demo(teacher, folder / "pruned", texts, memory, samples, compute)
    pruned = Checkpoint.open(folder / "pruned")
    if not (folder / "compensated").is_dir():
        _say("compensating", quiet)
        _compensate(teacher, pruned.folder / PLAN_FILE, folder / "compensated", texts, compute)
    compensated = Checkpoint.open(folder / "compensated")
    if not (folder / "distilled").is_dir():
        _say("distilling", quiet)
        _distill(compensated, teacher, folder / "distilled", texts, tokens, quiet)
    distilled = Checkpoint.open(folder / "distilled")
    if not (folder / "fp8").is_dir():
        _say("exporting to FP8", quiet)
        _export(distilled, folder / "fp8", texts)
    fp8 = Checkpoint.open(folder / "fp8")
    _say("evaluating on held-out text", quiet)
    cuts = {"pruned": pruned, "compensated": compensated, "distilled": distilled, "FP8": fp8}
    models = {"teacher": teacher, **cuts}
    return _evaluate(models, teacher, texts, compute)


def _say(step: str, quiet: bool) -> None:
    if not quiet:
        click.echo(click.style(f"» {step}", bold=True), err=True)


def prune_demo(teacher: Checkpoint, out: Path, texts: DemoTexts, memory: str, samples: int, compute: Compute) -> None:
    """Measure, search and cut as the demo does; what stays keeps its weights."""
    from minipuzzle.search.request import SearchRequest
    from minipuzzle.show.report import print_plan
    from minipuzzle.workflows.prune import PruneRequest, prune_checkpoint

    request = PruneRequest(
        checkpoint=teacher,
        target=SearchRequest(memory=memory),
        deployment=DEPLOYMENT,
        data=(texts.calibration,),
        samples=samples,
        sequence_length=256,
        compensate=False,
    )
    choice = prune_checkpoint(request, compute, out=out)
    if compute.progress is not silent:
        source = teacher.architecture
        print_plan(source, choice.plan.apply(source), source.layers_besides(choice.plan.kept_layers), DEPLOYMENT)


def _compensate(teacher: Checkpoint, plan: Path, out: Path, texts: DemoTexts, compute: Compute) -> None:
    """The same cut again, mended: what `prune` does by itself unless it is asked not to."""
    from minipuzzle.show.report import print_compensation
    from minipuzzle.workflows.prune import PruneRequest, prune_checkpoint

    request = PruneRequest(
        checkpoint=teacher,
        target=None,
        deployment=DEPLOYMENT,
        plan=plan,
        data=(texts.calibration,),
        sequence_length=256,
        criterion=OBS,
    )
    choice = prune_checkpoint(request, compute, out=out)
    if compute.progress is not silent:
        print_compensation(choice.compensation)


def demo_distillation(tokens: int, *, seed: int = 0, evaluations: int = 0) -> DistillSettings:
    """The demo's distillation, evaluated so many times on the way."""
    from distill.settings import DistillSettings

    # Small steps and softened targets recover most per token in runs this short.
    settings = DistillSettings(
        tokens=tokens,
        sequence_length=256,
        batch_sequences=4,
        micro_batch_sequences=4,
        learning_rate=1e-3,
        temperature=2.0,
        seed=seed,
    )
    return replace(settings, eval_every=max(1, settings.total_steps // evaluations)) if evaluations else settings


def _distill(student: Checkpoint, teacher: Checkpoint, out: Path, texts: DemoTexts, tokens: int, quiet: bool) -> None:
    from distill.run import DistillRequest, prepare_run, run_prepared
    from minipuzzle.show.distill import distill_progress

    request = DistillRequest(
        student=student,
        teacher=teacher,
        data=(texts.distillation,),
        validation=(texts.validation,),
        settings=demo_distillation(tokens),
        out=out,
    )
    prepared = prepare_run(request)
    with distill_progress(prepared, is_quiet=quiet) as on_step:
        run_prepared(prepared, on_step=on_step)


def _export(checkpoint: Checkpoint, out: Path, texts: DemoTexts) -> None:
    from minipuzzle.data.documents import read_documents
    from minipuzzle.data.windows import sample_windows
    from minipuzzle.runtime.models import load_tokenizer
    from minipuzzle.workflows.export import ExportRequest, export_checkpoint

    documents = read_documents([texts.calibration])
    token_ids = sample_windows(load_tokenizer(checkpoint.folder), documents, num_samples=64, sequence_length=256)
    export_checkpoint(checkpoint, out, ExportRequest(scheme="fp8"), calibration_token_ids=token_ids)


def _evaluate(models: Mapping[str, Checkpoint], teacher: Checkpoint, texts: DemoTexts, compute: Compute) -> list[Stage]:
    from minipuzzle.architecture.memory import memory_breakdown
    from minipuzzle.data.documents import read_documents
    from minipuzzle.data.windows import evaluation_windows
    from minipuzzle.export.reader import load_any_model
    from minipuzzle.quality.evaluate import combine, documents_within, evaluate
    from minipuzzle.runtime.models import load_tokenizer
    from minipuzzle.show.demo import Stage

    tokenizer = load_tokenizer(teacher.folder)
    windows = {}
    for domain, path in texts.domains.items():
        documents = documents_within(tokenizer, read_documents([path]), EVALUATION_TOKENS)
        windows[domain] = evaluation_windows(tokenizer, documents, sequence_length=EVALUATION_WINDOW_TOKENS)
    num_windows = sum(len(domain_windows.token_ids) for domain_windows in windows.values())
    reference = load_any_model(teacher)
    stages = []
    with compute.progress("evaluating", num_windows * len(models)) as advance:
        for name, checkpoint in models.items():
            model = load_any_model(checkpoint)
            by_domain = {
                domain: evaluate(model, checkpoint.family, domain_windows, against=reference, advance=advance)
                for domain, domain_windows in windows.items()
            }
            deployment = FP8_DEPLOYMENT if checkpoint.is_quantized else DEPLOYMENT
            stages.append(
                Stage(
                    name=name,
                    architecture=checkpoint.architecture,
                    memory_bytes=memory_breakdown(checkpoint.architecture, deployment).total_bytes,
                    by_domain=by_domain,
                    overall=combine(list(by_domain.values())),
                )
            )
    return stages


def _print_dry_run(teacher: Checkpoint, settings: dict[str, Any], as_json: bool) -> None:
    from minipuzzle.search.request import SearchRequest
    from minipuzzle.workflows.prune import check_feasible

    num_fitting = len(check_feasible(teacher, SearchRequest(memory=settings["memory"]), DEPLOYMENT))
    facts = {"model": str(teacher.folder), "pattern": teacher.architecture.pattern, **settings}
    facts |= {"candidates_that_fit": num_fitting}
    if as_json:
        echo_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):<22} {value}")
    click.echo("dry run: nothing was written")
