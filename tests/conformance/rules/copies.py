"""Rule 2, second half: a deep copy and a pickle of an attached backbone live on their own."""

from __future__ import annotations

import pickle

import torch

import deltatune as dt
from tests.conformance.cells import shake
from tests.conformance.sitting import Sitting, twin
from tests.models import output


@torch.no_grad()
def copies_are_independent(sitting: Sitting) -> None:
    """A deep copy, and a pickle of that: each acts as the original, trains alone, and is detached alone."""
    delta, inputs, acting = sitting.trained(), sitting.inputs, sitting.acting
    copied, one = sitting.copy()
    assert one is not delta
    assert one.backbone is copied
    assert torch.equal(output(copied, inputs), acting), "deepcopy"
    pickled, other = twin(copied, lambda backbone: pickle.loads(pickle.dumps(backbone)))
    assert torch.equal(output(pickled, inputs), acting), "pickle"
    shake(other, seed=8)
    changed = output(pickled, inputs)
    assert not torch.equal(changed, acting)
    shake(one, seed=9)
    sitting.spoil()
    assert torch.equal(sitting.output(), acting), "the original trains with its copies"
    dt.detach(delta)
    assert torch.equal(output(pickled, inputs), changed), "the pickle leaves with the original"
    assert not torch.equal(output(copied, inputs), acting)
    for backbone, copy in ((copied, one), (pickled, other)):
        dt.detach(copy)
        assert torch.equal(output(backbone, inputs), sitting.plain)
        assert list(backbone.state_dict()) == list(sitting.backbone.state_dict())
