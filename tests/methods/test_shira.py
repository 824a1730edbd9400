"""SHiRA against its formula; ``oracles/shira.py`` holds it against PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.methods import SHiRA
from deltatune.methods.reparameterization.shira import SparseWeight
from tests.conformance.cells import fresh, shake


def test_the_formula_in_double_precision() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(12, 9)).double()
    x = torch.randn(4, 12, dtype=torch.float64)
    delta = attach(backbone, SHiRA(rank=2), "0")
    backbone.double()
    shake(delta, spread=1.0)
    (values,) = delta.parameters()
    (patch,) = delta.patches
    S = torch.zeros(9, 12, dtype=torch.float64)
    for place, value in zip(patch.index.tolist(), values, strict=True):
        S[place // 12, place % 12] = value
    assert (S != 0).sum() == len(values) == 2 * (12 + 9)
    assert torch.linalg.matrix_rank(S) > 4, "no low-rank change"
    torch.testing.assert_close(backbone(x), x @ (backbone[0].weight + S).T + backbone[0].bias, atol=1e-10, rtol=1e-10)


def test_the_places_come_from_the_seed_and_are_not_stored() -> None:
    places = []
    for seed in (0, 0, 1):
        backbone, _ = fresh("mixtral")
        delta = attach(backbone, SHiRA(rank=1, seed=seed), ["attention.query", "experts.down"])
        assert all(name.endswith(".values") for name in delta.state_dict())
        patches = [patch for patch in delta.patches if isinstance(patch, SparseWeight)]
        assert all(len(patch.index) == len(patch.values) == len(patch.index.unique()) for patch in patches)
        places.append(torch.cat([patch.index for patch in patches]))
        assert delta.budget().size_bytes == 4 * len(places[-1])
        detach(delta)
    assert torch.equal(places[0], places[1])
    assert not torch.equal(places[0], places[2])


def test_it_trains_as_much_as_lora() -> None:
    backbone, _ = fresh("bert")
    assert attach(backbone, SHiRA(rank=3), head=False).budget().delta == 4 * 3 * (32 + 32)


def test_refusals() -> None:
    backbone, _ = fresh("bert")
    with pytest.raises(Unsupported, match=r"it asks for 1088 places of 1024\. Choose rank=16 or less"):
        attach(backbone, SHiRA(rank=17))
    with pytest.raises(InvalidValue, match=r"SHiRA\(rank=0\) was asked for"):
        SHiRA(rank=0)
