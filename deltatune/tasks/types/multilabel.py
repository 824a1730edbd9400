"""Multi-label classification: any number of the task's labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from deltatune.errors import DataError
from deltatune.tasks.rows import Row
from deltatune.tasks.tensors import Features
from deltatune.tasks.types.base import Spoken, TaskType, answered, label_index, task_types
from deltatune.tasks.types.classification import check_labels, words_of
from deltatune.tasks.types.sequence import SequenceHead

if TYPE_CHECKING:
    from deltatune.tasks.framing import HeadFraming
    from deltatune.tasks.task import Task
    from deltatune.tasks.template import Template

NOTHING = "none"
"""What is said where nothing is to be named."""


class MultilabelHead(SequenceHead):
    """l = -sum_c (y_c log sigmoid(logit_c) + (1 - y_c) log sigmoid(-logit_c))."""

    def target(self, task: Task, row: Row) -> list[float]:
        """A row of zeros and ones."""
        return [float(index in row[task.label]) for index in range(task.outputs)]

    def compare(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Binary cross-entropy, summed over labels and rows."""
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")

    def value(self, framing: HeadFraming, features: Features, scores: Tensor) -> list[int]:
        """The labels whose probability is above a half."""
        return [int(index) for index in (scores > 0).nonzero().flatten()]


class LabelWords(Spoken):
    """The words of the labels with commas between them, or ``none``."""

    def say(self, task: Task, template: Template, row: Row) -> str:
        """The words in the labels' order."""
        words = words_of(task, template)
        return ", ".join(words[index] for index in sorted(row[task.label])) or NOTHING

    def understand(self, task: Task, template: Template, row: Row, text: str) -> list[int]:
        """The labels whose words are among those said."""
        said = {" ".join(part.lower().split()) for part in text.split(",")}
        return [index for index, word in enumerate(words_of(task, template)) if word.lower() in said]


class Multilabel(TaskType):
    """A value is a list of indices into ``labels``."""

    name = "multilabel"
    asks = "some of {}"
    answers = "labels"
    metrics = ("f1_micro", "f1_macro")
    fields = {"labels": True, "words": False}  # noqa: RUF012
    head = MultilabelHead()
    spoken = LabelWords()
    speaks = False

    def check(self, task: Task) -> None:
        """At least two labels, and words for all of them."""
        check_labels(task)

    def encode(self, task: Task, row: Row, names: Sequence[str]) -> Row:
        """With the labels' indices, in order; the column lists indices or names."""
        value = row[task.label]
        if not isinstance(value, list | tuple):
            raise DataError(f"`{task.name}` has several labels a row, but its column `{task.label}` holds {value!r}, which is no list.")
        return answered(task, row, sorted({label_index(task, one, names) for one in value}))

    def stratum(self, task: Task, row: Row) -> Hashable:
        """The whole set of labels."""
        return tuple(row[task.label])

    def constant(self, task: Task, rows: Sequence[Row]) -> list[int]:
        """The commonest set of labels."""
        counts: Counter[tuple[int, ...]] = Counter(tuple(row[task.label]) for row in rows)
        commonest = min(counts, key=lambda labels: (-counts[labels], labels))
        return list(commonest)

    def named(self, task: Task, row: Row, value: Any) -> list[str]:
        """The labels' names."""
        return [task.labels[index] for index in value]

    def shares(self, task: Task, row: Row, scores: Tensor) -> dict[str, float]:
        """sigmoid(scores), by label."""
        return dict(zip(task.labels, scores.sigmoid().tolist(), strict=True))


task_types.register("multilabel")(Multilabel())
