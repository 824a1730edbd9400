"""The learning curve: computed from a run's history here, drawn beneath; loss above, validation score below, by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import TYPE_CHECKING, Any

from deltatune.errors import missing_extra
from deltatune.training.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEWEST = 30
"""Points of the loss from which on they are smoothed: a mean of fewer hides what there is."""

WINDOW = 20
"""The mean goes over so many-th of the points on either side."""

TITLE = 80
"""Letters of a line of the title."""

MARKED = 60
"""Most points that are marked one by one."""

LOSS, SCORE, PALE = "#0072B2", "#D55E00", "#A8C8DC"
"""Blue and vermilion of Okabe and Ito, which the colour-blind tell apart, and the blue made pale."""


ROUND = [1, 2, 5, 10]
"""Steps between ticks, up to powers of ten."""


@dataclass(frozen=True)
class Curve:
    """Points of a learning curve.

    Attributes:
        loss: (step, loss), as logged.
        smooth: the same, as a running mean; empty where there are fewer than ``FEWEST``.
        score: (step, validation score).
    """

    loss: tuple[tuple[int, float], ...]
    smooth: tuple[tuple[int, float], ...]
    score: tuple[tuple[int, float], ...]


def curve_of(history: Sequence[Mapping[str, Any]]) -> Curve:
    """The curve in the entries a Trainer logged.

    >>> curve_of([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_score": 0.5}]).score
    ((2, 0.5),)
    """
    loss = tuple((int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry)
    score = tuple((int(entry["step"]), float(entry["eval_score"])) for entry in history if "eval_score" in entry)
    return Curve(loss, _smoothed(loss) if len(loss) >= FEWEST else (), score)


def _smoothed(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """The mean of each point and as many on either side, fewer towards the ends: so it neither lags behind nor runs ahead."""
    reach = len(points) // WINDOW
    smooth = []
    for place, (step, _) in enumerate(points):
        near = min(reach, place, len(points) - 1 - place)
        smooth.append((step, mean(value for _, value in points[place - near : place + near + 1])))
    return tuple(smooth)


def draw_curve(curve: Curve, target: Path, *, title: str, metric: str) -> None:
    """Write the picture, PNG.

    Raises:
        MissingExtra: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as cause:
        raise missing_extra("matplotlib", "train") from cause
    rows = 2 if curve.score else 1
    figure = Figure(figsize=(7, 2.6 * rows + 0.6), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    _draw_loss(axes[0], curve)
    if curve.score:
        _draw_score(axes[1], curve.score, metric)
    _dress(figure, axes, title, last=max((step for step, _ in (*curve.loss, *curve.score)), default=1))
    write_whole(target, lambda scratch: figure.savefig(scratch, dpi=120))


def _draw_loss(axis: Axes, curve: Curve) -> None:
    """The running mean over the single values, or these alone where they are few; the legend stands above the plot."""
    marker = "o" if len(curve.loss) < FEWEST else None
    single = PALE if curve.smooth else LOSS
    axis.plot(
        *_columns(curve.loss), color=single, linewidth=1 if curve.smooth else 2, marker=marker, markersize=4, label="each logged step"
    )
    if curve.smooth:
        axis.plot(*_columns(curve.smooth), color=LOSS, linewidth=2, label="running mean")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize="small", borderaxespad=0)
    axis.set_ylabel("training loss")
    axis.set_ylim(0, 1.08 * max((value for _, value in curve.loss), default=1.0) or 1.0)


def _draw_score(axis: Axes, score: Sequence[tuple[int, float]], metric: str) -> None:
    """The scores with a mark each, and the last one in words beside it."""
    axis.plot(*_columns(score), color=SCORE, linewidth=2, marker="o", markersize=5 if len(score) <= MARKED else 2)
    axis.set_ylabel(f"validation {metric}")
    step, value = score[-1]
    axis.annotate(
        f"{value:.3f}", (step, value), textcoords="offset points", xytext=(8, 0), va="center", fontweight="bold", annotation_clip=False
    )
    values = [value for _, value in score]
    spare = max(0.15 * (max(values) - min(values)), 0.02)
    axis.set_ylim(min(values) - spare, max(values) + spare)


def _dress(figure: Figure, axes: Sequence[Axes], title: str, last: int) -> None:
    """Whole steps from zero on, few ticks, a faint grid."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND))
    axes[-1].set_xlabel("optimiser step")
    axes[-1].set_xlim(0, 1.02 * last)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, steps=ROUND, integer=True))
    axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    figure.align_ylabels(axes)
    figure.suptitle(fill(title, TITLE))


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
