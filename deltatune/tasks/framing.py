"""Ways to put a task to a model. A head over the answers is here; prompts are in ``text2text`` and ``cloze``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import DataError, InvalidValue, Unsupported
from deltatune.registry import Registry
from deltatune.tasks.metrics import Measured, compute, measure
from deltatune.tasks.rows import Row, text_of
from deltatune.tasks.task import Task
from deltatune.tasks.template import Template
from deltatune.tasks.truncation import kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Features = dict[str, Any]
IGNORED = -100
"""The label that PyTorch's cross-entropy leaves out."""


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


class Framing(ABC):
    """How rows become a model's input, its output an answer, and the difference to the truth a loss.

    Attributes:
        name: as ``--framing`` names it.
        task: whose rows.
        tokenizer: of the backbone; it needs a pad token.
        max_length: most tokens of one input, special ones and answer included.
        template: the prompt, where there is one.
    """

    name: ClassVar[str]
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
    def score(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32) -> Tensor:
        """Scores (rows, most answers) in fp32 on the CPU, minus infinity where a row has fewer answers.

        Raises:
            Unsupported: the answers cannot be listed.
        """

    @abstractmethod
    def answers(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, most: int | None = None) -> list[Answer]:
        """What the model answers to each row; written ones have at most ``most`` tokens."""

    @classmethod
    @abstractmethod
    def takes(cls, task: Task) -> bool:
        """Whether a task can be put this way, by what it is alone."""

    @classmethod
    @abstractmethod
    def shown(cls, task: Task, row: Row) -> list[tuple[str, str]]:
        """What a model reads of a row, and what it shall answer, for people: once a template."""

    def length(self, features: Features) -> int:
        """Tokens of one example, by which batches are made."""
        return len(features["input_ids"])

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Items in a batch."""
        return batch["labels"].ne(IGNORED).sum()

    def class_weights(self, rows: Sequence[Row]) -> Tensor:
        """Weights of the classes by their frequency.

        Raises:
            InvalidValue: there are no classes to weigh.
        """
        raise InvalidValue(f"`class_weights` was asked for, but `{self.task.name}` is trained by label words. Leave it out, or use a head.")

    def longest_answer(self, rows: Sequence[Row]) -> int | None:
        """Most tokens that a right answer to the rows has; None where none is written."""
        return None

    def predict(self, scores: Tensor) -> list[Any]:
        """The values of the largest scores (rows, answers)."""
        return [int(index) for index in scores.argmax(dim=1)]

    def references(self, rows: Sequence[Row]) -> list[Any]:
        """The truth in the form of the predictions."""
        return [self.task.kind.reference(self.task, row) for row in rows]

    def said(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32) -> list[Any]:
        """The values that the task's metrics compare with ``references``."""
        return [answer.value for answer in self.answers(model, rows, batch_size, self.longest_answer(rows))]

    def compared(self, said: Sequence[Any], rows: Sequence[Row]) -> dict[str, float]:
        """Each of the task's metrics for what was said to the rows."""
        return compute(self.task.metrics, said, self.references(rows), rows)

    def judged(self, said: Sequence[Any], rows: Sequence[Row]) -> dict[str, Measured]:
        """The same with intervals, and whether the predictor is degenerate."""
        return measure(self.task.metrics, said, self.references(rows), rows)

    def in_batches(self, model: nn.Module, inputs: Sequence[Features], batch_size: int) -> Iterator[list[int]]:
        """Indices of the inputs, batch by batch with rows of like length together, while the model is in eval mode."""
        order = sorted(range(len(inputs)), key=lambda index: self.length(inputs[index]))
        with evaluating(model), torch.no_grad():
            for start in range(0, len(order), batch_size):
                yield order[start : start + batch_size]


framings: Registry[type[Framing]] = Registry("framing", "framings", builtin="deltatune.tasks.framed")


def framings_of(task: Task) -> list[str]:
    """Names of the framings that take a task."""
    return [name for name in framings if framings[name].takes(task)]


