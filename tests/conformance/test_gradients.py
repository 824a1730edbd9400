"""Rule 4: a delta's parameters, and nothing else, get gradients; what it says it trains is what is counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.injection.delta import Delta
from deltatune.injection.slot import CHILD
from tests.conformance.cells import TAKEN, Cell, over, shake
from tests.models import output

IDLE: dict[str, tuple[str, ...]] = {}
"""Method -> ends of names of trained parameters that a loss on the main output cannot reach."""


def _backward(backbone: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    output(backbone, inputs).float().square().mean().backward()


@over(TAKEN)
def test_exactly_the_delta_gets_gradients(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    delta = cell.attach(backbone)
    shake(delta)
    _backward(backbone, inputs)
    own = {id(parameter) for parameter in delta.parameters()}
    others = [name for name, parameter in backbone.named_parameters() if id(parameter) not in own]
    leaked = [name for name in others if backbone.get_parameter(name).grad is not None]
    wanting = [name for name in others if backbone.get_parameter(name).requires_grad]
    assert leaked == []
    assert wanting == []
    trained = delta.trained_parameters()
    assert trained
    idle = [name for name, parameter in trained.items() if parameter.grad is None]
    assert [name for name in idle if not name.endswith(IDLE.get(cell.method, ()))] == []
    assert all(parameter.grad.isfinite().all() for parameter in trained.values() if parameter.grad is not None)
    assert any(parameter.grad.abs().max() > 0 for parameter in trained.values() if parameter.grad is not None)


@over(TAKEN)
def test_budget_is_what_is_counted(cell: Cell) -> None:
    backbone, _ = cell.fresh()
    size = sum(parameter.numel() for parameter in backbone.parameters())
    delta = cell.attach(backbone)
    budget = delta.budget()
    wanting = {id(parameter): parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad}
    added = {id(p): p.numel() for name, p in backbone.named_parameters() if CHILD in name.split(".") and p.requires_grad}
    stored = delta.state_dict().values()
    assert size == budget.N
    assert sum(wanting.values()) == budget.delta == sum(p.numel() for p in delta.trained_parameters().values())
    assert size + sum(added.values()) == budget.M
    assert budget.ratio == budget.delta / size
    assert budget.size_bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored)


@over(TAKEN)
def test_disabled_and_frozen_deltas_want_no_gradients(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    delta = cell.attach(backbone)
    wanted = _wanting(delta)
    delta.freeze()
    assert _wanting(delta) == []
    assert not output(backbone, inputs).requires_grad
    delta.unfreeze()
    assert _wanting(delta) == wanted
    delta.disable()
    assert _wanting(delta) == []
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    delta.enable()
    assert _wanting(delta) == wanted


def _wanting(delta: Delta) -> list[str]:
    return [name for name, parameter in delta.named_parameters() if parameter.requires_grad]


@over(TAKEN)
def test_one_step_moves_only_the_delta(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    delta = cell.attach(backbone)
    own = {id(parameter) for parameter in delta.parameters()}
    frozen = {name: p.detach().clone() for name, p in backbone.named_parameters() if id(p) not in own}
    with torch.no_grad():
        before = output(backbone, inputs)
    optimizer = torch.optim.SGD(delta.parameter_groups(lr=0.1), lr=0.1)
    for _ in range(2):  # the first step of LoRA moves B alone
        optimizer.zero_grad()
        _backward(backbone, inputs)
        optimizer.step()
    with torch.no_grad():
        assert not torch.equal(output(backbone, inputs), before)
    assert all(torch.equal(backbone.get_parameter(name), tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_stepped_optimizer_survives_disable_and_enable(model: str) -> None:
    for cell in [cell for cell in TAKEN if cell.model == model]:
        backbone, inputs = cell.fresh()
        delta = cell.attach(backbone)
        before = [id(parameter) for parameter in delta.parameters()]
        delta.disable()
        delta.enable()
        assert [id(parameter) for parameter in delta.parameters()] == before
        assert output(backbone, inputs).requires_grad
