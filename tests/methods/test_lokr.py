"""LoKr against its formula; ``oracles/lokr.py`` holds it against PEFT."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import nn

from deltatune.errors import InvalidValue
from deltatune.injection.attach import attach
from deltatune.injection.merge import merge
from deltatune.methods import LoKr
from deltatune.methods.reparameterization.lokr import KroneckerLinear, KroneckerWeight, divisors
from tests.conformance.cells import fresh, shake


@pytest.mark.parametrize(("method", "factors"), [(LoKr(rank=9), 2), (LoKr(rank=1), 3), (LoKr(rank=1, factor_both=True), 4)])
def test_the_formula_in_double_precision(method: LoKr, factors: int) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(12, 20)).double()
    x = torch.randn(4, 12, dtype=torch.float64)
    delta = attach(backbone, method, "0")
    backbone.double()
    shake(delta, spread=1.0)
    own = {name.rpartition(".")[2]: tensor for name, tensor in delta.named_parameters()}
    assert len(own) == factors
    C = own["C"] if "C" in own else own["C_b"] @ own["C_a"]
    D = own["D"] if "D" in own else own["D_b"] @ own["D_a"]
    assert C.shape == (4, 3) and D.shape == (5, 4)
    W, b = backbone[0].weight, backbone[0].bias
    expected = x @ (W + method.alpha / method.rank * torch.kron(C, D)).T + b
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    merge(delta)
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)


def test_only_a_called_linear_map_skips_the_product() -> None:
    kinds = {}
    for model, where in (("bert", "attention.query"), ("conv_net", "conv1"), ("tied_mlp", "first"), ("mixtral", "experts.up")):
        backbone, _ = fresh(model)
        kinds[model] = {type(patch) for patch in attach(backbone, LoKr(), where).patches if "Kronecker" in type(patch).__name__}
    assert kinds == {"bert": {KroneckerLinear}, "conv_net": {KroneckerWeight}, "tied_mlp": {KroneckerWeight}, "mixtral": {KroneckerWeight}}


def test_sizes_are_factored_as_in_peft() -> None:
    for size in range(1, 400):
        for factor in (-1, 1, 2, 3, 5, 8, 16, 60):
            assert divisors(size, factor) == factorization(size, factor), (size, factor)


def test_counts() -> None:
    backbone, _ = fresh("bert")
    assert attach(backbone, LoKr(rank=8), head=False, name="whole").budget().delta == 4 * (4 * 4 + 8 * 8)
    assert attach(backbone, LoKr(rank=1), head=False, name="factored").budget().delta == 4 * (4 * 4 + 2 * 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rank=0), "`rank` must be greater than 0"),
        (dict(factor=0), r"LoKr\(factor=0\) was asked for; `factor` must be at least 1, or -1"),
    ],
)
def test_fields_out_of_range(fields: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        LoKr(**fields)  # type: ignore[arg-type]
