"""Two ways to put a task to a model: a head over the labels, or a prompt answered by label words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import DataError, Unsupported
from deltatune.tasks.rows import Row, Rows
from deltatune.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Features = dict[str, Any]
Watch = Callable[[Sequence[list[int]]], Iterable[list[int]]]
"""Passes batches of row numbers on, one by one, and may show how far it is."""
IGNORED = -100
"""The label that PyTorch's cross-entropy leaves out."""


class Framing(ABC):
    """How rows become a model's input, and its output becomes predictions.

    Attributes:
        task: whose rows.
        tokenizer: of the backbone; it needs a pad token.
        max_length: most tokens of one input, special ones and answer included.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    @property
    @abstractmethod
    def auto_class(self) -> str:
        """Name of the transformers auto class that gives a fitting model."""

    @abstractmethod
    def encode(self, rows: Rows) -> list[Features]:
        """Training examples: token ids with labels, not padded yet."""

    @abstractmethod
    def encode_inputs(self, rows: Sequence[Row]) -> list[Features]:
        """The same without labels; rows need the text columns only."""

    @abstractmethod
    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """One batch: padded on the right to its longest example."""

    @abstractmethod
    def score_batch(self, model: nn.Module, inputs: Sequence[Features]) -> Tensor:
        """Scores (batch, outputs) of encoded inputs: logits of a head, or log-probabilities of the label words."""

    def score(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, watch: Watch = iter) -> Tensor:
        """Scores (rows, outputs) in fp32 on the CPU, in the order of the rows; the model is in eval mode meanwhile.

        Rows of like length share a batch, which changes nothing but the time; ``watch`` is given the batches.
        """
        inputs = self.encode_inputs(rows)
        scores = torch.empty(len(inputs), self.task.outputs)
        with _evaluating(model), torch.no_grad():
            for batch in watch(by_length(inputs, batch_size)):
                scores[batch] = self.score_batch(model, [inputs[index] for index in batch]).float().cpu()
        return scores

    def predict(self, scores: Tensor) -> list[Any]:
        """What the scores (rows, outputs) say: a label index, the indices above zero (multilabel), or a number."""
        if self.task.type == "regression":
            return scores[:, 0].tolist()
        if self.task.type == "multilabel":
            return [row.nonzero().flatten().tolist() for row in scores > 0]
        return scores.argmax(dim=1).tolist()

    def references(self, rows: Rows) -> list[Any]:
        """The truth in the form of ``predict``."""
        return list(rows[self.task.label])


class HeadFraming(Framing):
    """text (pair) -> tokens -> a head with one output per label.

    Raises:
        Unsupported: the task has no labels and is no regression, or has more than two text columns.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int = 256) -> None:
        if task.type == "text2text":
            raise Unsupported(f"The task `{task.name}` generates text, so no head fits it. Use the text2text framing.")
        if len(task.text) > 2:
            raise Unsupported(
                f"The task `{task.name}` has {len(task.text)} text columns; tokenizers take one or two. Use the text2text framing."
            )
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)

    @property
    def auto_class(self) -> str:
        """Sequence classification, for every task with a head."""
        return "AutoModelForSequenceClassification"

    def encode(self, rows: Rows) -> list[Features]:
        """Token ids (length,), with ``labels`` an index, a row of zeros and ones, or a number."""
        features = self.encode_inputs(rows)
        for feature, label in zip(features, rows[self.task.label], strict=True):
            feature["labels"] = self._target(label)
        return features

    def encode_inputs(self, rows: Sequence[Row]) -> list[Features]:
        """Token ids (length,); of a pair, the longer text is cut first."""
        if not len(rows):
            return []
        texts = [[str(row[column]) for row in rows] for column in self.task.text]
        encoded = self.tokenizer(*texts, truncation="longest_first", max_length=self.max_length)
        names = [name for name in encoded if name in ("input_ids", "token_type_ids")]
        return [{name: encoded[name][index] for name in names} for index in range(len(rows))]

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (batch, length) and, where there are any, ``labels``."""
        batch = _padded(features, self.tokenizer)
        if "labels" in features[0]:
            kind = torch.long if self.task.type == "classification" else torch.float
            batch["labels"] = torch.tensor([feature["labels"] for feature in features], dtype=kind)
        return batch

    def score_batch(self, model: nn.Module, inputs: Sequence[Features]) -> Tensor:
        """The head's logits (batch, outputs)."""
        logits: Tensor = model(**moved(self.collate(inputs), model)).logits
        return logits

    def _target(self, label: Any) -> Any:
        if self.task.type == "multilabel":
            return [float(index in label) for index in range(self.task.outputs)]
        return label


def _padded(features: Sequence[Features], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Right-padded ``input_ids`` and ``attention_mask``, and ``token_type_ids`` where the tokenizer makes them."""
    fill: Mapping[str, Any] = {"input_ids": tokenizer.pad_token_id, "token_type_ids": 0}
    batch = {name: padded([feature[name] for feature in features], value) for name, value in fill.items() if name in features[0]}
    batch["attention_mask"] = padded([[1] * len(feature["input_ids"]) for feature in features], 0)
    return batch


def padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Sequences of unequal length -> (batch, longest), filled with ``value`` on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences])


def by_length(inputs: Sequence[Features], batch_size: int) -> list[list[int]]:
    """The numbers of encoded inputs in batches, the shortest first, so that those of like length share one."""
    order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]["input_ids"]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def moved(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch on the model's device; where its weights are offloaded, their hooks move it."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return dict(batch) if device.type == "meta" else {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
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
            if column not in row or not str(row[column]).strip():
                raise DataError(
                    f"Row {number} has no text in `{column}`. `{task.name}` needs {', '.join(f'`{name}`' for name in task.text)}."
                )
