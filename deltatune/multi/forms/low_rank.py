"""LowRank: LoRA and all that is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from deltatune.multi.forms.form import Form, dropped, padded, rank_class
from deltatune.multi.lanes import Lanes, Shortcut
from deltatune.multi.operators.choice import EVEN, choose
from deltatune.multi.picks import Picks
from deltatune.multi.table import Table

if TYPE_CHECKING:
    from deltatune.multi.ground import Beside


class LowRank(Form):
    """y + (dropout(x) A) B; the setting is dropout's share."""

    name: ClassVar[str] = "low-rank"

    def fitted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Zero columns of A and rows of B up to the rank's class."""
        return fitted_rank(tensors)

    def one(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        """y + (x A) B."""
        x = dropped(x.to(y.dtype), table.key.settings[0])
        return y + x @ tensors["A"].to(y.dtype) @ tensors["B"].to(y.dtype)

    def shortcut(self, y: Tensor, lanes: Lanes, table: Table) -> Shortcut | None:
        """The operator's."""
        return None if table.key.settings[0] else choose(y, lanes, "A", lanes["A"].shape[-1]).shortcut(y, lanes, "A", "B")

    def many(self, x: Tensor, y: Tensor, lanes: Lanes, table: Table, out: Tensor | None = None) -> Tensor:
        """One pair of products."""
        x = x.to(y.dtype)
        if table.key.settings[0]:
            x = dropped(x, table.key.settings[0], lanes.picks)
        return choose(x, lanes, "A", lanes["A"].shape[-1]).added(y, x, lanes, "A", "B", out)

    def beside(self, x: Tensor, y: Tensor, lanes: Mapping[str, Beside], picks: Picks, table: Table) -> Tensor:
        """All products of forward and backward as one operation."""
        return EVEN.beside(y, dropped(x.to(y.dtype), table.key.settings[0], picks), lanes["A"], lanes["B"])


def fitted_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A (in, r) and B (r, out) with r rounded up to its class by zeros."""
    size = rank_class(tensors["A"].shape[1])
    return {**tensors, "A": padded(tensors["A"], 1, size), "B": padded(tensors["B"], 0, size)}
