"""Rule 2: detaching leaves no trace, in whatever order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.errors import Unsupported
from deltatune.injection.attach import detach
from tests.conformance.cells import TAKEN, Cell, over, shake
from tests.conformance.trace import trace
from tests.models import output


def _freeze_some(backbone: nn.Module) -> None:
    for k, parameter in enumerate(backbone.parameters()):
        parameter.requires_grad_(k % 3 != 0)


@over(TAKEN)
def test_detach_leaves_no_trace(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    _freeze_some(backbone)
    before = trace(backbone)
    with torch.no_grad():
        expected = output(backbone, inputs)
    delta = cell.attach(backbone)
    shake(delta)
    output(backbone, inputs).float().square().mean().backward()
    detach(delta)
    assert trace(backbone).differences(before) == []
    assert all(parameter.grad is None for parameter in backbone.parameters())
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), expected)
    with pytest.raises(Unsupported, match=r"was detached from its backbone\. Attach or load it again"):
        delta.enable()


@pytest.mark.parametrize("first", [0, 1], ids=["oldest-first", "newest-first"])
@over(TAKEN)
def test_two_deltas_leave_in_any_order(cell: Cell, first: int) -> None:
    backbone, inputs = cell.fresh()
    before = trace(backbone)
    with torch.no_grad():
        plain = output(backbone, inputs)
        pair = [cell.attach(backbone, name="a"), cell.attach(backbone, name="b")]
        alone = []
        for k, delta in enumerate(pair):
            shake(delta, seed=k)
        for k in (0, 1):
            pair[1 - k].disable()
            alone.append(output(backbone, inputs))
            pair[1 - k].enable()
        detach(pair[first])
        assert torch.equal(output(backbone, inputs), alone[1 - first])
        detach(pair[1 - first])
        assert trace(backbone).differences(before) == []
        assert torch.equal(output(backbone, inputs), plain)


@over(TAKEN)
def test_a_delta_comes_back_after_detach(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    with torch.no_grad():
        delta = cell.attach(backbone)
        shake(delta)
        state, expected = {name: tensor.clone() for name, tensor in delta.state_dict().items()}, output(backbone, inputs)
        detach(delta)
        again = cell.attach(backbone)
        again.load_state_dict(state)
        assert torch.equal(output(backbone, inputs), expected)
