"""What ``benchmarks/methods.py`` measured of each method, as packaged in ``measured.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Measured:
    """A method on MiniLM, with its own defaults but for what had to be set.

    Attributes:
        scores: task -> mean accuracy and its standard deviation over the seeds (None with one seed).
        share: what trains, before anything is dropped or pruned, as a share of the backbone's parameters.
        file_bytes: of the delta's folder, head included.
        step: seconds a step, as a ratio to full fine-tuning; None where nothing trains.
        memory: peak memory, as a ratio to full fine-tuning.
        collapsed: task -> with how many of how many seeds every test row got the same answer; tasks where it never did are left out.
        settings: the fields that were not at their defaults, as one sets them; empty for most.
    """

    scores: dict[str, tuple[float, float | None]]
    share: float
    file_bytes: int
    step: float | None
    memory: float | None
    collapsed: dict[str, tuple[int, int]] = field(default_factory=dict)
    settings: str = ""

    def __str__(self) -> str:
        scores = [f"{task} {_told(*score)}{self._mark(task)}" for task, score in self.scores.items()]
        costs = [f"{word} {ratio:.2f}" for word, ratio in (("step", self.step), ("memory", self.memory)) if ratio is not None]
        sizes = [f"{self.share:.3%} of the parameters", f"{self.file_bytes / 1e3:,.0f} kB"]
        told = [", ".join(scores), ", ".join(sizes), ", ".join(costs) + " of full fine-tuning's" if costs else ""]
        return "; ".join(filter(None, [*told, f"with {self.settings}" if self.settings else ""]))

    def _mark(self, task: str) -> str:
        if task not in self.collapsed:
            return ""
        count, seeds = self.collapsed[task]
        often = "" if count == seeds else f" with {count} of {seeds} seeds"
        return f" (one answer to every text{often})"


def measured(name: str) -> Measured | None:
    """The row of a method; None where it was not measured.

    >>> measured("of nobody") is None
    True
    """
    row = _table()["rows"].get(name)
    if row is None:
        return None
    scores = {task: (float(mean), None if spread is None else float(spread)) for task, (mean, spread) in row["scores"].items()}
    collapsed = {task: (int(count), int(seeds)) for task, (count, seeds) in row["collapsed"].items()}
    return Measured(scores, row["share"], row["file_bytes"], row["step"], row["memory"], collapsed, row["settings"])


def budget() -> str:
    """What every method was given, in words."""
    return str(_table()["budget"])


def _told(mean: float, spread: float | None) -> str:
    return f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


@cache
def _table() -> dict[str, Any]:
    place = files("deltatune.methods") / "measured.json"
    if not place.is_file():
        return {"budget": "", "rows": {}}
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found
