"""Choosing text: labels, classifiers, buckets, duplicates, likeness to targets, blends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipuzzle.data.blend import BLEND_SUFFIX, read_blend
from minipuzzle.data.documents import MANIFEST_FILE
from minipuzzle.data.rows import Row, read_rows, write_shard
from minipuzzle.data.runner import StepReport, run_step
from minipuzzle.data.selecting import dsir
from minipuzzle.data.selecting.buckets import FIRST_STEP, bucket_table, buckets_of
from minipuzzle.data.selecting.duplicates import without_duplicates
from minipuzzle.data.selecting.labels import Label
from minipuzzle.data.selecting.quality import CLASSIFIER_FILE, read_classifier, train_classifier
from minipuzzle.data.selecting.sampling import capped, normalised, shares_by_name
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.json_files import write_json
from minipuzzle.files.outputs import check_target_file, fingerprint_files, output_file, output_folder
from minipuzzle.workflows.data.running import PlannedStep, asked, run_made, run_rows
from minipuzzle.workflows.data.settings import (
    BlendSettings,
    BucketSettings,
    DedupSettings,
    LabelSettings,
    SelectSettings,
    TrainQualitySettings,
)
from minipuzzle.workflows.settings import paths_of
from minipuzzle.workflows.verbs import keywords


@dataclass(frozen=True, kw_only=True)
class Found:
    """Figures by name, and what they are of."""

    figures: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The figures."""
        return dict(self.figures)


def run_label(settings: LabelSettings, *, is_dry: bool = False) -> StepReport | PlannedStep:
    """Add measures to rows."""
    step = Label(classifiers={name: read_classifier(Path(path)) for name, path in settings.classifiers.items()})
    return run_rows(step, settings.data, settings.running, settings=settings, is_dry=is_dry)


def run_dedup(settings: DedupSettings, *, is_dry: bool = False) -> StepReport | PlannedStep:
    """Leave out rows whose content was there already. One process sees all rows."""
    if settings.running.workers > 1:
        raise MinipuzzleError("duplicates are found by one process, which sees all rows", "drop ‹workers›")
    paths = paths_of(settings.data)
    rows = without_duplicates(read_rows(paths), similarity=settings.similarity)
    if is_dry:
        return run_rows(Label(name="dedup"), settings.data, settings.running, settings=settings, is_dry=True)
    return run_made(
        lambda folder: run_step(Label(name="dedup"), rows, folder, None, settings.running.work),
        "dedup",
        settings.running,
        paths,
        settings,
    )


def run_train_quality(settings: TrainQualitySettings, *, is_dry: bool = False) -> Found:
    """Train a classifier that tells good from bad text, and measure it on held-out documents."""
    assert settings.out is not None
    sides = {name: _usable(paths_of(texts)) for name, texts in (("good", settings.good), ("bad", settings.bad))}
    counts = {name: len(rows) for name, rows in sides.items()}
    if is_dry:
        return Found(figures=counts)
    inputs = [*paths_of(settings.good), *paths_of(settings.bad)]
    provenance = {"command": "data train-quality", "settings": asked(settings), "inputs": fingerprint_files(inputs)}
    with output_folder(Path(settings.out), provenance, overwrite=settings.overwrite) as folder:
        classifier = train_classifier(sides["good"], sides["bad"])
        classifier.write(folder / CLASSIFIER_FILE)
    return Found(figures={**counts, "auc_on_held_out_documents": classifier.auc})


def _usable(paths: tuple[Path, ...]) -> list[Row]:
    return [row for row in read_rows(paths) if isinstance(row, Row)]


def run_buckets(settings: BucketSettings, *, is_dry: bool = False) -> Found:
    """Sort rows into five buckets by quality, a folder each."""
    running, paths = settings.running, paths_of(settings.data)
    rows = _usable(paths)
    buckets = buckets_of(rows, settings.by)
    table = bucket_table(rows, buckets)
    if is_dry:
        return Found(figures=table)
    assert running.out is not None
    provenance = {"command": "data buckets", "settings": asked(settings), "inputs": fingerprint_files(list(paths))}
    with output_folder(Path(running.out), provenance, overwrite=running.overwrite) as folder:
        for name in FIRST_STEP:
            members = [row for row, bucket in zip(rows, buckets, strict=True) if bucket == name]
            if members:
                (folder / name).mkdir(exist_ok=True)
                write_shard(folder / name / "part-00000.parquet", members)
        write_json(folder / MANIFEST_FILE, {"step": "buckets", "by": list(settings.by), "buckets": table})
    return Found(figures=table)


def run_select(settings: SelectSettings, *, is_dry: bool = False) -> StepReport | PlannedStep:
    """Select chunks that are like targets."""
    targets = {}
    for text in settings.target:
        path, _, share = text.rpartition("=") if "=" in text else (text, "", "1")
        rows = _usable((Path(path),))
        if share.replace(".", "", 1).isdigit() is False:
            raise MinipuzzleError(f"‹target› {text!r} has no share behind its =", "give PATH=0.5, for instance")
        targets[path] = (dsir.frequencies(row.content for row in rows), float(share))
    shares = normalised({name: share for name, (_, share) in targets.items()})
    step = dsir.fit(
        _usable(paths_of(settings.data)),
        {name: (target, shares[name]) for name, (target, _) in targets.items()},
        budget_tokens=settings.tokens,
        chunk_words=settings.chunk,
        seed=settings.seed,
    )
    return run_rows(step, settings.data, settings.running, settings=settings, is_dry=is_dry)


