"""DoRA against its formula; the oracle table holds PEFT's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.attach import attach
from deltatune.injection.merge import merge
from deltatune.methods import DoRA
from tests.conformance.cells import fresh, shake
from tests.models import output


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_formula_in_double_precision(stabilized: bool) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(7, 5)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    delta = attach(backbone, DoRA(rank=3, alpha=2.5, rank_stabilized=stabilized), "0")
    backbone.double()
    shake(delta, spread=1.0)
    A, B, m = delta.parameters()
    V = backbone[0].weight + (2.5 / 3**0.5 if stabilized else 2.5 / 3) * B @ A
    expected = x @ (m * V / V.square().sum(1, keepdim=True).sqrt()).T + backbone[0].bias
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    merge(delta)
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("model", "where"),
    [
        ("bert", None),
        ("gpt2", None),
        ("phi3", None),
        ("torch_encoder", None),
        ("mixtral", "*.experts.*_proj"),
        ("conv_net", "conv*"),
        ("opt", "embedding"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_one_is_the_identity_to_the_bit(model: str, where: str | None, dtype: torch.dtype) -> None:
    backbone, inputs = fresh(model)
    backbone.to(dtype)
    inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    plain = output(backbone, inputs)
    delta = attach(backbone, DoRA(rank=2), where, head=False)
    assert torch.equal(output(backbone, inputs), plain)
    shake(delta)
    assert not torch.equal(output(backbone, inputs), plain)


def test_magnitudes_are_norms_of_rows_and_of_the_features_of_embeddings() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Embedding(11, 7), nn.Linear(7, 5))
    delta = attach(backbone, DoRA(rank=2), ["0", "1"])
    table, linear = (patch.magnitude.detach().flatten() for patch in delta.patches)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(table, backbone[0].weight.norm(dim=0))
    torch.testing.assert_close(linear, backbone[1].weight.norm(dim=1))
    assert delta.budget().delta == (2 * (11 + 7) + 7) + (2 * (7 + 5) + 5)


def test_a_row_of_zeros_stays_finite() -> None:
    backbone = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        backbone[0].weight[1] = 0
    x = torch.randn(2, 4)
    plain = backbone(x)
    delta = attach(backbone, DoRA(rank=2), "0")
    assert torch.equal(backbone(x), plain)
    shake(delta)
    backbone(x).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in delta.parameters())


def test_refusals() -> None:
    for fields in (dict(rank=0), dict(alpha=0.0)):
        with pytest.raises(InvalidValue, match="must be greater than 0"):
            DoRA(**fields)  # type: ignore[arg-type]
    backbone = nn.Sequential(nn.Linear(4, 4))
    backbone[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(Unsupported, match="DoRA starts from the values of the weight at `0`, which is quantised"):
        attach(backbone, DoRA(), "0")
