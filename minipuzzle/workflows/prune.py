"""Pruning as a whole: scores, candidates, the measured best plan, and the checkpoint folder cut by it."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.race import RaceSettings
from importance.measure import measure
from importance.work import open_stack, predict_work
from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.architecture.model import Architecture
from minipuzzle.architecture.quantities import parse_count
from minipuzzle.cut.budget import MADE_FOR, ServingBudget, budget_of_plan
from minipuzzle.cut.plan import CRITERIA, OBS, Plan, read_plan
from minipuzzle.cut.scores import Scores, read_scores, write_scores
from minipuzzle.cut.vocabulary import recorded
from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import EvaluationWindows, evaluation_windows, wanted_windows, windows_of_tokens
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.files.outputs import check_target_folder, fingerprint_files, output_file, output_folder
from minipuzzle.files.records import complete_record
from minipuzzle.formats.choices import warn_of_terms_not_exported
from minipuzzle.quality.evaluate import documents_within
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import load_tokenizer
from minipuzzle.search.candidates import Candidate
from minipuzzle.search.engine import find_candidates
from minipuzzle.search.request import SearchRequest
from minipuzzle.show.page.facts import SCORES_FILE, cut_facts
from minipuzzle.show.page.page import write_page
from minipuzzle.show.report import plan_summary
from minipuzzle.workflows.choosing.compare import Choice, ChoosingSettings, Problem, compare
from minipuzzle.workflows.choosing.race import CANDIDATES_FILE, FINALISTS_FOLDER, race_finalists
from minipuzzle.workflows.choosing.vocabulary import cut_vocabulary, kept_tokens_of, scores_for
from minipuzzle.workflows.compensation import CutWriter, compensation_windows
from minipuzzle.workflows.settings import DEFAULT_SAMPLES, PruneSettings, named_deployment, paths_of
from minipuzzle.workflows.verbs import Model, open_plain, verb_with

UNFINISHED_SCORES_FILE = "scores.unfinished.json"
PROVENANCE_FIELDS = ("samples", "sequence_length", "seed", "compensate", "criterion")
VALIDATION_TOKENS = 1_000_000  # at most, of each file; as published


@dataclass(frozen=True, kw_only=True)
class PruneRequest:
    """What to cut and how to find out: a plan, or a target with scores or with text to measure on.

    ``validation``: text to compare candidates on; default: the tokens of the scores. ``race_data``: text that
    finalists train on; default: ``data``. ``compensate``: mend the cut on ``data`` or on the tokens of the scores.
    ``criterion``: one of CRITERIA; default: OBS for a cut that is mended, unless a given plan says which units stay.
    """

    checkpoint: Checkpoint
    target: SearchRequest | None
    deployment: Deployment
    plan: Plan | Path | None = None
    scores: Scores | Path | None = None
    data: tuple[Path, ...] = ()
    validation: tuple[Path, ...] = ()
    race_data: tuple[Path, ...] = ()
    samples: int | None = None
    sequence_length: int = 512
    seed: int = 0
    compensate: bool = True
    criterion: str | None = None
    choosing: ChoosingSettings = field(default_factory=ChoosingSettings)

    def __post_init__(self) -> None:
        if self.plan is not None:
            if self.target is not None or self.scores is not None:
                raise MinipuzzleError("‹plan› already says what to cut", "drop ‹scores›, ‹memory›, ‹keep› and ‹width›")
        elif self.target is None:
            raise MinipuzzleError("nothing says how small the model should be", "give ‹memory›, ‹keep› or ‹width›")
        elif self.scores is None and not self.data:
            raise MinipuzzleError("there is nothing to measure on", "give ‹data›, or ‹scores› of an earlier run")
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise MinipuzzleError(f"there is no criterion {self.criterion!r}", f"choose one of {', '.join(CRITERIA)}")
        if self.criterion == OBS and not self.compensate:
            raise MinipuzzleError("OBS chooses units by what a refit makes up", "drop ‹criterion› or ‹no_compensate›")
        if self.choosing.race is not None and not self.training_data:
            raise MinipuzzleError("finalists have nothing to train on", "give ‹race_data› or ‹data›")

    @property
    def training_data(self) -> tuple[Path, ...]:
        """Text for the race."""
        return self.race_data or self.data

    @property
    def files(self) -> list[Path]:
        """What is read beside the checkpoint."""
        texts = (*self.data, *self.validation, *self.race_data)
        return [path for path in (self.plan, self.scores, *texts) if isinstance(path, Path)]

    @cached_property
    def made_for(self) -> ServingBudget:
        """What the cut has to fit: by the plan's own figures, or as it is asked for now."""
        plan = read_plan(self.plan) if isinstance(self.plan, Path) else self.plan
        if plan is not None and (of_plan := budget_of_plan(plan)) is not None:
            return of_plan
        budget_bytes = None
        if self.target is not None and self.target.memory is not None:
            source_bytes = memory_breakdown(self.checkpoint.architecture, self.deployment).total_bytes
            budget_bytes = self.target.budget_bytes(source_bytes)
        return ServingBudget(deployment=self.deployment, budget_bytes=budget_bytes)

    def provenance(self, compute: Compute) -> dict[str, Any]:
        """What the output remembers: its teacher, for `distill`, and what was asked."""
        given = [str(value.to_json()) for value in (self.plan, self.scores) if isinstance(value, Plan | Scores)]
        return {
            "command": "prune",
            "teacher": self.checkpoint.name,
            "teacher_fingerprint": self.checkpoint.origin.fingerprint,
            MADE_FOR: asdict(self.made_for),
            "settings": {
                "target": asdict(self.target) if self.target else None,
                **{name: getattr(self, name) for name in PROVENANCE_FIELDS},
                **asdict(self.choosing),
                "dtype": compute.dtype,
                "inputs_fingerprint": fingerprint_files(self.files),
                **kept_tokens_of(self.checkpoint),
                **({"given_fingerprint": sha256("".join(given).encode()).hexdigest()[:16]} if given else {}),
            },
        }


