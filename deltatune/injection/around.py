"""What acts keep once per backbone: random draws, a guard of weights, a switch of attention implementations, a sweep of branches."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from deltatune.injection.branches import Sweep
from deltatune.injection.draws import Draws
from deltatune.injection.guard import Guard
from deltatune.injection.variants import Switch
from deltatune.structure.index import Index


@dataclass
class Around:
    """One per backbone, in its ledger.

    Attributes:
        draws: of the patches that draw random numbers.
        guard: shared by all hosts of weight patches.
        switch: of attention implementations; None while no prefix is attached.
        sweep: of what branches keep; None while there are none.
    """

    draws: Draws = field(default_factory=Draws)
    guard: Guard = field(default_factory=Guard)
    switch: Switch | None = None
    sweep: Sweep | None = None

    def switch_of(self, backbone: nn.Module, index: Index) -> Switch:
        """The switch, made if there was none."""
        if self.switch is None:
            self.switch = Switch(backbone, index)
        return self.switch
