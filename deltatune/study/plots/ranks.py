"""Average ranks: how far apart methods are, and which cannot be told apart (critical-difference diagram, Demsar 2006)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from deltatune.study.plots.canvas import INK, sheet
from deltatune.study.statistics import Ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEP = 0.42
"""Height of a line of text."""


def draw_ranks(ranks: Ranks) -> Figure:
    """The axis of ranks with the best at the left, names beneath at both sides, bars over who cannot be told apart."""
    names = list(ranks.average)
    half, bars = math.ceil(len(names) / 2), ranks.alike
    top = STEP * (len(bars) + 1)
    figure, axes = sheet(7.4, 1.0 + STEP * half + 0.6 * top)
    first, last = 1.0, float(len(names))
    axes.set_axis_off()
    axes.set_xlim(first - 0.28 * (last - first) - 0.2, last + 0.28 * (last - first) + 0.2)
    axes.set_ylim(-STEP * (half + 0.8), top + 0.75)
    axes.plot([first, last], [top, top], color=INK, linewidth=1.2)
    for rank in range(1, len(names) + 1):
        axes.plot([rank, rank], [top, top + 0.1], color=INK, linewidth=1.2)
        axes.text(rank, top + 0.16, str(rank), ha="center", va="bottom", fontsize=9)
    for place, name in enumerate(names):
        left = place < half
        row = place if left else len(names) - 1 - place
        _lead(axes, name, ranks.average[name], -STEP * (row + 0.4), top, first if left else last, left=left)
    for number, group in enumerate(bars):
        y = top - STEP * (number + 0.6)
        axes.plot([ranks.average[group[0]] - 0.04, ranks.average[group[-1]] + 0.04], [y, y], color=INK, linewidth=4, solid_capstyle="round")
    length = min(ranks.difference, last - first)
    axes.plot([first, first + length], [top + 0.6, top + 0.6], color="#D55E00", linewidth=2, marker="|", markersize=8)
    axes.text(first + length + 0.06, top + 0.6, f"critical difference {ranks.difference:.2f}", va="center", fontsize=9, color="#D55E00")
    return figure


def _lead(axes: Axes, name: str, rank: float, y: float, top: float, edge: float, *, left: bool) -> None:
    """A line from the axis to the name."""
    end = edge - 0.12 if left else edge + 0.12
    axes.plot([rank, rank, end], [top, y, y], color=INK, linewidth=0.9)
    text = f"{name}  {rank:.2f}" if left else f"{rank:.2f}  {name}"
    axes.text(end - 0.05 if left else end + 0.05, y, text, ha="right" if left else "left", va="center", fontsize=9)
