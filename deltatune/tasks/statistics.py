"""What is in a task's rows: how many, how long, and how the answers are spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltatune.tasks.loading import TaskData
from deltatune.tasks.metrics import Measured, measure
from deltatune.tasks.rows import Row, text_of
from deltatune.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_ANSWERS = 20
"""So many answers are told, the commonest first."""


@dataclass(frozen=True)
class Lengths:
    """How long the inputs of a split are.

    Attributes:
        mean: on average.
        median: of half of the rows at most.
        p95: of 95 % of the rows at most.
        longest: of the longest row.
    """

    mean: float
    median: int
    p95: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """From the length of each row."""
        median, p95 = np.quantile(lengths, [0.5, 0.95], method="higher")
        return cls(round(float(np.mean(lengths)), 1), int(median), int(p95), max(lengths))


@dataclass(frozen=True)
class Statistics:
    """A task's rows in numbers.

    Attributes:
        rows: how many, by split.
        unit: what lengths count: ``tokens`` or ``words``.
        lengths: of the inputs, by split; the options of a choice count.
        answers: of train, the commonest with their counts.
        constant: the metrics of a predictor that always gives the commonest answer, on test.
    """

    rows: dict[str, int]
    unit: str
    lengths: dict[str, Lengths]
    answers: dict[str, int]
    constant: dict[str, Measured]


def statistics(data: TaskData, tokenizer: PreTrainedTokenizerBase | None = None) -> Statistics:
    """Count a task's rows, their tokens (without a tokenizer: words) and their answers."""
    task = data.task
    count = _words if tokenizer is None else _tokens(tokenizer)
    answers = Counter(str(task.kind.named(task, row, task.kind.perfect(task, row)))[:80] for row in data.train)
    constant = [task.kind.constant(task, data.train)] * len(data.test)
    references = [task.kind.reference(task, row) for row in data.test]
    return Statistics(
        rows={name: len(split) for name, split in data.splits.items()},
        unit="words" if tokenizer is None else "tokens",
        lengths={name: Lengths.of(count([inputs_of(task, row) for row in split])) for name, split in data.splits.items()},
        answers=dict(answers.most_common(MOST_ANSWERS)),
        constant=measure(task.metrics, constant, references, data.test, resamples=100),
    )


def inputs_of(task: Task, row: Row) -> str:
    """All that is asked in a row, as one text."""
    return "\n".join(text_of(row[column]) for column in task.kind.inputs(task))


def _words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def _tokens(tokenizer: Any) -> Callable[[Sequence[str]], list[int]]:
    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]

    return count
