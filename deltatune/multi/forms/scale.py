"""Scale: (IA)^3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.multi.forms.form import Form
from deltatune.multi.lanes import Lanes
from deltatune.multi.table import Table


class Scale(Form):
    """l * y."""

    name: ClassVar[str] = "scale"
    reads_input: ClassVar[bool] = False

    def neutral(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ones."""
        return {"l": torch.ones_like(tensors["l"])}

    def one(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        """l * y."""
        return y * tensors["l"].to(y.dtype)

    def many(self, x: Tensor, y: Tensor, lanes: Lanes, table: Table, out: Tensor | None = None) -> Tensor:
        """The vectors of each row."""
        return torch.mul(y, lanes.rows("l", y.dtype)[:, None], out=out)
