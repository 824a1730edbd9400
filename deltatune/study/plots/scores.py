"""Scores by method: the mean over tasks with its interval, on top of the scores of the tasks themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltatune.study.plots.canvas import FAINT, colours, sheet
from deltatune.study.statistics import Mean, Scores, mean_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class MethodScores:
    """One row.

    Attributes:
        method: its label.
        mean: over tasks.
        tasks: the score of each.
    """

    method: str
    mean: Mean
    tasks: tuple[float, ...]


def method_scores(scores: Scores, methods: Sequence[str]) -> list[MethodScores]:
    """Of the methods that have any, the best mean first."""
    found = []
    for method in methods:
        own = tuple(row[method] for row in scores.values() if method in row)
        if own:
            found.append(MethodScores(method, mean_of(own), own))
    return sorted(found, key=lambda one: -one.mean.value)


def draw_method_scores(rows: Sequence[MethodScores], order: Sequence[str], what: str = "score on the test rows") -> Figure:
    """A row a method; ``order`` gives methods the same colours in all pictures."""
    figure, axes = sheet(7.4, 0.8 + 0.42 * len(rows))
    colour = colours(order)
    for place, row in enumerate(rows):
        axes.plot(row.tasks, [place] * len(row.tasks), "|", color=FAINT, markersize=9, zorder=1)
        axes.plot([row.mean.low, row.mean.high], [place, place], color=colour[row.method], linewidth=3, solid_capstyle="butt", zorder=2)
        axes.plot(row.mean.value, place, "o", color=colour[row.method], markersize=7, zorder=3)
        axes.annotate(
            f"{row.mean.value:.3f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9, annotation_clip=False
        )
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(what)
    axes.grid(axis="x", alpha=0.3)
    return figure
