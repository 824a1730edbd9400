"""Even: in training, where each lane of a stack has as many rows as the next, one behind the other. Nothing is copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltatune.multi.lanes import Lanes
from deltatune.multi.operators.operator import Operator

if TYPE_CHECKING:
    from deltatune.multi.ground import Beside


class Even(Operator):
    """``bmm`` of the lanes where they lie, with all tokens of a lane's rows as one matrix."""

    def matrix(self, x: Tensor, lanes: Lanes, W: str) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        return torch.bmm(_by_lanes(x, len(lanes[W])), lanes[W].to(x.dtype)).view(*x.shape[:-1], -1)

    @staticmethod
    def beside(y: Tensor, x: Tensor, A: Beside, B: Beside) -> Tensor:
        """y + (x A) B, where A and B lie on a ground."""
        n = A.count
        z: Tensor = _Beside.apply(_by_lanes(y, n), _by_lanes(x, n), A.values, A, B)  # type: ignore[no-untyped-call]
        return z.view(y.shape)


def _by_lanes(x: Tensor, lanes: int) -> Tensor:
    return x.reshape(lanes, -1, x.shape[-1])


class _Beside(torch.autograd.Function):
    """y + s (x A) B for y (n, t, out), x (n, t, in), A (n, in, r), B (n, r, out); gradients of A and B go to the ground at once.

    What is as small as r stands first in every product: with r as the last axis, each takes three to four times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, trains: Tensor, A: Beside, B: Beside) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            a, b, ctx.scale = A.look().to(y.dtype), B.look().to(y.dtype), A.scale * B.scale
            h = torch.bmm(a.mT, x.mT) * ctx.scale  # (n, r, t)
            ctx.save_for_backward(x, a, b, h)
            ctx.A, ctx.B = A, B
            return torch.baddbmm(y, h.mT, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, a, b, h = ctx.saved_tensors
        dh = torch.bmm(b, g.mT) * ctx.scale  # (n, r, t)
        ctx.A.add(torch.bmm(dh, x).mT)
        ctx.B.add(torch.bmm(h, g))
        return g, torch.bmm(dh.mT, a.mT) if ctx.needs_input_grad[1] else None, None, None, None
