"""Regression: a number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from deltatune.errors import DataError, InvalidValue
from deltatune.tasks.rows import Row
from deltatune.tasks.tensors import Features
from deltatune.tasks.types.base import Spoken, TaskType, answered, task_types
from deltatune.tasks.types.sequence import SequenceHead

if TYPE_CHECKING:
    from deltatune.tasks.framing import HeadFraming
    from deltatune.tasks.task import Task
    from deltatune.tasks.template import Template

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
STEPS = 50
"""About so many numbers of the range are told apart in words."""


class RegressionHead(SequenceHead):
    """l = (output - y)^2."""

    def outputs(self, task: Task) -> int:
        """One."""
        return 1

    def compare(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Squared error."""
        return F.mse_loss(logits[:, 0], labels.float(), reduction="sum")

    def value(self, framing: HeadFraming, features: Features, scores: Tensor) -> float:
        """The output, within the range."""
        return within(framing.task, float(scores[0]))


class Digits(Spoken):
    """The number with as many places as tell about fifty numbers of the range apart."""

    def say(self, task: Task, template: Template, row: Row) -> str:
        """For instance ``3.4``."""
        return f"{row[task.label]:.{places(task)}f}"

    def understand(self, task: Task, template: Template, row: Row, text: str) -> float:
        """The first number in the text, within the range; the middle of the range where there is none."""
        found = _NUMBER.search(text)
        low, high = task.range or (0.0, 0.0)
        return within(task, float(found.group())) if found else (low + high) / 2


class Regression(TaskType):
    """A value is a number."""

    name = "regression"
    asks = "a number"
    answers = "number"
    metrics = ("pearson", "spearman")
    fields = {"range": True}  # noqa: RUF012
    head = RegressionHead()
    spoken = Digits()
    speaks = False

    def check(self, task: Task) -> None:
        """A range goes from less to more."""
        if task.range is not None and not task.range[0] < task.range[1]:
            raise InvalidValue(f"The task `{task.name}` has the range {list(task.range)}. Write the least number, then the largest.")

    def is_withheld(self, task: Task, rows: Sequence[Row]) -> list[bool]:
        """Minus one in every row marks numbers that are kept back; in some rows it may be a number like others."""
        whole = all(row[task.label] == -1 for row in rows)
        return [whole or empty for empty in super().is_withheld(task, rows)]

    def encode(self, task: Task, row: Row, names: Sequence[str]) -> Row:
        """With the number."""
        try:
            return answered(task, row, float(row[task.label]))
        except (TypeError, ValueError):
            raise DataError(
                f"The task `{task.name}` is a regression, but its column `{task.label}` holds {row[task.label]!r}, which is not a number."
            ) from None

    def constant(self, task: Task, rows: Sequence[Row]) -> float:
        """The mean."""
        return sum(float(row[task.label]) for row in rows) / max(len(rows), 1)


def within(task: Task, number: float) -> float:
    """The nearest number of the task's range."""
    return number if task.range is None else min(max(number, task.range[0]), task.range[1])


def places(task: Task) -> int:
    """Decimal places in words."""
    if task.range is None:
        return 2
    width, count = task.range[1] - task.range[0], 0
    while width * 10**count < STEPS:
        count += 1
    return count


task_types.register("regression")(Regression())
