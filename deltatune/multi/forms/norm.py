"""Norm: a gain of its own behind a normalisation that all rows share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.multi.forms.form import Form
from deltatune.multi.lanes import Lanes
from deltatune.multi.table import Table


class Norm(Form):
    """y + norm(x) * gamma, with gamma the difference from the module's own gain."""

    name: ClassVar[str] = "norm"

    def one(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        """y + norm(x) * gamma."""
        return y + normed(table.module, x) * tensors["gamma"].to(y.dtype)

    def many(self, x: Tensor, y: Tensor, lanes: Lanes, table: Table, out: Tensor | None = None) -> Tensor:
        """The gains of each row."""
        return y + normed(table.module, x) * lanes.rows("gamma", y.dtype)[:, None]


def normed(module: nn.Module, x: Tensor) -> Tensor:
    """norm(x), what the gain multiplies."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, None, module.eps)
    weight = module._parameters["weight"]
    assert weight is not None
    with held(module, torch.ones_like(weight)):  # one that adds 1 to its weight has two numbers between 0 and 1, too
        above: Tensor = module.forward(x)
    with held(module, torch.zeros_like(weight)):
        below: Tensor = module.forward(x)
    return above - below


@contextmanager
def held(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """The module with another weight for a moment."""
    own = module._parameters["weight"]
    module._parameters["weight"] = weight  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters["weight"] = own
