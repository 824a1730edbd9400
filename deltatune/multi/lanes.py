"""Lanes: those of one table that the rows of a batch use, laid out as operators want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from deltatune.multi.picks import Picks

TOKENS = 8
"""From so many tokens a row on, copying the matrices of its lane in each forward costs less than reading them token by token."""

Shortcut = Callable[[Tensor, Tensor], object]
"""What later forwards of a route do with x and y, in place, with everything looked up."""


class Lanes:
    """The tensors of a table, with the lane of each row.

    Where few lanes are in use, their matrices stand side by side for one product; a route that goes on keeps these copies from its
    second forward on. A lane that an open route may read is never written, so they hold until the route closes or is planned anew.

    Attributes:
        is_kept: copies are.
        shortcuts: type of y, and whether tokens are few -> what later forwards do; None where that is not known.

    Args:
        tensors: name -> (lanes, ...).
        picks: the lane of each row.
        lasts: the tensors are the same in every forward of the route.
        whole: says of some lanes whether all their numbers are finite; None where nobody knows.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], picks: Picks, *, lasts: bool = False, whole: Callable[[Sequence[int]], bool] | None = None
    ) -> None:
        self.tensors, self.picks = tensors, picks
        self.is_kept = False
        self.shortcuts: dict[tuple[torch.dtype, bool], Shortcut | None] = {}
        self._lasts, self._is_new = lasts, True
        self._copies: dict[tuple[str, str, torch.dtype], Tensor] = {}
        self._whole = whole
        self._mixes: bool | None = None

    @property
    def mixes(self) -> bool:
        """Rows may be multiplied with lanes of others, times 0: all is finite, or whoever has the streams looks after that."""
        if self._mixes is None:
            self._mixes = self.picks.streams is not None if self._whole is None else self._whole(self.picks.distinct)
        return self._mixes

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def begin(self) -> bool:
        """A forward begins that uses them: whether the route goes on, so that copies are kept."""
        self.is_kept = self._lasts and not self._is_new
        self._is_new = False
        return self.is_kept

    def rows(self, name: str, dtype: torch.dtype) -> Tensor:
        """Each row's: (rows, ...)."""
        return self.tensors[name].index_select(0, self.picks.lanes).to(dtype)

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
        """That of the only lane in use; where it lies, if it is of that type and no backward reads it when the lane is another's."""
        own = self.tensors[name][self.picks.distinct[0]]
        return own.to(dtype, copy=self._lasts and torch.is_grad_enabled())

    def _copy(self, how: str, name: str, dtype: torch.dtype, made: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.is_kept or torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
            return made(self.tensors[name]).to(dtype)
        found = self._copies.get((how, name, dtype))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self._copies[how, name, dtype] = made(self.tensors[name]).to(dtype)
        return found
