"""PiSSA against its formula; ``oracles/pissa.py`` holds it against PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.merge import merge
from deltatune.methods import LoRA, PiSSA
from deltatune.methods.reparameterization.pissa import PrincipalLinear, PrincipalWeight
from tests.conformance.cells import fresh, shake
from tests.models import output


def test_the_formula_in_double_precision() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(7, 5)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    plain, W = backbone(x), backbone[0].weight.detach().clone()
    delta = attach(backbone, PiSSA(rank=3), "0")
    assert torch.equal(backbone(x), plain)
    backbone.double()
    U, S, Vh = torch.linalg.svd(W)
    principal = U[:, :3] @ S[:3].diag() @ Vh[:3]
    A, B = delta.parameters()
    torch.testing.assert_close(B @ A, principal, atol=1e-6, rtol=1e-6)
    (patch,) = delta.patches
    start = patch.start_B @ patch.start_A  # type: ignore[operator]
    shake(delta, spread=1.0)
    expected = x @ (W - start + B @ A).T + backbone[0].bias
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    merge(delta)
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    detach(delta)
    assert torch.equal(backbone[0].weight, W)


@pytest.mark.parametrize(
    ("model", "where"), [("mixtral", "*.experts.down_proj"), ("conv_net", "conv2"), ("gpt2", "attention.value"), ("tied_mlp", "first")]
)
def test_every_kind_of_weight_starts_at_its_principal_part(model: str, where: str) -> None:
    backbone, inputs = fresh(model)
    plain = output(backbone, inputs)
    delta = attach(backbone, PiSSA(rank=2), where, head=False)
    assert torch.equal(output(backbone, inputs), plain)
    for entry in delta.entries:
        assert isinstance(entry.patch, PrincipalLinear | PrincipalWeight)
        B, A = entry.patch.lora_B, entry.patch.lora_A
        gram = (B.mT @ B).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(gram, (A @ A.mT).diagonal(dim1=-2, dim2=-1), atol=1e-4, rtol=1e-4)
        assert (gram[..., 0] > gram[..., 1]).all()
    shake(delta)
    assert not torch.equal(output(backbone, inputs), plain)


def test_subspace_iterations_come_close() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(60, 50))
    with torch.no_grad():
        U, _, V = torch.linalg.svd(backbone[0].weight, full_matrices=False)
        backbone[0].weight.copy_(U @ torch.diag(0.7 ** torch.arange(50.0)) @ V)
    products = []
    for iterations in (0, 16):
        A, B = attach(backbone, PiSSA(rank=4, iterations=iterations), "0").parameters()
        products.append(B.detach() @ A.detach())
    torch.testing.assert_close(products[0], products[1], atol=1e-4, rtol=1e-4)


def test_a_rank_beyond_the_weight_takes_the_whole_weight() -> None:
    backbone = nn.Sequential(nn.Linear(6, 3))
    A, B = attach(backbone, PiSSA(rank=8), "0").parameters()
    torch.testing.assert_close(B @ A, backbone[0].weight.detach(), atol=1e-6, rtol=1e-5)


def test_it_starts_from_the_backbone_not_from_what_is_merged() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(7, 5))
    W = backbone[0].weight.detach().clone()
    other = attach(backbone, LoRA(rank=2), "0")
    shake(other, spread=1.0)
    merge(other)
    A, B = attach(backbone, PiSSA(rank=5), "0").parameters()
    torch.testing.assert_close(B @ A, W, atol=1e-5, rtol=1e-5)


def test_refusals() -> None:
    for fields, message in (
        (dict(rank=0), "`rank` must be"),
        (dict(dropout=1.0), "`dropout` must be"),
        (dict(iterations=-1), "at least 0"),
    ):
        with pytest.raises(InvalidValue, match=message):
            PiSSA(**fields)  # type: ignore[arg-type]
    backbone = nn.Sequential(nn.Linear(4, 4))
    backbone[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(Unsupported, match=r"PiSSA starts from the values of the weight at `0`, which is quantised .* or use LoRA"):
        attach(backbone, PiSSA(), "0")
