"""The pictures of ``docs/benchmarks.md``: what they show is computed here, and drawn beneath."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench_figures import Read

from deltatune.study.plots.canvas import FAINT, INK, colours, sheet, svg

BACKBONES = {"minilm": "MiniLM\n16 x 128", "smollm2-135m": "SmolLM2-135M\n4 x 128", "opt": "OPT-like\n4 x 128"}
STEPS = {"ours / floor": "LoRA, ours", "peft / floor": "LoRA, PEFT", "full / floor": "full fine-tuning"}
TURNS = {"decoding": ("peft", "ours"), "in turn": ("peft in turn", "ours"), "prefill": ("peft", "ours")}


@dataclass(frozen=True)
class Bars:
    """Groups of bars.

    Attributes:
        groups: names of the groups.
        series: name -> a value for each group; None leaves a gap.
        label: of the axis.
        line: a value that is marked, and its name.
        log: the axis is logarithmic.
    """

    groups: tuple[str, ...]
    series: Mapping[str, tuple[float | None, ...]]
    label: str
    line: tuple[float, str]
    log: bool = False


def steps(read: Read) -> Bars:
    """A step of LoRA on all linear maps, as a ratio to the floor."""
    found = read("step") or {}
    series = {said: tuple(found.get(name, {}).get(key) for name in BACKBONES) for key, said in STEPS.items()}
    return Bars(tuple(BACKBONES.values()), series, "step / floor", (1.0, "floor"))


def routed(read: Read) -> Bars:
    """What PEFT takes for the batch that ours takes one unit for."""
    found = read("many") or {}
    sizes = {"S": "S: width 512, 8 layers", "M": "M: width 1024, 12 layers"}
    keys = {"S": ("S1", "S3", "S7"), "M": ("S2", "S3", "S7")}
    words = ("mixed batch, decoding", "delta by delta, decoding", "mixed batch, prefill")
    series = {sizes[size]: tuple(found.get(size, {}).get(key) for key in keys[size]) for size in sizes}
    return Bars(words, series, "PEFT's time / ours", (1.0, "ours"), log=True)


@dataclass(frozen=True)
class Points:
    """Predicted against found.

    Attributes:
        kinds: name -> (found, predicted) of each configuration.
        bar: how far a ratio may be from 1.
    """

    kinds: Mapping[str, tuple[tuple[float, float], ...]]
    bar: float


def estimates(read: Read) -> Points:
    """Memory in megabytes."""
    found = read("estimates") or {"configurations": {}, "bar": 0.15}
    kinds = {"live_bytes": "live tensors", "resident_bytes": "process"}
    lines = found["configurations"].values()
    points = {said: tuple((line["found"][key] / 1e6, line["predicted"][key] / 1e6) for line in lines) for key, said in kinds.items()}
    return Points(points, found["bar"])


def draw_bars(bars: Bars) -> str:
    """The picture, SVG."""
    figure, axes = sheet(7.2, 0.55 * len(bars.groups) * max(1, len(bars.series) - 1) + 1.3)
    thick = 0.8 / len(bars.series)
    for number, (name, colour) in enumerate(colours(bars.series).items()):
        places = [place + (number - (len(bars.series) - 1) / 2) * thick for place in range(len(bars.groups))]
        shown = [(place, value) for place, value in zip(places, bars.series[name], strict=True) if value is not None]
        axes.barh([place for place, _ in shown], [value for _, value in shown], height=0.92 * thick, color=colour, label=name)
        for place, value in shown:
            axes.text(value, place, f" {said(value)}", va="center", fontsize=8, color=INK)
    axes.axvline(bars.line[0], color=INK, linewidth=1, label=bars.line[1])
    axes.set_yticks(range(len(bars.groups)), bars.groups)
    axes.invert_yaxis()
    if bars.log:
        _round_numbers(axes)
    axes.set_xlabel(bars.label)
    axes.margins(x=0.1)
    axes.set_xlim(left=bars.line[0] if bars.log else 0.0)
    axes.grid(axis="x", color=FAINT, alpha=0.5)
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(bars.series) + 1, frameon=False, fontsize=8)
    return svg(figure)


def _round_numbers(axes: Any) -> None:
    """A logarithmic axis on which numbers can be read."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def said(value: float) -> str:
    """A figure with the digits that mean something.

    >>> said(1.1964), said(58.04)
    ('1.20', '58.0')
    """
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def draw_points(points: Points) -> str:
    """The picture, SVG: one line is where both are the same, the band is the bar."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = sheet(5.2, 4.6)
    values = [value for kind in points.kinds.values() for pair in kind for value in pair]
    ends = [min(values) / 1.3, max(values) * 1.3]
    axes.plot(ends, ends, color=INK, linewidth=1, label="the same")
    bands = ([(1 - points.bar) * end for end in ends], [(1 + points.bar) * end for end in ends])
    axes.fill_between(ends, *bands, color=FAINT, alpha=0.4, linewidth=0, label=f"within {points.bar:.0%}")
    for (name, colour), marker in zip(colours(points.kinds).items(), "os", strict=False):
        axes.scatter(*_columns(points.kinds[name]), color=colour, marker=marker, s=26, label=name, zorder=3)
    for axis, said in ((axes.xaxis, "found, MB"), (axes.yaxis, "predicted, MB")):
        axis.set_label_text(said)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    return svg(figure)


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def pictures(read: Read) -> dict[str, str]:
    """Name -> SVG, of the results that are there."""
    made: dict[str, Any] = {"step": ("step", steps, draw_bars), "routed": ("many", routed, draw_bars)}
    made["estimates"] = ("estimates", estimates, draw_points)
    return {name: _plain(draw(compute(read))) for name, (needs, compute, draw) in made.items() if read(needs)}


def _plain(picture: str) -> str:
    """On white, since pages may be dark; the ids that one run gives and another does not are none."""
    return re.sub(r"(<svg [^>]*?)>", r'\1 style="background: white">', picture, count=1)
