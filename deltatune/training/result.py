"""What a run came to: its numbers, and the objects to go on with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from deltatune.injection.delta import Delta

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LINE = ("score", "metric", "trainable_parameters", "total_parameters", "seconds", "delta_bytes", "out")
"""What ``deltatune tune --json`` ends with."""


@dataclass
class Result:
    """What a run came to.

    Attributes:
        score: the metric on the test rows.
        metric: its name.
        metrics: all of the task's metrics on the test rows.
        intervals: 95 % bootstrap intervals of these metrics over the test rows.
        degenerate: the model says the same to every test row, though the truth differs.
        trainable_parameters: how many numbers were trained, counted ahead of the first step.
        stored_parameters: how many of them the final form has: a prefix leaves its MLP behind, diff pruning what it prunes.
        total_parameters: of the backbone.
        seconds: the training took, evaluations and checkpoints included.
        seconds_per_step: median of an optimiser step.
        peak_memory_bytes: most memory the process (or the GPU) held meanwhile.
        tokens: of the training rows that were read, each time they were; padding left out.
        delta_bytes: of the delta on disk; of its tensors where nothing was written.
        steps: optimiser steps.
        out: the run's folder, or None.
        history: what was logged: losses and validation scores by step.
        backbone: the model, with the deltas attached.
        tokenizer: its tokenizer.
        deltas: what was trained.
    """

    score: float
    metric: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    degenerate: bool
    trainable_parameters: int
    stored_parameters: int
    total_parameters: int
    seconds: float
    seconds_per_step: float
    peak_memory_bytes: int
    tokens: int
    delta_bytes: int
    steps: int
    out: Path | None
    history: list[dict[str, Any]] = field(repr=False)
    backbone: nn.Module = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    deltas: list[Delta] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The numbers, for ``metrics.json`` and the command line; without history and objects."""
        left_out = {"history", "backbone", "tokenizer", "deltas"}
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name not in left_out}
        return {**values, "out": None if self.out is None else str(self.out)}

    def line(self) -> dict[str, Any]:
        """The numbers that ``deltatune tune --json`` ends with."""
        values = self.to_json()
        return {name: values[name] for name in LINE}
