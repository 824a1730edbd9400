"""LoHa against its formula; ``oracles/loha.py`` holds it against PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.errors import InvalidValue
from deltatune.injection.attach import attach
from deltatune.methods import LoHa
from tests.conformance.cells import fresh, shake


def test_the_formula_in_double_precision() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(7, 5)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    delta = attach(backbone, LoHa(rank=3, alpha=2.5), "0")
    backbone.double()
    shake(delta, spread=1.0)
    A_1, B_1, A_2, B_2 = delta.parameters()
    change = torch.zeros(5, 7, dtype=torch.float64)
    for i in range(5):
        for j in range(7):
            change[i, j] = 2.5 / 3 * (B_1[i] @ A_1[:, j]) * (B_2[i] @ A_2[:, j])
    torch.testing.assert_close(backbone(x), x @ (backbone[0].weight + change).T + backbone[0].bias, atol=1e-10, rtol=1e-10)
    assert torch.linalg.matrix_rank(change) > 3, "more than the rank of either product"


def test_it_trains_twice_what_lora_does_and_starts_at_nothing() -> None:
    backbone, _ = fresh("bert")
    delta = attach(backbone, LoHa(rank=4), head=False)
    assert delta.budget().delta == 2 * 2 * (2 * 4 * (32 + 32))
    for patch in delta.patches:
        assert not patch.get_parameter("B_2").any()
        assert 0.05 < patch.get_parameter("B_1").std() < 0.2
        assert 0.5 < patch.get_parameter("A_2").std() < 2


def test_rows_of_a_fused_projection() -> None:
    backbone, _ = fresh("gpt2")
    c_attn = backbone.get_submodule("transformer.h.0.attn.c_attn")
    delta = attach(backbone, LoHa(rank=2, alpha=2.0), "attention.value", layers=0)
    shake(delta, spread=0.3)
    (patch,) = delta.patches
    x = torch.randn(3, 32)
    with torch.no_grad():
        W = c_attn.weight.clone()
        W[:, 64:] += ((patch.B_1 @ patch.A_1) * (patch.B_2 @ patch.A_2)).T
        torch.testing.assert_close(c_attn(x), x @ W + c_attn.bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [(dict(rank=0), r"LoHa\(rank=0\) was asked for; `rank` must be greater than 0"), (dict(alpha=-1.0), "`alpha` must be greater than 0")],
)
def test_fields_out_of_range(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        LoHa(**fields)  # type: ignore[arg-type]
