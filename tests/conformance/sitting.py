"""A sitting: one backbone with one delta of a cell's method on it, used for one rule after the other.

Building a backbone and attaching to it costs more than most rules do, so all rules of a cell share one. A rule asks for
the state it starts from, ``fresh()`` or ``trained()``, and leaves that state behind, or says with ``spoil()`` or
``move()`` that it did not; then the next rule finds what it asks for all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.injection.delta import Delta
from tests.conformance.cells import Cell, plain, shake
from tests.conformance.trace import Trace, trace
from tests.models import output

Rule = Callable[["Sitting"], None]


class Sitting:
    """One cell while its rules are checked.

    Attributes:
        cell: the method and the architecture.
        backbone: it has been trained in part before: a third of its parameters are frozen.
        inputs: what it is called with.
        before: the backbone before anything was attached.
        plain: its output then.
        delta: attached, alone and enabled.
        acting: of a trained delta, the output with it.
    """

    backbone: nn.Module
    inputs: dict[str, Tensor]
    before: Trace
    delta: Delta
    acting: Tensor

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.plain = plain(cell.model)
        self._state = "spoilt"

    def fresh(self) -> Delta:
        """The delta as it is attached, untouched."""
        if self._state != "fresh":
            self.backbone, self.inputs = self.cell.fresh()
            for k, parameter in enumerate(self.backbone.parameters()):
                parameter.requires_grad_(k % 3 != 0)
            self.before = trace(self.backbone)
            self.delta = self.cell.attach(self.backbone)
            self._state = "fresh"
        return self.delta

    def trained(self) -> Delta:
        """The delta moved away from where it started."""
        if self._state == "spoilt":
            self.fresh()
        if self._state != "trained":
            shake(self.delta)
            self.acting = self.output()
            self._state = "trained"
        return self.delta

    def move(self) -> None:
        """Say that the delta is no longer as it was attached."""
        self._state = "moved"

    def take(self, delta: Delta) -> None:
        """Go on with another delta that computes what the trained one did."""
        self.delta, self._state = delta, "trained"

    def spoil(self) -> None:
        """Say that the backbone is not to be used any more."""
        self._state = "spoilt"

    def second(self) -> Delta:
        """Another trained delta of the same method beside the first."""
        delta = self.cell.attach(self.backbone, name="second")
        shake(delta, seed=1)
        return delta

    @torch.no_grad()
    def output(self) -> Tensor:
        """The backbone's output now, without gradients."""
        return output(self.backbone, self.inputs)

    def backward(self) -> Tensor:
        """Gradients of a loss on the output, which is returned."""
        found = output(self.backbone, self.inputs)
        found.float().square().mean().backward()
        return found.detach()

    def changes(self, since: Trace | None = None) -> list[str]:
        """What is not as it was at ``since``, or before anything was attached."""
        return trace(self.backbone).differences(since or self.before)

    def copy(self) -> tuple[nn.Module, Delta]:
        """A deep copy of the backbone, and the delta on it."""
        return twin(self.backbone, copy.deepcopy)


def twin(backbone: nn.Module, way: Callable[[nn.Module], Any]) -> tuple[nn.Module, Delta]:
    """A copy of a backbone that has one delta, and the delta on the copy."""
    other = way(backbone)
    (delta,) = dt.deltas(other)
    return other, delta
