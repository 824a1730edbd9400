"""Sparse differences: values that train at fixed positions of a parameter, and the choice of the positions that count most.

Shared by the methods whose mask is fixed. Positions and values of k entries take 8 k bytes, their gradients and two
Adam moments 12 k, where a dense masked difference of n entries takes 17 n: positions are the smaller form at any
density below 0.85. theta' itself is dense, for the length of one forward, as with every weight patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deltatune.methods.kinds import WeightPatch


def added(theta: Tensor, index: Tensor, values: Tensor, axis: int | None = None) -> Tensor:
    """theta + sum_j v_j e_{i_j}: v_j at entry i_j of the flat theta, or at its slice i_j along ``axis``."""
    if axis is not None:
        return theta.index_add(axis, index, values.to(theta.dtype))
    return theta.reshape(-1).index_add(0, index, values.to(theta.dtype)).view(theta.shape)


def index_type(entries: int) -> torch.dtype:
    """Type of positions among so many entries."""
    return torch.int32 if entries < 2**31 else torch.int64


@torch.no_grad()
def largest(scores: Sequence[Tensor], density: float) -> list[Tensor]:
    """Flat positions of the share ``density`` of all entries with the largest scores.

    Exact over all tensors together, and at least one entry; ties fall to the earlier one, and NaN counts as largest.

    Args:
        scores: one tensor a parameter, of any shape and device.
        density: share to keep, in (0, 1].

    Returns:
        For each tensor its positions, ascending; some may have none.
    """
    flat = [score.reshape(-1).nan_to_num(math.inf, math.inf, -math.inf) for score in scores]
    budget = max(1, round(density * sum(map(len, flat))))
    candidates = torch.cat([part.topk(min(budget, len(part))).values.cpu() for part in flat])
    least = float(candidates.topk(budget).values[-1])
    room = budget - sum(int((part > least).sum()) for part in flat)
    positions = []
    for part in flat:
        kept = part > least
        ties = (part == least).nonzero().squeeze(1)[:room]
        kept[ties] = True
        room -= len(ties)
        positions.append(kept.nonzero().squeeze(1))
    return positions


class SparseDifference(WeightPatch):
    """theta' = theta + sum_j v_j e_{i_j}; trains the values v, 0 at the start, at the fixed positions i.

    Args:
        parameter: path of the parameter below the site's module.
        theta: the part of it that belongs to the site, for its shape and device.
        index: positions (k,) in the flat theta; or slices along ``axis``, and v has k of them.
        axis: axis of the slices; None for single entries.
        stored: the file holds the positions; else they are drawn anew from a seed.
    """

    commutes = "add"
    index: Tensor

    def __init__(self, parameter: str, theta: Tensor, index: Tensor, axis: int | None = None, *, stored: bool = True) -> None:
        super().__init__()
        self.parameter = parameter
        self.axis = axis
        self.stored = stored
        self.entries = theta.numel()
        shape = [len(index)] if axis is None else [len(index) if k == axis else size for k, size in enumerate(theta.shape)]
        self.values = nn.Parameter(torch.zeros(shape))
        self.register_buffer("index", index.to(index_type(self.entries)), persistent=stored)

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        return added(theta, self.index, self.values, self.axis)

    @torch.no_grad()
    def choose(self, index: Tensor) -> None:
        """Move to other positions in the flat theta, with values 0; the Parameter stays the same object, for its optimizer."""
        self.index = index.to(self.index)
        self.values.data = self.values.new_zeros(len(index))
        self.values.grad = None

    def reform(self, state: Mapping[str, Tensor]) -> None:
        """Make room for as many positions as ``state`` has."""
        if self.stored and "index" in state and len(state["index"]) != len(self.index):
            self.choose(self.index.new_zeros(len(state["index"])))
