"""Dense: few lanes, so that all rows are multiplied with all of them and keep what is theirs.

Of what a row does not use it takes nothing times 0 in the second product, which is NaN where a lane is; so lanes have to be finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.multi.lanes import TOKENS, Lanes, Shortcut
from deltatune.multi.operators.operator import NARROW, Operator


class Dense(Operator):
    """(x [A_1 .. A_n], masked) [B_1; ..; B_n]: two plain products for any number of rows."""

    def matrix(self, x: Tensor, lanes: Lanes, W: str) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        n, out = len(lanes.picks.distinct), lanes[W].shape[-1]
        z = x @ lanes.beside(W, x.dtype)  # (rows, tokens, distinct * out)
        if n == 1:
            return z
        return torch.sum(z.masked_fill(lanes.picks.others(out), 0).view(*x.shape[:-1], n, out), -2)

    def added(self, y: Tensor, x: Tensor, lanes: Lanes, A: str, B: str, out: Tensor | None = None) -> Tensor:
        """y + (x A) B, the sum made by the second product."""
        r, down, up = lanes[A].shape[-1], lanes.beside(A, x.dtype), lanes.below(B, x.dtype)
        others = lanes.picks.others(r) if len(lanes.picks.distinct) > 1 else None
        return _added(y, x, down, up, others, out)

    def shortcut(self, y: Tensor, lanes: Lanes, A: str, B: str) -> Shortcut | None:
        """The same with the copies, or with the only lane."""
        if not (lanes.is_kept or len(lanes.picks.distinct) == 1):
            return None
        r, down, up = lanes[A].shape[-1], lanes.beside(A, y.dtype), lanes.below(B, y.dtype)
        others = lanes.picks.others(r) if len(lanes.picks.distinct) > 1 else None
        return lambda x, y: _added(y, x, down, up, others, y)


def _added(y: Tensor, x: Tensor, down: Tensor, up: Tensor, others: Tensor | None, out: Tensor | None) -> Tensor:
    """y + (x down, but for what is others') up."""
    flat = x.reshape(-1, x.shape[-1])
    turned = x.shape[1] >= TOKENS and down.shape[-1] <= NARROW and not torch.is_grad_enabled()
    h = (down.T @ flat.T).T if turned else flat @ down  # (rows * tokens, distinct * r)
    if others is not None:
        h = h.view(*x.shape[:-1], -1).masked_fill(others, 0).flatten(0, 1)
    if out is None:
        return torch.addmm(y.reshape(-1, y.shape[-1]), h, up).view(y.shape)
    whole = out.view(-1, out.shape[-1])
    torch.addmm(y.reshape(whole.shape), h, up, out=whole)
    return out
