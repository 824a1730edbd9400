"""Segment: many tokens a row, as in reading a prompt and in training. One batched product over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.multi.operators.operator import Operator
from deltatune.multi.picks import Picks


class Segment(Operator):
    """``bmm`` with the matrices of the rows' lanes; the copy of a matrix is paid by the row's tokens."""

    def matrix(self, x: Tensor, W: Tensor, picks: Picks) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        return torch.bmm(x, W.index_select(0, picks.lanes).to(x.dtype))

    def added(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, picks: Picks) -> Tensor:
        """y + (x A) B, the sum made by the second product."""
        return torch.baddbmm(y, self.matrix(x, A, picks), B.index_select(0, picks.lanes).to(x.dtype))
