"""Rules 1 and 3: an attached backbone stays itself, and a fresh delta is the identity where its method says so."""

from __future__ import annotations

import torch

from deltatune.injection.ledger import Ledger
from deltatune.injection.slot import CHILD, Slot
from deltatune.injection.state import backbone_state
from tests.conformance.cells import moved
from tests.conformance.sitting import Sitting


def the_backbone_stays_itself(sitting: Sitting) -> None:
    """Its modules, parameters and names are the same objects, and its own state is to be had, whatever was trained."""
    sitting.trained()
    backbone, before = sitting.backbone, sitting.before
    modules = list(backbone.named_modules(remove_duplicate=False))
    assert [(path, id(module), type(module)) for path, module in modules if CHILD not in path.split(".")] == before.modules
    ours = [module for path, module in modules if path.split(".")[-1] == CHILD]
    assert ours
    assert all(type(module) in (Slot, Ledger) for module in ours)
    names = [name for name in before.tensors if not name.startswith("buffer ")]
    assert [name for name in backbone.state_dict() if CHILD not in name.split(".")] == names
    parameters = backbone.named_parameters(remove_duplicate=False)
    assert {name: id(tensor) for name, tensor in parameters if CHILD not in name.split(".")} == {n: key for n, key, _ in before.parameters}
    state = backbone_state(backbone)
    assert list(state) == names
    assert [name for name in names if not torch.equal(state[name], before.tensors[name])] == []


def a_fresh_delta_is_the_identity_where_promised(sitting: Sitting) -> None:
    """Bit for bit; and where it is not promised, it is not so by chance."""
    delta = sitting.fresh()
    found = sitting.output()
    assert found.dtype == sitting.plain.dtype
    assert found.shape == sitting.plain.shape
    if type(delta.method).identity:
        assert torch.equal(found, sitting.plain), f"moved by {moved(found, sitting.plain)}"
    else:
        assert moved(found, sitting.plain) > 1e-4


def a_trained_delta_acts_and_rests(sitting: Sitting) -> None:
    """Enabled it moves the outputs; disabled it leaves the plain ones to the bit."""
    delta = sitting.trained()
    assert moved(sitting.acting, sitting.plain) > 1e-4
    delta.disable()
    assert torch.equal(sitting.output(), sitting.plain)
    delta.enable()
    assert torch.equal(sitting.output(), sitting.acting)
