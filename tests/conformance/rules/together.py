"""Rules 7 and 8: one more delta walks over nothing, and several act together as if each had been enabled in turn."""

from __future__ import annotations

from unittest.mock import patch

import torch

import deltatune as dt
from deltatune.structure.index import Index
from tests.conformance.cells import moved
from tests.conformance.sitting import Sitting

ROUNDING = 1e-5
"""Sums of selections are rounded anew when they are formed anew."""


@torch.no_grad()
def a_second_delta_joins_the_first(sitting: Sitting) -> None:
    """It finds its sites in the index; composed, the two act as they do one behind the other."""
    first = sitting.trained()
    with patch.object(Index, "__init__", side_effect=AssertionError("the backbone was walked again")):
        second = sitting.second()
    both = sitting.output()
    composition = dt.compose(sitting.backbone, [first, second])
    assert moved(sitting.output(), both) < ROUNDING
    composition.disable()
    assert torch.equal(sitting.output(), sitting.plain)
    composition.enable()
    assert moved(sitting.output(), both) < ROUNDING
    composition.dissolve()
    dt.detach(second)
    first.enable()
    assert torch.equal(sitting.output(), sitting.acting)
