"""Random mixtures of kinds, ranks and sites: whatever a batch holds, each row is what it is alone, gradients included."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods import IA3, Adapter, BitFit, DoRA, HiRA, LoRA, LoReFT, NormTuning, VeRA
from deltatune.multi.routing import Entry
from tests.conformance.cells import shake
from tests.multi.rows import far, forget, use

WIDTH = 8


class Net(nn.Module):
    """Two maps, a norm and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 12)
        self.second = nn.Linear(12, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.second(torch.tanh(self.first(x))))
        return y


METHODS: dict[str, tuple[Any, str]] = {
    "low1": (LoRA(rank=1), "first"),
    "low3": (LoRA(rank=3), "first"),
    "low5": (LoRA(rank=5), "second"),
    "both": (LoRA(rank=5), "first"),
    "vera": (VeRA(rank=4), "first"),
    "dora": (DoRA(rank=2), "second"),
    "hira": (HiRA(rank=2), "first"),
    "scaled": (IA3(), "second"),
    "biases": (BitFit(), "first"),
    "norm": (NormTuning(), "norm"),
    "serial": (Adapter(bottleneck_dim=3), "second"),
    "edit": (LoReFT(rank=2), "second"),
}


@cache
def net() -> nn.Module:
    torch.manual_seed(0)
    backbone = Net()
    for seed, (name, (method, where)) in enumerate(METHODS.items()):
        shake(dt.attach(backbone, method, where, name=name), spread=0.2, seed=seed)
    dt.switch(backbone, None)
    return backbone


NAMED = st.sampled_from(sorted(METHODS))
ENTRY = st.one_of(st.none(), NAMED, st.lists(NAMED, min_size=2, max_size=3, unique=True))
ROWS = st.lists(ENTRY, min_size=1, max_size=9)
QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def inputs(rows: int, tokens: int) -> Tensor:
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(rows * 31 + tokens))


def alone(entries: list[Entry], x: Tensor) -> list[Tensor]:
    found = []
    for i, entry in enumerate(entries):
        use(net(), entry)
        found.append(net()(x[i : i + 1])[0])
    dt.switch(net(), None)
    return found


@QUICK
@given(ROWS, st.sampled_from([1, 3, 12]), st.sampled_from([1, 2]))
@torch.no_grad()
def test_outputs(entries: list[Entry], tokens: int, factor: int) -> None:
    x = inputs(len(entries) * factor, tokens)
    with dt.route(net(), entries):
        found = [net()(x) for _ in range(3)]  # from the second on with copies that are kept
    expected = alone([entry for entry in entries for _ in range(factor)], x)
    assert max(far(one, expected) for one in found) < 1e-5


@QUICK
@given(ROWS, ROWS, st.integers(0, 8))
@torch.no_grad()
def test_no_row_knows_the_others(entries: list[Entry], others: list[Entry], place: int) -> None:
    place %= len(entries)
    changed = [*others[:place], entries[place], *others[place:]]
    place_then = min(place, len(others))
    one, other = inputs(len(entries), 3), inputs(len(changed), 3)
    other[place_then] = one[place]
    with dt.route(net(), entries):
        before = net()(one)[place]
    with dt.route(net(), changed):
        after = net()(other)[place_then]
    assert far(after[None], [before]) < 1e-5


TRAINED = st.lists(st.one_of(st.none(), st.sampled_from(sorted(set(METHODS) - {"biases", "norm"}))), min_size=1, max_size=6)


@settings(QUICK, max_examples=15)
@given(TRAINED, st.sampled_from([1, 12]))
def test_gradients(entries: list[Entry], tokens: int) -> None:
    backbone = net()
    x = inputs(len(entries), tokens)
    weights = torch.linspace(0.5, 1.5, WIDTH)
    expected: dict[str, Tensor] = {}
    x_gradients = []
    for i, entry in enumerate(entries):
        use(backbone, entry)
        forget(backbone)
        own = x[i : i + 1].clone().requires_grad_()
        (backbone(own).square() * weights).sum().backward()
        x_gradients.append(own.grad[0] if own.grad is not None else torch.zeros_like(own[0]))
        collect(backbone, expected)
    for delta in dt.deltas(backbone):
        if delta.name not in ("biases", "norm"):
            delta.enable()
    forget(backbone)
    whole = x.clone().requires_grad_()
    with dt.route(backbone, entries):
        (backbone(whole).square() * weights).sum().backward()
    found: dict[str, Tensor] = {}
    collect(backbone, found)
    dt.switch(backbone, None)
    assert whole.grad is not None
    assert far(whole.grad, x_gradients) < 1e-5
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert float((found.get(name, torch.zeros_like(gradient)) - gradient).abs().max()) < 1e-5 * scale, name
    assert all(name in expected or not gradient.any() for name, gradient in found.items()), "no other delta gets any"


def collect(backbone: nn.Module, into: dict[str, Tensor]) -> None:
    for delta in dt.deltas(backbone):
        for name, parameter in delta.named_parameters():
            if parameter.grad is not None and delta.name not in ("biases", "norm"):
                into[f"{delta.name}.{name}"] = into.get(f"{delta.name}.{name}", 0) + parameter.grad
