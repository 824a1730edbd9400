"""The sheet that pictures are drawn on: one manner for all, written as vector graphics that are the same each time."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from deltatune.errors import missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8A7A00",
    "#5D3A9B",
    "#444444",
    "#A0A0A0",
    "#994F00",
    "#40B0A6",
)
"""Okabe and Ito's, which the colour-blind tell apart, and some more."""

INK, FAINT = "#222222", "#BBBBBB"

CLIP = re.compile(r'<clipPath id="(\w+)"')


def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as cause:
        raise missing_extra("matplotlib", "study") from cause
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    return figure, axes


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, by its place."""
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def svg(figure: Figure) -> str:
    """The picture's text: letters as paths, so that it looks the same anywhere."""
    from matplotlib import rc_context

    target = io.StringIO()
    with rc_context({"svg.hashsalt": "deltatune", "svg.fonttype": "path"}):
        figure.savefig(target, format="svg", metadata={"Date": None})
    lines = target.getvalue().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("<svg"))
    return _named("\n".join(line.rstrip() for line in lines[start:]) + "\n")


def _named(text: str) -> str:
    """The same with clip paths named by what the picture holds: matplotlib names some of them by an address in memory."""
    for number, name in enumerate(dict.fromkeys(CLIP.findall(text))):
        text = text.replace(name, f"@{number}@")
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return re.sub(r"@(\d+)@", rf"clip-{digest}-\1", text)
