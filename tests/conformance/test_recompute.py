"""Inputs made anew in the backward: every delta gets the loss and the gradients it gets without, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deltatune.injection.delta import Delta
from deltatune.injection.switching import recompute
from tests.conformance.cells import TAKEN, Cell, shake
from tests.conformance.sample import pairwise
from tests.models import MODELS, output

CELLS = pairwise(TAKEN)


def _gradients(backbone: nn.Module, inputs: dict[str, Tensor], delta: Delta) -> list[Tensor]:
    backbone.zero_grad()
    torch.manual_seed(3)
    loss = output(backbone, inputs).float().square().mean()
    if loss.requires_grad:
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in delta.trained_parameters().values() if p.grad is not None)]


def test_all_models_and_methods_are_there() -> None:
    assert {cell.model for cell in CELLS} == MODELS.keys()
    assert {cell.method for cell in CELLS} == {cell.method for cell in TAKEN}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradients_are_those_without(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    delta = cell.attach(backbone)
    shake(delta)
    expected = _gradients(backbone, inputs, delta)
    recompute(backbone)
    found = _gradients(backbone, inputs, delta)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
