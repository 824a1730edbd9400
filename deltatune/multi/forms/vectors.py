"""Vectors: VeRA's two vectors a lane, around matrices that all lanes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.multi.forms.form import Form, dropped
from deltatune.multi.lanes import Lanes
from deltatune.multi.table import Table


class Vectors(Form):
    """y + b * ((d * (dropout(x) A)) B), with A and B the same for all lanes."""

    name: ClassVar[str] = "vectors"

    def one(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        """One pair of vectors."""
        x = dropped(x.to(y.dtype), table.key.settings[0])
        return y + self._change(x, y, tensors["d"], tensors["b"], table)

    def many(self, x: Tensor, y: Tensor, lanes: Lanes, table: Table, out: Tensor | None = None) -> Tensor:
        """Plain products, with the vectors of each row."""
        d, b = (lanes.rows(name, y.dtype)[:, None] for name in "db")
        x = dropped(x.to(y.dtype), table.key.settings[0], lanes.picks)
        return torch.add(y, self._change(x, y, d, b, table), out=out)

    @staticmethod
    def _change(x: Tensor, y: Tensor, d: Tensor, b: Tensor, table: Table) -> Tensor:
        A, B = table.shared["A"].to(y.dtype), table.shared["B"].to(y.dtype)
        return b.to(y.dtype) * ((d.to(y.dtype) * (x @ A)) @ B)
