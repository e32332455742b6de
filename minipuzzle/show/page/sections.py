"""What a page says, section by section, from the steps of a run; nothing is said of what no step knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from minipuzzle.architecture.kinds import prunable_axes
from minipuzzle.architecture.quantities import format_count, format_gib
from minipuzzle.cut.layer_metrics import LAYER_METRICS
from minipuzzle.cut.scores import Scores
from minipuzzle.quality.record import LABELS, with_interval
from minipuzzle.show.page import charts
from minipuzzle.show.page.charts import Chart
from minipuzzle.show.page.facts import Step
from minipuzzle.show.page.parts import Page, Section, Table
from minipuzzle.show.page.strips import Facts, Run, architecture

_SHOWN_CANDIDATES = 10
_SHOWN_METRICS = ("mse", "kl")
_QUALITY_FIGURES = ("loss", "bits_per_byte", "loss_rise", "kl", "top1_agreement")


def page_of(steps: Sequence[Step]) -> Page:
    """The page of some steps, the first step first."""
    run = Run(steps=steps)
    makers = (architecture, _memory, _scores, _candidates, _compensation, _distillation, _quality, _checks, _origin)
    sections = [section for make in makers if (section := make(run)) is not None]
    name = steps[-1].name or steps[-1].command or "model"
    return Page(title=name, lead=_lead(run), tiles=_tiles(run), sections=sections)


def _lead(run: Run) -> str:
    if not run.models:
        return "What was measured."
    last = run.models[-1][1]
    verbs = dict.fromkeys(step.command for step in run.steps if "model" in step.results and step.command)
    layers, parameters = len(last["layers"]), format_count(last["num_parameters"])
    lead = f"A {last['model_type']} model of {layers} layers and {parameters} parameters"
    return f"{lead}, made by {', '.join(verbs)}." if verbs else f"{lead}."


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    tiles: list[tuple[str, str, str]] = []
    if run.models:
        first, last = run.models[0][1], run.models[-1][1]
        of_source = len(run.models) > 1
        for label, key, shown in (
            ("memory", "memory_bytes", format_gib),
            ("parameters", "num_parameters", format_count),
        ):
            note = f"{last[key] / first[key]:.0%} of {shown(first[key])}" if of_source else ""
            tiles.append((label, shown(last[key]), note))
        note = f"of {len(first['layers'])}" if of_source else ""
        tiles.append(("layers", str(len(last["layers"])), note))
    if rows := quality_rows(run.steps):
        _, _, figures = rows[-1]
        if figures.get("kl") is not None:
            tiles.append(("KL to the teacher", f"{figures['kl']:.4f}", "nats/token"))
        if figures.get("top1_agreement") is not None:
            tiles.append(("same best token", f"{figures['top1_agreement']:.1%}", "as the teacher"))
    return tiles


def _memory(run: Run) -> Section | None:
    if not run.models:
        return None
    shown: list[tuple[str, Facts]] = []
    for name, model in run.models:
        if model["memory"] not in [other["memory"] for _, other in shown]:
            shown.append((name, model))
    terms = charts.memory_terms([model for _, model in shown])
    rows = [(term, *(format_gib(model["memory"].get(term, 0)) for _, model in shown)) for term in terms]
    rows.append(("all", *(format_gib(model["memory_bytes"]) for _, model in shown)))
    deployment = shown[0][1]["deployment"]
    text = (
        f"Weights, caches and states at a context of {deployment['context_tokens']:,} tokens, batch "
        f"{deployment['batch']}; activations and buffers of engines come on top."
    )
    return Section(
        key="memory",
        title="Memory",
        text=text,
        legend=[(term, f"var({variable})") for term, variable in terms.items()],
        charts=[charts.memory_chart(shown, run.budget_bytes)],
        details=[Table(caption="Terms", header=("", *(name for name, _ in shown)), rows=rows)],
    )


def _scores(run: Run) -> Section | None:
    if run.prune is None or not run.layer_scores:
        return None
    kinds = [layer["kind"] for layer in run.prune.results["source"]["layers"]]
    metrics = [metric for metric in _SHOWN_METRICS if metric in run.layer_scores] or list(run.layer_scores)[:1]
    pictures = [
        charts.layer_score_chart(name, run.layer_scores[name], kinds, run.kept_layers or ()) for name in metrics
    ]
    if (measured := next((step.scores for step in run.steps if step.scores is not None), None)) is not None:
        pictures += _unit_charts(measured, run.prune.results)
    return Section(
        key="scores",
        title="Scores",
        text="What the model loses without each layer, and how unequal the units within layers are.",
        legend=[(kind, charts.color_of(kind)) for kind in dict.fromkeys(kinds)],
        charts=pictures,
        points=[f"{name}: {LAYER_METRICS[name].definition}" for name in metrics if name in LAYER_METRICS],
    )


def _unit_charts(scores: Scores, results: Facts) -> Iterator[Chart]:
    for axis in prunable_axes():
        by_layer = {
            idx: scores.unit_scores(axis, idx).tolist()
            for idx in (None, *range(len(results["source"]["layers"])))
            if (axis if idx is None else f"{axis}.{idx}") in scores.units
        }
        if not by_layer or max(map(len, by_layer.values())) < 2:
            continue
        before, after = (_mean_size(results[which], axis) for which in ("source", "model"))
        yield charts.unit_score_chart(axis, by_layer, after / before if before and after else 1.0)


def _mean_size(model: Facts, axis: str) -> float:
    if axis == "hidden":
        return float(model["hidden"])
    sizes = [layer["sizes"][axis] for layer in model["layers"] if axis in layer["sizes"]]
    return sum(sizes) / len(sizes) if sizes else 0.0


def _candidates(run: Run) -> Section | None:
    tables = next((step.tables for step in run.steps if {"candidates", "frontier"} & step.tables.keys()), None)
    if tables is None:
        return None
    pictures, shown = [], []
    candidates = tables.get("candidates", {}).get("candidates", [])
    if candidates:
        pictures.append(charts.candidate_chart(candidates, run.budget_bytes))
        rows = [
            (item["pattern"], format_count(item["num_parameters"]), format_gib(item["memory_bytes"]),
             f"{item['predicted_loss']:.4g}", f"{item['kl']:.4f}", f"{item['agreement']:.1%}")
            for item in candidates[:_SHOWN_CANDIDATES]
        ]  # fmt: skip
        header = ("layers", "parameters", "memory", "predicted loss", "measured KL", "agreement")
        shown.append(Table(caption=f"The best of {len(candidates)} measured", header=header, rows=rows))
    if points := tables.get("frontier", {}).get("frontier"):
        pictures.append(charts.frontier_chart(points))
    if finalists := tables.get("candidates", {}).get("finalists"):
        pictures.append(charts.race_chart(finalists))
    text = "Measured together on text before any training. What is best before training need not be so after it."
    return Section(key="candidates", title="Candidates", text=text, charts=pictures, tables=shown)


def _compensation(run: Run) -> Section | None:
    found = next((step.tables["compensation"] for step in run.steps if "compensation" in step.tables), None)
    if found is None or not found.get("layers"):
        return None
    text = (
        f"Output projections refitted in closed form on {found['tokens']:,} tokens: {found['layers_refitted']} layers "
        f"took new weights, {found['layers_left_plain']} gained nothing on held-out text and keep theirs."
    )
    chart = charts.compensation_chart(found["layers"])
    return Section(key="compensation", title="Compensation", text=text, charts=[chart])


def _distillation(run: Run) -> Section | None:
    step = next((step for step in run.steps if step.command == "distill" and step.results), None)
    if step is None:
        return None
    results = step.results
    curve = step.curve or results.get("curve", [])
    pictures = [charts.learning_chart(curve, results.get("validation_kl_before"))] if curve else []
    text = f"{results['steps']:,} steps, {format_count(results['tokens'])} tokens, {results['epochs']:.2f} epochs."
    if results.get("remaining_kl_fraction") is not None:
        text += f" {results['remaining_kl_fraction']:.1%} of the KL on held-out text is left."
    return Section(key="distillation", title="Distillation", text=text, charts=pictures)


def quality_rows(steps: Sequence[Step]) -> list[tuple[str, str, Facts]]:
    """What was measured: (model, text, figures), in the order of the steps."""
    rows: list[tuple[str, str, Facts]] = []
    for step in steps:
        for model, by_text in step.results.get("quality", {}).items():
            rows += [(model, text, figures) for text, figures in by_text.items()]
    return rows


def _quality(run: Run) -> Section | None:
    rows = quality_rows(run.steps)
    if not rows:
        return None
    figures = [name for name in _QUALITY_FIGURES if any(of.get(name) is not None for _, _, of in rows)]
    shown = [(model, text, *(with_interval(of, name, LABELS[name][1]) for name in figures)) for model, text, of in rows]
    header = ("model", "text", *(LABELS[name][0] for name in figures))
    text = "± is a 95 % interval of the mean, by how windows of text differ."
    table = Table(caption="Quality on held-out text", header=header, rows=shown, num_names=2)
    return Section(key="quality", title="Quality", text=text, tables=[table])


def _checks(run: Run) -> Section | None:
    points: list[str] = []
    for step in run.steps:
        found, name = step.results, step.name or step.command
        if (limit := found.get("budget_bytes")) is not None:
            fits = "within" if found["model"]["memory_bytes"] <= limit else "above"
            points.append(
                f"{name}: {format_gib(found['model']['memory_bytes'])}, {fits} the budget of {format_gib(int(limit))}"
            )
        if step.command == "distill" and "problem" in found:
            points.append(f"{name}: {found['problem'] or 'weights are finite, and the student did not get worse'}")
        if (checked := found.get("verification")) is not None:
            difference = checked["relative_difference"]
            points.append(
                f"{name}: written, read back and run on {checked['num_tokens']:,} tokens; "
                f"{f'differs by {difference:.1e} from' if difference else 'computes the same as'} the source rounded "
                f"alike; KL from the source {checked['kl_from_source']:.4g} nats/token"
            )
        if (number := found.get("num_tensors")) is not None:
            points.append(f"{name}: digests of all {number:,} tensors are recorded, which `minipuzzle verify` compares")
    return Section(key="checks", title="Verified", points=points) if points else None


def _origin(run: Run) -> Section | None:
    commands = [
        made["command_line"] for step in run.steps if (made := step.record.get("made")) and made["command_line"]
    ]
    rows = [
        (step.name or step.command, field_name.replace("_", " "), str(value))
        for step in run.steps
        for field_name, value in step.record.items()
        if field_name.endswith(("fingerprint", "version")) and value
    ]
    for step in run.steps:
        for package, number in (step.record.get("made") or {}).get("versions", {}).items():
            rows.append((step.name or step.command, package, number))
        if machine := (step.record.get("made") or {}).get("machine"):
            rows.append((step.name or step.command, "machine", machine))
    if not rows:
        return None
    table = Table(caption="Fingerprints and versions", header=("step", "", ""), rows=rows, num_names=3)
    return Section(key="origin", title="How it was made", commands=[line for line in commands if line], details=[table])
