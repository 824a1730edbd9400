"""Which operator runs: by the number of tokens a row, of lanes in use and of what lies between two products."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.multi.operators.dense import Dense
from deltatune.multi.operators.even import Even
from deltatune.multi.operators.fused import Fused
from deltatune.multi.operators.gather import Gather
from deltatune.multi.operators.operator import Operator
from deltatune.multi.operators.segment import Segment
from deltatune.multi.picks import Picks

FEW = 64
"""So many numbers between two products may be computed for rows that do not need them."""

TOKENS = 8
"""From so many tokens a row on, copying the matrices of its lane costs less than reading them token by token."""

GATHER, SEGMENT, DENSE, EVEN, FUSED = Gather(), Segment(), Dense(), Even(), Fused()


def choose(x: Tensor, W: Tensor, picks: Picks, width: int) -> Operator:
    """The operator for one product, or for a pair of them.

    Args:
        x: (rows, tokens, in).
        W: (lanes, in, ...).
        picks: the lanes of the rows.
        width: what lies between the two products of a pair; the output of a single one.
    """
    if torch.compiler.is_compiling():
        return SEGMENT  # one graph for all routes
    if x.device.type == "cuda" and FUSED.is_available() and not _trains(x, W):
        return FUSED
    if picks.is_even:
        return EVEN
    if len(picks.distinct) == 1 or len(picks.distinct) * width <= FEW:
        return DENSE
    if x.shape[1] < TOKENS and x.device.type == "cpu" and not W.requires_grad:
        return GATHER
    return SEGMENT


def _trains(x: Tensor, W: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
