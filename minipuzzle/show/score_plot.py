"""The figure of layer scores as it is published: score by position, coloured by kind, on a logarithmic axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minipuzzle.architecture.model import Architecture
from minipuzzle.cut.scores import Scores
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.outputs import output_file

FORMATS = (".png", ".svg", ".pdf")
COLORS = {"mamba": "tab:cyan", "attention": "tab:red", "mlp": "tab:olive", "moe": "tab:purple"}


def check_plot_path(path: Path) -> None:
    """Refuse a name that no picture can have.

    Raises: MinipuzzleError for another format or a folder that does not exist.
    """
    if path.suffix not in FORMATS:
        raise MinipuzzleError(f"{path} is no picture", f"give --plot a name that ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise MinipuzzleError(f"the folder of {path} does not exist", "make it, or choose another --plot")


def draw_scores(architecture: Architecture, scores: Scores, path: Path, metric: str = "mse") -> None:
    """Draw the scores of one metric. Layers that score zero or were not measured have no point.

    Source: arXiv 2504.03624, figure 9.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = scores.layer[metric]
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind in architecture.layer_counts:
        indices = [idx for idx in architecture.layer_indices(kind) if values[idx] > 0]
        axes.plot(indices, values[indices], "o", color=COLORS.get(kind, "tab:gray"), label=kind)
    shown = np.flatnonzero(values > 0)
    axes.plot(shown, values[shown], "-", color="lightgray", zorder=0)
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{metric} of the LM head's input without the layer")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with output_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150)
