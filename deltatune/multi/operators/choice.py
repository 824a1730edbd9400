"""Which operator runs: by the number of tokens a row, of lanes in use and of what lies between two products."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.multi.lanes import TOKENS, Lanes
from deltatune.multi.operators.dense import Dense
from deltatune.multi.operators.even import Even
from deltatune.multi.operators.fused import Fused
from deltatune.multi.operators.gather import Gather
from deltatune.multi.operators.native import Native
from deltatune.multi.operators.operator import Operator
from deltatune.multi.operators.segment import Segment

FEW = 64
"""So many numbers between two products may be computed for rows that do not need them; half as many where rows have many tokens."""

GATHER, NATIVE, SEGMENT, DENSE, EVEN, FUSED = Gather(), Native(), Segment(), Dense(), Even(), Fused()


def choose(x: Tensor, lanes: Lanes, W: str, width: int) -> Operator:
    """The operator for one product, or for a pair of them.

    Args:
        x: (rows, tokens, in).
        lanes: the lanes of the rows.
        W: name of their matrices, (lanes, in, ...).
        width: what lies between the two products of a pair; the output of a single one.
    """
    if torch.compiler.is_compiling():
        return SEGMENT  # one graph for all routes
    if x.is_cuda and FUSED.is_available() and not _trains(x, lanes[W]):
        return FUSED
    if lanes.picks.is_even:
        return EVEN
    distinct = len(lanes.picks.distinct)
    if distinct == 1 or (distinct * width <= (FEW if x.shape[1] < TOKENS else FEW // 2) and lanes.mixes):
        return DENSE
    if x.shape[1] >= TOKENS or not x.is_cpu or _trains(x, lanes[W]):
        return SEGMENT  # with gradients the others would keep the table for the backward, where lanes may have become others'
    return NATIVE if NATIVE.fits(x, lanes[W]) and NATIVE.is_available() else GATHER


def _trains(x: Tensor, W: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