def check_feasible(checkpoint: Checkpoint, target: SearchRequest, deployment: Deployment) -> list[Candidate]:
    """Everything that fits, whatever the scores will be: known from config.json, before any weight is read.

    Raises: InfeasibleBudgetError, or MinipuzzleError for impossible targets.
    """
    no_scores = np.zeros(len(checkpoint.architecture.layers))
    return find_candidates(checkpoint.architecture, Scores(layer={target.metric: no_scores}), target, deployment)


def prune_checkpoint(
    request: PruneRequest, compute: Compute = Compute(), *, out: Path, overwrite: bool = False
) -> Choice:
    """Find the best plan and write the cut checkpoint to ``out``; with a race, the winner with its trained weights.

    Raises: MinipuzzleError for bad input, InfeasibleBudgetError, InputChangedError for another interrupted run.
    """
    checkpoint = request.checkpoint
    check_target_folder(out, overwrite=overwrite, inputs=(checkpoint.folder, *request.files))
    candidates = check_feasible(checkpoint, request.target, request.deployment) if request.target is not None else []
    _check_memory(request, candidates, compute)
    # Read before the output folder is begun, so that a broken file leaves no trace.
    tokenizer = load_tokenizer(checkpoint.tokenizer_folder) if request.data or request.validation else None
    documents = read_documents(request.data, tokenizer) if request.data else []
    validation = read_documents(request.validation, tokenizer) if request.validation else []
    plan = read_plan(request.plan) if isinstance(request.plan, Path) else request.plan
    if plan is not None:
        plan.check_against(checkpoint.architecture, checkpoint.fingerprint)
    scores = read_scores(request.scores) if isinstance(request.scores, Path) else request.scores
    with output_folder(out, request.provenance(compute), overwrite=overwrite) as folder:
        if plan is not None:
            choice = Choice(plan=plan)
        else:
            scores = scores or measured_scores(request, documents, compute, folder)
            choice = _choose(request, scores, validation, folder, cut_writer(request, documents, scores, compute))
        if not choice.is_trained:
            found = cut_writer(request, documents, scores, compute).write(choice.plan, folder)
            compensation = found.to_json() if found.num_tokens else {}
            choice = replace(choice, plan=recorded(checkpoint, found.plan), compensation=compensation)
        if choice.table:
            write_json(folder / CANDIDATES_FILE, choice.table)
        shutil.rmtree(folder / FINALISTS_FOLDER, ignore_errors=True)
        results = cut_facts(checkpoint.architecture, choice.plan, request.deployment, scores)
        places = {} if checkpoint.hub_id else {"teacher": str(checkpoint.folder.resolve())}
        complete_record(folder, results, before=(checkpoint.folder,), device=compute.device, places=places)
        write_page(folder)
    return choice


@dataclass(frozen=True, kw_only=True)
class PrunedModel:
    """A cut checkpoint folder, and what it was chosen by: the plan, and the table of all that was compared."""

    out: Path
    source: Architecture = field(repr=False)
    deployment: Deployment
    choice: Choice = field(repr=False)

    @property
    def plan(self) -> Plan:
        """What was cut."""
        return self.choice.plan

    @property
    def checkpoint(self) -> Checkpoint:
        """What was written."""
        return Checkpoint.open(self.out)

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        summary = plan_summary(self.source, self.plan, self.deployment)
        compensation = {"compensation": self.choice.compensation} if self.choice.compensation else {}
        return {"out": str(self.out), **summary, **self.choice.table, **compensation}


