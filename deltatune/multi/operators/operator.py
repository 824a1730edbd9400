"""What an operator is: the product of every row's tokens with the matrix of the row's lane."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from deltatune.multi.lanes import Lanes, Shortcut

NARROW = 8
"""Products of so few columns are up to twice as fast with those as rows: (W^T x^T)^T."""


class Operator(ABC):
    """z_i = x_i W[lane_i] for every row i."""

    @abstractmethod
    def matrix(self, x: Tensor, lanes: Lanes, W: str) -> Tensor:
        """The product.

        Args:
            x: (rows, tokens, in).
            lanes: the lanes of the rows.
            W: name of their matrices, (lanes, in, out).

        Returns:
            (rows, tokens, out), of x's dtype.
        """

    def pair(self, x: Tensor, lanes: Lanes, A: str, B: str) -> Tensor:
        """(x A) B, by way of the few numbers between them."""
        return self.matrix(self.matrix(x, lanes, A), lanes, B)

    def shortcut(self, y: Tensor, lanes: Lanes, A: str, B: str) -> Shortcut | None:
        """``added`` for a y like this one, which is ``out``, looked up once for a route; None where that saves nothing."""
        return None

    def added(self, y: Tensor, x: Tensor, lanes: Lanes, A: str, B: str, out: Tensor | None = None) -> Tensor:
        """y + (x A) B; in ``out``, if it is given, which may be y."""
        return torch.add(y, self.pair(x, lanes, A, B), out=out)
