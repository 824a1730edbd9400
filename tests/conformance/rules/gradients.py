"""Rule 4: a delta's parameters, and nothing else, get gradients; what it says it trains is what is counted."""

from __future__ import annotations

import torch

from deltatune.injection.delta import Delta
from deltatune.injection.slot import CHILD
from tests.conformance.cells import moved
from tests.conformance.sitting import Sitting
from tests.models import output


def the_budget_is_what_is_counted(sitting: Sitting) -> None:
    """N, M, |delta|, their ratio and the bytes, counted from outside."""
    delta, backbone = sitting.fresh(), sitting.backbone
    budget = delta.budget()
    named = dict(backbone.named_parameters())
    size = sum(parameter.numel() for name, parameter in named.items() if CHILD not in name.split("."))
    added = sum(p.numel() for name, p in named.items() if CHILD in name.split(".") and p.requires_grad)
    wanting = sum(parameter.numel() for parameter in named.values() if parameter.requires_grad)
    assert size == budget.N
    assert wanting == budget.delta == sum(p.numel() for p in delta.trained_parameters().values())
    assert size + added == budget.M
    assert budget.ratio == budget.delta / size
    assert budget.size_bytes == sum(tensor.numel() * tensor.element_size() for tensor in delta.state_dict().values())


def frozen_and_disabled_deltas_want_no_gradients(sitting: Sitting) -> None:
    """Nothing on the backbone trains then, and all that trained before does afterwards."""
    delta = sitting.fresh()
    wanted = _wanting(delta)
    assert wanted == list(delta.trained_parameters())
    delta.freeze()
    assert _wanting(delta) == []
    assert not output(sitting.backbone, sitting.inputs).requires_grad
    delta.unfreeze()
    assert _wanting(delta) == wanted
    same = [id(parameter) for parameter in delta.parameters()]
    delta.disable()
    assert _wanting(delta) == []
    assert not any(parameter.requires_grad for parameter in sitting.backbone.parameters())
    delta.enable()
    assert _wanting(delta) == wanted
    assert [id(parameter) for parameter in delta.parameters()] == same, "an optimizer would step what no longer acts"


def _wanting(delta: Delta) -> list[str]:
    return [name for name, parameter in delta.named_parameters() if parameter.requires_grad]


def two_steps_move_the_delta_and_nothing_else(sitting: Sitting) -> None:
    """It learns from where it starts; two steps, because the first one of LoRA moves B alone."""
    delta, backbone = sitting.fresh(), sitting.backbone
    sitting.move()
    own = {id(parameter) for parameter in delta.parameters()}
    first = sitting.output()
    optimizer = torch.optim.SGD(delta.parameter_groups(lr=0.1), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sitting.backward()
        optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(sitting.output(), first)
    tensors = sitting.before.tensors
    others = {name: parameter for name, parameter in backbone.named_parameters() if name in tensors and id(parameter) not in own}
    assert [name for name, parameter in others.items() if not torch.equal(parameter, tensors[name])] == []


def exactly_the_delta_gets_gradients(sitting: Sitting) -> None:
    """Each of its trained parameters, finite and not all zero, and no parameter besides."""
    delta, backbone = sitting.trained(), sitting.backbone
    assert moved(sitting.backward(), sitting.acting) < 1e-5, "with gradients it computes something else"
    own = {id(parameter) for parameter in delta.parameters()}
    others = {name: parameter for name, parameter in backbone.named_parameters() if id(parameter) not in own}
    assert [name for name, parameter in others.items() if parameter.grad is not None] == [], "leaked"
    assert [name for name, parameter in others.items() if parameter.requires_grad] == [], "not frozen"
    trained = delta.trained_parameters()
    gradients = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    assert sorted(trained.keys() - gradients.keys()) == [], "idle"
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    backbone.zero_grad()
