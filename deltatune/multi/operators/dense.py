"""Dense: few lanes, so that all rows are multiplied with all of them and keep what is theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.multi.operators.operator import Operator
from deltatune.multi.picks import Picks


class Dense(Operator):
    """(x [A_1 .. A_n] * mask) [B_1; ..; B_n]: two plain products for any number of rows."""

    def matrix(self, x: Tensor, W: Tensor, picks: Picks) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        n, out = len(picks.distinct), W.shape[-1]
        z = x @ self._beside(W, picks).to(x.dtype)  # (rows, tokens, distinct * out)
        if n == 1:
            return z
        return torch.sum((z * picks.places(out).to(x.dtype)).view(*x.shape[:-1], n, out), -2)

    def pair(self, x: Tensor, A: Tensor, B: Tensor, picks: Picks) -> Tensor:
        """(x A) B."""
        r, n = A.shape[-1], len(picks.distinct)
        h = x @ self._beside(A, picks).to(x.dtype)  # (rows, tokens, distinct * r)
        if n == 1:
            return h @ B[picks.distinct[0]].to(x.dtype)
        return (h * picks.places(r).to(x.dtype)) @ B.index_select(0, picks.used).reshape(n * r, -1).to(x.dtype)

    @staticmethod
    def _beside(W: Tensor, picks: Picks) -> Tensor:
        """The matrices of the lanes in use side by side, (in, distinct * out)."""
        if len(picks.distinct) == 1:
            return W[picks.distinct[0]]
        return W.index_select(0, picks.used).transpose(0, 1).flatten(1)
