"""Results for people (rich tables) and for machines (plain dictionaries for --json), from the same figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from rich.console import Console

from minipuzzle.architecture.kinds import LAYER_KINDS, prunable_axes
from minipuzzle.architecture.memory import Deployment, memory_breakdown
from minipuzzle.architecture.model import UNIFORM, Architecture
from minipuzzle.architecture.quantities import format_count, format_gib
from minipuzzle.cut.plan import Plan
from minipuzzle.search.candidates import Candidate
from minipuzzle.show.tables import figures_table


def architecture_summary(architecture: Architecture, deployment: Deployment) -> dict[str, Any]:
    """Layers, widths, parameters and memory terms of an architecture."""
    breakdown = memory_breakdown(architecture, deployment)
    return {
        "model_type": architecture.model_type,
        "pattern": architecture.pattern,
        "num_layers": len(architecture.layers),
        "layers": architecture.layer_counts,
        "widths": {axis: width for axis in prunable_axes() if (width := architecture.width(axis)) is not None},
        "num_parameters": architecture.num_parameters,
        "num_active_parameters": architecture.num_active_parameters,
        "parameters": architecture.parameters_by_part(),
        "deployment": asdict(deployment),
        "memory_bytes": breakdown.total_bytes,
        "memory_terms": [asdict(term) for term in breakdown.terms],
        "estimates": [asdict(term) for term in breakdown.estimates],
    }


def print_architecture(architecture: Architecture, deployment: Deployment) -> None:
    """Print what a model is made of and what it needs, with estimates below the exact sum."""
    console = Console()
    console.print(f"[bold]{architecture.model_type}[/], {len(architecture.layers)} layers", highlight=False)
    console.print(f"pattern  {colored_pattern(architecture)}", highlight=False)
    widths = ((axis, architecture.width(axis)) for axis in prunable_axes())
    console.print("widths   " + ", ".join(f"{axis} {width}" for axis, width in widths if width), highlight=False)
    parameters = figures_table("part", "layers", "parameters", "share", title="Parameters")
    counts, total = architecture.layer_counts, architecture.num_parameters
    for part, count in architecture.parameters_by_part().items():
        parameters.add_row(part, str(counts.get(part, "")), format_count(count), f"{count / total:.1%}")
    parameters.add_row("[bold]total", str(len(architecture.layers)), f"[bold]{format_count(total)}", "100%")
    if (active := architecture.num_active_parameters) != total:
        parameters.add_row("active for a token", "", format_count(active), f"{active / total:.1%}")
    breakdown = memory_breakdown(architecture, deployment)
    memory = figures_table("term", "precision", "memory", title="Memory")
    for term in breakdown.terms:
        memory.add_row(term.name, term.precision, format_gib(term.num_bytes))
    memory.add_row("[bold]total", "", f"[bold]{format_gib(breakdown.total_bytes)}")
    for term in breakdown.estimates:
        memory.add_row(f"[dim]not counted: {term.name}", term.precision, f"[dim]{format_gib(term.num_bytes)}")
    console.print(parameters)
    console.print(memory)
    console.print(f"[dim]at {deployment.describe()}; engines add activations and buffers of their own", highlight=False)


def colored_pattern(architecture: Architecture, dropped: Sequence[int] = ()) -> str:
    """The pattern string in rich markup, one colour a kind, dropped layers struck out."""
    pieces = []
    for layer_idx, layer in enumerate(architecture.layers):
        kind = LAYER_KINDS[layer.kind]
        pieces.append(f"[{'dim strike' if layer_idx in dropped else kind.color}]{kind.symbol}[/]")
    return "".join(pieces)


def plan_summary(source: Architecture, plan: Plan, deployment: Deployment) -> dict[str, Any]:
    """A plan and what is left of the model, for --json."""
    return {
        "dropped_layers": list(source.layers_besides(plan.kept_layers)),
        "kept_layers": list(plan.kept_layers),
        **architecture_summary(plan.apply(source), deployment),
        "source_memory_bytes": memory_breakdown(source, deployment).total_bytes,
        "source_num_parameters": source.num_parameters,
    }


def print_plan(source: Architecture, target: Architecture, dropped: Sequence[int], deployment: Deployment) -> None:
    """Print a cut as a difference against its source."""
    console = Console()
    console.print(f"source   {colored_pattern(source, dropped)}", highlight=False)
    console.print(f"cut      {colored_pattern(target)}", highlight=False)
    table = figures_table("", "source", "cut", "left")
    for kind, count in source.layer_counts.items():
        left = target.layer_counts.get(kind, 0)
        table.add_row(f"{kind} layers", str(count), str(left), f"{left / count:.0%}")
    for axis in prunable_axes():
        before, after = source.widths(axis), target.widths(axis)
        if before and after:
            table.add_row(axis, _range(before), _range(after), f"{mean(after) / mean(before):.0%}")
    parameters = source.num_parameters, target.num_parameters
    table.add_row("parameters", *(format_count(count) for count in parameters), f"{parameters[1] / parameters[0]:.1%}")
    memory = [memory_breakdown(architecture, deployment) for architecture in (source, target)]
    for before_term, after_term in zip(memory[0].terms, memory[1].terms, strict=True):
        if before_bytes := before_term.num_bytes:
            sizes = format_gib(before_bytes), format_gib(after_term.num_bytes)
            table.add_row(before_term.name, *sizes, f"{after_term.num_bytes / before_bytes:.0%}")
    total = [breakdown.total_bytes for breakdown in memory]
    table.add_row("[bold]memory", *(format_gib(size) for size in total), f"[bold]{total[1] / total[0]:.1%}")
    console.print(table)
    console.print(f"[dim]memory at {deployment.describe()}", highlight=False)


def _range(widths: Sequence[int]) -> str:
    return str(widths[0]) if min(widths) == max(widths) else f"{min(widths)} to {max(widths)}"


def print_candidates(candidates: Sequence[Candidate], num_found: int) -> None:
    """Print the best candidates of a search."""
    is_timed = any(candidate.costs.step_nanoseconds for candidate in candidates)
    columns = ("candidate", "parameters", "memory", *(("tokens/s",) if is_timed else ()), "predicted loss")
    title = f"The {len(candidates)} best of all"
    if candidates[0].layout == UNIFORM:
        title = f"{len(candidates)} best of {num_found} candidates that fit and that no other one dominates"
    table = figures_table(*columns, title=title)
    for candidate in candidates:
        throughput = candidate.pricing.throughput(candidate.costs)
        table.add_row(
            candidate.describe(),
            format_count(candidate.num_parameters),
            format_gib(candidate.memory_bytes),
            *((f"{throughput:,.0f}",) if throughput else ()),
            f"{candidate.predicted_loss:.4g}",
        )
    Console().print(table)


def print_finalists(finalists: Sequence[Mapping[str, Any]]) -> None:
    """Print a race: each finalist before, and after its last round."""
    table = figures_table("finalist", "parameters", "KL before", "tokens", "KL after", "loss after", title="Race")
    for finalist in finalists:
        last = finalist["rounds"][-1]
        table.add_row(
            f"{'[bold]' if finalist['is_winner'] else ''}{finalist['pattern']}",
            format_count(finalist["num_parameters"]),
            f"{finalist['before']['kl']:.4f}",
            format_count(last["tokens"]),
            f"{last['kl']:.4f}",
            f"{last['loss']:.4f}{' ◂' if finalist['is_winner'] else ''}",
        )
    Console().print(table)


def print_choice(table: Mapping[str, Any]) -> None:
    """What the choice was made by: the race, the refinement, the best measured candidate."""
    if "finalists" in table:
        print_finalists(table["finalists"])
    if (refinement := table.get("refinement")) is not None:
        before, after = refinement["before"]["kl"], refinement["after"]["kl"]
        print(
            f"refined in {refinement['rounds']} rounds, {refinement['neighbours_measured']} neighbours: "
            f"KL {before:.4f} -> {after:.4f} nats/token"
        )
        for name, added_up in refinement.get("sum_of_dropped_layers_kl", {}).items():
            print(f"  {name}: measured {refinement[name]['kl']:.4f}, sum of the dropped layers' KLs {added_up:.4f}")
    if "candidates" in table:
        candidates = table["candidates"]
        plain = candidates[0].get("kl_not_compensated")
        mended = "" if plain is None else f"compensated ({plain:.4f} as it was cut) and "
        print(
            f"{len(candidates)} candidates measured; the best, KL {candidates[0]['kl']:.4f} nats/token "
            f"{mended}before "
            f"distillation, was predicted to be number {table['best_was_predicted']}"
        )


def print_planned_work(facts: Mapping[str, int]) -> None:
    """Print what a cut would do and take."""
    for name, value in facts.items():
        label = name.replace("_bytes", "").replace("_", " ")
        print(f"{label:<30} {format_gib(value) if name.endswith('_bytes') else f'{value:,}'}")
    print("dry run: nothing was written")


def print_compensation(found: Mapping[str, Any]) -> None:
    """Say how a cut was mended, by its record; or that it was not."""
    if not found:
        print("not compensated: what stays has the source's weights")
        return
    refitted, plain = found["layers_refitted"], found["layers_left_plain"]
    others = sum(layer["has_other_units"] for layer in found["layers"])
    print(
        f"compensated on {found['tokens']:,} tokens: {refitted} of {refitted + plain} layers refitted, "
        f"{plain} gained nothing on held-out text; {others} keep other units than planned"
    )
