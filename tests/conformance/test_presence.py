"""Rules 1 and 3: an attached backbone stays itself, and a fresh delta is the identity where its method says so."""

from __future__ import annotations

import torch
from torch import nn

from deltatune.injection.ledger import Ledger
from deltatune.injection.slot import CHILD, Slot
from deltatune.injection.state import backbone_state
from tests.conformance.cells import TAKEN, Cell, moved, over, shake
from tests.models import output


def _own_modules(backbone: nn.Module) -> list[tuple[str, int, type]]:
    return [(path, id(module), type(module)) for path, module in backbone.named_modules() if CHILD not in path.split(".")]


@over(TAKEN)
def test_backbone_stays_itself(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    modules, names = _own_modules(backbone), list(backbone.state_dict())
    parameters = {name: id(parameter) for name, parameter in backbone.named_parameters()}
    bits = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    delta = cell.attach(backbone)
    output(backbone, inputs)
    shake(delta)
    assert _own_modules(backbone) == modules
    ours = [module for path, module in backbone.named_modules() if path.split(".")[-1] == CHILD]
    assert all(type(module) in (Slot, Ledger) for module in ours)
    assert [name for name in backbone.state_dict() if CHILD not in name.split(".")] == names
    now = {name: id(parameter) for name, parameter in backbone.named_parameters() if CHILD not in name.split(".")}
    assert now == parameters
    state = backbone_state(backbone)
    assert list(state) == names
    assert all(torch.equal(state[name], tensor) for name, tensor in bits.items())


@over(TAKEN)
def test_fresh_delta_is_the_identity_where_promised(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    with torch.no_grad():
        expected = output(backbone, inputs)
        delta = cell.attach(backbone)
        found = output(backbone, inputs)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if type(delta.method).identity:
        assert torch.equal(found, expected)
    else:
        assert moved(found, expected) > 1e-4


@over(TAKEN)
def test_trained_delta_acts_and_rests(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    with torch.no_grad():
        plain = output(backbone, inputs)
        delta = cell.attach(backbone)
        shake(delta)
        acting = output(backbone, inputs)
        delta.disable()
        resting = output(backbone, inputs)
        delta.enable()
        again = output(backbone, inputs)
    assert moved(acting, plain) > 1e-4
    assert torch.equal(resting, plain)
    assert torch.equal(again, acting)
