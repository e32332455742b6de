"""How each verb of recovery data is asked for: fields are keywords in Python and options of the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minipuzzle.data.runner import EXECUTORS, SHARD_ROWS, Work
from minipuzzle.data.writing.dialogues import COMBINATIONS, STYLES
from minipuzzle.data.writing.instruct import KINDS
from minipuzzle.data.writing.rewriting import TASKS
from minipuzzle.errors import MinipuzzleError
from minipuzzle.option import option, part
from minipuzzle.progress import Progress, silent
from minipuzzle.workflows.settings import OUT_HELP, OVERWRITE_HELP, Texts

_RUNNING, _ASKING = "Running", "Asking a model"
DATA_HELP = "Text: .txt, .md, .jsonl or .parquet, or a folder of these, such as another step's. Repeatable."
ROWS_HELP = "Rows of an earlier step, or .jsonl with 'messages'. Repeatable."


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a step is run."""

    out: str | Path | None = option(None, OUT_HELP, takes="path", is_needed=True)
    overwrite: bool = option(False, OVERWRITE_HELP)
    limit: int = option(0, "Rows at most; default: all.", at_least=0, section=_RUNNING)
    workers: int = option(1, "Processes.", at_least=1, section=_RUNNING)
    executor: str = option("local", "Where workers run.", choices=EXECUTORS.names(), section=_RUNNING)
    shard_rows: int = option(SHARD_ROWS, "Rows a shard.", at_least=1, section=_RUNNING)
    progress: Progress = field(default=silent)

    @property
    def work(self) -> Work:
        """As the runner wants it."""
        return Work(
            workers=self.workers,
            executor=self.executor,
            shard_rows=self.shard_rows,
            limit=self.limit,
            progress=self.progress,
        )


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Who is asked: an OpenAI-compatible server, or a folder."""

    endpoint: Sequence[str] = option(
        (), "Address of a server, e.g. http://127.0.0.1:8000/v1. Repeatable.", takes="texts"
    )
    model: str = option("", "Name of the served model.")
    teacher: str | Path | None = option(None, "A model's folder, in place of a server.", takes="folder")
    concurrency: int = option(8, "Questions at a time.", at_least=1, section=_ASKING)
    prompts: str | Path | None = option(
        None, "Prompts of yours (TOML) for entries of ours.", takes="path", section=_ASKING
    )

    def __post_init__(self) -> None:
        if bool(self.endpoint) == (self.teacher is not None):
            raise MinipuzzleError("a model must answer", "give ‹endpoint› and ‹model›, or ‹teacher›")
        if self.endpoint and not self.model:
            raise MinipuzzleError("a server may hold several models", "name one by ‹model›")


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """Measures of text."""

    data: Texts = option(help=DATA_HELP, takes="paths")
    classifiers: Mapping[str, str] = option(
        {}, "A classifier of `train-quality`. Repeatable.", takes="pairs", metavar="NAME=FOLDER"
    )
    running: Running = part(Running)


@dataclass(frozen=True, kw_only=True)
class DedupSettings:
    """Duplicates."""

    data: Texts = option(help=DATA_HELP, takes="paths")
    similarity: float = option(
        0.8, "Jaccard similarity from which rows are duplicates; 1: equal words only.", above=0.0, at_most=1.0
    )
    running: Running = part(Running)


@dataclass(frozen=True, kw_only=True)
class TrainQualitySettings:
    """A classifier of good and bad text."""

    good: Texts = option(help="Text as it should be. Repeatable.", takes="paths")
    bad: Texts = option(help="Text as it should not be. Repeatable.", takes="paths")
    out: str | Path | None = option(None, OUT_HELP, takes="path", is_needed=True)
    overwrite: bool = option(False, OVERWRITE_HELP)


@dataclass(frozen=True, kw_only=True)
class BucketSettings:
    """Quality buckets."""

    data: Texts = option(help=ROWS_HELP, takes="paths")
    by: Sequence[str] = option(
        help="A label that says how good a row is. Repeatable: the best one counts.", takes="texts"
    )
    running: Running = part(Running)


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """Text that is like targets."""

    data: Texts = option(help=DATA_HELP, takes="paths")
    target: Sequence[str] = option(
        help="Text that the selection is to be like, with its share where there are several. Repeatable.",
        takes="texts",
        metavar="PATH[=SHARE]",
    )
    tokens: int = option(help="Tokens to select, about.", takes="count")
    chunk: int = option(384, "Words a chunk.", at_least=32)
    seed: int = option(0, "Seed of the sample.", takes="integer")
    running: Running = part(Running)


@dataclass(frozen=True, kw_only=True)
class BlendSettings:
    """Shares of sources."""

    data: Texts = option(help="A source: a file or a folder. Repeatable.", takes="paths")
    tokens: int = option(help="Tokens of the run that reads the blend.", takes="count")
    sample: str = option("unimax", "How sources are shared out: natural, alpha=EXPONENT or unimax.", metavar="RULE")
    max_epochs: float = option(4.0, "How often a source is read at most.", above=0.0)
    multiply: Mapping[str, str] = option(
        {}, "Weigh a source by a factor. Repeatable.", takes="pairs", metavar="SOURCE=FACTOR"
    )
    phases: str = option("100", "Shares of the phases, e.g. 60:40.", metavar="SHARE[:SHARE]")
    last: Sequence[str] = option(
        (), "A source that the last phase reads; default: those of high quality. Repeatable.", takes="texts"
    )
    downsample: float = option(1.0, "Scale sources and tokens alike, to try a blend out.", above=0.0, at_most=1.0)
    tokenizer: str | Path | None = option(
        None, "Count tokens by this model's tokenizer; default: 4 bytes a token.", takes="folder"
    )
    out: str | Path | None = option(None, "The blend file (.toml).", takes="path", is_needed=True)
    overwrite: bool = option(False, OVERWRITE_HELP)


@dataclass(frozen=True, kw_only=True)
class DialogueSettings:
    """Dialogues from raw text."""

    data: Texts = option(help=DATA_HELP, takes="paths")
    styles: str = option("all", f"Styles: all, or some of {', '.join(STYLES)}.", metavar="STYLE,...")
    chunk: int = option(500, "Tokens a passage.", at_least=32)
    combine: str = option("longest", "What becomes of a passage's dialogues.", choices=COMBINATIONS)
    min_coverage: float = option(
        0.0, "Share of a passage's words that a dialogue must take up.", at_least=0.0, at_most=1.0
    )
    max_tokens: int = option(4096, "Tokens of a dialogue at most.", takes="count")
    running: Running = part(Running)
    asking: Asking = part(Asking)


@dataclass(frozen=True, kw_only=True)
class RewriteSettings:
    """Text rewritten."""

    data: Texts = option(help=DATA_HELP, takes="paths")
    tasks: str = option("all", f"Tasks: all, or some of {', '.join(TASKS)}.", metavar="TASK,...")
    running: Running = part(Running)
    asking: Asking = part(Asking)


@dataclass(frozen=True, kw_only=True)
class InstructSettings:
    """Conversations from topics."""

    kinds: str = option("open", f"Kinds: some of {', '.join(KINDS)}.", metavar="KIND,...")
    topics: str = option("20x5x10", "Topics, subtopics of each, first messages of each.", metavar="NxNxN")
    data: Texts = option((), "Documents for the kind 'closed'. Repeatable.", takes="paths")
    turns: int = option(3, "Messages of the user.", at_least=1)
    max_tokens: int = option(1024, "Tokens of a message at most.", takes="count")
    running: Running = part(Running)
    asking: Asking = part(Asking)


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Scores of a reward model."""

    data: Texts = option(help=ROWS_HELP, takes="paths")
    keep: Sequence[str] = option(
        (), "What a score must fulfil, e.g. 'helpfulness>=3'. Repeatable.", takes="texts", metavar="CONDITION"
    )
    running: Running = part(Running)
    asking: Asking = part(Asking)


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """Pairs of answers."""

    data: Texts = option(help=ROWS_HELP, takes="paths")
    by: str = option(
        "both-orders",
        "Who judges: both-orders, reward, or a verifier (number, exact, reasoning-gym, command:...).",
        metavar="JUDGE",
    )
    responders: Sequence[str] = option(
        (), "Another model that answers too. Repeatable.", takes="texts", metavar="NAME=URL"
    )
    judge: str = option("", "The model that judges; default: the one that answers.", metavar="NAME=URL")
    samples: int = option(2, "Answers of each model.", at_least=1)
    max_tokens: int = option(1024, "Tokens of an answer at most.", takes="count")
    running: Running = part(Running)
    asking: Asking = part(Asking)


@dataclass(frozen=True, kw_only=True)
class ReviseSettings:
    """Shorter, better reasoning."""

    data: Texts = option(help="Traces: .jsonl with question, answer and trace. Repeatable.", takes="paths")
    verifier: str = option(
        "number", "What says that an answer is right: number, exact, reasoning-gym or command:PROGRAM."
    )
    gamma: float = option(0.9, "What each further step costs.", above=0.0, at_most=1.0)
    max_tokens: int = option(1024, "Tokens of a continuation at most.", takes="count")
    temperature: float = option(1.0, "Of the continuations.", at_least=0.0)
    baseline: bool = option(False, "Also sample as many whole traces, and say how long the shortest right ones are.")
    running: Running = part(Running)
    asking: Asking = part(Asking)
