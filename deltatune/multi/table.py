"""A table: the lanes of one form and shape at one module, stacked."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from deltatune.multi.forms.form import Form
    from deltatune.multi.reading import Source

LaneName = tuple[str, int]
"""Name of a delta, and which of its patches on the module."""

FIRST = 4
"""Lanes of a fresh table, the zero lane included; it grows by doubling."""


@dataclass(frozen=True)
class Key:
    """What lanes must agree in to stand in one table.

    Attributes:
        stage: ``module``, ``input`` or ``output``: what the patch acts on.
        reads: ``module`` or ``branch``: whose input the patch calls x.
        number: which of its delta's patches on the module.
        form: name of the form.
        settings: of the lanes.
        rows: last word of the role whose rows of a fused projection are changed; empty for all.
        shapes: names, shapes and types of the lanes' tensors, in the order of their names.
    """

    stage: str
    reads: str
    number: int
    form: str
    settings: tuple[Hashable, ...]
    rows: str
    shapes: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, name: LaneName, stage: str, reads: str, source: Source, fitted: Mapping[str, Tensor]) -> Key:
        """The key of one lane."""
        lane, rows = source.lane, source.site.leaf if source.site.rows is not None else ""
        shapes = tuple((letter, tuple(tensor.shape), tensor.dtype) for letter, tensor in sorted(fitted.items()))
        return cls(stage, reads, name[1], lane.form, lane.settings, rows, shapes)


class Table:
    """The stacked lanes.

    A lane that a forward may be reading is never written: what is entered anew gets a lane of its own, and a lane that was
    left is used again once no route that was opened before is open any more.

    Attributes:
        key: what they agree in.
        form: how they run.
        module: the module they belong to.
        site: whose rows and channels they change.
        shared: what all of them have in common.
        example: a patch whose forward serves all of them; None where the form has a formula.
        tensors: name -> (lanes, ...); lane 0 changes nothing.
        lanes: which lane is whose.
    """

    def __init__(self, key: Key, form: Form, module: nn.Module, source: Source, fitted: Mapping[str, Tensor]) -> None:
        self.key, self.form, self.module = key, form, module
        self.site, self.shared, self.example = source.site, dict(source.lane.shared), source.example
        self.lanes: dict[LaneName, int] = {}
        self._left: list[tuple[int, int]] = []
        with torch.inference_mode(False), torch.no_grad():
            neutral = form.neutral(fitted)
            self.tensors = {name: tensor.new_zeros((FIRST, *tensor.shape)) for name, tensor in fitted.items()}
            for name, tensor in neutral.items():
                self.tensors[name][0] = tensor
        self._free = list(range(FIRST - 1, 0, -1))
        self._unseen: set[int] = set()
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.lanes)

    def enter(self, name: LaneName, fitted: Mapping[str, Tensor], oldest: int, now: int) -> None:
        """Give a lane these tensors.

        Args:
            name: whose lane it is.
            fitted: its tensors, of the table's shapes.
            oldest: number of the oldest route that is open.
            now: number of the newest.
        """
        self._free += [lane for left, lane in self._left if left < oldest]
        self._left = [(left, lane) for left, lane in self._left if left >= oldest]
        with torch.inference_mode(False), torch.no_grad():
            if not self._free:
                self._grow()
            lane = self._free.pop()
            for key, tensor in fitted.items():
                self.tensors[key][lane].copy_(tensor)
        self._unseen.add(lane)
        self._broken.discard(lane)
        self.leave(name, now)
        self.lanes[name] = lane

    def leave(self, name: LaneName, now: int) -> None:
        """Give a lane up."""
        lane = self.lanes.pop(name, None)
        if lane is not None:
            self._left.append((now, lane))

    def is_whole(self, lanes: Sequence[int]) -> bool:
        """All numbers of these lanes are finite; they are looked at once."""
        for lane in self._unseen.intersection(lanes):
            if not all(bool(tensor[lane].isfinite().all()) for tensor in self.tensors.values()):
                self._broken.add(lane)
            self._unseen.discard(lane)
        return self._broken.isdisjoint(lanes)

    def move(self, function: object) -> None:
        """Move the tensors to another device or type, as ``nn.Module._apply`` does."""
        assert callable(function)
        self.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        self.shared = {name: function(tensor) for name, tensor in self.shared.items()}

    def _grow(self) -> None:
        size = next(iter(self.tensors.values())).shape[0]
        self.tensors = {name: torch.cat([tensor, torch.zeros_like(tensor)]) for name, tensor in self.tensors.items()}
        self._free = list(range(2 * size - 1, size - 1, -1))
