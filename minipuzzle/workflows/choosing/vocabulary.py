"""Which part of a vocabulary stays, decided before anything else: the rest of a search sees the smaller model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from minipuzzle.architecture.kinds import VOCABULARY
from minipuzzle.cut.plan import Plan, keep_everything, read_plan
from minipuzzle.cut.scores import Scores, read_scores
from minipuzzle.cut.vocabulary import VocabularyCut, apart, on_fewer_tokens
from minipuzzle.data.documents import read_documents
from minipuzzle.data.vocabulary import BytePairs, choose_tokens, count_tokens, named_ids
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import read_json
from minipuzzle.runtime.models import load_tokenizer
from minipuzzle.search.costs import Pricing
from minipuzzle.search.request import SearchRequest
from minipuzzle.workflows.settings import PruneSettings, named_deployment, paths_of

GENERATION_CONFIG = "generation_config.json"


def cut_vocabulary(
    checkpoint: Checkpoint, settings: PruneSettings, sweep: str | None = None
) -> tuple[Checkpoint, SearchRequest | None, Plan | Path | None]:
    """The checkpoint with the tokens that settings keep, and what is left to do with it: a search or a plan.

    Shares of a target are of the model with all tokens. Where nothing else is to be cut, or the smaller vocabulary
    meets every limit, the plan keeps all the rest.

    Raises: MinipuzzleError for tokenizers that cannot be cut, or a vocabulary that is too small for what must stay.
    """
    named = named_deployment(settings.deployment)
    target, deployment = settings.request(named.memory if settings.plan is None else None, sweep), named.deployment
    plan = Path(settings.plan) if isinstance(settings.plan, str) else settings.plan
    asked = settings.vocab is not None or bool(settings.keep_vocab_from)
    if plan is not None:
        if target is not None and target.only_cuts_vocabulary:
            target = None
        read = read_plan(plan) if isinstance(plan, Path) else plan
        if read.units(VOCABULARY, None) is not None:
            if asked:
                raise MinipuzzleError("‹plan› already says which tokens stay", "drop ‹vocab› and ‹keep_vocab_from›")
            read, cut = apart(read, checkpoint)
            return cut, target, read
        if asked:
            read.check_against(checkpoint.architecture)
            cut = _with_tokens_of_text(checkpoint, settings)
            return cut, target, on_fewer_tokens(read, cut.architecture)
    if not asked:
        return checkpoint, target, plan
    cut = _with_tokens_of_text(checkpoint, settings)
    if target is not None and not target.only_cuts_vocabulary:
        target = target.of_source(checkpoint.architecture, deployment)
        costs = Pricing(source=cut.architecture, deployment=deployment, timings=target.timings).model(cut.architecture)
        limits = target.limits(cut.architecture, deployment)
        if target.is_fixed or limits.violated(costs):
            return cut, target, None
    return cut, None, keep_everything(cut.architecture)


def kept_tokens_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What the record of a cut says of its vocabulary; nothing where all tokens stay."""
    return {} if checkpoint is checkpoint.origin else {"kept_tokens_fingerprint": checkpoint.fingerprint}


def _with_tokens_of_text(checkpoint: Checkpoint, settings: PruneSettings) -> VocabularyCut:
    texts = paths_of(settings.keep_vocab_from) or paths_of(settings.data)
    if not texts:
        raise MinipuzzleError("no text says which tokens are needed", "give ‹keep_vocab_from›, or ‹data›")
    source, limit = checkpoint.architecture, None
    if settings.vocab is not None:
        limit = SearchRequest(vocab=settings.vocab).vocabulary_of(source)
    pairs = BytePairs.read(checkpoint.tokenizer_folder)
    tokenizer = load_tokenizer(checkpoint.tokenizer_folder)
    counts = count_tokens(tokenizer, read_documents(texts, tokenizer))
    needed = named_ids(checkpoint.config, source.vocabulary)
    if (generation := checkpoint.tokenizer_folder / GENERATION_CONFIG).is_file():
        needed |= named_ids(read_json(generation), source.vocabulary)
    return VocabularyCut(checkpoint, choose_tokens(pairs, counts, limit=limit, needed=needed))


def scores_for(checkpoint: Checkpoint, scores: Scores | str | Path | None) -> Scores | Path | None:
    """Scores of a model as those of the part of its vocabulary that stays: what they say of layers holds for both.

    Of their text those windows are left whose tokens all stay.

    Raises: MinipuzzleError for scores of another model.
    """
    if scores is None or not isinstance(checkpoint, VocabularyCut):
        return Path(scores) if isinstance(scores, str) else scores
    found, origin = scores if isinstance(scores, Scores) else read_scores(Path(scores)), checkpoint.origin
    found.check_against(origin.architecture, origin.fingerprint)
    metadata = {**found.metadata}
    if found.is_measured_here:
        metadata["model_fingerprint"] = checkpoint.fingerprint
    token_ids = None
    if found.token_ids is not None:
        new_ids = np.full(origin.architecture.vocabulary, -1, dtype=np.int32)
        new_ids[list(checkpoint.kept_tokens)] = np.arange(len(checkpoint.kept_tokens), dtype=np.int32)
        mapped = new_ids[found.token_ids]
        whole = mapped[(mapped >= 0).all(1)]
        token_ids = whole if len(whole) else None
    return replace(found, metadata=metadata, token_ids=token_ids)
