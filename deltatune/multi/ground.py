"""Ground: memory for what equally shaped deltas train, a row for each, so that their lanes are stacked by looking at it, without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Settler(Protocol):
    """Who has a row."""

    def settle(self, row: int) -> None:
        """Its numbers lie in that row from now on."""


class Ground:
    """Two matrices, of values and of gradients; rows are taken without gaps, so whoever leaves makes the last one move.

    Args:
        numbers: of a row.
        like: says type and device.

    Attributes:
        values: (rows, numbers).
        gradients: of the same shape, in the same order.
        settlers: who has the first rows, in their order.
    """

    def __init__(self, numbers: int, like: Tensor) -> None:
        self.values, self.gradients = like.new_zeros(1, numbers), like.new_zeros(1, numbers)
        self.settlers: list[Settler] = []

    def enter(self, settler: Settler, values: Tensor, gradients: Tensor) -> None:
        """Give somebody a row that holds these numbers."""
        row = len(self.settlers)
        if row == len(self.values):
            self.values, self.gradients = (torch.cat([both, torch.zeros_like(both)]) for both in (self.values, self.gradients))
            for number, other in enumerate(self.settlers):
                other.settle(number)
        self.values[row], self.gradients[row] = values, gradients
        self.settlers.append(settler)
        settler.settle(row)

    def leave(self, settler: Settler) -> None:
        """Take a row back; it must not be looked at any more."""
        row, last = self.settlers.index(settler), self.settlers.pop()
        if last is not settler:
            self.values[row], self.gradients[row] = self.values[len(self.settlers)], self.gradients[len(self.settlers)]
            self.settlers[row] = last
            last.settle(row)

    def stacked(self, parts: Sequence[Tensor], scales: Sequence[float]) -> Beside | None:
        """The parts stacked, each times its number, where they lie; good until somebody moves.

        Args:
            parts: Parameters or views of them, alike in shape, one of each delta.
            scales: a number for each.

        Returns:
            None where they do not all lie here, at the same place of their rows.
        """
        first, width = parts[0], self.values.shape[1]
        place, shape, stride = first.storage_offset() % width, first.shape, first.stride()
        if any(size > 1 and not step for size, step in zip(shape, stride, strict=True)):
            return None
        for part in parts:
            here = part.requires_grad and part.untyped_storage().data_ptr() == self.values.untyped_storage().data_ptr()
            if not here or part.shape != shape or part.stride() != stride or part.storage_offset() % width != place:
                return None
        rows = [part.storage_offset() // width for part in parts]
        in_order = all(row == rows[0] + k for k, row in enumerate(rows))
        begin, count = (rows[0], len(rows)) if in_order else (0, len(self.settlers))
        window = (count, *shape), (width, *stride), begin * width + place
        return Beside(
            self.values.as_strided(*window).detach().requires_grad_(),
            self.gradients.as_strided(*window),
            None if in_order else torch.tensor(rows, device=first.device),
            scales[0] if len(set(scales)) == 1 else torch.tensor(scales).to(first).view(-1, *[1] * first.ndim),
        )


@dataclass(frozen=True)
class Beside:
    """Tensors of several deltas on a ground.

    Attributes:
        values: (n, ...).
        gradients: of these.
        rows: which of them are meant; None for all.
        scale: by what they are multiplied, one number for all or (n, 1, ...).
    """

    values: Tensor
    gradients: Tensor
    rows: Tensor | None
    scale: float | Tensor

    @property
    def count(self) -> int:
        """n."""
        return len(self.values if self.rows is None else self.rows)

    def look(self) -> Tensor:
        """The tensors as they lie, without scale and gradient."""
        values = self.values.detach()
        return values if self.rows is None else values.index_select(0, self.rows)

    def add(self, gradient: Tensor) -> None:
        """A gradient of what ``look`` gave is added to those that are there."""
        if self.rows is None:
            self.gradients.add_(gradient)
        else:
            self.gradients.index_add_(0, self.rows, gradient.to(self.gradients.dtype))

    def __call__(self) -> Tensor:
        """scale * values, with its way back."""
        found: Tensor = _Looked.apply(self.values, self)  # type: ignore[no-untyped-call]
        return found


class _Looked(torch.autograd.Function):
    """What autograd has itself would copy gradients, and complain that they do not lie one behind the other."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, stacked: Beside) -> Tensor:
        ctx.stacked = stacked
        return stacked.look() * stacked.scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.stacked.add(gradient * ctx.stacked.scale)
        return None, None
