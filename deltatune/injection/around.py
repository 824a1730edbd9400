"""What acts keep once per backbone: random draws, a guard of weights, a switch of attention implementations, a sweep of branches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltatune.injection.branches import Sweep
from deltatune.injection.draws import Draws
from deltatune.injection.guard import Guard
from deltatune.injection.recompute import Recomputing
from deltatune.injection.variants import Switch
from deltatune.structure.index import Index


class Guest(ABC):
    """What another layer keeps with a backbone and wants to know of each of its forwards."""

    @abstractmethod
    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward of the root begins with this call."""

    @abstractmethod
    def rows_of(self, number: int) -> Any:
        """What the rows of the batch do at the act of that number; None where all rows do what acts."""

    @abstractmethod
    def forget(self, delta: str) -> None:
        """A delta was detached."""

    @abstractmethod
    def refresh(self) -> None:
        """Parameters were written in a way that nothing tells."""


@dataclass
class Around:
    """One per backbone, in its ledger.

    Attributes:
        draws: of the patches that draw random numbers.
        guard: shared by all hosts of weight patches.
        switch: of attention implementations; None while no prefix is attached.
        sweep: of what branches keep; None while there are none.
        recomputing: whether inputs of adapted modules are made anew in the backward.
        guest: the bank of routed deltas (``multi``); None while nothing was routed.
    """

    draws: Draws = field(default_factory=Draws)
    guard: Guard = field(default_factory=Guard)
    recomputing: Recomputing = field(default_factory=Recomputing)
    switch: Switch | None = None
    sweep: Sweep | None = None
    guest: Guest | None = None

    def switch_of(self, backbone: nn.Module, index: Index) -> Switch:
        """The switch, made if there was none."""
        if self.switch is None:
            self.switch = Switch(backbone, index)
        return self.switch
