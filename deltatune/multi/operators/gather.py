"""Gather: few tokens a row, as in decoding. Two fused gather-mat-vecs that never copy a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.multi.operators.operator import Operator
from deltatune.multi.picks import Picks

SUM = 0
"""Of the modes of ``embedding_bag``, which is called without its wrapper: that makes the beginnings of the bags anew each time."""


class Gather(Operator):
    """``embedding_bag``: the bag of a token is the rows of its lane's matrix, weighed by the token's entries."""

    def matrix(self, x: Tensor, W: Tensor, picks: Picks) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        rows, tokens, width = x.shape
        bags, begins = picks.bags(width, tokens)
        weights = x.reshape(-1).to(W.dtype)
        z = torch.embedding_bag(W.view(-1, W.shape[-1]), bags, begins, False, SUM, False, weights)[0]
        return z.view(rows, tokens, -1).to(x.dtype)
