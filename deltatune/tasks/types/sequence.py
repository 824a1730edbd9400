"""The head of types whose rows have one or more texts and one row of logits: classification, multilabel, regression."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.tasks.rows import Row
from deltatune.tasks.tensors import Features, moved, without
from deltatune.tasks.types.base import Head

if TYPE_CHECKING:
    from deltatune.tasks.framing import HeadFraming
    from deltatune.tasks.task import Task


class SequenceHead(Head):
    """texts -> tokens -> logits (batch, outputs); what they mean is the subclass's."""

    dtype: torch.dtype = torch.float

    def encode(self, framing: HeadFraming, rows: Sequence[Row], *, labelled: bool) -> list[Features]:
        """Token ids (length,), with ``labels`` an index, a row of zeros and ones, or a number."""
        features = framing.inputs.tokens(rows, framing.task.text)
        if labelled:
            for feature, row in zip(features, rows, strict=True):
                feature["labels"] = self.target(framing.task, row)
        return features

    def target(self, task: Task, row: Row) -> Any:
        """The label as the loss takes it."""
        return row[task.label]

    def collate(self, framing: HeadFraming, features: Sequence[Features]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (batch, length) and, where there are any, ``labels``."""
        batch = framing.inputs.padded(features)
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features], dtype=self.dtype)
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """The sum of the rows' losses."""
        return self.compare(model(**without(batch)).logits.float(), batch["labels"], weights)

    @abstractmethod
    def compare(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Logits (batch, outputs) and labels -> the sum of the losses."""

    def scores(self, framing: HeadFraming, model: nn.Module, features: Sequence[Features]) -> list[Tensor]:
        """The head's logits (outputs,) of each row."""
        logits: Tensor = model(**moved(self.collate(framing, features), model)).logits
        return list(logits.float().cpu())
