"""A record: a trial as the store gives it back, flat, ready for statistics and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """A trial and what came of it; numbers are None until it is done.

    Attributes:
        key: of the trial.
        backbone: alias, folder or hub id.
        task: its name.
        category: of the task.
        method: its label.
        seed: of the trial.
        cell: the values of the grid.
        procedure: how it was carried out.
        purpose: ``trial`` or ``search``.
        state: ``waiting``, ``running``, ``done`` or ``failed``.
        metric: the customary one of the task.
        score: on the test rows.
        low: of the score's 95 % bootstrap interval over test rows.
        high: of the same.
        degenerate: the model says the same to every test row.
        lr: peak learning rate.
        trained: numbers that were trained.
        total: of the backbone.
        steps: of the optimiser.
        tokens: that were read in training, padding left out.
        seconds: the trial took.
        training_seconds: the training within took.
        seconds_per_step: median.
        peak_memory_bytes: most memory meanwhile.
        delta_bytes: on disk.
        numbers: everything else.
        error: the last failure's class and message.
        attempts: so many times it was begun.
        machine: number of the machine with its software that made the last attempt, in the store.
    """

    key: str
    backbone: str
    task: str
    category: str
    method: str
    seed: int
    cell: Mapping[str, Any] = field(default_factory=dict)
    procedure: str = "train"
    purpose: str = "trial"
    state: str = "done"
    metric: str = "accuracy"
    score: float | None = None
    low: float | None = None
    high: float | None = None
    degenerate: bool = False
    lr: float | None = None
    trained: int | None = None
    total: int | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    training_seconds: float | None = None
    seconds_per_step: float | None = None
    peak_memory_bytes: int | None = None
    delta_bytes: int | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    attempts: int = 0
    machine: int | None = None

    @property
    def share(self) -> float | None:
        """Of the backbone's parameters that were trained."""
        return self.trained / self.total if self.trained is not None and self.total else None
