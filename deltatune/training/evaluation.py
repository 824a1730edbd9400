"""Score a backbone, with whatever deltas act on it, on the rows of a task."""

from __future__ import annotations

from torch import nn

from deltatune.tasks import Rows
from deltatune.tasks.framing import Framing
from deltatune.tasks.metrics import compute


def score_rows(framing: Framing, backbone: nn.Module, rows: Rows, batch_size: int = 64) -> dict[str, float]:
    """Each of the task's metrics, and ``score``, the customary one."""
    scores = framing.score(backbone, rows, batch_size)
    values = compute(framing.task.metrics, framing.predict(scores), framing.references(rows))
    return {"score": values[framing.task.metric], **values}
