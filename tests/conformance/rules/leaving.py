"""Rule 2, first half: detaching leaves no trace, in whatever order, and what was detached can come back."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.errors import Unsupported
from tests.conformance.sitting import Sitting


def two_deltas_leave_in_any_order(sitting: Sitting) -> None:
    """What is left acts as if it had been alone; behind the last one there is no trace."""
    first = sitting.trained()
    second = sitting.second()
    first.disable()
    alone = sitting.output()
    first.enable()
    second.disable()
    assert torch.equal(sitting.output(), sitting.acting)
    second.enable()
    dt.detach(second)
    assert torch.equal(sitting.output(), sitting.acting), "newest first"
    second = sitting.second()
    sitting.spoil()
    dt.detach(first)
    assert torch.equal(sitting.output(), alone), "oldest first"
    dt.detach(second)
    assert sitting.changes() == []
    assert torch.equal(sitting.output(), sitting.plain)


def detaching_leaves_no_trace(sitting: Sitting) -> None:
    """Behind a backward: objects, bits, flags, gradients, hooks, configs, outputs; then its state brings the delta back."""
    delta = sitting.trained()
    state = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
    sitting.backward()
    sitting.spoil()
    dt.detach(delta)
    assert sitting.changes() == []
    assert all(parameter.grad is None for parameter in sitting.backbone.parameters())
    assert torch.equal(sitting.output(), sitting.plain)
    with pytest.raises(Unsupported, match=r"was detached from its backbone\. Attach or load it again"):
        delta.enable()
    again = sitting.cell.attach(sitting.backbone)
    again.load_state_dict(state)
    assert torch.equal(sitting.output(), sitting.acting), "a delta comes back"
    sitting.take(again)
