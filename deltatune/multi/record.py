"""A record: a delta in a bank, from its place at the modules to the day it goes.

It is *placed* at the modules that run its patches, *entered* while the lanes there are what its tensors are, *stale* as soon as
something was written, and *gone* when its places are given back. Whoever reads lanes asks for it to be entered first; what an
error left half entered is stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.injection.delta import Delta
from deltatune.injection.selections import Choice
from deltatune.injection.steps import steps
from deltatune.methods.kinds import SelectionPatch
from deltatune.multi.reading import NOTHING, Spot, read

if TYPE_CHECKING:
    from deltatune.multi.act import RouteAct

VERSION, TRAINING = attrgetter("_version"), attrgetter("training")


@dataclass(frozen=True)
class Snapshot:
    """What a delta was when its lanes were made.

    Attributes:
        tensors: what they were made from, each with where it is held.
        counted: those that count how often they are written.
        total: the sum of these numbers.
        selected: the values of what it selects, each with where it is held, and its number.
        modes: whether each of its patches was in training.
        stamp: how many steps optimizers had made.
    """

    tensors: tuple[tuple[dict[str, Any], str, Tensor], ...]
    counted: tuple[Tensor, ...]
    total: int
    selected: tuple[tuple[Choice, Tensor, int], ...]
    modes: tuple[bool, ...]
    stamp: int

    @classmethod
    def of(cls, delta: Delta) -> Snapshot:
        """The delta as it is now, enabled or not."""
        held = tuple(
            (holder, name, tensor)
            for _, owner in delta.holders
            for module in owner.modules()
            for holder in (module._parameters, module._buffers)
            for name, tensor in holder.items()
            if tensor is not None
        )
        counted = tuple(tensor for _, _, tensor in held if not tensor.is_inference())
        chosen = [entry for entry in delta.entries if isinstance(entry.patch, SelectionPatch)]
        values = [(entry.choice, entry.choice.value(delta.name, entry.parameter)) for entry in chosen]
        selected = tuple((choice, value, value._version) for choice, value in values)
        return cls(held, counted, sum(map(VERSION, counted)), selected, tuple(map(TRAINING, delta.patches)), steps())

    def is_true(self, delta: Delta) -> bool:
        """Nothing has changed since."""
        if self.modes != tuple(map(TRAINING, delta.patches)):
            return False
        if self.stamp != steps() and any(tensor.requires_grad for _, _, tensor in self.tensors):
            return False
        if any(holder.get(name) is not tensor for holder, name, tensor in self.tensors):
            return False
        if any(choice.values.get(delta.name) is not value or value._version != version for choice, value, version in self.selected):
            return False
        return self.total == int(sum(map(VERSION, self.counted)))  # versions only grow


class Record:
    """A delta in the bank.

    Args:
        delta: the delta.

    Attributes:
        spots: its patches at the modules that run them, each with the act there.
        begins: acts, with their modules, at the beginnings of sub-layers at whose ends it has patches.
        entered: what it was when its lanes were made; None while they are not what it is.
    """

    def __init__(self, delta: Delta) -> None:
        self.delta = delta
        self.spots: list[tuple[RouteAct, Spot]] = []
        self.begins: list[tuple[RouteAct, nn.Module]] = []
        self.entered: Snapshot | None = None
        self._stamp = 0

    @property
    def is_quiet(self) -> bool:
        """Nothing was written since, as far as counters tell at once; whether it trains, the first patch tells for all."""
        then = self.entered
        if then is None or self._stamp != steps() or then.total != sum(map(VERSION, then.counted)):
            return False
        return not then.modes or then.modes[0] == self.delta.entries[0].patch.training

    def enter(self) -> bool:
        """Have every patch as a lane, as it is now; False where that is so already."""
        if self.entered is not None and self.entered.is_true(self.delta):
            self._stamp = steps()
            return False
        self.entered = None
        now = Snapshot.of(self.delta)
        with torch.no_grad():
            for act, spot in self.spots:
                source = read(spot)
                if source is NOTHING:
                    act.tables.forget(spot.name)
                else:
                    act.tables.enter(spot.name, spot.stage, source, spot.module, spot.reads)
        self.entered, self._stamp = now, now.stamp
        return True

    def leave(self) -> None:
        """Give its places back."""
        self.entered = None
        for act, spot in self.spots:
            act.remove(spot.module, self.delta.name)
        for act, module in self.begins:
            act.remove(module, self.delta.name)
