"""Ways to put a task to a model. A head over the answers is here; prompts are in ``text2text`` and ``cloze``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import DataError, InvalidValue, Unsupported
from deltatune.registry import Registry
from deltatune.tasks.collector import collector_held
from deltatune.tasks.inputs import Inputs
from deltatune.tasks.metrics import compute
from deltatune.tasks.rows import Row, text_of
from deltatune.tasks.task import Task
from deltatune.tasks.template import Template
from deltatune.tasks.tensors import IGNORED as IGNORED
from deltatune.tasks.tensors import Features, Watch, in_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What a model answered to one row.

    Attributes:
        value: in the form of the task's type.
        shares: probability by name, where the answers can be listed.
    """

    value: Any
    shares: Mapping[str, float]


@dataclass(frozen=True)
class How:
    """What a run asks of a framing.

    Attributes:
        max_length: most tokens of one input.
        kind: of the backbone: ``encoder``, ``decoder`` or ``encoder-decoder``.
        template: one of the task's templates by its number, or another one.
        manual: with the template; without, the columns stand alone.
        packing: fill each training example with several texts.
    """

    max_length: int = 256
    kind: str = "encoder"
    template: int | Template = 0
    manual: bool = True
    packing: bool = False

    def refuse_packing(self, framing: str) -> None:
        """For framings in which an example is one row.

        Raises:
            InvalidValue: packing was asked for.
        """
        if self.packing:
            raise InvalidValue(
                f"`packing` was asked for, but the {framing} framing takes one row an example. It is for plain texts and chats."
            )


Judge = Callable[[Sequence[str], Sequence[Any], Sequence[Any], Sequence[Row]], dict[str, Any]]
"""(names of metrics, predictions, references, rows) -> what each metric says."""


class Framing(ABC):
    """How rows become a model's input, its output an answer, and the difference to the truth a loss.

    Attributes:
        name: as ``--framing`` names it.
        fits: whether a task can be put this way, by what it is alone.
        task: whose rows.
        tokenizer: of the backbone; it needs a pad token.
        max_length: most tokens of one input, special ones and answer included.
        template: the prompt, where there is one.
    """

    name: ClassVar[str]
    fits: ClassVar[staticmethod[[Task], bool]]
    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    template: Template | None = None

    @classmethod
    @abstractmethod
    def make(cls, task: Task, tokenizer: PreTrainedTokenizerBase, how: How) -> Framing:
        """The framing as a run asks for it.

        Raises:
            Unsupported: the task or the backbone does not take this framing.
            InvalidValue: a template was asked for where none is used, or is not there.
        """

    @property
    @abstractmethod
    def auto_class(self) -> str:
        """Name of the transformers auto class that gives a fitting model."""

    @property
    def backbone_options(self) -> dict[str, Any]:
        """What ``load_backbone`` needs to know to give a fitting model."""
        return {}

    @property
    def outputs(self) -> int | None:
        """Numbers that the model's task head has to give; None where it has none."""
        return None

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[Features]:
        """Training examples: token ids with labels, not padded yet."""

    @abstractmethod
    def encode_inputs(self, rows: Sequence[Row]) -> list[Features]:
        """The same without labels; rows need no label column."""

    @abstractmethod
    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """One batch: padded on the right to its longest example."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """The sum of the losses of a batch's items, which ``count`` counts; ``weights`` by class."""

    @abstractmethod
    def score(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, watch: Watch = iter) -> Tensor:
        """Scores (rows, most answers) in fp32 on the CPU, minus infinity where a row has fewer answers; ``watch`` is given the batches.

        Raises:
            Unsupported: the answers cannot be listed.
        """

    @abstractmethod
    def answers(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, most: int | None = None, watch: Watch = iter
    ) -> list[Answer]:
        """What the model answers to each row; written ones have at most ``most`` tokens; ``watch`` is given the batches."""

    @classmethod
    @abstractmethod
    def shown(cls, task: Task, row: Row) -> list[tuple[str, str]]:
        """What a model reads of a row, and what it shall answer, for people: once a template."""

    def class_weights(self, rows: Sequence[Row]) -> Tensor:
        """Weights of the classes by their frequency.

        Raises:
            InvalidValue: there are no classes to weigh.
        """
        raise InvalidValue(f"`class_weights` was asked for, but `{self.task.name}` is trained by label words. Leave it out, or use a head.")

    def predict(self, scores: Tensor) -> list[Any]:
        """The values of the largest scores (rows, answers)."""
        return [int(index) for index in scores.argmax(dim=1)]

    def references(self, rows: Sequence[Row]) -> list[Any]:
        """The truth in the form of the predictions."""
        return [self.task.kind.reference(self.task, row) for row in rows]

    def judged(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, by: Judge = compute, watch: Watch = iter
    ) -> dict[str, Any]:
        """What each of the task's metrics says of the model's answers; ``by`` is ``compute``, or ``measure`` for intervals too."""
        said = [answer.value for answer in self.answers(model, rows, batch_size, watch=watch)]
        return by(self.task.metrics, said, self.references(rows), rows)


framings: Registry[type[Framing]] = Registry("framing", "framings", builtin="deltatune.tasks.framed")


