"""What an operator is: the product of every row's tokens with the matrix of the row's lane."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from deltatune.multi.picks import Picks


class Operator(ABC):
    """z_i = x_i W[lane_i] for every row i."""

    @abstractmethod
    def matrix(self, x: Tensor, W: Tensor, picks: Picks) -> Tensor:
        """The product.

        Args:
            x: (rows, tokens, in).
            W: (lanes, in, out).
            picks: the lanes of the rows.

        Returns:
            (rows, tokens, out), of x's dtype.
        """

    def pair(self, x: Tensor, A: Tensor, B: Tensor, picks: Picks) -> Tensor:
        """(x A) B, by way of the few numbers between them."""
        return self.matrix(self.matrix(x, A, picks), B, picks)

    def added(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, picks: Picks) -> Tensor:
        """y + (x A) B."""
        return y + self.pair(x, A, B, picks)
