"""VeRA against its formula; the oracle table holds PEFT's, with the same random matrices."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from deltatune.errors import InvalidValue
from deltatune.injection.attach import attach
from deltatune.injection.merge import merge
from deltatune.methods import VeRA
from deltatune.methods.reparameterization.vera import Bases, VectorLinear
from tests.conformance.cells import fresh, shake
from tests.models import output


def test_the_formula_in_double_precision() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 9)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    delta = attach(backbone, VeRA(rank=3), ["0", "2"])
    backbone.double()
    shake(delta, spread=1.0)
    shared = delta.shared
    assert isinstance(shared, Bases) and shared.A.shape == (3, 7) and shared.B.shape == (9, 3)
    d, b, d2, b2 = delta.parameters()
    h = x @ (backbone[0].weight + b.diag() @ shared.B[:5] @ d.diag() @ shared.A).T + backbone[0].bias
    expected = h.tanh() @ (backbone[2].weight + b2.diag() @ shared.B @ d2.diag() @ shared.A[:, :5]).T + backbone[2].bias
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    merge(delta)
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)


def test_counts_and_what_is_stored() -> None:
    backbone, _ = fresh("bert")
    delta = attach(backbone, VeRA(rank=16), head=False)
    assert delta.budget().delta == 4 * (16 + 32)
    assert delta.budget().size_bytes == 4 * delta.budget().delta, "the random matrices come from the seed"
    assert {name.rpartition(".")[2] for name in delta.state_dict()} == {"d", "b"}


def test_the_matrices_are_one_object_in_copies_too() -> None:
    backbone, inputs = fresh("gpt2")
    delta = attach(backbone, VeRA(rank=4))
    shake(delta)
    expected = output(backbone, inputs)
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(output(twin, inputs), expected)
        shared = [module for module in twin.modules() if isinstance(module, Bases)]
        patches = [module for module in twin.modules() if isinstance(module, VectorLinear)]
        assert len(shared) == 1 and patches and all(patch.bases[0] is shared[0] for patch in patches)


@pytest.mark.parametrize(
    ("model", "where"),
    [
        ("phi3", None),
        ("torch_encoder", None),
        ("mixtral", ["attention.query", "*.experts.*_proj"]),
        ("conv_net", ["conv*"]),
        ("opt", ["embedding"]),
    ],
)
def test_a_fresh_one_is_the_identity_to_the_bit(model: str, where: list[str] | None) -> None:
    backbone, inputs = fresh(model)
    plain = output(backbone, inputs)
    delta = attach(backbone, VeRA(rank=4), where, head=False)
    assert torch.equal(output(backbone, inputs), plain)
    shake(delta)
    assert not torch.equal(output(backbone, inputs), plain)


def test_seeds_and_fields() -> None:
    one, same, other = (Bases(4, 6, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(one.A, same.A) and torch.equal(one.B, same.B) and not torch.equal(one.A, other.A)
    for fields, message in ((dict(rank=0), "`rank`"), (dict(d_init=0.0), "`d_init`"), (dict(dropout=1.0), "`dropout`")):
        with pytest.raises(InvalidValue, match=message):
            VeRA(**fields)  # type: ignore[arg-type]
