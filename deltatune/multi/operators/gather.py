"""Gather: few tokens a row, as in decoding. Two fused gather-mat-vecs that never copy a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.multi.lanes import Lanes, Shortcut
from deltatune.multi.operators.operator import Operator

SUM = 0
"""Of the modes of ``embedding_bag``, which is called without its wrapper: that makes the beginnings of the bags anew each time."""


class Gather(Operator):
    """``embedding_bag``: the bag of a token is the rows of its lane's matrix, weighed by the token's entries."""

    def matrix(self, x: Tensor, lanes: Lanes, W: str) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        rows, tokens, width = x.shape
        matrices = lanes[W]
        bags, begins = lanes.picks.bags(width, tokens)
        weights = x.reshape(-1).to(matrices.dtype)
        z = torch.embedding_bag(matrices.view(-1, matrices.shape[-1]), bags, begins, False, SUM, False, weights)[0]
        return z.view(rows, tokens, -1).to(x.dtype)

    def shortcut(self, y: Tensor, lanes: Lanes, A: str, B: str) -> Shortcut | None:
        """The same with the tables as they lie."""
        if lanes[A].dtype != y.dtype:
            return None
        picks, width, r = lanes.picks, *lanes[A].shape[1:]
        down, up = lanes[A].view(-1, r), lanes[B].view(-1, lanes[B].shape[-1])

        def step(x: Tensor, y: Tensor) -> None:
            tokens = x.size(1)
            h = torch.embedding_bag(down, *picks.bags(width, tokens), False, SUM, False, x.reshape(-1))[0]
            z = torch.embedding_bag(up, *picks.bags(r, tokens), False, SUM, False, h.view(-1))[0]
            y.add_(z.view(y.shape))

        return step
