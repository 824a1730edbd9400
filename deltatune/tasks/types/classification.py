"""Classification: one of the task's labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltatune.errors import InvalidValue
from deltatune.tasks.rows import Row
from deltatune.tasks.tensors import Features
from deltatune.tasks.types.base import Spoken, TaskType, answered, label_index, task_types
from deltatune.tasks.types.sequence import SequenceHead

if TYPE_CHECKING:
    from deltatune.tasks.framing import HeadFraming
    from deltatune.tasks.task import Task
    from deltatune.tasks.template import Template


class ClassificationHead(SequenceHead):
    """l = -w_y log softmax(logits)_y."""

    dtype = torch.long

    def compare(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Cross-entropy, each row weighed by its class."""
        return F.cross_entropy(logits, labels, weight=None if weights is None else weights.to(logits.device), reduction="sum")

    def value(self, framing: HeadFraming, features: Features, scores: Tensor) -> int:
        """The label of the largest logit."""
        return int(scores.argmax())

    def weights(self, task: Task, rows: Sequence[Row]) -> Tensor:
        """w_c = N / (K N_c) for K classes with N_c of N rows: every class counts as much, and the mean weight is 1."""
        counts = torch.bincount(torch.tensor([row[task.label] for row in rows]), minlength=task.outputs).float()
        if (counts == 0).any():
            missing = task.labels[int((counts == 0).nonzero()[0])]
            raise InvalidValue(f"`class_weights` was asked for, but no training row of `{task.name}` has the label `{missing}`.")
        return counts.sum() / (len(counts) * counts)


class LabelWord(Spoken):
    """The verbalizer's word of the label; all words are known, so they are scored."""

    def is_closed(self, task: Task) -> bool:
        """Always."""
        return True

    def options(self, task: Task, template: Template, row: Row) -> tuple[str, ...]:
        """The words of all labels."""
        return words_of(task, template)

    def say(self, task: Task, template: Template, row: Row) -> str:
        """The word of the row's label."""
        return words_of(task, template)[row[task.label]]

    def understand(self, task: Task, template: Template, row: Row, text: str) -> int:
        """The label of the word; of one that is nobody's, -1, which is never right."""
        said = " ".join(text.lower().split())
        return next((index for index, word in enumerate(words_of(task, template)) if word.lower() == said), -1)


class Classification(TaskType):
    """A value is an index into ``labels``."""

    name = "classification"
    asks = "one of {}"
    answers = "label"
    metrics = ("accuracy", "f1_macro")
    fields = {"labels": True, "words": False}  # noqa: RUF012
    head = ClassificationHead()
    spoken = LabelWord()

    def check(self, task: Task) -> None:
        """At least two labels, and words for all of them."""
        check_labels(task)

    def is_withheld(self, task: Task, rows: Sequence[Row]) -> list[bool]:
        """Hubs mark a label that is kept back by -1 too."""
        return [empty or row[task.label] == -1 for empty, row in zip(super().is_withheld(task, rows), rows, strict=True)]

    def encode(self, task: Task, row: Row, names: Sequence[str]) -> Row:
        """With the label's index."""
        return answered(task, row, label_index(task, row[task.label], names))

    def stratum(self, task: Task, row: Row) -> Hashable:
        """The class."""
        return int(row[task.label])

    def constant(self, task: Task, rows: Sequence[Row]) -> int:
        """The commonest class; the smallest index where several are."""
        counts = Counter(int(row[task.label]) for row in rows)
        return min(counts, key=lambda label: (-counts[label], label))

    def named(self, task: Task, row: Row, value: Any) -> str:
        """The label's name."""
        return task.labels[int(value)]

    def shares(self, task: Task, row: Row, scores: Tensor) -> dict[str, float]:
        """softmax(scores), by label."""
        return dict(zip(task.labels, scores.softmax(-1).tolist(), strict=True))


def words_of(task: Task, template: Template) -> tuple[str, ...]:
    """The label words of a template; the label names where it has none."""
    return template.verbalizer.words if template.verbalizer else task.labels


def check_labels(task: Task) -> None:
    """Make sure that there are two labels or more, and that each template has a word for each.

    Raises:
        InvalidValue: it is not so.
    """
    if len(task.labels) < 2:
        raise InvalidValue(f"The task `{task.name}` has {len(task.labels)} labels; {task.type} needs at least two.")
    for template in task.templates:
        if template.verbalizer is not None and len(template.verbalizer.words) != len(task.labels):
            words = len(template.verbalizer.words)
            raise InvalidValue(f"A template of `{task.name}` has {words} label words for {len(task.labels)} labels.")


task_types.register("classification")(Classification())
