"""HiRA against its formula; the oracle table holds PEFT's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.errors import InvalidValue
from deltatune.injection.attach import attach
from deltatune.injection.merge import merge, unmerge
from deltatune.methods import HiRA
from tests.conformance.cells import fresh, shake
from tests.models import output


def test_the_formula_in_double_precision() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(7, 5)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    delta = attach(backbone, HiRA(rank=2), "0")
    backbone.double()
    shake(delta, spread=1.0)
    A, B = delta.parameters()
    W = backbone[0].weight.detach().clone()
    expected = x @ (W + W * (B @ A)).T + backbone[0].bias
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    merge(delta)
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    unmerge(delta)
    assert torch.equal(backbone[0].weight, W)


def test_the_change_has_a_high_rank() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(20, 20))
    delta = attach(backbone, HiRA(rank=2), "0")
    shake(delta, spread=1.0)
    (patch,) = delta.patches
    W = backbone[0].weight.detach()
    assert torch.linalg.matrix_rank(patch(W).detach() - W) == 20


@pytest.mark.parametrize(
    ("model", "where"), [("gpt2", None), ("torch_encoder", None), ("mixtral", "*.experts.down_proj"), ("conv_net", "conv*")]
)
def test_a_fresh_one_is_the_identity_to_the_bit(model: str, where: str | None) -> None:
    backbone, inputs = fresh(model)
    plain = output(backbone, inputs)
    delta = attach(backbone, HiRA(rank=2), where, head=False)
    assert torch.equal(output(backbone, inputs), plain)
    shake(delta, spread=0.5)
    assert not torch.equal(output(backbone, inputs), plain)


def test_counts_and_fields() -> None:
    assert attach(nn.Sequential(nn.Linear(12, 20)), HiRA(), "0").budget().delta == 32 * (12 + 20)
    with pytest.raises(InvalidValue, match="`rank` must be greater than 0"):
        HiRA(rank=0)
