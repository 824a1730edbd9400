"""Lookup: a low-rank change of an embedding table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from deltatune.multi.forms.form import Form
from deltatune.multi.forms.low_rank import fitted_rank
from deltatune.multi.lanes import Lanes
from deltatune.multi.operators.choice import choose
from deltatune.multi.table import Table


class Lookup(Form):
    """y + A[ids] B, with the ids in place of x; padding is looked up, too, but does not train, as in the table itself."""

    name: ClassVar[str] = "lookup"

    def fitted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Zero columns of A and rows of B up to the rank's class."""
        return fitted_rank(tensors)

    def one(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        """y + A[ids] B."""
        return y + F.embedding(x, tensors["A"], table.module.padding_idx).to(y.dtype) @ tensors["B"].to(y.dtype)  # type: ignore[arg-type]

    def many(self, x: Tensor, y: Tensor, lanes: Lanes, table: Table, out: Tensor | None = None) -> Tensor:
        """The rows of all tables one behind the other."""
        count, size, rank = lanes["A"].shape
        h = F.embedding(x + lanes.picks.lanes[:, None] * size, lanes["A"].reshape(count * size, rank))  # (rows, tokens, r)
        padding: Any = table.module.padding_idx
        if padding is not None and h.requires_grad:
            h = h.where((x != padding)[..., None], h.detach())
        h = h.to(y.dtype)
        return y + choose(h, lanes, "B", lanes["B"].shape[-1]).matrix(h, lanes, "B")
