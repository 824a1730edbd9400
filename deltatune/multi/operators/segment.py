"""Segment: many tokens a row, as in reading a prompt and in training. One batched product over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.multi.lanes import TOKENS, Lanes, Step
from deltatune.multi.operators.operator import NARROW, Operator


class Segment(Operator):
    """``bmm`` with the matrices of the rows' lanes; the copy of a matrix is paid by the row's tokens, or by the route's forwards."""

    def matrix(self, x: Tensor, lanes: Lanes, W: str) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        matrices = lanes.rows(W, x.dtype)
        if matrices.shape[-1] > NARROW or torch.compiler.is_compiling() or x.shape[1] < TOKENS or torch.is_grad_enabled():
            return torch.bmm(x, matrices)
        return torch.bmm(matrices.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)

    def step(self, lanes: Lanes, A: str, B: str, dtype: torch.dtype) -> Step | None:
        """Two batched products with the copies."""
        if not lanes.is_kept:
            return None
        down, up = lanes.rows(A, dtype), lanes.rows(B, dtype)
        return lambda x, y: torch.baddbmm(y, torch.bmm(x, down), up, out=y)

    def added(self, y: Tensor, x: Tensor, lanes: Lanes, A: str, B: str, out: Tensor | None = None) -> Tensor:
        """y + (x A) B, the sum made by the second product."""
        return torch.baddbmm(y, self.matrix(x, lanes, A), lanes.rows(B, x.dtype), out=out)  # type: ignore[call-overload, no-any-return]
