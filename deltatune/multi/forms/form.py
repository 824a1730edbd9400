"""What a form is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from deltatune.multi.lanes import Lanes, Shortcut
from deltatune.multi.picks import Picks
from deltatune.multi.table import Table

if TYPE_CHECKING:
    from deltatune.multi.ground import Beside


class Form(ABC):
    """A formula of one patch, and how it runs for many rows with a lane each.

    Class attributes:
        name: what lanes call it.
        reads_input: it reads what the module was given.
        is_alone: of what changes the module itself, it is exact only without another one in the same row.
        whole: it is given (rows, factor, ..., width), with the axes of a row's tokens apart.
    """

    name: ClassVar[str]
    reads_input: ClassVar[bool] = True
    is_alone: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    def fitted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in the shape in which they stand in a table; differentiable."""
        return dict(tensors)

    def neutral(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The zero lane: tensors of these shapes that change nothing."""
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    @abstractmethod
    def one(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        """The definition, for one lane: x (tokens, in), y (tokens, out) -> (tokens, out)."""

    def shortcut(self, y: Tensor, lanes: Lanes, table: Table) -> Shortcut | None:
        """``many`` for a y like this one, which is ``out``, looked up once for a route; None where that saves nothing."""
        return None

    @abstractmethod
    def many(self, x: Tensor, y: Tensor, lanes: Lanes, table: Table, out: Tensor | None = None) -> Tensor:
        """The same for rows with a lane each.

        Args:
            x: what the module was given, (rows, tokens, in); what is edited, where an input is.
            y: what is edited, (rows, tokens, out).
            lanes: the tensors, with the lane of each row.
            table: settings, what lanes share, the module.
            out: y itself, where nobody else reads it and no gradient is wanted: then the result may be put there.

        Returns:
            (rows, tokens, out), of y's dtype.
        """

    def beside(self, x: Tensor, y: Tensor, lanes: Mapping[str, Beside], picks: Picks, table: Table) -> Tensor:
        """The same for lanes that train where they lie, each with as many rows as the next."""
        return self.many(x, y, Lanes({name: stacked() for name, stacked in lanes.items()}, picks), table)


def rank_class(rank: int) -> int:
    """The next power of two, from 4: ranks of one class stand in one table.

    >>> [rank_class(rank) for rank in (1, 4, 5, 8, 9)]
    [4, 4, 8, 8, 16]
    """
    return max(4, 1 << (rank - 1).bit_length())


def padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """The tensor with zeros behind it along one axis, up to ``size``."""
    missing = size - tensor.shape[axis]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def dropped(x: Tensor, p: object, picks: Picks | None = None) -> Tensor:
    """Dropout of x (rows, tokens, in), where the lanes ask for it: they do in training only; each row by its own random numbers."""
    if not (isinstance(p, float) and p):
        return x
    return F.dropout(x, p) if picks is None or picks.streams is None else picks.streams.dropped(x, p, picks.numbers)
