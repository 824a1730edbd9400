"""Score against the share of parameters that train, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from deltatune.study.plots.canvas import colours, sheet
from deltatune.study.record import Record
from deltatune.study.statistics import grouped

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One method.

    Attributes:
        method: its label.
        share: of the backbone's parameters that train, heads included; the mean over tasks.
        score: mean over trials.
    """

    method: str
    share: float
    score: float


def shares_of(records: Iterable[Record]) -> list[Point]:
    """The methods that train anything, the smallest share first."""
    found = []
    for method, own in grouped(records, lambda record: record.method).items():
        shares = [record.share for record in own if record.share]
        scores = [record.score for record in own if record.score is not None]
        if shares and len(shares) == len(own):
            found.append(Point(method, fmean(shares), fmean(scores)))
    return sorted(found, key=lambda point: point.share)


def draw_shares(points: Sequence[Point], order: Sequence[str]) -> Figure:
    """A mark and a name a method."""
    figure, axes = sheet(7.4, 3.4)
    colour = colours(order)
    for number, point in enumerate(points):
        axes.plot(100 * point.share, point.score, "o", color=colour[point.method], markersize=8)
        place = (0, 9 if number % 2 else -14)
        axes.annotate(point.method, (100 * point.share, point.score), xytext=place, textcoords="offset points", ha="center", fontsize=9)
    axes.set_xscale("log")
    axes.margins(0.12, 0.22)
    axes.set_xlabel("trained parameters, % of the backbone")
    axes.set_ylabel("mean score")
    axes.grid(alpha=0.3)
    return figure
