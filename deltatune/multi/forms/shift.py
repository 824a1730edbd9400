"""Shift: a bias of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from deltatune.multi.forms.form import Form
from deltatune.multi.picks import Picks
from deltatune.multi.table import Table


class Shift(Form):
    """y + b, with b the difference from the module's own bias."""

    name: ClassVar[str] = "shift"
    reads_input: ClassVar[bool] = False

    def one(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        """y + b."""
        return y + tensors["b"].to(y.dtype)

    def many(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], picks: Picks, table: Table) -> Tensor:
        """The biases of each row."""
        return y + tensors["b"].index_select(0, picks.lanes)[:, None].to(y.dtype)
