"""How each verb is asked for: one class a verb, whose fields are the keywords in Python and the options of the command.

Free of torch, so that commands can show help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from distill.engine import EngineSettings
from distill.settings import DistillSettings
from minipuzzle.architecture.deployments import NamedDeployment, find_deployment
from minipuzzle.architecture.memory import Deployment
from minipuzzle.architecture.quantities import parse_count
from minipuzzle.cut.layer_metrics import LAYER_METRICS
from minipuzzle.cut.plan import CRITERIA
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.algorithms import ALGORITHMS
from minipuzzle.formats.choices import RECIPES, WritingOptions
from minipuzzle.formats.flavours import FLAVOURS
from minipuzzle.option import option, part
from minipuzzle.quality.ranked import DEFAULT_RANK_BY, RANK_BY
from minipuzzle.runtime.compute import Compute
from minipuzzle.search.request import PruneTargets, SearchTargets

if TYPE_CHECKING:
    from minipuzzle.cut.plan import Plan
    from minipuzzle.cut.scores import Scores
    from minipuzzle.workflows.verbs import Model

DEFAULT_TOP_K = 64  # of a teacher cache
# Windows of text where nobody asks for a number.
DEFAULT_SAMPLES, EXPORT_SAMPLES, VERIFY_SAMPLES = 128, 64, 4
_CHOOSING, _CUTTING, _RACE = "Comparing candidates", "Cutting", "Race of finalists"
COMPUTING = "Computing"  # the heading under which options say where and how
Texts = str | Path | Sequence[str | Path]
Serving = Deployment | NamedDeployment | str | None  # None: the defaults of Deployment
QualityFile = str | Path | Mapping[str, Mapping[str, float | None]] | None  # a file, or figures by text and by name
TEXT_HELP = "Text: .txt, .md, .jsonl or .parquet with 'text' or chat 'messages', or a folder of these. Repeatable."
OVERWRITE_HELP = "Replace an output folder that minipuzzle wrote, or began to with other settings; never any other."
OVERWRITE_FILE_HELP = "Replace output files of the same kind, or begun with other settings; never any other."
OVER_BUDGET_HELP = "Go on although the result will take more memory than the model was cut for."
OUT_HELP = "Output folder; appears only when complete."


def paths_of(texts: Texts) -> tuple[Path, ...]:
    """One path or several, as paths."""
    return (Path(texts),) if isinstance(texts, str | Path) else tuple(Path(text) for text in texts)


def named_deployment(serving: Serving) -> NamedDeployment:
    """A deployment with the budget of its machine, where it has a name.

    Raises: MinipuzzleError for an unknown name.
    """
    if isinstance(serving, NamedDeployment):
        return serving
    if isinstance(serving, str):
        return find_deployment(serving)
    return NamedDeployment(name="", deployment=serving or Deployment())


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What of a model to measure, how much of it and on which text.

    Raises: MinipuzzleError for numbers that measure nothing.
    """

    data: Texts = option(help=TEXT_HELP, takes="paths")
    samples: int | None = option(
        None, f"Calibration samples for layers. Default: {DEFAULT_SAMPLES}, or all there are.", takes="count"
    )
    channel_samples: int | None = option(
        None,
        "Calibration samples for channels and heads (published: 1024). Default: those for layers.",
        takes="count",
    )
    sequence_length: int = option(512, "Tokens a sample.")
    layers: str | None = option(None, "Layers to leave out, e.g. 0-5,9,attention. Default: each.", section="More")
    variants: Sequence[str] = option(
        (),
        "Also score each layer at smaller widths, e.g. ffn=75%,50%: what a per-layer search needs. Repeatable.",
        takes="texts",
        metavar="AXIS=WIDTHS",
        section="More",
    )
    iterative: int = option(
        0,
        "Remove the layer with the lowest score and score the others again, N times; default: never.",
        at_least=0,
        metavar="N",
        section="More",
    )
    remove_by: str = option("mse", "Score by which --iterative removes.", choices=LAYER_METRICS, section="More")
    compensated: bool = option(
        False,
        "Score what remains of each removal once the layers above it are refitted, as prune does, on three quarters of "
        "the samples and measured on the rest. Takes about eight times as long.",
        section="More",
    )
    seed: int = option(0, "Seed of the sampling.", takes="integer", section="More")
    out: str | Path | None = option(
        None, "Output score file (.safetensors); appears only when complete.", takes="path", is_needed=True
    )
    overwrite: bool = option(False, OVERWRITE_FILE_HELP)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        if min(self.num_layer_samples, self.num_channel_samples) < 1 or self.sequence_length < 2:
            raise MinipuzzleError(
                f"{self.num_layer_samples} samples ({self.num_channel_samples} for channels) of {self.sequence_length} "
                "tokens measure nothing",
                "give ‹samples› and ‹channel_samples› of at least 1 and ‹sequence_length› of at least 2",
            )

    @property
    def num_layer_samples(self) -> int:
        """Samples for layers, where the text has as many."""
        return DEFAULT_SAMPLES if self.samples is None else self.samples

    @property
    def num_channel_samples(self) -> int:
        """Samples for channels and heads, likewise."""
        return self.num_layer_samples if self.channel_samples is None else self.channel_samples

    @property
    def needed_samples(self) -> int | None:
        """Samples that the text must have; None where nobody asked for a number."""
        return max((number for number in (self.samples, self.channel_samples) if number is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class SearchSettings(SearchTargets):
    """What to search for, for which deployment, and where the best plan goes.

    Raises: MinipuzzleError for outputs that do not go together.
    """

    deployment: Serving = None
    out: str | Path | None = option(None, "Write the best plan here, for `prune --plan`.", takes="path")
    overwrite: bool = option(False, OVERWRITE_FILE_HELP)
    top: int = option(5, "Candidates to show.", at_least=1)
    sweep: str | None = option(
        None,
        "Search for each of many budgets, e.g. 20GiB:40GiB:2GiB or 50%:100%:5%, and chart the frontier.",
        metavar="LOW:HIGH:STEP",
        section="Sweep",
    )
    csv: str | Path | None = option(None, "Write the frontier of --sweep as CSV.", takes="path", section="Sweep")
    plot: str | Path | None = option(
        None, "Draw the frontier of --sweep into a .png, .svg or .pdf.", takes="path", section="Sweep"
    )

    def __post_init__(self) -> None:
        if self.sweep is not None and self.out is not None:
            raise MinipuzzleError("a sweep has no one plan to write", "drop ‹out›, then search at the budget you chose")
        if self.sweep is None and (self.csv is not None or self.plot is not None):
            raise MinipuzzleError("‹csv› and ‹plot› belong to a sweep", "add ‹sweep› LOW:HIGH:STEP")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """On which text to measure a model, and against which other; or on which tasks of lm-eval.

    Raises: MinipuzzleError for both, or neither.
    """

    against: Model | None = option(
        None, "A model with the same vocabulary to compare with.", takes="path", metavar="TEACHER"
    )
    data: Texts = option((), TEXT_HELP, takes="paths")
    sequence_length: int = option(512, "Tokens of context at most.")
    tasks: str | None = option(None, "Run these tasks of lm-eval instead.", metavar="TASK,...", section="lm-eval")
    task_folder: Path | None = option(None, "Task files of yours for lm-eval.", takes="folder", section="lm-eval")
    limit: int | None = option(None, "Items of each task at most.", takes="count", section="lm-eval")
    batch: int = option(4, "Windows run at once.", at_least=1, section=COMPUTING)
    max_tokens: int | None = option(None, "Use about this many tokens of each --data; default: all.", takes="count")
    out: str | Path | None = option(None, "Also write the figures and a page that shows them here.", takes="path")
    overwrite: bool = option(False, OVERWRITE_HELP)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        if bool(self.tasks) == bool(paths_of(self.data)):
            raise MinipuzzleError("a model is measured on text or on tasks", "give either ‹data› or ‹tasks›")
        if self.tasks and (self.against or self.out):
            raise MinipuzzleError("lm-eval measures one model and prints it", "leave ‹against› and ‹out› out")


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """What to run a folder on, and what to compare it with. Without text it runs on random tokens."""

    against: Model | None = option(None, "The model it was exported from.", takes="path", metavar="MODEL")
    data: Texts = option((), TEXT_HELP, takes="paths")
    samples: int | None = option(
        None, f"Windows of text to run. Default: {VERIFY_SAMPLES}, or all there are.", takes="count"
    )
    sequence_length: int = option(512, "Tokens of a window.")
    compute: Compute = field(default_factory=Compute)


@dataclass(frozen=True, kw_only=True)
class ExportSettings(WritingOptions):
    """How an export is stored and calibrated, and where it goes. ``command``: for the model card.

    Raises: MinipuzzleError for an unknown algorithm or an impossible percentile.
    """

    out: str | Path = option(help=OUT_HELP, takes="path")
    data: Texts = option((), TEXT_HELP, takes="paths")
    samples: int | None = option(
        None, f"Calibration windows. Default: {EXPORT_SAMPLES}, or all there are.", takes="count"
    )
    sequence_length: int = option(512, "Tokens of a calibration window.")
    overwrite: bool = option(False, OVERWRITE_HELP)
    over_budget: bool = option(False, OVER_BUDGET_HELP)
    flavour: str = option(
        "modelopt",
        "Layout: modelopt for vLLM, SGLang and TensorRT-LLM; compressed-tensors for vLLM and transformers.",
        choices=FLAVOURS,
        section="Format",
    )
    recipe: str | None = option(
        None,
        "mamba-safe leaves attention in BF16; all adds the LM head. Default: as the model was cut for, else default.",
        choices=RECIPES,
        section="Format",
    )
    overrides: Sequence[tuple[str, str]] = option(
        (),
        "Linear layers whose names fit the pattern: bf16, or the format of this export. Repeatable; the last that fits "
        "counts. Example: 'backbone.layers.0.*=bf16'.",
        name="override",
        takes="patterns",
        metavar="PATTERN=FORMAT",
        section="Format",
    )
    activations: str | None = option(
        None,
        "FP8: one calibrated scale a layer, or one scale a token found while serving, which needs no --data. Default: "
        "static for modelopt, dynamic for compressed-tensors.",
        choices=("static", "dynamic"),
        section="Format",
    )
    kv_cache: str | None = option(
        None,
        "fp8 stores scales for an FP8 KV cache, which engines then use. Default: as the model was cut for, else bf16.",
        choices=("bf16", "fp8"),
        section="Format",
    )
    calibration: str = option(
        "max",
        "How the largest activation is found, by ModelOpt's calibrators.",
        choices=ALGORITHMS,
        section="Format",
    )
    percentile: float = option(99.99, "Of --calibration percentile.", above=0, at_most=100, section="Format")
    puzzle: bool = option(
        False,
        "For nemotron_h models whose layers differ in width (Mamba layers may not): config.json as vLLM's "
        "NemotronHPuzzleForCausalLM reads it, and its class beside it, which vLLM runs with --trust-remote-code only.",
        section="Folder",
    )
    max_shard_size: str = option("5GB", "Size of a file of weights at most.", section="Folder")
    no_verify: bool = option(False, "Do not read the result back and compare what it computes.", section="Folder")
    base_model: str | None = option(None, "The base model's name on a model hub, for the model card.", section="Folder")
    quality: QualityFile = option(
        None,
        "What `minipuzzle evaluate --json` printed, for the model card.",
        takes="path",
        metavar="FILE",
        section="Folder",
    )
    command: str | None = None
    compute: Compute = field(default_factory=Compute)


@dataclass(frozen=True, kw_only=True)
class DistillOptions(DistillSettings):
    """A teacher, text, how to train on them, and where the result goes.

    Raises: MinipuzzleError for a value out of range.
    """

    tokens: int | str = option(help="Tokens to train on, e.g. 2M; may exceed the data.", takes="count", is_needed=False)  # type: ignore[assignment] # a number once it is made
    teacher: Model | None = option(
        None, "The model STUDENT was cut from; default: the one that STUDENT remembers.", takes="path"
    )
    data: Texts = option((), TEXT_HELP, takes="paths")
    validation: Texts = option(
        (),
        "Held-out text, to measure the distance from the teacher before and after. Repeatable.",
        takes="paths",
    )
    out: str | Path = option(help=OUT_HELP, takes="path", is_needed=False)
    overwrite: bool = option(False, OVERWRITE_HELP)
    over_budget: bool = option(False, OVER_BUDGET_HELP)
    teacher_cache: Path | None = option(
        None,
        "Keep the teacher's top-k targets in this folder, for further epochs and students; several runs may share it.",
        takes="folder",
        section="Loss",
    )
    tensorboard: Path | None = option(
        None,
        "Write the figures of each step for TensorBoard into this folder.",
        takes="folder",
        section="Saving and evaluating",
    )
    engine: EngineSettings = part(EngineSettings)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        if isinstance(self.tokens, str):
            object.__setattr__(self, "tokens", parse_count(self.tokens))
        if self.teacher_cache is not None and not self.top_k:
            object.__setattr__(self, "top_k", DEFAULT_TOP_K)
        super().__post_init__()

    @property
    def training(self) -> DistillSettings:
        """What shapes the result."""
        return DistillSettings(**{item.name: getattr(self, item.name) for item in fields(DistillSettings)})


@dataclass(frozen=True, kw_only=True)
class PruneSettings(PruneTargets):
    """What to cut, on which evidence, how candidates are compared, and where the result goes.

    Raises: MinipuzzleError for targets that do not go together.
    """

    deployment: Serving = None
    data: Texts = option((), TEXT_HELP, takes="paths")
    out: str | Path = option(help=OUT_HELP, takes="path")
    scores: Scores | str | Path | None = option(None, "Use these scores; measure nothing.", takes="path")
    plan: Plan | str | Path | None = option(None, "Cut by this plan; search nothing.", takes="path")
    samples: int | None = option(
        None, f"Calibration samples. Default: {DEFAULT_SAMPLES}, or all there are.", takes="count"
    )
    sequence_length: int = option(512, "Tokens a sample.")
    overwrite: bool = option(False, OVERWRITE_HELP)
    seed: int = option(0, "Seed of the sampling.", takes="integer", section=_CHOOSING)
    num_candidates: int = option(
        8,
        "Candidates to measure, the best predicted; 1 trusts the prediction.",
        name="candidates",
        at_least=1,
        section=_CHOOSING,
    )
    validation: Texts = option(
        (),
        "Text to compare candidates on; default: the calibration samples. Repeatable.",
        takes="paths",
        section=_CHOOSING,
    )
    rank_by: str = option(
        DEFAULT_RANK_BY,
        "kl: to the source, the least noisy; loss; mean-rank: of next-token accuracy and agreement, as published.",
        choices=RANK_BY,
        section=_CHOOSING,
    )
    refine: bool = option(
        False, "Add and exchange layers of the best candidate while that measures better.", section=_CHOOSING
    )
    rank_compensated: int = option(
        3,
        "Of the best measured, how many are mended and measured again, so that the choice is between mended cuts; 0: "
        "none.",
        at_least=0,
        section=_CHOOSING,
    )
    no_compensate: bool = option(
        False,
        "Leave the weights that stay as they are. Else each layer's output projection is refitted, in closed form and "
        "a layer at a time, to what the source's hidden states are behind it, on --data or on the tokens of --scores; "
        "a layer that held-out text does not gain from keeps its weights.",
        section=_CUTTING,
    )
    criterion: str | None = option(
        None,
        "obs: keep those neurons and key-value groups that the others make up for least after a refit (Optimal Brain "
        "Surgeon), in layers where held-out text gains by that; published: the most active ones. Default: obs, unless "
        "--plan names the units or nothing is refitted.",
        choices=CRITERIA,
        section=_CUTTING,
    )
    num_finalists: int = option(1, "Candidates that race.", name="finalists", at_least=1, section=_RACE)
    race_tokens: int | str | None = option(
        None, "Tokens that each finalist is distilled on; the winner keeps its weights.", takes="count", section=_RACE
    )
    race_data: Texts = option((), "Text for that; default: --data. Repeatable.", takes="paths", section=_RACE)
    race_halving: bool = option(False, "Race in rounds and drop the worse half after each.", section=_RACE)
    race_learning_rate: float = option(1e-4, "Peak rate of the race.", section=_RACE)
    race_batch: int = option(16, "Sequences of an optimiser step.", section=_RACE)
    compute: Compute = field(default_factory=Compute)
