"""The framing's loss as a mean: a sum over what is counted, so that accumulated batches add up to one mean."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from deltatune.tasks.framing import Framing
from deltatune.tasks.tensors import items


class Objective:
    """loss = (1 / count) sum_i w_i l_i, with l_i what the framing says of item i.

    An item is what the framing counts: a row, a word, or an answer's token.

    Args:
        framing: whose loss.
        class_weights: w by class, (labels,).
    """

    def __init__(self, framing: Framing, class_weights: Tensor | None = None) -> None:
        self.framing = framing
        self.class_weights = class_weights

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], count: Tensor | int | None = None) -> Tensor:
        """The loss of one batch; ``count`` items are in all batches of the optimiser step (this one's if left out)."""
        total = self.framing.loss(model, batch, self.class_weights)
        return total / (items(batch) if count is None else count)
