"""Native: few tokens a row on a CPU, as in decoding, by a compiled loop that reads each lane's matrices once, as a stream.

Where it was not compiled (see ``deltatune.compiled``), ``Gather`` does the same more slowly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.compiled.library import is_compiled
from deltatune.multi.lanes import Lanes, Shortcut
from deltatune.multi.operators.operator import Operator


class Native(Operator):
    """One call a product or pair, in which nothing is copied; rows without a delta are skipped in a pair."""

    @staticmethod
    def is_available() -> bool:
        """It was compiled for this torch and this kind of processor."""
        return is_compiled()

    @staticmethod
    def fits(x: Tensor, W: Tensor) -> bool:
        """These tensors are what the loop reads: numbers of 32 bits, in order, on the CPU, and nobody else's."""
        plain = x.is_cpu and x.dtype == W.dtype == torch.float32 and W.is_contiguous()
        return plain and torch._C._functorch.maybe_current_level() is None

    def matrix(self, x: Tensor, lanes: Lanes, W: str) -> Tensor:
        """(rows, tokens, in), (lanes, in, out) -> (rows, tokens, out)."""
        z = x.new_zeros(*x.shape[:-1], lanes[W].shape[-1])
        torch.ops.deltatune.add_rows_(z, x.contiguous(), lanes[W], lanes.picks.lanes)
        return z

    def pair(self, x: Tensor, lanes: Lanes, A: str, B: str) -> Tensor:
        """(x A) B; the zero lane of a pair is zeros."""
        z = x.new_zeros(*x.shape[:-1], lanes[B].shape[-1])
        torch.ops.deltatune.add_pairs_(z, x.contiguous(), lanes[A], lanes[B], lanes.picks.lanes)
        return z

    def shortcut(self, y: Tensor, lanes: Lanes, A: str, B: str) -> Shortcut | None:
        """The loop, into y itself."""
        if not self.fits(y, lanes[B]):
            return None
        add, down, up, each = torch.ops.deltatune.add_pairs_.default, lanes[A], lanes[B], lanes.picks.lanes
        return lambda x, y: add(y, x.contiguous(), down, up, each)
