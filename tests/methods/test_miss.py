"""MiSS against its formula; ``oracles/miss.py`` holds it against PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.attach import attach
from deltatune.injection.merge import merge
from deltatune.methods import MiSS
from tests.conformance.cells import fresh, shake


@pytest.mark.parametrize("mini_rank", [None, 2, 3])
@pytest.mark.parametrize("rank", [2, 5, 7])
def test_the_formula_in_double_precision(rank: int, mini_rank: int | None) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(7, 6)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    delta = attach(backbone, MiSS(rank=rank, mini_rank=mini_rank), "0")
    backbone.double()
    shake(delta, spread=1.0)
    (D,) = delta.parameters()
    W, b = backbone[0].weight, backbone[0].bias
    change = torch.stack([torch.stack([D[j % rank, i % D.shape[1]] for j in range(7)]) for i in range(6)])
    expected = x @ (W + change).T + b
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    merge(delta)
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)


def test_counts() -> None:
    backbone, _ = fresh("bert")
    assert attach(backbone, MiSS(rank=4), head=False, name="whole").budget().delta == 4 * 4 * 32
    assert attach(backbone, MiSS(rank=4, mini_rank=8), head=False, name="mini").budget().delta == 4 * 4 * 8


def test_dropout_is_on_the_input_and_in_training_only() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(8, 6)
    delta = attach(backbone, MiSS(rank=3, dropout=0.5), "0")
    shake(delta, spread=1.0)
    (D,) = delta.parameters()
    plain = nn.functional.linear(x, backbone[0].weight, backbone[0].bias)
    torch.manual_seed(1)
    found = backbone(x)
    torch.manual_seed(1)
    kept = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(found, plain + (kept[:, :3] + kept[:, 3:]) @ D, atol=1e-5, rtol=1e-5)
    backbone.eval()
    torch.testing.assert_close(backbone(x), plain + (x[:, :3] + x[:, 3:]) @ D, atol=1e-5, rtol=1e-5)


def test_refusals() -> None:
    backbone, _ = fresh("bert")
    with pytest.raises(Unsupported, match=r"its input is 32 wide\. Choose rank=32 or less"):
        attach(backbone, MiSS(rank=33))
    with pytest.raises(Unsupported, match=r"mini_rank does not divide its output, 32 wide\. Choose a divisor"):
        attach(backbone, MiSS(rank=4, mini_rank=5))
    for fields in (dict(rank=0), dict(mini_rank=0), dict(dropout=1.0)):
        with pytest.raises(InvalidValue, match="was asked for"):
            MiSS(**fields)  # type: ignore[arg-type]
