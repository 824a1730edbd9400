"""Picks: which lane of a table each row of a batch uses, and what operators derive from that once for all modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deltatune.multi.streams import Streams


class Picks:
    """The lanes of a batch's rows; lane 0 is the zero delta.

    Args:
        numbers: the lane of each row.
        device: of the tables.
        streams: whose random numbers each row's dropout takes; None for the global ones.
        first: number of the first lane of the stack; 1 where every row has one, and the zero delta is left out.

    Attributes:
        numbers: one per row, 0 where it has none.
        lanes: which tensor of a stack each row uses, (rows,).
        distinct: the lanes in use, that of rows without one included, in order.
        is_even: each of the stack's lanes is used by as many rows as the next, one behind the other.
        is_used: some row uses a lane.
        mask: rows that use a lane, (rows, 1, 1).
        streams: whose random numbers each row's dropout takes; None for the global ones.
    """

    def __init__(self, numbers: tuple[int, ...], device: torch.device, streams: Streams | None = None, first: int = 0) -> None:
        self.numbers, self.streams = numbers, streams
        with torch.inference_mode(False):  # gradients may need them later
            each = torch.tensor(numbers, dtype=torch.long, device=device)
            self.lanes = each - first
            self.mask = (each > 0)[:, None, None]
        self.distinct = tuple(sorted({number - first for number in numbers}))
        self.is_used = any(numbers)
        self.is_even = bool(first) and numbers == _repeated(first, len(self.distinct), len(numbers))
        self._bags: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._used: Tensor | None = None
        self._others: dict[int, Tensor] = {}

    @torch.inference_mode(False)
    def bags(self, width: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Rows of a table (lanes * width, ...) that each token reads, (rows * tokens * width,), and where each token's begin."""
        found = self._bags.get((width, tokens))
        if found is None:
            first = self.lanes.repeat_interleave(tokens) if tokens > 1 else self.lanes
            each = first[:, None] * width + torch.arange(width, device=self.lanes.device)
            begins = torch.arange(0, each.numel(), width, device=self.lanes.device)
            kind = torch.int32 if int(each.max()) < 2**31 else torch.int64
            found = self._bags[width, tokens] = each.flatten().to(kind), begins.to(kind)
        return found

    @property
    @torch.inference_mode(False)
    def used(self) -> Tensor:
        """``distinct`` as a tensor."""
        if self._used is None:
            self._used = torch.tensor(self.distinct, device=self.lanes.device)
        return self._used

    @torch.inference_mode(False)
    def others(self, width: int) -> Tensor:
        """Which of ``distinct`` each row does not use, each ``width`` times: (rows, 1, number of them * width)."""
        found = self._others.get(width)
        if found is None:
            found = self._others[width] = (self.lanes[:, None] != self.used).repeat_interleave(width, 1)[:, None]
        return found


def _repeated(first: int, lanes: int, rows: int) -> tuple[int, ...]:
    """Each lane for as many rows as the next."""
    each = rows // lanes
    return tuple(first + row // each for row in range(rows)) if each * lanes == rows else ()
