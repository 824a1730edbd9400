"""OFT against its formula; ``oracles/oft.py`` holds it against PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.attach import attach
from deltatune.injection.merge import merge
from deltatune.methods import OFT
from deltatune.methods.reparameterization.oft import RotatedInput, RotatedWeight
from tests.conformance.cells import fresh, shake


def _by_hand(vector: Tensor, size: int) -> Tensor:
    """(I - Q)(I + Q)^-1."""
    rows, columns = torch.triu_indices(size, size, 1)
    Q = torch.zeros(size, size, dtype=vector.dtype)
    Q[rows, columns] = vector.detach()
    Q = Q - Q.T
    I = torch.eye(size, dtype=vector.dtype)  # noqa: E741
    return (I - Q) @ torch.linalg.inv(I + Q)


@pytest.mark.parametrize("share", [False, True])
def test_the_formula_in_double_precision(share: bool) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(12, 5)).double()
    x = torch.randn(4, 12, dtype=torch.float64)
    delta = attach(backbone, OFT(block_size=4, block_share=share), "0")
    backbone.double()
    shake(delta, spread=0.5)
    (vectors,) = delta.parameters()
    assert vectors.shape == (1 if share else 3, 6)
    R = torch.block_diag(*[_by_hand(vectors[0 if share else k], 4) for k in range(3)])
    torch.testing.assert_close(R @ R.T, torch.eye(12, dtype=R.dtype), atol=1e-10, rtol=0)
    W, b = backbone[0].weight, backbone[0].bias
    expected = x @ (W @ R.T).T + b
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    merge(delta)
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)


def test_rotated_rows_keep_their_angles() -> None:
    """A weight patch, as for a role of a fused projection, keeps all inner products of W's rows; so does a rotated table."""
    for model, where in (("phi3", "attention.query"), ("bert", "embedding"), ("torch_encoder", "attention.value")):
        backbone, _ = fresh(model)
        delta = attach(backbone, OFT(block_size=4), where)
        shake(delta, spread=0.3)
        entries = [entry for entry in delta.entries if isinstance(entry.patch, RotatedWeight)]
        assert entries
        for entry in entries:
            theta = entry.site.part(entry.parameter)
            turned = entry.patch(theta)
            assert (turned - theta).abs().max() > 1e-2
            torch.testing.assert_close(turned @ turned.T, theta @ theta.T, atol=1e-4, rtol=1e-4)


def test_the_series_tends_to_the_inverse_rotation() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(8, 8)).double()
    rotations = []
    for terms in (None, 4, 8, 30):
        delta = attach(backbone, OFT(block_size=8, neumann_terms=terms), "0", name=f"terms_{terms}")
        backbone.double()
        shake(delta, spread=0.1)
        (patch,) = delta.patches
        assert isinstance(patch, RotatedInput)
        rotations.append(patch.rotation()[0].detach())
    errors = [float((rotation - rotations[0].T).abs().max()) for rotation in rotations[1:]]
    assert errors[0] > 1e-3 > errors[1] > errors[2]
    assert errors[2] < 1e-10


def test_counts() -> None:
    backbone, _ = fresh("bert")
    assert attach(backbone, OFT(block_size=8), head=False, name="own").budget().delta == 4 * (32 // 8) * (8 * 7 // 2)
    assert attach(backbone, OFT(block_size=8, block_share=True), head=False, name="shared").budget().delta == 4 * (8 * 7 // 2)


def test_refusals() -> None:
    backbone, _ = fresh("bert")
    with pytest.raises(Unsupported, match=r"its input is 32 wide, no multiple of it\. Choose block_size=4"):
        attach(backbone, OFT(block_size=5))
    for fields in (dict(block_size=0), dict(block_size=1), dict(neumann_terms=3)):
        with pytest.raises(InvalidValue, match="was asked for"):
            OFT(**fields)  # type: ignore[arg-type]
