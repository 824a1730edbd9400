"""Segment: many tokens a row, as in reading a prompt and in training. One batched product over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.multi.lanes import TOKENS, Lanes
from deltatune.multi.operators.operator import NARROW, Operator


class Segment(Operator):
    """``bmm`` with the matrices of the rows' lanes; the copy of a matrix is paid by the row's tokens."""

    def matrix(self, x: Tensor, lanes: Lanes, W: str) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        matrices = lanes.rows(W, x.dtype)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _is_turned(x, matrices):
            return torch.bmm(x, matrices)
        return torch.bmm(matrices.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)

    def added(self, y: Tensor, x: Tensor, lanes: Lanes, A: str, B: str, out: Tensor | None = None) -> Tensor:
        """y + (x A) B, the sum made by the second product."""
        return torch.baddbmm(y, self.matrix(x, lanes, A), lanes.rows(B, x.dtype), out=out)


def _is_turned(x: Tensor, matrices: Tensor) -> bool:
    """The product is better made with the few columns as rows."""
    return matrices.shape[-1] <= NARROW and x.shape[1] >= TOKENS
