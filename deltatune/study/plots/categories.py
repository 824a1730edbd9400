"""Mean score by category of task and method, as a table of colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from deltatune.study.plots.canvas import sheet
from deltatune.study.statistics import Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Categories:
    """The table.

    Attributes:
        names: of the rows, each with its number of tasks.
        methods: of the columns.
        means: one row a category; None where a method has no score.
    """

    names: tuple[tuple[str, int], ...]
    methods: tuple[str, ...]
    means: tuple[tuple[float | None, ...], ...]


def categories_of(scores: Scores, category: Mapping[str, str], methods: Sequence[str]) -> Categories:
    """The mean over the tasks of each category, in alphabetical order."""
    names = sorted({category[task] for task in scores})
    own = {name: [row for task, row in scores.items() if category[task] == name] for name in names}
    means = tuple(
        tuple(fmean(found) if (found := [row[method] for row in own[name] if method in row]) else None for method in methods)
        for name in names
    )
    return Categories(tuple((name, len(own[name])) for name in names), tuple(methods), means)


def draw_categories(table: Categories) -> Figure:
    """Darker is better; the best of a row is set in bold letters."""
    from matplotlib import colormaps

    figure, axes = sheet(1.9 + 0.72 * len(table.methods), 1.2 + 0.32 * len(table.names))
    shades = colormaps["Blues"]
    for row, values in enumerate(table.means):
        best = max((value for value in values if value is not None), default=None)
        for column, value in enumerate(values):
            if value is None:
                continue
            axes.add_patch(_cell(column, row, shades(0.08 + 0.8 * max(0.0, min(1.0, value)))))
            weight = "bold" if value == best else "normal"
            ink = "white" if value > 0.62 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink, fontweight=weight)
    axes.set_xlim(-0.5, len(table.methods) - 0.5)
    axes.set_ylim(len(table.names) - 0.5, -0.5)
    axes.set_xticks(range(len(table.methods)), table.methods, rotation=40, ha="right")
    axes.set_yticks(range(len(table.names)), [f"{name} ({count})" for name, count in table.names])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _cell(column: int, row: int, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=colour, edgecolor="none")
