"""Dense: few lanes, so that all rows are multiplied with all of them and keep what is theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.multi.lanes import Lanes
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
        return self._own(x, lanes, A) @ lanes.below(B, x.dtype)

    def added(self, y: Tensor, x: Tensor, lanes: Lanes, A: str, B: str, out: Tensor | None = None) -> Tensor:
        """y + (x A) B, the sum made by the second product."""
        h, flat = self._own(x, lanes, A), None if out is None else out.view(-1, out.shape[-1])
        z = torch.addmm(y.reshape(-1, y.shape[-1]), h.flatten(0, 1), lanes.below(B, x.dtype), out=flat)  # type: ignore[call-overload]
        return z.view(y.shape)  # type: ignore[no-any-return]

    @staticmethod
    def _own(x: Tensor, lanes: Lanes, A: str) -> Tensor:
        """x A for all lanes in use, (rows, tokens, distinct * r), with zeros for those that are not the row's."""
        matrices = lanes.beside(A, x.dtype)
        if matrices.shape[-1] > NARROW or torch.is_grad_enabled():
            h = x @ matrices
        else:
            h = (matrices.T @ x.reshape(-1, x.shape[-1]).T).T.view(*x.shape[:-1], -1)
        if len(lanes.picks.distinct) == 1:
            return h
        return h * lanes.picks.places(lanes[A].shape[-1]).to(x.dtype)
