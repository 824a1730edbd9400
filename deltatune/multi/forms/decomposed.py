"""Decomposed: DoRA with the norms of its weights computed when the lane is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from deltatune.multi.forms.form import Form
from deltatune.multi.forms.low_rank import fitted_rank
from deltatune.multi.lanes import Lanes
from deltatune.multi.operators.choice import choose
from deltatune.multi.table import Table


class Decomposed(Form):
    """y + g * (y - bias) + (x A) B, the change of W to diag(1 + g) W + B^T A^T in y = x W^T + bias."""

    name: ClassVar[str] = "decomposed"
    is_alone: ClassVar[bool] = True

    def fitted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Zero columns of A and rows of B up to the rank's class."""
        return fitted_rank(tensors)

    def one(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        """The definition."""
        x = x.to(y.dtype)
        A, B, g = (tensors[name].to(y.dtype) for name in "ABg")
        return y + g * self._linear(y, table) + x @ A @ B

    def many(self, x: Tensor, y: Tensor, lanes: Lanes, table: Table, out: Tensor | None = None) -> Tensor:
        """LowRank, and a gathered scale."""
        x, scaled = x.to(y.dtype), lanes.rows("g", y.dtype)[:, None] * self._linear(y, table)
        return choose(x, lanes, "A", lanes["A"].shape[-1]).added(y, x, lanes, "A", "B", out).add_(scaled)

    @staticmethod
    def _linear(y: Tensor, table: Table) -> Tensor:
        """x W^T: y without the bias."""
        bias = table.module._parameters.get("bias")
        return y if bias is None else y - table.site.rows_of(bias, -1).to(y.dtype)
