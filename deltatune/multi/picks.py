"""Picks: which lane of a table each row of a batch uses, and what operators derive from that once for all modules."""

from __future__ import annotations

import torch
from torch import Tensor


class Picks:
    """The lanes of a batch's rows; lane 0 is the zero delta.

    Attributes:
        numbers: one per row.
        lanes: the same, (rows,).
        distinct: the lanes in use, 0 included where a row has none, in order.
        mask: rows that use a lane, (rows, 1, 1).
    """

    def __init__(self, numbers: tuple[int, ...], device: torch.device) -> None:
        self.numbers = numbers
        self.lanes = torch.tensor(numbers, dtype=torch.long, device=device)
        self.distinct = tuple(sorted(set(numbers)))
        self.mask = (self.lanes > 0)[:, None, None]
        self._bags: dict[tuple[int, int], Tensor] = {}
        self._places: Tensor | None = None

    @property
    def is_used(self) -> bool:
        """Some row uses a lane."""
        return self.distinct != (0,)

    def bags(self, width: int, tokens: int) -> Tensor:
        """Rows of a table (lanes * width, ...) that each token reads: (rows * tokens, width)."""
        found = self._bags.get((width, tokens))
        if found is None:
            first = self.lanes.repeat_interleave(tokens) if tokens > 1 else self.lanes
            found = self._bags[width, tokens] = first[:, None] * width + torch.arange(width, device=self.lanes.device)
        return found

    @property
    def places(self) -> Tensor:
        """Which of ``distinct`` each row uses, (rows, number of them), as 0 and 1."""
        if self._places is None:
            self._places = self.lanes[:, None] == torch.tensor(self.distinct, device=self.lanes.device)
        return self._places
