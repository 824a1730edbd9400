"""Score a backbone, with whatever deltas act on it, on the rows of a task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from deltatune.tasks.framing import Framing
from deltatune.tasks.metrics import Measured, measure
from deltatune.tasks.rows import Row
from deltatune.tasks.tensors import Watch


def score_rows(framing: Framing, backbone: nn.Module, rows: Sequence[Row], batch_size: int = 64, watch: Watch = iter) -> dict[str, float]:
    """Each of the task's metrics, and ``score``, the customary one; ``watch`` is given the batches."""
    values = framing.judged(backbone, rows, batch_size, watch=watch)
    return {"score": values[framing.task.metric], **values}


def measure_rows(
    framing: Framing, backbone: nn.Module, rows: Sequence[Row], batch_size: int = 64, watch: Watch = iter
) -> dict[str, Measured]:
    """Each of the task's metrics with its confidence interval, the customary one first."""
    return framing.judged(backbone, rows, batch_size, by=measure, watch=watch)
