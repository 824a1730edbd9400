"""The learning curve: computed from a run's history here, drawn beneath; loss above, validation score below, by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.errors import missing_extra
from deltatune.training.files import write_whole

SMOOTHING = 0.9


@dataclass(frozen=True)
class Curve:
    """Points of a learning curve.

    Attributes:
        loss: (step, loss), as logged.
        smooth: the same, as a running mean that forgets.
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
    return Curve(loss, _smoothed(loss), score)


def _smoothed(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """m_t = a m_{t-1} + (1 - a) x_t, divided by 1 - a^t, so that the beginning is not pulled to zero."""
    mean, smooth = 0.0, []
    for t, (step, value) in enumerate(points, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        smooth.append((step, mean / (1 - SMOOTHING**t)))
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
    except ImportError as cause:
        raise missing_extra("matplotlib", "train") from cause
    rows = 2 if curve.score else 1
    figure = Figure(figsize=(7, 2.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot(*_columns(curve.loss), color="0.8", linewidth=1, label="each")
    axes[0].plot(*_columns(curve.smooth), color="C0", linewidth=2, label="smoothed")
    axes[0].set_ylabel("training loss")
    axes[0].set_ylim(0, 1.08 * max((value for _, value in curve.loss), default=1.0))
    axes[0].legend(frameon=False)
    if curve.score:
        axes[1].plot(*_columns(curve.score), color="C1", marker="o", linewidth=2)
        axes[1].set_ylabel(f"validation {metric}")
        step, value = curve.score[-1]
        axes[1].annotate(f"{value:.3f}", (step, value), textcoords="offset points", xytext=(0, 8), ha="right", fontweight="bold")
        axes[1].margins(y=0.2)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("optimiser step")
    figure.suptitle(title)
    write_whole(target, lambda scratch: figure.savefig(scratch, dpi=120))


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
