"""Dense: few lanes, so that all rows are multiplied with all of them and keep what is theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.multi.lanes import TOKENS, Lanes, Step
from deltatune.multi.operators.operator import NARROW, Operator


class Dense(Operator):
    """(x [A_1 .. A_n] * mask) [B_1; ..; B_n]: two plain products for any number of rows."""

    def matrix(self, x: Tensor, lanes: Lanes, W: str) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        n, out = len(lanes.picks.distinct), lanes[W].shape[-1]
        z = x @ lanes.beside(W, x.dtype)  # (rows, tokens, distinct * out)
        if n == 1:
            return z
        return torch.sum((z * lanes.picks.places(out).to(x.dtype)).view(*x.shape[:-1], n, out), -2)

    def pair(self, x: Tensor, lanes: Lanes, A: str, B: str) -> Tensor:
        """(x A) B."""
        return (self._own(x, lanes, A) @ lanes.below(B, x.dtype)).view(*x.shape[:-1], -1)

    def added(self, y: Tensor, x: Tensor, lanes: Lanes, A: str, B: str, out: Tensor | None = None) -> Tensor:
        """y + (x A) B, the sum made by the second product."""
        h, below = self._own(x, lanes, A), lanes.below(B, x.dtype)
        if out is None:
            return torch.addmm(y.reshape(-1, y.shape[-1]), h, below).view(y.shape)
        flat = out.view(-1, out.shape[-1])
        torch.addmm(y.reshape(flat.shape), h, below, out=flat)
        return out

    def step(self, lanes: Lanes, A: str, B: str, dtype: torch.dtype) -> Step | None:
        """Two products with the only lane."""
        if len(lanes.picks.distinct) > 1:
            return None
        down, up = lanes.beside(A, dtype), lanes.below(B, dtype)

        def step(x: Tensor, y: Tensor) -> None:
            flat = y.view(-1, up.shape[-1])
            torch.addmm(flat, x.reshape(-1, down.shape[0]) @ down, up, out=flat)

        return step

    @staticmethod
    def _own(x: Tensor, lanes: Lanes, A: str) -> Tensor:
        """x A for all lanes in use, (rows * tokens, distinct * r), with zeros for those that are not the row's."""
        matrices, flat = lanes.beside(A, x.dtype), x.reshape(-1, x.shape[-1])
        if x.shape[1] >= TOKENS and matrices.shape[-1] <= NARROW and not torch.is_grad_enabled():
            h = (matrices.T @ flat.T).T
        else:
            h = flat @ matrices
        if len(lanes.picks.distinct) == 1:
            return h
        places = lanes.picks.places(lanes[A].shape[-1]).to(x.dtype)
        return (h.view(*x.shape[:-1], -1) * places).flatten(0, 1)
