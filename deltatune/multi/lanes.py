"""Lanes: those of one table that the rows of a batch use, laid out as operators want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from deltatune.multi.picks import Picks

TOKENS = 8
"""From so many tokens a row on, copying the matrices of its lane in each forward costs less than reading them token by token."""


Shortcut = Callable[[Tensor, Tensor], object]
"""What later forwards of a route do with x and y, in place, with everything looked up."""


class Room:
    """Bytes that the copies of one route may take, all modules together."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> bool:
        """Whether so many are left; they are taken then."""
        found = size <= self._left
        self._left -= size * found
        return found


class Lanes:
    """The tensors of a table, with the lane of each row.

    What operators copy for many tokens a row, a route keeps for its later forwards while there is room, and what they copy for few
    from the second forward on: one does not pay for it. A lane that an open route may read is never written, so the copies hold
    until the route closes or is planned anew.

    Attributes:
        is_kept: copies are.
        shortcuts: type of y, and whether tokens are few -> what later forwards do; None where that is not known.

    Args:
        tensors: name -> (lanes, ...).
        picks: the lane of each row.
        room: for copies; None where the tensors are made anew in each forward, or lie where memory is scarce.
    """

    def __init__(self, tensors: Mapping[str, Tensor], picks: Picks, room: Room | None = None) -> None:
        self.tensors, self.picks = tensors, picks
        self.is_kept = False
        self.shortcuts: dict[tuple[torch.dtype, bool], Shortcut | None] = {}
        self._room = room
        self._is_new = True
        self._is_settled = False
        self._copies: dict[tuple[str, str, torch.dtype], Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def begin(self, tokens: int) -> bool:
        """A forward with so many tokens a row begins that uses them: whether it is known by now what is kept."""
        if self._is_settled or self._room is None or (self._is_new and tokens < TOKENS):
            self._is_new = False
            return self._is_settled
        self._is_settled = True
        if len(self.picks.distinct) > 1:
            lane = sum(tensor[0].numel() * tensor.element_size() for tensor in self.tensors.values())
            self.is_kept = self._room.take(lane * len(self.picks.numbers))
        return True

    def rows(self, name: str, dtype: torch.dtype) -> Tensor:
        """Each row's: (rows, ...)."""
        return self._copy("rows", name, dtype, lambda tensor: tensor.index_select(0, self.picks.lanes))

    def beside(self, name: str, dtype: torch.dtype) -> Tensor:
        """The matrices of the lanes in use side by side: (lanes, in, out) -> (in, distinct * out)."""
        if len(self.picks.distinct) == 1:
            return self._one(name, dtype)
        return self._copy("beside", name, dtype, lambda tensor: tensor.index_select(0, self.picks.used).transpose(0, 1).flatten(1))

    def below(self, name: str, dtype: torch.dtype) -> Tensor:
        """One below the other: (lanes, in, out) -> (distinct * in, out)."""
        if len(self.picks.distinct) == 1:
            return self._one(name, dtype)
        return self._copy("below", name, dtype, lambda tensor: tensor.index_select(0, self.picks.used).flatten(0, 1))

    def _one(self, name: str, dtype: torch.dtype) -> Tensor:
        """That of the only lane in use; where it lies, if it is of that type."""
        return self.tensors[name][self.picks.distinct[0]].to(dtype)

    def _copy(self, how: str, name: str, dtype: torch.dtype, made: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.is_kept or torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
            return made(self.tensors[name]).to(dtype)
        found = self._copies.get((how, name, dtype))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self._copies[how, name, dtype] = made(self.tensors[name]).to(dtype)
        return found
