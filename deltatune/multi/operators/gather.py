"""Gather: few tokens a row, as in decoding. Two fused gather-mat-vecs that never copy a matrix."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from deltatune.multi.operators.operator import Operator
from deltatune.multi.picks import Picks


class Gather(Operator):
    """``F.embedding_bag``: the bag of a token is the rows of its lane's matrix, weighed by the token's entries."""

    def matrix(self, x: Tensor, W: Tensor, picks: Picks) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        rows, tokens, width = x.shape
        bags = picks.bags(width, tokens)
        weights = x.reshape(rows * tokens, width).to(W.dtype)
        z = F.embedding_bag(bags, W.reshape(-1, W.shape[-1]), per_sample_weights=weights, mode="sum")
        return z.view(rows, tokens, -1).to(x.dtype)
