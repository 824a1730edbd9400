"""Segment: many tokens a row, as in reading a prompt and in training. One batched product over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.multi.lanes import TOKENS, Lanes, Shortcut
from deltatune.multi.operators.operator import NARROW, Operator


class Segment(Operator):
    """``bmm`` with the matrices of the rows' lanes; the copy of a matrix is paid by the row's tokens, or by the route's forwards."""

    def matrix(self, x: Tensor, lanes: Lanes, W: str) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        matrices = lanes.rows(W, x.dtype)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _is_turned(x, matrices):
            return torch.bmm(x, matrices)
        return torch.bmm(matrices.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)

    def added(self, y: Tensor, x: Tensor, lanes: Lanes, A: str, B: str, out: Tensor | None = None) -> Tensor:
        """y + (x A) B, the sum made by the second product."""
        return torch.baddbmm(y, self.matrix(x, lanes, A), lanes.rows(B, x.dtype), out=out)

    def shortcut(self, y: Tensor, lanes: Lanes, A: str, B: str) -> Shortcut | None:
        """The same with the copies."""
        if not lanes.is_kept:
            return None
        down, up = lanes.rows(A, y.dtype), lanes.rows(B, y.dtype)
        if not _is_turned(y, down):
            return lambda x, y: torch.baddbmm(y, torch.bmm(x, down), up, out=y)
        turned = down.transpose(1, 2)
        return lambda x, y: torch.baddbmm(y, torch.bmm(turned, x.transpose(1, 2)).transpose(1, 2), up, out=y)


def _is_turned(x: Tensor, matrices: Tensor) -> bool:
    """The product is better made with the few columns as rows."""
    return matrices.shape[-1] <= NARROW and x.shape[1] >= TOKENS