class HeadFraming(Framing):
    """texts -> tokens -> a head; what the head gives and how it is trained is the task type's.

    Raises:
        Unsupported: no head fits the task's type.
    """

    name = "head"

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int = 256) -> None:
        if task.kind.head is None:
            raise Unsupported(f"The task `{task.name}` {task.kind.headless}, so no head fits it. Use the {task.kind.words} framing.")
        self.task = task
        self.head = task.kind.head
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)

    @classmethod
    def make(cls, task: Task, tokenizer: PreTrainedTokenizerBase, how: How) -> HeadFraming:
        """The head framing, which takes no template."""
        if how.template or not how.manual:
            asked = f"template={how.template}" if how.template else "manual_template=False"
            raise InvalidValue(
                f"`{asked}` was asked for, but `{task.name}` is put to a head here, which takes no template. "
                "Leave it out, or choose the text2text framing (`framing=text2text`), for models with a decoder."
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

    def encode(self, rows: Sequence[Row]) -> list[Features]:
        """Token ids with ``labels``."""
        return self.head.encode(self, rows, labelled=True)

    def encode_inputs(self, rows: Sequence[Row]) -> list[Features]:
        """Token ids; of several texts, the longest is cut first."""
        return self.head.encode(self, rows, labelled=False)

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """Inputs and, where there are any, ``labels``."""
        return self.head.collate(self, features)

    def length(self, features: Features) -> int:
        """Tokens of the longest input of one example."""
        return self.head.length(features)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """That of the task's type, summed over the items."""
        return self.head.loss(model, batch, weights)

    def class_weights(self, rows: Sequence[Row]) -> Tensor:
        """w_c = N / (K N_c) for K classes with N_c of N rows."""
        return self.head.weights(self.task, rows)

    def score(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32) -> Tensor:
        """The head's numbers for each row, in the order of the rows; the model is in eval mode meanwhile."""
        found = [scores for _, scores in self._scored(model, rows, batch_size)]
        if not found:
            return torch.empty(0, self.outputs)
        return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-torch.inf)

    def predict(self, scores: Tensor) -> list[Any]:
        """What each row's scores say: a label index, the indices above zero (multilabel), a number, an option."""
        return [self.head.value(self, {}, row) for row in scores]

    def answers(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, most: int | None = None) -> list[Answer]:
        """The values and probabilities that the head's numbers say."""
        task, scored = self.task, self._scored(model, rows, batch_size)
        return [
            Answer(self.head.value(self, features, scores), task.kind.shares(task, row, scores))
            for row, (features, scores) in zip(rows, scored, strict=True)
        ]

    def _scored(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[tuple[Features, Tensor]]:
        inputs = self.encode_inputs(rows)
        found: list[Tensor] = [torch.empty(0)] * len(inputs)
        for batch in self.in_batches(model, inputs, batch_size):
            for index, scores in zip(batch, self.head.scores(self, model, [inputs[index] for index in batch]), strict=True):
                found[index] = scores
        return list(zip(inputs, found, strict=True))

    @classmethod
    def takes(cls, task: Task) -> bool:
        """Tasks whose type has a head."""
        return task.kind.head is not None

    @classmethod
    def shown(cls, task: Task, row: Row) -> list[tuple[str, str]]:
        """The texts one under the other, and the answer by name."""
        kind = task.kind
        texts = [text_of(row[column]) for column in task.text]
        texts += [f"- {text_of(one)}" for column in kind.inputs(task) if column not in task.text for one in row[column]]
        return [("\n".join(texts), str(kind.named(task, row, kind.perfect(task, row))))]

    # what heads encode with

    def tokens(self, rows: Sequence[Row], columns: Sequence[str] = (), *, offsets: bool = False) -> list[Features]:
        """Token ids of the rows' texts with special ones, the longest text cut first; the task's columns if none are given."""
        columns = tuple(columns) or self.task.text
        if not len(rows):
            return []
        texts = [[text_of(row[column]) for row in rows] for column in columns]
        if len(columns) > 2 or (len(columns) == 2 and not self._between):
            return self._assembled(texts)
        encoded = self.tokenizer(*texts, truncation="longest_first", max_length=self.max_length, return_offsets_mapping=offsets)
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        found = [encoded[name] for name in names]
        features: list[Features] = [dict(zip(names, values, strict=True)) for values in zip(*found, strict=True)]
        if offsets:
            for feature, places in zip(features, encoded["offset_mapping"], strict=True):
                feature["offsets"] = places
        return features

    def _assembled(self, texts: Sequence[Sequence[str]]) -> list[Features]:
        """Pieces joined by the tokenizer's separator, or by a line break where it has none."""
        columns = [self.bare(column) for column in texts]
        between = self._between or self.bare(["\n"])[0]
        room = self.room - len(between) * (len(columns) - 2 if self._between else len(columns) - 1)
        features = []
        for pieces in zip(*columns, strict=True):
            cut = [piece[:length] for piece, length in zip(pieces, kept([len(piece) for piece in pieces], room), strict=True)]
            rest = [token for piece in cut[1:] for token in (*between, *piece)]
            features.append(self.joined(cut[0], rest[len(between) :] if self._between else rest)[0])
        return features

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special ones."""
        return list(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if len(texts) else []

    def joined(self, first: Sequence[int], second: Sequence[int]) -> tuple[Features, int]:
        """A pair with its special tokens, and the place where the second begins."""
        before, between, after = (ids for ids, _ in self._pattern)
        parts = [before, first, between, second, after]
        feature: Features = {"input_ids": [token for part in parts for token in part]}
        if "token_type_ids" in self.tokenizer.model_input_names:
            (_, zero), (_, one), (_, two) = self._pattern
            types = [zero, [0] * len(first), one, [self._second_type] * len(second), two]
            feature["token_type_ids"] = [number for part in types for number in part]
        return feature, len(before) + len(first) + len(between)

    @property
    def room(self) -> int:
        """Tokens that are left for the texts of a pair."""
        return self.max_length - sum(len(ids) for ids, _ in self._pattern)

    @property
    def _between(self) -> list[int]:
        return self._pattern[1][0]

    @property
    def _second_type(self) -> int:
        return self._pattern[2][1][0] if self._pattern[2][1] else 0

    @cached_property
    def _pattern(self) -> tuple[tuple[list[int], list[int]], ...]:
        """The special tokens before, between and behind the texts of a pair, each with their types."""
        [piece] = self.bare(["a"])
        whole = self.tokenizer("a", "a")
        ids, types = whole["input_ids"], whole.get("token_type_ids") or [0] * len(whole["input_ids"])
        size = len(piece)
        places = [place for place in range(len(ids) - size + 1) if ids[place : place + size] == piece]
        if len(places) < 2:
            raise DataError(f"{type(self.tokenizer).__name__} changes a text's tokens in a pair, so texts cannot be cut safely.")
        cuts = [0, places[0], places[0] + size, places[-1], places[-1] + size, len(ids)]
        stretches = [(ids[start:end], types[start:end]) for start, end in list(pairwise(cuts))[::2]]
        return tuple(stretches)

    def padded(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """Right-padded ``input_ids`` and ``attention_mask``, and ``token_type_ids`` where the tokenizer makes them."""
        fill: Mapping[str, Any] = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": 0}
        batch = {name: padded([feature[name] for feature in features], value) for name, value in fill.items() if name in features[0]}
        batch["attention_mask"] = padded([[1] * len(feature["input_ids"]) for feature in features], 0)
        return batch

    def moved(self, batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The batch on the model's device."""
        return moved(batch, model)


def padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Sequences of unequal length -> (batch, longest), filled with ``value`` on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences])


def moved(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch on the model's device; where its weights are offloaded, their hooks move it."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return dict(batch) if device.type == "meta" else {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a moment; each module gets back its own mode, since frozen layers may differ from trained ones."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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
