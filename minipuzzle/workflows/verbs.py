"""What all verbs of the Python API share: models given in any form, text, keywords made from settings, results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import update_wrapper, wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from minipuzzle.data.documents import read_documents
from minipuzzle.data.windows import check_token_ids, wanted_windows
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.formats.decoding import decoded
from minipuzzle.option import settings_of
from minipuzzle.runtime.models import load_tokenizer

if TYPE_CHECKING:
    import torch


class HasCheckpoint(Protocol):
    """The result of a step that wrote a checkpoint."""

    @property
    def checkpoint(self) -> Checkpoint:
        """What was written."""


Model = str | Path | Checkpoint | HasCheckpoint
Keywords = ParamSpec("Keywords")
Settings = TypeVar("Settings")
Result = TypeVar("Result")
What = TypeVar("What")
Other = TypeVar("Other")
Second = TypeVar("Second", contravariant=True)
Outcome = TypeVar("Outcome", covariant=True)


def open_model(model: Model) -> Checkpoint:
    """A checkpoint from its folder, or from the step that wrote it; one that is open already stays as it is.

    Raises: MinipuzzleError if anything is missing, truncated or outside the folder.
    """
    if isinstance(model, Checkpoint):
        return model
    return Checkpoint.open(Path(model)) if isinstance(model, str | Path) else model.checkpoint


def open_plain(model: Model) -> Checkpoint:
    """A checkpoint to measure, cut, train or export: one that is quantised is decoded as it is read.

    Raises: MinipuzzleError for what cannot be decoded, or config.json and weights that do not belong together.
    """
    checkpoint = decoded(open_model(model))
    checkpoint.require_plain_weights()
    return checkpoint


@overload
def verb(
    settings: Callable[Keywords, Settings], run: Callable[[What, Settings], Result]
) -> Callable[Concatenate[What, Keywords], Result]: ...
@overload
def verb(
    settings: Callable[Keywords, Settings], run: Callable[[What, Other, Settings], Result]
) -> Callable[Concatenate[What, Other, Keywords], Result]: ...
def verb(settings: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes the fields of settings as keywords: what is done to is positional, how is named."""

    @wraps(run)
    def called(*what: Any, **how: Any) -> Any:
        return run(*what, settings(**how))

    *positional, _ = signature(run).parameters.values()
    keywords = signature(settings).parameters.values()
    named = [parameter.replace(kind=Parameter.POSITIONAL_ONLY) for parameter in positional]
    called.__signature__ = signature(run).replace(parameters=[*named, *keywords])  # type: ignore[attr-defined]
    return called


class VerbWith(Protocol[Second, Keywords, Outcome]):
    """A verb that takes something beside the model, which may be left out."""

    def __call__(
        self, model: Model, second: Second | None = None, /, *how: Keywords.args, **named: Keywords.kwargs
    ) -> Outcome: ...


def verb_with(
    settings: Callable[Keywords, Settings], run: Callable[[Model, Second | None, Settings], Outcome]
) -> VerbWith[Second, Keywords, Outcome]:
    """As ``verb``; what is left out beside the model is None."""
    by_keywords: Any = verb(settings, run)

    def called(model: Model, second: Second | None = None, /, **how: Any) -> Any:
        return by_keywords(model, second, **how)

    typed: Any = called
    return update_wrapper(typed, by_keywords)


def keywords(settings: type[Any], run: Callable[..., Result]) -> Callable[..., Result]:
    """A function whose keywords are the fields of settings and of their parts, as its command has them as options."""

    @wraps(run)
    def called(**how: Any) -> Result:
        given = dict(how)
        made = settings_of(settings, given)
        if given:
            raise TypeError(f"{run.__name__} has no keyword {next(iter(given))!r}")
        return run(made)

    return called


def sample_text(
    checkpoint: Checkpoint,
    data: Sequence[Path],
    *,
    samples: int | None,
    default_samples: int,
    sequence_length: int,
    seed: int = 0,
    is_shuffled: bool = False,
) -> torch.Tensor:
    """Windows of a checkpoint's tokens, ``[samples, sequence_length]``, from text, as many as ``wanted_windows`` says.

    ``is_shuffled``: in random order, so that the first few are a fair sample of all; else in the text's order.

    Raises: MinipuzzleError for too little text, or tokens that the model does not know.
    """
    import torch

    tokenizer = load_tokenizer(checkpoint.tokenizer_folder)
    token_ids = wanted_windows(
        tokenizer,
        read_documents(data, tokenizer),
        samples=samples,
        default_samples=default_samples,
        sequence_length=sequence_length,
        seed=seed,
    )
    check_token_ids(token_ids, checkpoint.architecture.vocabulary)
    if is_shuffled:
        token_ids = token_ids[torch.randperm(len(token_ids), generator=torch.Generator().manual_seed(seed))]
    return token_ids
