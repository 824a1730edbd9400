"""The serial bottleneck adapter against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import InvalidValue
from deltatune.injection.attach import attach
from deltatune.methods import Adapter
from tests.conformance.cells import fresh, shake

FORMULAS = {
    "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))),
    "relu": lambda h: h.clamp(min=0),
    "silu": lambda h: h / (1 + torch.exp(-h)),
    "tanh": lambda h: (torch.exp(2 * h) - 1) / (torch.exp(2 * h) + 1),
}


@pytest.mark.parametrize("activation", FORMULAS)
def test_the_formula_in_double_precision(activation: str) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 5)).double()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    delta = attach(backbone, Adapter(bottleneck_dim=2, activation=activation), "0")
    backbone.double()
    shake(delta, spread=0.8)
    W_d, b_d, W_u, b_u = delta.parameters()  # (r, d), (r,), (d, r), (d,)
    h = x @ backbone[0].weight.T + backbone[0].bias
    expected = h + FORMULAS[activation](h @ W_d.T + b_d) @ W_u.T + b_u
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)


def test_a_convolution_is_adapted_per_position() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3))
    x = torch.randn(2, 3, 6, 7)
    delta = attach(backbone, Adapter(bottleneck_dim=2, activation="relu"), "0")
    shake(delta, spread=0.8)
    W_d, b_d, W_u, b_u = delta.parameters()
    y = F.conv2d(x, backbone[0].weight, backbone[0].bias)
    h = torch.einsum("bchw,rc->brhw", y, W_d) + b_d[:, None, None]
    expected = y + torch.einsum("brhw,cr->bchw", h.relu(), W_u) + b_u[:, None, None]
    torch.testing.assert_close(backbone(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model", "positions"), [("bert", 4), ("gpt2", 4), ("llama", 4), ("t5", 10), ("bart", 10), ("torch_encoder", 4)])
def test_positions_are_houlsbys(model: str, positions: int) -> None:
    """Behind every attention's output projection and behind every feed-forward network, cross-attention included."""
    backbone, _ = fresh(model)
    delta = attach(backbone, Adapter(bottleneck_dim=4), head=False)
    assert len(delta.entries) == positions
    assert {entry.site.leaf for entry in delta.entries} == {"output", "down"}
    assert delta.budget().delta == positions * (2 * 32 * 4 + 4 + 32)


def test_the_adapter_sits_ahead_of_the_residual_and_the_norm() -> None:
    backbone, inputs = fresh("bert")
    output = backbone.get_submodule("bert.encoder.layer.0.output")
    attach(backbone, Adapter(bottleneck_dim=4), "feed_forward.down", layers=0, head=False)
    seen: list[Tensor] = []
    handle = output.get_submodule("LayerNorm").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    delta_patch = output.get_submodule("dense.deltatune.patches.adapter")
    with torch.no_grad():
        delta_patch.bottleneck.U.b.fill_(100.0)  # type: ignore[union-attr, operator]
        backbone(**inputs)
    handle.remove()
    assert seen[0].mean() > 90


def test_the_start() -> None:
    backbone = nn.Sequential(nn.Linear(300, 200))
    torch.manual_seed(0)
    W_d, b_d, W_u, b_u = attach(backbone, Adapter(bottleneck_dim=50), "0", name="exact").parameters()
    assert not (b_d.any() or W_u.any() or b_u.any())
    assert math.isclose(float(W_d.detach().std()), 0.01, rel_tol=0.05)
    W_d, b_d, W_u, b_u = attach(backbone, Adapter(bottleneck_dim=50, init_std=1e-3), "0", name="near").parameters()
    assert not (b_d.any() or b_u.any())
    assert math.isclose(float(W_d.detach().std()), 1e-3, rel_tol=0.05)
    assert math.isclose(float(W_u.detach().std()), 1e-3, rel_tol=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(bottleneck_dim=0), r"Adapter\(bottleneck_dim=0\) was asked for; `bottleneck_dim` must be greater than 0"),
        (dict(activation="mish"), r"`activation` is one of `gelu`, `gelu_new`, `relu`, `silu`, `tanh`"),
    ],
)
def test_fields_out_of_range(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        Adapter(**fields)  # type: ignore[arg-type]
