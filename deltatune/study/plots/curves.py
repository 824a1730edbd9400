"""Learning curves: validation score by step, averaged over trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from deltatune.study.plots.canvas import colours, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[tuple[int, float], ...]
"""(step, score)."""

POINTS = 40
"""Of a mean curve."""


def curves_of(histories: Sequence[Sequence[Mapping[str, Any]]]) -> Curve:
    """The mean of curves with the same steps, such as those of several seeds; steps that not all have are left out."""
    curves = [{int(entry["step"]): float(entry["eval_score"]) for entry in history if "eval_score" in entry} for history in histories]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    return tuple((step, fmean(curve[step] for curve in curves)) for step in shared)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of curves of different lengths, at steps spaced evenly on a logarithmic axis; each keeps its last score to the end."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return ()
    first, last = max(curve[0][0] for curve in curves), max(curve[-1][0] for curve in curves)
    steps = np.unique(np.geomspace(first, max(last, first + 1), POINTS).round().astype(int))
    lines = [np.interp(steps, [step for step, _ in curve], [score for _, score in curve]) for curve in curves]
    values = np.mean(lines, axis=0)
    return tuple((int(step), float(value)) for step, value in zip(steps, values, strict=True))


def draw_curves(curves: Mapping[str, Sequence[Curve]], order: Sequence[str]) -> Figure:
    """One line a method, with its name at its end."""
    figure, axes = sheet(7.4, 3.8)
    colour = colours(order)
    for method in order:
        line = mean_curve(curves.get(method, ()))
        if line:
            axes.plot(*zip(*line, strict=True), color=colour[method], linewidth=2, label=method)
    axes.set_xscale("log")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("validation score, mean")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    return figure
