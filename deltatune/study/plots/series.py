"""Lines over a quantity, mostly on a logarithmic axis, with intervals: examples, lengths, sizes, stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deltatune.study.plots.canvas import colours, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float, float, float]]
"""(x, mean, low, high)."""


def draw_series(lines: Mapping[str, Points], order: Sequence[str], x: str, y: str, *, logarithmic: bool = True) -> Figure:
    """One line a name; ``order`` gives names the same colours in all pictures."""
    figure, axes = sheet(7.4, 3.8)
    colour = colours(order)
    for name in order:
        if points := lines.get(name):
            xs, means, lows, highs = zip(*points, strict=True)
            axes.plot(xs, means, "o-", color=colour[name], linewidth=2, markersize=5, label=name)
            axes.fill_between(xs, lows, highs, color=colour[name], alpha=0.12, linewidth=0)
    if logarithmic:
        axes.set_xscale("log")
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    return figure