def framings_of(task: Task) -> list[str]:
    """Names of the framings that take a task."""
    return [name for name in framings if framings[name].fits(task)]


def _has_head(task: Task) -> bool:
    return task.kind.head is not None


class HeadFraming(Framing):
    """texts -> tokens -> a head; what the head gives and how it is trained is the task type's.

    Raises:
        Unsupported: no head fits the task's type.
    """

    name = "head"
    fits = staticmethod(_has_head)

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int = 256) -> None:
        if task.kind.head is None:
            raise Unsupported(f"The task `{task.name}` {task.kind.headless}, so no head fits it. Use the {task.kind.words} framing.")
        self.task = task
        self.head = task.kind.head
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.inputs = Inputs(tokenizer, self.max_length)

    @classmethod
    def make(cls, task: Task, tokenizer: PreTrainedTokenizerBase, how: How) -> HeadFraming:
        """The head framing, which takes no template."""
        if how.template or not how.manual:
            asked = f"template={how.template}" if how.template else "manual_template=False"
            raise InvalidValue(
                f"`{asked}` was asked for, but `{task.name}` is put to a head here, which takes no template. "
                "Leave it out, or choose the text2text framing (`framing=text2text`), for models with a decoder."
            )
        if task.kind.head is None and how.kind == "encoder":
            raise Unsupported(
                f"The task `{task.name}` {task.kind.headless}, so no head fits it, and the backbone is an encoder. "
                "Take one with a decoder, such as `smollm2-135m`."
            )
        how.refuse_packing(cls.name)
        return cls(task, tokenizer, how.max_length)

    @property
    def auto_class(self) -> str:
        """That of the task's type; sequence classification, for most."""
        return self.head.auto_class

    @property
    def backbone_options(self) -> dict[str, Any]:
        """Names of the outputs where the labels are that, else their number."""
        named = len(self.task.labels) == self.outputs
        return {"label_names": self.task.labels} if named else {"num_labels": self.outputs}

    @property
    def outputs(self) -> int:
        """Numbers of the head."""
        return self.task.outputs

    @collector_held()
    def encode(self, rows: Sequence[Row]) -> list[Features]:
        """Token ids with ``labels``."""
        return self.head.encode(self, rows, labelled=True)

    def encode_inputs(self, rows: Sequence[Row]) -> list[Features]:
        """Token ids; of several texts, the longest is cut first."""
        return self.head.encode(self, rows, labelled=False)

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """Inputs and, where there are any, ``labels``."""
        return self.head.collate(self, features)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """That of the task's type, summed over the items."""
        return self.head.loss(model, batch, weights)

    def class_weights(self, rows: Sequence[Row]) -> Tensor:
        """w_c = N / (K N_c) for K classes with N_c of N rows."""
        return self.head.weights(self.task, rows)

    def score(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, watch: Watch = iter) -> Tensor:
        """The head's numbers for each row, in the order of the rows; the model is in eval mode meanwhile."""
        found = [scores for _, scores in self._scored(model, rows, batch_size, watch)]
        if not found:
            return torch.empty(0, self.outputs)
        return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-torch.inf)

    def predict(self, scores: Tensor) -> list[Any]:
        """What each row's scores say: a label index, the indices above zero (multilabel), a number, an option."""
        return [self.head.value(self, {}, row) for row in scores]

    def answers(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, most: int | None = None, watch: Watch = iter
    ) -> list[Answer]:
        """The values and probabilities that the head's numbers say."""
        task, scored = self.task, self._scored(model, rows, batch_size, watch)
        return [
            Answer(self.head.value(self, features, scores), task.kind.shares(task, row, scores))
            for row, (features, scores) in zip(rows, scored, strict=True)
        ]

    def _scored(self, model: nn.Module, rows: Sequence[Row], batch_size: int, watch: Watch) -> list[tuple[Features, Tensor]]:
        inputs = self.encode_inputs(rows)
        found: list[Tensor] = [torch.empty(0)] * len(inputs)
        for batch in in_batches(model, inputs, batch_size, watch):
            for index, scores in zip(batch, self.head.scores(self, model, [inputs[index] for index in batch]), strict=True):
                found[index] = scores
        return list(zip(inputs, found, strict=True))

    @classmethod
    def shown(cls, task: Task, row: Row) -> list[tuple[str, str]]:
        """The texts one under the other, and the answer by name."""
        kind = task.kind
        texts = [text_of(row[column]) for column in task.text]
        texts += [f"- {text_of(one)}" for column in kind.inputs(task) if column not in task.text for one in row[column]]
        return [("\n".join(texts), str(kind.named(task, row, kind.perfect(task, row))))]


def check_rows(task: Task, rows: Iterable[Row]) -> None:
    """Make sure that every row has text in every text column.

    Raises:
        DataError: one has not.
    """
    for number, row in enumerate(rows, 1):
        for column in task.text:
            if column not in row or not text_of(row[column]).strip():
                raise DataError(
                    f"Row {number} has no text in `{column}`. `{task.name}` needs {', '.join(f'`{name}`' for name in task.text)}."
                )


framings.register("head")(HeadFraming)
