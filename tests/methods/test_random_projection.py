"""Random projections against plain matrices, and what their columns measure."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

from deltatune.methods.reparameterization.random_projection import PROJECTIONS, Fastfood, Kind, Projection, hadamard, walsh_hadamard


def _draw(kind: Kind, D: int, d: int, seed: int = 0) -> Projection:
    return PROJECTIONS[kind](D, d, torch.Generator().manual_seed(seed)).double()


def _matrix(projection: Projection, d: int) -> Tensor:
    return torch.stack([projection(row) for row in torch.eye(d, dtype=torch.float64)], 1)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 6, 11])
@pytest.mark.parametrize("bits", [1, 3, 5])
def test_the_fast_transform_is_the_hadamard_matrix(n: int, bits: int) -> None:
    x = torch.randn(2**n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H = torch.from_numpy(scipy.linalg.hadamard(2**n)).double() / math.sqrt(2**n)
    torch.testing.assert_close(walsh_hadamard(x, hadamard(bits).double()), H @ x, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("D", "d"), [(48, 8), (48, 7), (64, 64), (5, 12), (1, 3), (7, 1), (40, 33)])
def test_fastfood_is_the_product_of_its_factors(D: int, d: int) -> None:
    """H G Pi H B with H of +-1, divided by sqrt(L sum G^2) sqrt(D / L), on theta padded with zeros: the official code."""
    projection = _draw("fastfood", D, d)
    assert isinstance(projection, Fastfood)
    L = 2 ** math.ceil(math.log2(max(D, d)))
    generator = torch.Generator().manual_seed(0)
    G = torch.diag(torch.randn(L, generator=generator)).double()
    B = torch.zeros(L, d, dtype=torch.float64)
    B[range(d), range(d)] = 2.0 * torch.randint(2, (d,), generator=generator).double() - 1
    Pi = torch.eye(L, dtype=torch.float64)[torch.randperm(L, generator=generator)]
    H = torch.from_numpy(scipy.linalg.hadamard(L)).double()
    expected = (H @ G @ Pi @ H @ B)[:D] / (L * G.square().sum()).sqrt() / math.sqrt(D / L)
    torch.testing.assert_close(_matrix(projection, d), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", list(PROJECTIONS))
def test_columns_have_length_one(kind: Kind) -> None:
    P = _matrix(_draw(kind, 3000, 40), 40)
    assert P.shape == (3000, 40)
    lengths = P.norm(dim=0)
    assert abs(float(lengths.square().mean()) - 1) < 0.02
    assert float((lengths - 1).abs().max()) < 0.2
    assert float((P.T @ P - torch.eye(40)).abs().max()) < 0.25, "nearly orthogonal"


@pytest.mark.parametrize("kind", list(PROJECTIONS))
def test_gradients_are_those_of_the_matrix(kind: Kind) -> None:
    projection = _draw(kind, 30, 12)
    theta = torch.randn(12, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(30, dtype=torch.float64)
    projection(theta).mul(weights).sum().backward()
    torch.testing.assert_close(theta.grad, _matrix(projection, 12).T @ weights, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", list(PROJECTIONS))
def test_the_seed_decides_and_nothing_is_stored(kind: Kind) -> None:
    one, same, other = (_draw(kind, 20, 6, seed) for seed in (1, 1, 2))
    assert one.state_dict() == {}
    assert torch.equal(_matrix(one, 6), _matrix(same, 6))
    assert not torch.equal(_matrix(one, 6), _matrix(other, 6))
