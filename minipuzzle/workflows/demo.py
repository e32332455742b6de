"""The demo as a whole: a small trained hybrid is measured, cut, compensated, distilled, exported, and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from distill.run import DistillRequest, PreparedRun, prepare_run
from distill.settings import DistillSettings, OnStep, ignore_step
from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.cut.plan import OBS, PLAN_FILE
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import evaluation_windows, sample_windows
from minipuzzle.export.reader import load_any_model
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.records import complete_record
from minipuzzle.quality.evaluate import combine, documents_within, evaluate
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import load_tokenizer
from minipuzzle.search.request import SearchRequest
from minipuzzle.show.demo import Stage
from minipuzzle.show.page.page import write_page
from minipuzzle.workflows.choosing.compare import Choice
from minipuzzle.workflows.distill import finish_distill
from minipuzzle.workflows.export import ExportRequest, export_checkpoint
from minipuzzle.workflows.prune import PruneRequest, prune_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_hybrid"
DEPLOYMENT = Deployment(context_tokens=4096)
FP8_DEPLOYMENT = Deployment(context_tokens=4096, weights="fp8")
EVALUATION_WINDOW_TOKENS = 512
EVALUATION_TOKENS = 16_000  # of each domain


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


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How small the model gets, and on how much text: ``tokens`` of distillation, ``samples`` of 256 tokens."""

    memory: str = "75%"
    tokens: int = 200_000
    samples: int = 64


@dataclass(frozen=True, kw_only=True)
class Audience:
    """Who watches a demo: is told each step, what was cut, and how distillation goes. Nobody, by default."""

    say: Callable[[str], None] = lambda _step: None
    see_cut: Callable[[Choice], None] = lambda _choice: None
    watch: Callable[[PreparedRun], AbstractContextManager[OnStep]] = lambda _prepared: nullcontext(ignore_step)


def run_demo(
    teacher: Checkpoint,
    folder: Path,
    settings: DemoSettings,
    compute: Compute = Compute(),
    audience: Audience = Audience(),
) -> list[Stage]:
    """Prune, compensate, distil and export into subfolders of ``folder``; steps that an interrupted run finished are
    kept."""
    texts = DemoTexts()
    steps: dict[str, tuple[str, Callable[[Path], object]]] = {
        "pruned": (
            "measuring, searching and cutting",
            lambda out: audience.see_cut(prune_demo(teacher, out, texts, settings, compute)),
        ),
        "compensated": (
            "compensating",
            lambda out: audience.see_cut(_compensate(teacher, folder / "pruned" / PLAN_FILE, out, texts, compute)),
        ),
        "distilled": (
            "distilling",
            lambda out: _distill(
                Checkpoint.open(folder / "compensated"), teacher, out, texts, settings.tokens, audience
            ),
        ),
        "fp8": ("exporting to FP8", lambda out: _export(Checkpoint.open(folder / "distilled"), out, texts)),
    }
    for name, (description, act) in steps.items():
        if not (folder / name).is_dir():
            audience.say(description)
            act(folder / name)
    audience.say("evaluating on held-out text")
    names = {"pruned": "pruned", "compensated": "compensated", "distilled": "distilled", "FP8": "fp8"}
    models = {"teacher": teacher, **{label: Checkpoint.open(folder / name) for label, name in names.items()}}
    stages = _evaluate(models, teacher, texts, compute)
    quality = {stage.name: {name: of.to_json() for name, of in stage.by_domain.items()} for stage in stages}
    complete_record(folder, {"quality": quality}, device=compute.device)
    write_page(folder, before=[folder / name for name in steps])
    return stages


def prune_demo(teacher: Checkpoint, out: Path, texts: DemoTexts, settings: DemoSettings, compute: Compute) -> Choice:
    """Measure, search and cut as the demo does; what stays keeps its weights."""
    request = PruneRequest(
        checkpoint=teacher,
        target=SearchRequest(memory=settings.memory),
        deployment=DEPLOYMENT,
        data=(texts.calibration,),
        samples=settings.samples,
        sequence_length=256,
        compensate=False,
    )
    return prune_checkpoint(request, compute, out=out)


def _compensate(teacher: Checkpoint, plan: Path, out: Path, texts: DemoTexts, compute: Compute) -> Choice:
    """The same cut again, mended: what `prune` does by itself unless it is asked not to."""
    request = PruneRequest(
        checkpoint=teacher,
        target=None,
        deployment=DEPLOYMENT,
        plan=plan,
        data=(texts.calibration,),
        sequence_length=256,
        criterion=OBS,
    )
    return prune_checkpoint(request, compute, out=out)


def demo_distillation(tokens: int, *, seed: int = 0, evaluations: int = 0) -> DistillSettings:
    """The demo's distillation, evaluated so many times on the way."""
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


def _distill(
    student: Checkpoint, teacher: Checkpoint, out: Path, texts: DemoTexts, tokens: int, audience: Audience
) -> None:
    request = DistillRequest(
        student=student,
        teacher=teacher,
        data=(texts.distillation,),
        validation=(texts.validation,),
        settings=demo_distillation(tokens),
        out=out,
    )
    prepared = prepare_run(request)
    with audience.watch(prepared) as on_step:
        finish_distill(prepared, None, on_step)


def _export(checkpoint: Checkpoint, out: Path, texts: DemoTexts) -> None:
    documents = read_documents([texts.calibration])
    tokenizer = load_tokenizer(checkpoint.folder)
    token_ids = sample_windows(tokenizer, documents, num_samples=64, sequence_length=256)
    export_checkpoint(checkpoint, out, ExportRequest(scheme="fp8"), calibration_token_ids=token_ids)


def _evaluate(models: Mapping[str, Checkpoint], teacher: Checkpoint, texts: DemoTexts, compute: Compute) -> list[Stage]:
    tokenizer = load_tokenizer(teacher.tokenizer_folder)
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
