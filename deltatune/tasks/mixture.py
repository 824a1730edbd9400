"""Mixtures of tasks: rows of several tasks in one training, drawn with a temperature, each put by its own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.tasks.framing import Answer, Framing, How, Judge, framings
from deltatune.tasks.loading import TaskData, load_task
from deltatune.tasks.metrics import Measured, compute
from deltatune.tasks.rows import Row, Rows
from deltatune.tasks.split import rank, text_key
from deltatune.tasks.task import Task
from deltatune.tasks.tensors import Features, Watch
from deltatune.tasks.text2text import TextToTextFraming
from deltatune.tasks.types.mixture import PART, ROW

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_mixture(names: Sequence[str], temperature: float = 1.0, seed: int = 0) -> TaskData:
    """The rows of several tasks; task i gives a share n_i^(1/T) / sum_j n_j^(1/T) of the training rows.

    There are as many training rows as the tasks have together. T = 1 takes each once; as T grows, small tasks give as
    much as large ones, their rows several times. Validation and test are those of all tasks.

    >>> data = load_mixture(["bbc-news", "tweet-sentiment"])
    >>> len(data.train), data.task.name
    (4986, 'bbc-news+tweet-sentiment')

    Args:
        names: of the tasks.
        temperature: T, 1 or more.
        seed: of the draw.

    Raises:
        InvalidValue: fewer than two tasks, one twice, or a temperature below 1.
        UnknownName: no task has one of the names.
    """
    if len(names) < 2 or len(set(names)) != len(names):
        raise InvalidValue(f"A mixture needs two or more different tasks; `{','.join(names)}` was given.")
    if temperature < 1:
        raise InvalidValue(f"The temperature of a mixture is {temperature}; it has to be 1 or more.")
    return mixed([load_task(name) for name in names], temperature, seed)


def mixed(parts: Sequence[TaskData], temperature: float = 1.0, seed: int = 0) -> TaskData:
    """A mixture of loaded tasks; see ``load_mixture``."""
    task = Task(
        name="+".join(part.task.name for part in parts),
        type="mixture",
        text=(),
        label=ROW,
        metrics=("mean",),
        parts=tuple(part.task for part in parts),
    )
    counts = shares([len(part.train) for part in parts], temperature)
    drawn = [
        (rank(f"{seed}\x1e{number}\x1e{place}\x1e{text_key(row, part.task.kind.inputs(part.task))}"), number, row)
        for number, (part, count) in enumerate(zip(parts, counts, strict=True))
        for place, row in enumerate(_first(part, count, seed))
    ]
    drawn.sort(key=lambda entry: entry[:2])
    train = Rows({PART: [number for _, number, _ in drawn], ROW: [row for _, _, row in drawn]})
    validation, test = (
        Rows({PART: [number for number, split in enumerate(splits) for _ in split], ROW: [row for split in splits for row in split]})
        for splits in ([part.validation for part in parts], [part.test for part in parts])
    )
    told = ", ".join(f"{count} rows of {part.task.name}" for part, count in zip(parts, counts, strict=True))
    notes = tuple(f"{part.task.name}: {note}" for part in parts for note in part.notes)
    source = "; ".join(part.source for part in parts)
    return TaskData(task, train, validation, test, source, (f"temperature {temperature:g}: {told}", *notes))


def shares(sizes: Sequence[int], temperature: float) -> list[int]:
    """Rows of each task: n_i^(1/T) / sum_j n_j^(1/T) of all, rounded so that they add up.

    >>> shares([90, 10], 1.0), shares([90, 10], 2.0), shares([90, 10], 1000.0)
    ([90, 10], [75, 25], [50, 50])
    """
    weights = [size ** (1 / temperature) for size in sizes]
    exact = [sum(sizes) * weight / sum(weights) for weight in weights]
    counts = [int(one) for one in exact]
    most = sorted(range(len(sizes)), key=lambda index: counts[index] - exact[index])
    for index in most[: sum(sizes) - sum(counts)]:
        counts[index] += 1
    return counts


def _first(part: TaskData, count: int, seed: int) -> list[Row]:
    """So many rows in the order of their hashes, from the beginning again where there are not enough."""
    inputs = part.task.kind.inputs(part.task)
    order = sorted(range(len(part.train)), key=lambda index: rank(f"{seed}\x1e{text_key(part.train[index], inputs)}"))
    return [part.train[order[place % len(order)]] for place in range(count)]


def _is_mixture(task: Task) -> bool:
    return bool(task.parts)


class MixtureFraming(Framing):
    """Each row is put as its own task is, in words, so that one model with one head of its own learns all.

    Raises:
        Unsupported: a part that has no template, or a backbone without a decoder.
    """

    name = "mixture"
    fits = staticmethod(_is_mixture)

    def __init__(self, task: Task, parts: Sequence[TextToTextFraming]) -> None:
        self.parts = list(parts)
        told = tuple(replace(part.task, templates=(part.template,)) for part in self.parts)
        self.task = replace(task, parts=told)
        self.tokenizer = parts[0].tokenizer
        self.max_length = parts[0].max_length

    @classmethod
    def make(cls, task: Task, tokenizer: PreTrainedTokenizerBase, how: How) -> MixtureFraming:
        """Every part in words."""
        return cls(task, [TextToTextFraming.make(part, tokenizer, how) for part in task.parts])

    @classmethod
    def shown(cls, task: Task, row: Row) -> list[tuple[str, str]]:
        """As the row's own task shows it, by its first template."""
        return TextToTextFraming.shown(task.parts[row[PART]], row[ROW])[:1]

    @property
    def auto_class(self) -> str:
        """A causal or a sequence-to-sequence LM."""
        return self.parts[0].auto_class

    def encode(self, rows: Sequence[Row]) -> list[Features]:
        """Training examples, in the order of the rows."""
        return self._each(rows, lambda framing, own: framing.encode(own))

    def encode_inputs(self, rows: Sequence[Row]) -> list[Features]:
        """Prompts, in the order of the rows."""
        return self._each(rows, lambda framing, own: framing.encode_inputs(own))

    def _each(self, rows: Sequence[Row], do: Any) -> list[Any]:
        """``do`` for each part with its own rows; what comes of it in the order of all rows."""
        found: list[Any] = [None] * len(rows)
        for number, framing in enumerate(self.parts):
            own = [index for index, row in enumerate(rows) if row[PART] == number]
            for index, one in zip(own, do(framing, [rows[index][ROW] for index in own]) if own else (), strict=True):
                found[index] = one
        return found

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """As one of the parts."""
        return self.parts[0].collate(features)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """As one of the parts: the answers' tokens count alike, whatever task they are of."""
        return self.parts[0].loss(model, batch, weights)

    def score(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, watch: Watch = iter) -> Tensor:
        """Rows of different tasks have no scores in common."""
        raise Unsupported(f"`{self.task.name}` mixes tasks, whose scores do not compare. Score the rows of one of them.")

    def answers(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, most: int | None = None, watch: Watch = iter
    ) -> list[Answer]:
        """What each row's own framing answers."""
        return self._each(rows, lambda framing, own: framing.answers(model, own, batch_size, most, watch))

    def judged(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, by: Judge = compute, watch: Watch = iter
    ) -> dict[str, Any]:
        """``mean``, of the customary metrics of all tasks that have rows here, and each task's own metrics as ``task.metric``.

        The interval of ``mean`` is as wide as the tasks' intervals are on average.
        """
        judged: list[tuple[Task, dict[str, Any]]] = []
        for number, framing in enumerate(self.parts):
            own = [row[ROW] for row in rows if row[PART] == number]
            if own:
                judged.append((framing.task, framing.judged(model, own, batch_size, by, watch)))
        found = {f"{part.name}.{name}": value for part, known in judged for name, value in known.items()}
        return {"mean": _mean([known[part.metric] for part, known in judged]), **found}


def _mean(values: Sequence[float | Measured]) -> float | Measured:
    """The mean of values, and where they have intervals, of these too."""
    known = [one for one in values if isinstance(one, Measured)]
    value = sum(map(float, values)) / len(values)
    if not known:
        return value
    low, high = (sum(ends) / len(known) for ends in zip(*((one.low, one.high) for one in known), strict=True))
    return Measured(value, low, high, any(one.degenerate for one in known))


framings.register("mixture")(MixtureFraming)
