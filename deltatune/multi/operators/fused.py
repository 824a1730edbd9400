"""Fused: on a GPU. Each row's lane is read where it lies, whatever the number of tokens, by a kernel of our own."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor

from deltatune.multi.lanes import Lanes
from deltatune.multi.operators.operator import Operator


class Fused(Operator):
    """One launch a product; no matrix is copied, and rows without a delta read nothing in a pair."""

    @staticmethod
    @functools.cache
    def is_available() -> bool:
        """Triton is installed."""
        return importlib.util.find_spec("triton") is not None

    def matrix(self, x: Tensor, lanes: Lanes, W: str) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        from deltatune.multi.operators.kernels import launch

        return launch(x[None], lanes[W], lanes.picks.lanes, x.dtype, splits=False, skips=False)[0]

    def pair(self, x: Tensor, lanes: Lanes, A: str, B: str) -> Tensor:
        """(x A) B; the zero lane of a pair is zeros."""
        from deltatune.multi.operators.kernels import launch

        h = launch(x[None], lanes[A], lanes.picks.lanes, x.dtype, splits=True, skips=True)  # (parts, rows, tokens, r)
        return launch(h, lanes[B], lanes.picks.lanes, x.dtype, splits=False, skips=True)[0]