def prune_request(model: Model, settings: PruneSettings, sweep: str | None = None) -> PruneRequest:
    """What settings ask for, with everything opened; ``sweep``: budgets that stand in the place of one.

    Raises: MinipuzzleError for what does not go together.
    """
    named = named_deployment(settings.deployment)
    checkpoint, target, plan = cut_vocabulary(open_plain(model), settings, sweep)
    keeps_rest = plan is not None and settings.plan is None  # only the vocabulary is cut
    tokens, race = settings.race_tokens, None
    if tokens is not None:
        race = RaceSettings(
            tokens=parse_count(tokens) if isinstance(tokens, str) else tokens,
            halving=settings.race_halving,
            learning_rate=settings.race_learning_rate,
            batch_sequences=settings.race_batch,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
        )
    return PruneRequest(
        checkpoint=checkpoint,
        target=target,
        deployment=named.deployment,
        plan=plan,
        scores=None if keeps_rest else scores_for(checkpoint, settings.scores),
        data=paths_of(settings.data),
        validation=paths_of(settings.validation),
        race_data=paths_of(settings.race_data),
        samples=settings.samples,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        compensate=not settings.no_compensate and not keeps_rest,
        criterion=settings.criterion,
        choosing=ChoosingSettings(
            num_candidates=settings.num_candidates,
            rank_by=settings.rank_by,
            refine=settings.refine,
            num_compensated=settings.rank_compensated,
            num_finalists=settings.num_finalists,
            race=race,
        ),
    )


def run_prune(model: Model, settings: PruneSettings) -> PrunedModel:
    """Cut a model by a plan, or to a target: measure, search, measure the best candidates, cut.

    Raises: as ``prune_checkpoint``.
    """
    request, out = prune_request(model, settings), Path(settings.out)
    warn_of_terms_not_exported(request.checkpoint.architecture, request.made_for.deployment)
    choice = prune_checkpoint(request, settings.compute, out=out, overwrite=settings.overwrite)
    source = request.checkpoint.origin.architecture
    return PrunedModel(out=out, source=source, deployment=request.deployment, choice=choice)


def measured_scores(request: PruneRequest, documents: list[str], compute: Compute, folder: Path) -> Scores:
    """Scores measured by an interrupted run of the same command, or measured now and kept in ``folder``."""
    kept = folder / SCORES_FILE
    if kept.is_file():
        return read_scores(kept)
    token_ids = _calibration_windows(request, documents)
    scores = measure(request.checkpoint, token_ids, compute, partial_file=folder / UNFINISHED_SCORES_FILE)
    kept.parent.mkdir(exist_ok=True)
    with output_file(kept) as path:
        write_scores(scores, path)
    return scores


def _calibration_windows(request: PruneRequest, documents: list[str]) -> torch.Tensor:
    return wanted_windows(
        load_tokenizer(request.checkpoint.tokenizer_folder),
        documents,
        samples=request.samples,
        default_samples=DEFAULT_SAMPLES,
        sequence_length=request.sequence_length,
        seed=request.seed,
    )


def cut_writer(request: PruneRequest, documents: list[str], scores: Scores | None, compute: Compute) -> CutWriter:
    """How this run writes cuts: mended on its data, or on the tokens of the scores, unless asked not to."""
    checkpoint, token_ids_BT = request.checkpoint, None
    if request.compensate and documents:
        token_ids_BT = compensation_windows(checkpoint, documents, request.sequence_length, request.seed)
    elif request.compensate and scores is not None and scores.token_ids is not None:
        token_ids_BT = torch.from_numpy(scores.token_ids).long()
    may_choose = request.criterion == OBS or (request.criterion is None and request.plan is None)
    return CutWriter(checkpoint=checkpoint, token_ids=token_ids_BT, compute=compute, may_choose=may_choose)


def _choose(request: PruneRequest, scores: Scores, validation: list[str], folder: Path, writer: CutWriter) -> Choice:
    """The best candidate: predicted if there is nothing to measure on, else measured, or the winner of a race."""
    assert request.target is not None
    checkpoint, choosing = request.checkpoint, request.choosing
    scores.check_against(checkpoint.architecture, checkpoint.fingerprint)
    scores = scores.ranking_experts_by(request.target.expert_criterion)
    problem = Problem(checkpoint=checkpoint, scores=scores, target=request.target, deployment=request.deployment)
    windows = comparison_windows(request, scores, validation)
    if choosing.race is not None:
        if windows is None:
            raise MinipuzzleError("a race needs text to measure finalists on", "give ‹validation›")
        return race_finalists(problem, choosing, request.training_data, windows, folder, writer)
    if windows is None or (choosing.num_candidates == 1 and not choosing.refine):
        return Choice(plan=problem.predicted_plans(1)[0])
    found = compare(problem, windows, choosing, writer.compute, writer.measure_on(windows))
    return Choice(plan=found.ranked[0].plan, table=found.to_json())


