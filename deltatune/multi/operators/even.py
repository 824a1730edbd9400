"""Even: in training, where each lane of a stack has as many rows as the next, one behind the other. Nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.multi.operators.operator import Operator
from deltatune.multi.picks import Picks


class Even(Operator):
    """``bmm`` of the lanes where they lie, with all tokens of a lane's rows as one matrix."""

    def matrix(self, x: Tensor, W: Tensor, picks: Picks) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        return torch.bmm(x.reshape(len(W), -1, x.shape[-1]), W.to(x.dtype)).view(*x.shape[:-1], -1)

    def added(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, picks: Picks) -> Tensor:
        """y + (x A) B."""
        n, type_ = len(A), y.dtype
        z: Tensor = _Added.apply(
            y.reshape(n, -1, y.shape[-1]), x.reshape(n, -1, x.shape[-1]), A.to(type_), B.to(type_)
        )  # type: ignore[no-untyped-call]
        return z.view(y.shape)


class _Added(torch.autograd.Function):
    """y + (x A) B for y (n, t, out), x (n, t, in), A (n, in, r), B (n, r, out).

    What is as small as r stands first in every product: with r as the last axis, each takes three to four times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            h = torch.bmm(A.mT, x.mT)  # (n, r, t)
            ctx.save_for_backward(x, A, B, h)
            return torch.baddbmm(y, h.mT, B)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, A, B, h = ctx.saved_tensors
        dh = torch.bmm(B, g.mT)  # (n, r, t)
        _, of_x, of_A, of_B = ctx.needs_input_grad
        dx = torch.bmm(dh.mT, A.mT) if of_x else None
        dA = torch.bmm(dh, x).mT if of_A else None
        dB = torch.bmm(h, g) if of_B else None
        return g, dx, dA, dB
