"""Use a saved delta: labels for new texts, and its score on its task's test rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from deltatune.checkpoint.format import read
from deltatune.errors import DataError
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.tasks import Task, TaskData
from deltatune.tasks.framing import Answer, Framing, How, check_rows, framings
from deltatune.tasks.rows import Row
from deltatune.tasks.tensors import Watch
from deltatune.training.evaluation import score_rows
from deltatune.training.job import kind_of
from deltatune.training.opening import delta_folder, open
from deltatune.training.place import DELTA
from deltatune.training.recorded import task_of, training_of
from deltatune.training.run import RUN_FILE, load_data, read_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | Sequence[str] | Mapping[str, str]


@dataclass(frozen=True)
class Prediction:
    """What a delta says about one text.

    Attributes:
        label: the label's name, a list of names (multilabel, tagging), a number (regression), or a text.
        score: the label's probability; of several the least; None for a number or a text.
        scores: probability by label name.
    """

    label: Any
    score: float | None
    scores: dict[str, float]


@dataclass(frozen=True)
class Predictor:
    """A saved delta, open, with its way of putting texts to the backbone.

    >>> predictor = Predictor.open("runs/bbc")  # doctest: +SKIP
    >>> predictor(["Shares rise as the bank beats forecasts"])[0].label  # doctest: +SKIP
    'business'
    """

    backbone: nn.Module
    tokenizer: PreTrainedTokenizerBase
    delta: Delta | Composition
    framing: Framing

    @classmethod
    def open(cls, folder: str | os.PathLike[str], **options: Any) -> Predictor:
        """Open a run's or a delta's folder; ``options`` go to ``dt.open``.

        Raises:
            CheckpointError: no delta there, or one that does not say its task.
        """
        record = read(delta_folder(folder))
        task, training = task_of(record), training_of(record)
        backbone, tokenizer, delta = open(folder, **options)
        framing = framings[training["framing"]].make(task, tokenizer, How(training["max_length"], kind_of(backbone)))
        return cls(backbone, tokenizer, delta, framing)

    def __call__(self, texts: Text | Sequence[Text], batch_size: int = 64, watch: Watch = iter) -> list[Prediction]:
        """One prediction a text.

        Args:
            texts: a text, or several; a pair is two texts, or a mapping with the task's columns.
            batch_size: texts a forward.
            watch: is given the batches; see ``training.watch``.

        Raises:
            DataError: an empty text, or a pair where the task has one column.
        """
        rows = asked(self.framing.task, texts)
        answers = self.framing.answers(self.backbone, rows, batch_size, watch=watch)
        return [_prediction(self.framing.task, row, answer) for row, answer in zip(rows, answers, strict=True)]


def predict(source: str | os.PathLike[str] | Predictor, texts: Text | Sequence[Text], batch_size: int = 64) -> list[Prediction]:
    """Labels for texts, by the delta in a folder or by one that is open.

    Raises:
        CheckpointError: no usable delta in the folder.
        DataError: an empty text.
    """
    predictor = source if isinstance(source, Predictor) else Predictor.open(source)
    return predictor(texts, batch_size)


def evaluate(
    source: str | os.PathLike[str] | Predictor, data: TaskData | None = None, batch_size: int = 64, watch: Watch = iter
) -> dict[str, float]:
    """The task's metrics on its test rows, and ``score``, the customary one.

    Args:
        source: a run's or a delta's folder; or an open one, with ``data``.
        data: the rows; found by the run's ``run.yaml``, else by the task's name, if left out.
        batch_size: rows a forward.
        watch: is given the batches; see ``training.watch``.

    Raises:
        CheckpointError: no usable delta in the folder.
        DataError: the labels are not those of the training.
    """
    predictor = source if isinstance(source, Predictor) else Predictor.open(source)
    task = predictor.framing.task
    if data is None:
        data = load_data(task.name) if isinstance(source, Predictor) else data_of(source)
    if data.task.labels != task.labels:
        raise DataError(
            f"The delta was trained for the labels {', '.join(task.labels)}; the rows of `{data.task.name}` have "
            f"{', '.join(data.task.labels)}. Evaluate it on the task it was trained for."
        )
    return score_rows(predictor.framing, predictor.backbone, data.test, batch_size, watch)


def data_of(folder: str | os.PathLike[str]) -> TaskData:
    """The rows of the run in the folder, or above the delta's; else of the task that the delta names.

    Raises:
        CheckpointError: no delta there, or one that does not say its task.
    """
    task, path = task_of(read(delta_folder(folder))), Path(folder).expanduser()
    for place in (path, path.parent) if path.name == DELTA else (path,):
        if (place / RUN_FILE).is_file():
            run = read_run(place)
            return load_data(run.task, run.settings)
    return load_data(task.name)


def asked(task: Task, texts: Text | Sequence[Text]) -> list[Row]:
    """A user's texts as rows of the task, to be answered.

    Raises:
        DataError: an empty text, or more or fewer texts in a row than the task has columns.
    """
    rows = [_row(task, text) for text in ([texts] if isinstance(texts, str | Mapping) else texts)]
    check_rows(task, rows)
    return rows


def _row(task: Task, text: Text) -> Row:
    if isinstance(text, Mapping):
        return task.kind.asking.asked(task, text)
    return task.kind.asking.given(task, [text] if isinstance(text, str) else [str(part) for part in text])


def _prediction(task: Task, row: Row, answer: Answer) -> Prediction:
    named = task.kind.named(task, row, answer.value)
    names = named if isinstance(named, list) else [named]
    known = [answer.shares[name] for name in names if name in answer.shares] if answer.shares else []
    return Prediction(named, min(known, default=None), dict(answer.shares))