def run_blend(settings: BlendSettings, *, is_dry: bool = False) -> Found:
    """Share the tokens of a run out over sources, and write the blend file that training reads.

    Raises: MinipuzzleError if the sources hold too little, or for phases that do not add up.
    """
    assert settings.out is not None
    out, paths = Path(settings.out), {_name(path): path for path in paths_of(settings.data)}
    if out.suffix != BLEND_SUFFIX:
        raise MinipuzzleError(f"{out} is no name for a blend file", f"end ‹out› in {BLEND_SUFFIX}")
    if not is_dry:
        check_target_file(out, overwrite=settings.overwrite, read=read_blend, inputs=tuple(paths.values()))
    sizes = {name: settings.downsample * _tokens(path, settings.tokenizer) for name, path in paths.items()}
    phases = _phases(settings, sizes)
    if not is_dry:
        with output_file(out) as partial:
            partial.write_text(_blend_text(settings, paths, sizes, phases), encoding="utf-8")
        read_blend(out)
    total = settings.tokens * settings.downsample
    epochs = {name: sum(share * weights[name] for share, weights in phases) * total / sizes[name] for name in paths}
    return Found(figures={name: {"tokens": sizes[name], "epochs": epochs[name]} for name in paths})


def _name(path: Path) -> str:
    return path.name.removesuffix(path.suffix) if path.is_file() else path.name


def _tokens(path: Path, tokenizer: str | Path | None) -> float:
    rows = _usable((path,))
    if tokenizer is None:
        return float(sum(row.num_tokens for row in rows))
    from minipuzzle.runtime.models import load_tokenizer

    loaded = load_tokenizer(Path(tokenizer))
    return float(sum(len(loaded(row.content)["input_ids"]) for row in rows))


def _phases(settings: BlendSettings, sizes: Mapping[str, float]) -> list[tuple[float, dict[str, float]]]:
    """The share of each phase, and of each source in it. Epochs are counted over all phases.

    The last of several phases reads only the sources of ``last``; the ones before it, what is left to give.
    """
    try:
        shares = list(
            normalised({str(place): float(part) for place, part in enumerate(settings.phases.split(":"))}).values()
        )
        factors = {name: float(settings.multiply.get(name, 1)) for name in sizes}
    except ValueError:
        raise MinipuzzleError("‹phases› and ‹multiply› take numbers", "give 60:40, and high=2, for instance") from None
    if unknown := sorted({*settings.multiply, *settings.last} - {*sizes}):
        raise MinipuzzleError(f"there is no source {unknown[0]!r}", f"there are {', '.join(sizes)}")
    total = settings.tokens * settings.downsample
    last = settings.last or [name for name in sizes if "high" in name]
    phases: list[tuple[float, dict[str, float]]] = []
    given = dict.fromkeys(sizes, 0.0)
    if len(shares) > 1:
        if not last:
            raise MinipuzzleError("nothing says what the last phase reads", "name its sources by ‹last›")
        wanted = {name: sizes[name] * factors[name] if name in last else 0.0 for name in sizes}
        weights = capped(wanted, sizes, total * shares[-1], settings.max_epochs)
        given = {name: total * shares[-1] * weights[name] for name in sizes}
        phases = [(shares[-1], weights)]
    rest = total * (sum(shares[:-1]) if len(shares) > 1 else 1.0)
    left = {name: sizes[name] - given[name] / settings.max_epochs for name in sizes}
    base = shares_by_name(
        settings.sample, {name: max(size, 0.0) for name, size in left.items()}, rest, settings.max_epochs
    )
    weights = capped({name: base[name] * factors[name] for name in sizes}, left, rest, settings.max_epochs)
    return [*((share, weights) for share in (shares[:-1] or [1.0])), *phases]


def _blend_text(
    settings: BlendSettings,
    paths: Mapping[str, Path],
    sizes: Mapping[str, float],
    phases: list[tuple[float, dict[str, float]]],
) -> str:
    """The TOML of a blend, with the epochs of each source in comments."""
    total = settings.tokens * settings.downsample
    lines = [f"max_epochs = {settings.max_epochs + 0.01:g}", ""]  # windows round up
    for name, path in paths.items():
        epochs = sum(share * weights[name] for share, weights in phases) * total / sizes[name]
        lines += [f"[sources.{_quoted(name)}]  # {sizes[name]:,.0f} tokens, read {epochs:.2f} times"]
        lines += [f"path = {_quoted(str(path.resolve()))}"]
    for place, (share, weights) in enumerate(phases):
        listed = ", ".join(f"{_quoted(name)} = {weight:.9f}" for name, weight in weights.items() if weight > 0)
        lines += ["", "[[phases]]", f'name = "phase {place + 1}"', f"share = {share:.9f}", f"weights = {{{listed}}}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


label = keywords(LabelSettings, run_label)
dedup = keywords(DedupSettings, run_dedup)
train_quality = keywords(TrainQualitySettings, run_train_quality)
buckets = keywords(BucketSettings, run_buckets)
select = keywords(SelectSettings, run_select)
blend = keywords(BlendSettings, run_blend)
