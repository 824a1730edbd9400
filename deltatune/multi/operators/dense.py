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
        z = x @ self._beside(W, picks).to(x.dtype)
        z = z.view(*x.shape[:-1], len(picks.distinct), -1)  # (rows, tokens, distinct, out)
        return torch.sum(z * picks.places[:, None, :, None], -2)

    def pair(self, x: Tensor, A: Tensor, B: Tensor, picks: Picks) -> Tensor:
        """(x A) B."""
        r, n = A.shape[-1], len(picks.distinct)
        h = x @ self._beside(A, picks).to(x.dtype)  # (rows, tokens, distinct * r)
        if n > 1:
            h = h * picks.places.repeat_interleave(r, 1)[:, None, :]
        chosen = B[picks.distinct[0] : picks.distinct[0] + 1] if n == 1 else B[list(picks.distinct)]
        return h @ chosen.reshape(n * r, -1).to(x.dtype)

    @staticmethod
    def _beside(W: Tensor, picks: Picks) -> Tensor:
        """The matrices of the lanes in use side by side, (in, distinct * out)."""
        if len(picks.distinct) == 1:
            return W[picks.distinct[0]]
        return W[list(picks.distinct)].transpose(0, 1).flatten(1)
