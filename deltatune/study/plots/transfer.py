"""Score of a delta from one task on another, relative to that of the other's own delta, as a table of colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltatune.study.plots.canvas import sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 1.2
"""Relative score of the darkest colour."""


@dataclass(frozen=True)
class Transfers:
    """The table.

    Attributes:
        sources: of the rows; tasks, then baselines.
        targets: of the columns.
        values: one row a source; None where there is no score.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


def transfers_of(relative: Mapping[tuple[str, str], float], sources: Sequence[str], targets: Sequence[str]) -> Transfers:
    """From (source, target) -> relative score."""
    values = tuple(tuple(relative.get((source, target)) for target in targets) for source in sources)
    return Transfers(tuple(sources), tuple(targets), values)


def draw_transfers(table: Transfers) -> Figure:
    """Darker is better; numbers are percent of the score that the target's own delta has."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    figure, axes = sheet(2.4 + 0.52 * len(table.targets), 1.8 + 0.32 * len(table.sources))
    shades = colormaps["Blues"]
    for row, values in enumerate(table.values):
        for column, value in enumerate(values):
            if value is None:
                continue
            depth = 0.08 + 0.84 * max(0.0, min(1.0, value / MOST))
            axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=shades(depth), edgecolor="none"))
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color="white" if depth > 0.6 else "black")
    axes.set_xlim(-0.5, len(table.targets) - 0.5)
    axes.set_ylim(len(table.sources) - 0.5, -0.5)
    axes.set_xticks(range(len(table.targets)), table.targets, rotation=40, ha="right")
    axes.set_yticks(range(len(table.sources)), table.sources)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
