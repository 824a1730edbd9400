"""A quantity by kind of parameter and layer, as a table of colours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from deltatune.study.plots.canvas import sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Layers:
    """The table.

    Attributes:
        kinds: of the rows.
        layers: of the columns; None is what lies outside the layers, and last.
        means: one row a kind; None where a layer has none of it.
    """

    kinds: tuple[str, ...]
    layers: tuple[int | None, ...]
    means: tuple[tuple[float | None, ...], ...]


def layers_of(lines: Iterable[Mapping[str, Any]], what: str) -> Layers:
    """The mean of ``what`` over the lines of a kind and layer; a line has ``kind``, ``layer`` and numbers."""
    found: dict[tuple[str, int | None], list[float]] = defaultdict(list)
    for line in lines:
        found[line["kind"], line["layer"]].append(float(line[what]))
    kinds = tuple(dict.fromkeys(kind for kind, _ in found))
    layers = tuple(sorted({layer for _, layer in found}, key=lambda layer: (layer is None, layer)))
    return Layers(kinds, layers, tuple(tuple(_mean(found.get((kind, layer))) for layer in layers) for kind in kinds))


def _mean(values: list[float] | None) -> float | None:
    return fmean(values) if values else None


def draw_layers(table: Layers) -> Figure:
    """Darker is more, and the darkest is the largest of the table."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    figure, axes = sheet(3.4 + 0.62 * len(table.layers), 1.1 + 0.32 * len(table.kinds))
    largest = max((value for row in table.means for value in row if value is not None), default=0.0) or 1.0
    for row, values in enumerate(table.means):
        for column, value in enumerate(values):
            if value is not None:
                shade = value / largest
                colour = colormaps["Blues"](0.08 + 0.8 * shade)
                axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=colour, edgecolor="none"))
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color="white" if shade > 0.62 else "black")
    axes.set_xlim(-0.5, len(table.layers) - 0.5)
    axes.set_ylim(len(table.kinds) - 0.5, -0.5)
    axes.set_xticks(range(len(table.layers)), ["outside" if layer is None else str(layer) for layer in table.layers])
    axes.set_yticks(range(len(table.kinds)), table.kinds)
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
