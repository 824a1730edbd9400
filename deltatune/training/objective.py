"""The task's loss: a sum over what is counted in a batch, so that accumulated batches add up to one mean."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import InvalidValue
from deltatune.tasks import Rows, Task
from deltatune.tasks.framing import IGNORED


class Objective:
    """loss = (1 / count) sum_i w_i l_i, with l_i the cross-entropy, the binary one, or the squared error of item i.

    An item is a row of a head's labels, or an answer's token.

    Args:
        task: what the labels are.
        head: the labels are those of a head; else they are token ids.
        decoder: the tokens are predicted one place ahead, as by a causal language model.
        class_weights: w by class, (labels,).
    """

    def __init__(self, task: Task, *, head: bool, decoder: bool = False, class_weights: Tensor | None = None) -> None:
        if class_weights is not None and not (head and task.type == "classification"):
            raise InvalidValue(
                f"`class_weights` was asked for, but `{task.name}` is trained {'as ' + task.type if head else 'by label words'}. "
                "Leave it out, or use it with a classification head."
            )
        self.task = task
        self.head = head
        self.decoder = decoder
        self.class_weights = class_weights

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], count: Tensor | int | None = None) -> Tensor:
        """The loss of one batch; ``count`` items are in all batches of the optimiser step (this one's if left out)."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        labels = batch["labels"]
        total = self._head(model, inputs, labels) if self.head else self._tokens(model, inputs, labels)
        return total / (self.count(labels) if count is None else count)

    def count(self, labels: Tensor) -> Tensor:
        """Items in a batch."""
        return labels.ne(IGNORED).sum()

    def _head(self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        logits: Tensor = model(**inputs).logits.float()  # (batch, outputs)
        if self.task.type == "classification":
            weights = None if self.class_weights is None else self.class_weights.to(logits.device)
            return F.cross_entropy(logits, labels, weight=weights, reduction="sum")
        if self.task.type == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")
        return F.mse_loss(logits[:, 0], labels.float(), reduction="sum")

    def _tokens(self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        if not self.decoder:
            logits = model(**inputs, labels=labels).logits  # labels make the decoder's inputs
            return _cross_entropy(logits, labels)
        targets = labels[:, 1:]  # (batch, length - 1): the token after each place
        if keeps_logits(model):
            places = targets.ne(IGNORED).any(0).nonzero().flatten()
            return _cross_entropy(model(**inputs, logits_to_keep=places).logits, targets[:, places])
        return _cross_entropy(model(**inputs).logits[:, :-1], targets)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (batch, k, vocabulary), targets (batch, k) -> sum over the targets that count."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can spread out the vocabulary at chosen places only."""
    inner = getattr(model, "module", model)  # DDP passes everything on
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters


def balanced_weights(task: Task, rows: Rows) -> Tensor:
    """w_c = N / (K N_c) for K classes with N_c of N rows: every class counts as much, and the mean weight is 1.

    Raises:
        InvalidValue: a class has no training row.
    """
    if task.type != "classification":
        raise InvalidValue(f"`class_weights` was asked for, but `{task.name}` is a {task.type} task. Leave it out.")
    counts = torch.bincount(torch.tensor(rows[task.label]), minlength=task.outputs).float()
    if (counts == 0).any():
        missing = task.labels[int((counts == 0).nonzero()[0])]
        raise InvalidValue(f"`class_weights` was asked for, but no training row of `{task.name}` has the label `{missing}`.")
    return counts.sum() / (len(counts) * counts)
