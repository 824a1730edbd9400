"""What a task type has to say about its kind of answer. One subclass a file; ``task_types`` finds it by its name."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from deltatune.errors import DataError, InvalidValue, nearest
from deltatune.registry import Registry
from deltatune.tasks.rows import Row
from deltatune.tasks.tensors import Features

if TYPE_CHECKING:
    from deltatune.tasks.framing import HeadFraming
    from deltatune.tasks.task import Task
    from deltatune.tasks.template import Template


class TaskType(ABC):
    """A kind of answer: how rows hold it, how a head gives it, how it is said in words, and what checks compare it with.

    A *value* is the form in which predictions and references meet a metric: an index, indices, a number, a text, tags.

    Attributes:
        name: as tasks name it.
        asks: what it asks for, in listings; braces stand for the number of labels.
        answers: what metrics call its values: ``label``, ``labels``, ``number``, ``text`` or ``tags``.
        metrics: those of a user's own data, the customary one first.
        fields: the fields of a YAML that are this type's own, each with whether it has to be there.
        head: how a head is trained and read; None where no head fits.
        spoken: the answer in words.
        asking: rows that users give, without an answer.
        speaks: a model with a decoder is asked in words, unless a head is asked for.
        words: the framing that asks in words.
        headless: why no head fits, in an error.
    """

    name: ClassVar[str]
    asks: ClassVar[str]
    answers: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    fields: ClassVar[Mapping[str, bool]]
    head: Head | None = None
    spoken: Spoken
    asking: Asking
    speaks: ClassVar[bool] = True
    words: ClassVar[str] = "text2text"
    headless: ClassVar[str] = "generates text"

    def check(self, task: Task) -> None:
        """Make sure that the task's fields fit together.

        Raises:
            InvalidValue: they do not.
        """

    def read(self, task: Task) -> tuple[str, ...]:
        """The columns that a source has to have; dots lead into structs and lists of them."""
        return (*task.text, task.label)

    def columns(self, task: Task) -> tuple[str, ...]:
        """The columns of an encoded row."""
        return (*task.text, task.label)

    def inputs(self, task: Task) -> tuple[str, ...]:
        """The columns that make two rows the same question."""
        return task.text

    def is_withheld(self, task: Task, rows: Sequence[Row]) -> list[bool]:
        """For each row, whether the source keeps the label back: hubs mark that by nothing at all, or by nan."""
        return [_is_nothing(row[task.label]) for row in rows]

    @abstractmethod
    def encode(self, task: Task, row: Row, names: Sequence[str]) -> Row:
        """A source's row as the rest of the library reads it; ``names`` say what a file's integers mean.

        Raises:
            DataError: the row does not hold what the task says.
        """

    def stratum(self, task: Task, row: Row) -> Hashable:
        """What splits and few-shot samples keep the shares of; None where there is nothing."""
        return None

    def reference(self, task: Task, row: Row) -> Any:
        """The truth as a value, or several that are right."""
        return row[task.label]

    def perfect(self, task: Task, row: Row) -> Any:
        """The value a perfect predictor gives."""
        return self.reference(task, row)

    @abstractmethod
    def constant(self, task: Task, rows: Sequence[Row]) -> Any:
        """The value that a predictor gives which has only seen the answers of ``rows``: the commonest, or the mean."""

    def named(self, task: Task, row: Row, value: Any) -> Any:
        """A value for people: names in place of indices."""
        return value

    def shares(self, task: Task, row: Row, scores: Tensor) -> dict[str, float]:
        """Probability by name, from the scores of one row; empty where an answer has none."""
        return {}


class Head(ABC):
    """How a type is put to a head: encoding, loss, prediction. It has no state: framing and task come with each call.

    Attributes:
        auto_class: transformers' auto class that gives a fitting model.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    def outputs(self, task: Task) -> int:
        """Numbers the head gives."""
        return len(task.labels) or 1

    @abstractmethod
    def encode(self, framing: HeadFraming, rows: Sequence[Row], *, labelled: bool) -> list[Features]:
        """Token ids a row, with ``labels`` where they are asked for."""

    @abstractmethod
    def collate(self, framing: HeadFraming, features: Sequence[Features]) -> dict[str, Tensor]:
        """One batch, padded."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """The sum of the items' losses; an item is what ``labels`` of the batch holds and is not -100."""

    @abstractmethod
    def scores(self, framing: HeadFraming, model: nn.Module, features: Sequence[Features]) -> list[Tensor]:
        """For each example the scores from which ``value`` is read."""

    @abstractmethod
    def value(self, framing: HeadFraming, features: Features, scores: Tensor) -> Any:
        """What the scores of one example say."""

    def weights(self, task: Task, rows: Sequence[Row]) -> Tensor:
        """Weights of the classes by their frequency.

        Raises:
            InvalidValue: the type has no classes to weigh.
        """
        raise InvalidValue(f"`class_weights` was asked for, but `{task.name}` is a {task.type} task. Leave it out.")


class Spoken(ABC):
    """How a type's answer is said in words, and read back."""

    @abstractmethod
    def say(self, task: Task, template: Template, row: Row) -> str:
        """The right answer in words."""

    def options(self, task: Task, template: Template, row: Row) -> tuple[str, ...] | None:
        """All answers there are, in the order of their indices; None where they cannot be listed."""
        return None

    @abstractmethod
    def understand(self, task: Task, template: Template, row: Row, text: str) -> Any:
        """The value that an answer in words stands for; for one that makes no sense, the value of saying nothing."""

    def worded(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """What a verbalizer has words for."""
        return labels

    def prompted(self, task: Task) -> tuple[str, ...]:
        """The columns that a prompt may name."""
        return task.text

    def is_closed(self, task: Task) -> bool:
        """Whether the answers can be listed, so that they are scored instead of generated."""
        return False


class Asking:
    """How a user's texts become a row to be answered; most types take one text a column."""

    def width(self, task: Task) -> int | None:
        """Texts a row, where each has as many; a user gives them one behind the other."""
        return len(task.text)

    def given(self, task: Task, parts: Sequence[str]) -> Row:
        """A row from a user's texts: one a text column, in order.

        Raises:
            DataError: there are more or fewer.
        """
        if len(parts) != len(task.text):
            raise DataError(f"`{task.name}` takes {len(task.text)} text(s) a row ({', '.join(task.text)}); {len(parts)} were given.")
        return dict(zip(task.text, map(str, parts), strict=True))

    def asked(self, task: Task, row: Row) -> Row:
        """The input columns of a user's row, each as encoded rows have it."""
        return {column: str(row.get(column, "")) for column in task.text}


TaskType.asking = Asking()
task_types: Registry[TaskType] = Registry("task type", "task_types", builtin="deltatune.tasks.types.builtin")


def answered(task: Task, row: Row, value: Any) -> Row:
    """The texts of a row, and its answer."""
    return {**{column: row[column] for column in task.text}, task.label: value}


def label_index(task: Task, value: Any, names: Sequence[str]) -> int:
    """The index of a label in the task's own order; a file gives a name, or an integer into ``names``.

    Raises:
        DataError: the task has no such label.
    """
    places = _places(task.labels)
    if isinstance(value, int) and 0 <= value < len(names) and not (isinstance(value, bool) and str(value) in places):
        value = names[value]
    if str(value) not in places:
        raise DataError(f"The task `{task.name}` has no label {value!r}. {nearest(str(value), task.labels)}")
    return places[str(value)]


@functools.lru_cache(maxsize=64)
def _places(labels: tuple[str, ...]) -> dict[str, int]:
    return {label: place for place, label in enumerate(labels)}


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
