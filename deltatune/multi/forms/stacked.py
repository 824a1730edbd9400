"""Stacked: any patch at all, its own forward mapped over the stacked tensors of its deltas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.methods.kinds import InputPatch, Patch
from deltatune.multi.forms.form import Form
from deltatune.multi.lanes import Lanes
from deltatune.multi.table import Table


class Stacked(Form):
    """``vmap`` of one delta's patch over the tensors of all; the settings are its class and its recipe."""

    name: ClassVar[str] = "stacked"
    whole: ClassVar[bool] = True

    def neutral(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Some delta's, but finite: rows without a lane keep what they had, zeros may have no gradient, and none times NaN is NaN."""
        return {name: tensor.detach().nan_to_num(0.0, 0.0, 0.0) for name, tensor in tensors.items()}

    def one(self, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        """The patch itself."""
        return self._call(x, y, tensors, table)

    def many(self, x: Tensor, y: Tensor, lanes: Lanes, table: Table, out: Tensor | None = None) -> Tensor:
        """Each row with its own tensors; x and y are (rows, factor, ..., width) here."""
        chosen = {name: lanes.rows(name, tensor.dtype) for name, tensor in lanes.tensors.items()}

        def alone(x: Tensor, y: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
            return self._call(x, y, tensors, table)

        z: Tensor = torch.vmap(alone, randomness="different")(x, y, chosen)
        return z.where(lanes.picks.mask.reshape(-1, *[1] * (y.ndim - 1)), y)

    @staticmethod
    def _call(x: Tensor, y: Tensor, tensors: Mapping[str, Tensor], table: Table) -> Tensor:
        example = table.example
        assert isinstance(example, Whole)
        inputs = (y,) if isinstance(example.patch, InputPatch) else (x, y)
        changed: Tensor = torch.func.functional_call(example, dict(tensors), inputs)
        return changed


class Whole(nn.Module):
    """A patch together with what its delta shares between sites, which the patch holds without owning it."""

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        self.patch = patch
        for k, module in enumerate(reached(patch)):
            self.add_module(f"shared_{k}", module)

    def forward(self, *inputs: Any) -> Any:
        """As the patch."""
        return self.patch(*inputs)

    def tensors(self) -> dict[str, Tensor]:
        """Everything it computes with, by name."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def example(self) -> Whole:
        """A copy to be called with other tensors."""
        return Whole(deepcopy(self.patch))


def reached(module: nn.Module) -> Iterator[nn.Module]:
    """Modules held in tuples, at whatever depth: there, what belongs to the delta as a whole is kept."""
    seen: set[int] = set()
    waiting = list(module.modules())
    while waiting:
        for value in vars(waiting.pop()).values():
            for held in value if isinstance(value, tuple) else ():
                if isinstance(held, nn.Module) and id(held) not in seen:
                    seen.add(id(held))
                    waiting += held.modules()
                    yield held
