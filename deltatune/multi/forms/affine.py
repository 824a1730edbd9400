"""Affine: a linear map of its own, as of task heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from deltatune.multi.forms.form import Form
from deltatune.multi.lanes import Lanes
from deltatune.multi.operators.choice import choose
from deltatune.multi.table import Table

ABSENT = float("-inf")
"""Logit of a label that a row's task does not have."""


class Affine(Form):
    """x W + b in place of y. Where widths differ, rows end in ``-inf``: no softmax sees it, no argmax takes it."""

    name: ClassVar[str] = "affine"
    is_alone: ClassVar[bool] = True

    def one(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        """x W + b."""
        return x.to(y.dtype) @ tensors["W"].to(y.dtype) + tensors["b"].to(y.dtype)

    def many(self, x: Tensor, y: Tensor, lanes: Lanes, table: Table, out: Tensor | None = None) -> Tensor:
        """One product; rows without a lane keep y."""
        x = x.to(y.dtype)
        z = choose(x, lanes, "W", lanes["W"].shape[-1]).matrix(x, lanes, "W") + lanes.rows("b", y.dtype)[:, None]
        width = max(y.shape[-1], z.shape[-1])
        return widened(z, width).where(lanes.picks.mask, widened(y, width))


def widened(logits: Tensor, width: int) -> Tensor:
    """The logits with labels behind them that these rows do not have."""
    missing = width - logits.shape[-1]
    return F.pad(logits, (0, missing), value=ABSENT) if missing else logits
