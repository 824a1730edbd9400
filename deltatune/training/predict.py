"""Use a saved delta: labels for new texts, and its score on its task's test rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltatune.checkpoint.format import read
from deltatune.errors import DataError
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.tasks import Task, TaskData
from deltatune.tasks.framing import Framing, HeadFraming, Watch, check_rows
from deltatune.tasks.text2text import TextToTextFraming
from deltatune.training.evaluation import answers, score_rows
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
        label: the label's name, a list of names (multilabel), a number (regression), or a text (text2text).
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
        framing: Framing
        if training["framing"] == "head":
            framing = HeadFraming(task, tokenizer, training["max_length"])
        else:
            both = bool(getattr(getattr(backbone, "config", None), "is_encoder_decoder", False))
            framing = TextToTextFraming(task, tokenizer, training["max_length"], encoder_decoder=both)
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
        several = [texts] if isinstance(texts, str | Mapping) else list(texts)
        rows = [_row(self.framing.task, text) for text in several]
        check_rows(self.framing.task, rows)
        if isinstance(self.framing, TextToTextFraming) and not self.framing.words:
            return [Prediction(text, None, {}) for text in answers(self.framing, self.backbone, rows, batch_size, watch=watch)]
        scores = self.framing.score(self.backbone, rows, batch_size, watch)
        return [_prediction(self.framing, row, said) for row, said in zip(scores, self.framing.predict(scores), strict=True)]


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
            return load_data(read_run(place).task)
    return load_data(task.name)


def _row(task: Task, text: Text) -> dict[str, str]:
    if isinstance(text, Mapping):
        return {column: str(text.get(column, "")) for column in task.text}
    parts = [text] if isinstance(text, str) else list(text)
    if len(parts) != len(task.text):
        raise DataError(f"`{task.name}` takes {len(task.text)} text(s) a row ({', '.join(task.text)}); {len(parts)} were given.")
    return dict(zip(task.text, map(str, parts), strict=True))


def _prediction(framing: Framing, scores: Tensor, said: Any) -> Prediction:
    task = framing.task
    if task.type == "regression":
        return Prediction(float(said), None, {})
    shares = scores.sigmoid() if task.type == "multilabel" else scores.softmax(-1)
    by_name = dict(zip(task.labels, shares.tolist(), strict=True))
    if task.type == "multilabel":
        names = [task.labels[index] for index in said]
        return Prediction(names, min((by_name[name] for name in names), default=None), by_name)
    return Prediction(task.labels[said], by_name[task.labels[said]], by_name)
