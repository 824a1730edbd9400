"""Shift: a bias of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.multi.forms.form import Form
from deltatune.multi.lanes import Lanes
from deltatune.multi.table import Table


class Shift(Form):
    """y + b, with b the difference from the module's own bias."""

    name: ClassVar[str] = "shift"
    reads_input: ClassVar[bool] = False

    def one(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        """y + b."""
        return y + tensors["b"].to(y.dtype)

    def many(self, x: Tensor, y: Tensor, lanes: Lanes, table: Table, out: Tensor | None = None) -> Tensor:
        """The biases of each row."""
        return torch.add(y, lanes.rows("b", y.dtype)[:, None], out=out)