def comparison_windows(request: PruneRequest, scores: Scores, validation: list[str]) -> EvaluationWindows | None:
    """The validation text, or the tokens of the scores; None if there is neither."""
    if validation:
        tokenizer = load_tokenizer(request.checkpoint.tokenizer_folder)
        texts = documents_within(tokenizer, validation, VALIDATION_TOKENS)
        return evaluation_windows(tokenizer, texts, sequence_length=request.sequence_length)
    if scores.token_ids is None:
        return None
    token_ids = torch.from_numpy(scores.token_ids).long()
    return windows_of_tokens(load_tokenizer(request.checkpoint.tokenizer_folder), token_ids)


def planned_work(request: PruneRequest, compute: Compute) -> dict[str, int]:
    """What a run would do, after checking all that can be checked without weights.

    Units: as the names say; ``disk_at_most_bytes`` is the weights of the largest candidate.
    """
    checkpoint = request.checkpoint
    source = checkpoint.architecture
    facts = {"source_memory_bytes": memory_breakdown(source, request.deployment).total_bytes}
    num_kept_parameters, candidates, scores = source.num_parameters, list[Candidate](), None
    if request.plan is not None:
        plan = read_plan(request.plan) if isinstance(request.plan, Path) else request.plan
        plan.check_against(source)
        num_kept_parameters = plan.apply(source).num_parameters
    if request.target is not None:
        candidates = check_feasible(checkpoint, request.target, request.deployment)
        num_kept_parameters = max(candidate.num_parameters for candidate in candidates)
        facts |= {
            "budget_bytes": request.target.budget_bytes(facts["source_memory_bytes"]),
            "candidates_that_fit": len(candidates),
            "candidates_to_measure": min(len(candidates), request.choosing.num_candidates),
        }
    if (race := request.choosing.race) is not None:
        facts |= {"finalists": request.choosing.num_finalists, "race_tokens_a_finalist": race.tokens}
    if request.scores is not None:
        scores = read_scores(request.scores) if isinstance(request.scores, Path) else request.scores
        scores.check_against(source, checkpoint.fingerprint)
    documents = read_documents(request.data, load_tokenizer(checkpoint.tokenizer_folder)) if request.data else []
    if documents and scores is None:
        facts |= {"documents": len(documents), "calibration_tokens": _calibration_windows(request, documents).numel()}
    mending = cut_writer(request, documents, scores, compute).planned_work()
    if mending and (measured := facts.get("candidates_to_measure", 0)) > 1:
        facts["candidates_to_compensate"] = min(measured, request.choosing.num_compensated)
    facts |= mending
    _check_memory(request, candidates, compute)
    facts["disk_at_most_bytes"] = checkpoint.weight_bytes * num_kept_parameters // source.num_parameters
    num_samples = facts.get("calibration_tokens", 0) // request.sequence_length
    return facts | (_measuring_work(request, num_samples, compute) if num_samples else {})


def _check_memory(request: PruneRequest, candidates: list[Candidate], compute: Compute) -> None:
    """Refuse before any work what the memory is too small for: measuring, or a race of even the smallest candidates.

    Raises: MinipuzzleError with the amount that is needed.
    """
    if request.scores is None and request.data:
        open_stack(request.checkpoint, compute, sequence_length=request.sequence_length)
    if (race := request.choosing.race) is not None:
        smallest = min(candidates, key=lambda candidate: candidate.num_parameters)
        race.require_room(smallest.architecture, request.checkpoint.architecture, compute)


def _measuring_work(request: PruneRequest, samples: int, compute: Compute) -> dict[str, int]:
    length = request.sequence_length
    stack = open_stack(request.checkpoint, compute, sequence_length=length)
    work = predict_work(stack, layer_samples=samples, channel_samples=samples, sequence_length=length)
    return {
        "layer_applications": work.layer_applications,
        "weights_to_read_bytes": work.weight_bytes_read,
        "memory_while_measuring_bytes": work.peak_bytes,
    }


def prune_by(model: Model, cut: Plan | str | Path | None, settings: PruneSettings) -> PrunedModel:
    """As ``run_prune``; a plan may stand beside the model, because it is what the model is cut by.

    Raises: as ``prune_checkpoint``.
    """
    return run_prune(model, settings if cut is None else replace(settings, plan=cut))


prune = verb_with(PruneSettings, prune_by)
