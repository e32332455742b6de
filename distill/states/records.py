"""What a run leaves for people: a line a step in metrics.jsonl, a picture of the curves, and optionally TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.settings import OnStep, StepRecord, ignore_step
from minipuzzle.errors import MinipuzzleError, warn
from minipuzzle.files.json_files import parse_json, record_of

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "learning_curve.png"
_SMOOTHED_STEPS = 25
_FEW_STEPS = 20


def append_metrics(folder: Path, record: StepRecord) -> None:
    """Add a step's line to ``metrics.jsonl``."""
    values = {name: value for name, value in asdict(record).items() if value is not None}
    # JSON has no NaN: the loss of a skipped step is null.
    finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
    with (folder / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite, allow_nan=False) + "\n")


def forget_metrics_after(folder: Path, step: int) -> None:
    """Remove the lines of steps that will be run again, and those that are damaged: aloud, but for half a last line."""
    path = folder / METRICS_FILE
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]  # a killed run may leave half a line at the end
    records = [_record(line) for line in whole]
    if num_damaged := records.count(None):
        warn(f"{path}: {num_damaged} lines are damaged and left out")
    kept = (line for line, record in zip(whole, records, strict=True) if record and record["step"] <= step)
    path.write_bytes(b"".join(kept))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that are whole; none if there is no such file."""
    path = folder / METRICS_FILE
    return [record for line in path.read_bytes().splitlines() if (record := _record(line))] if path.exists() else []


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line says; None unless it is what ``append_metrics`` writes."""
    try:
        found = parse_json(line, METRICS_FILE)
        # What was no number is null.
        numbers = {n: 0.0 if v is None else v for n, v in found.items()} if isinstance(found, dict) else found
        record_of(StepRecord, numbers)
    except (MinipuzzleError, ValueError):
        return None
    return dict(found)


def draw_learning_curve(folder: Path, *, validation_kl_before: float | None) -> None:
    """Draw divergence in training, on held-out text, and the learning rate against tokens, into ``folder``."""
    from matplotlib.figure import Figure

    records = [record for record in read_metrics(folder) if record["kl"] is not None]
    if not records:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    tokens, kl = [record["tokens"] for record in records], [record["kl"] for record in records]
    axes.plot(tokens, kl, color="0.8", linewidth=0.8)
    axes.plot(tokens, _smoothed(kl), color="tab:blue", label="training")
    evaluated = [(record["tokens"], record["validation_kl"]) for record in records if "validation_kl" in record]
    if evaluated:
        points = [(0, validation_kl_before), *evaluated]
        axes.plot(
            *zip(*points, strict=True), color="tab:red", marker="o", markersize=3, label="held-out, temperature 1"
        )
    shown = [*kl, *(value for _, value in evaluated)]
    scale = "log" if any(value > 0 for value in shown) else "linear"  # a student that equals its teacher has no log
    axes.set(xlabel="tokens", ylabel="divergence from the teacher, nats/token", yscale=scale)
    axes.legend(frameon=False)
    rate_axes = axes.twinx()
    rate_axes.plot(tokens, [record["learning_rate"] for record in records], color="0.6", linestyle=":")
    rate_axes.set(ylabel="learning rate (dotted)", ylim=(0, None))
    figure.savefig(folder / CURVE_FILE, dpi=120)


def risen_loss(folder: Path) -> tuple[float, float] | None:
    """The mean training loss of a run's first and last tenth, if it rose by more than a tenth and a hundredth nat.

    A loss that is no number counts as infinite. Of runs of a few steps only such a last loss tells something.
    """
    losses = [math.inf if record["loss"] is None else record["loss"] for record in read_metrics(folder)]
    tenth = max(1, len(losses) // 10)
    if not losses or (len(losses) < _FEW_STEPS and losses[-1] < math.inf):
        return None
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    return (first, last) if math.isinf(last) or last > 1.1 * first + 0.01 else None


def _smoothed(values: list[float]) -> list[float]:
    """Mean of the last steps up to each one."""
    windows = (values[max(0, end - _SMOOTHED_STEPS) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def is_tensorboard_log(folder: Path) -> bool:
    """Whether all files in a folder were written for TensorBoard."""
    return all(path.name.startswith("events.out.") for path in folder.rglob("*") if not path.is_dir())


@contextmanager
def tensorboard_log(folder: Path | None) -> Iterator[OnStep]:
    """Yield an OnStep that writes a step's figures for TensorBoard; it does nothing where there is no folder.

    Raises: MinipuzzleError if TensorBoard is not installed.
    """
    if folder is None:
        yield ignore_step
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MinipuzzleError("TensorBoard is not installed", "pip install 'minipuzzle[tensorboard]'") from None
    with SummaryWriter(str(folder)) as writer:

        def on_step(record: StepRecord) -> None:
            for name, value in asdict(record).items():
                if name not in ("step", "tokens") and value is not None:
                    writer.add_scalar(name, float(value), record.step)

        yield on_step
