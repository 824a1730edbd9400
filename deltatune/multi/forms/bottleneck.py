"""Bottleneck: every adapter, serial or parallel, whatever its matrices are made of; and LoReFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.methods.addition.bottleneck import ACTIVATIONS
from deltatune.multi.forms.form import Form, padded, rank_class
from deltatune.multi.lanes import Lanes
from deltatune.multi.operators.choice import choose
from deltatune.multi.table import Table

LANED: dict[str, Callable[[Tensor], Tensor]] = {**ACTIVATIONS, "identity": lambda h: h}


class Bottleneck(Form):
    """y + f(h D + c) U + e; the settings are f's name, and whether h is the input x or the output y."""

    name: ClassVar[str] = "bottleneck"

    def fitted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Zero rows of U behind zero columns of D up to the class of r."""
        size = rank_class(tensors["D"].shape[1])
        D, c, U = padded(tensors["D"], 1, size), padded(tensors["c"], 0, size), padded(tensors["U"], 0, size)
        return {"D": D, "c": c, "U": U, "e": tensors["e"]}

    def one(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        """y + f(h D + c) U + e."""
        f, h = self._setting(x, y, table)
        D, c, U, e = (tensors[name].to(y.dtype) for name in "DcUe")
        return y + (f(h @ D + c) @ U + e)

    def many(self, x: Tensor, y: Tensor, lanes: Lanes, table: Table, out: Tensor | None = None) -> Tensor:
        """Two products, and the biases of each row."""
        f, h = self._setting(x, y, table)
        c, e = (lanes.rows(name, y.dtype)[:, None] for name in "ce")
        operator = choose(h, lanes, "D", lanes["D"].shape[-1])
        h = f(operator.matrix(h, lanes, "D") + c)
        return torch.add(y, operator.matrix(h, lanes, "U") + e, out=out)

    @staticmethod
    def _setting(x: Tensor, y: Tensor, table: Table) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        activation, reads = table.key.settings
        return LANED[str(activation)], x.to(y.dtype) if reads == "input" else y
