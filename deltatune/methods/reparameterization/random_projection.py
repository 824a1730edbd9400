"""Fixed random maps P: R^d -> R^D, drawn from a seed and never stored, for methods that train in a random subspace."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["fastfood", "dense", "sparse"]
BITS = 5  # H is applied in factors of up to 32 x 32: measured as the fastest on a CPU, between too many passes and too many products


class Projection(nn.Module, ABC):
    """P, with columns of length 1: exactly, or in expectation."""

    @staticmethod
    @abstractmethod
    def entries(D: int, d: int) -> int:
        """How many random numbers it holds."""

    @abstractmethod
    def forward(self, theta: Tensor) -> Tensor:
        """P theta: (d,) -> (D,)."""


class Fastfood(Projection):
    """P = H G Pi H B / sqrt(sum G^2 * D / L), its first D rows and d columns, in O(L log L) (Le et al. 2013).

    H is the orthonormal Walsh-Hadamard matrix of size L = 2^ceil(log2 max(D, d)), B diagonal of +-1, Pi a permutation,
    G diagonal from N(0, 1). That is the official code's normalisation by sqrt(L sum G^2) sqrt(D / L), which has H of
    +-1; there L = 2^ceil(log2 D), so that a small parameter sees only the first L coordinates of theta. Here it sees all.
    B theta is zero behind d, so H B theta is one transform of size 2^ceil(log2 d), repeated.
    """

    B: Tensor
    Pi: Tensor
    G: Tensor
    H: Tensor

    def __init__(self, D: int, d: int, generator: torch.Generator) -> None:
        super().__init__()
        L, self.length = _length(D, d), _length(d, d)
        G = torch.randn(L, generator=generator)
        self.D = D
        self.scale = math.sqrt(L * self.length) / float(G.double().norm() * math.sqrt(D))
        self.register_buffer("B", 2.0 * torch.randint(2, (d,), generator=generator) - 1, persistent=False)
        self.register_buffer("Pi", torch.randperm(L, generator=generator) % self.length, persistent=False)
        self.register_buffer("G", G, persistent=False)
        self.register_buffer("H", hadamard(BITS), persistent=False)

    @staticmethod
    def entries(D: int, d: int) -> int:
        """G and Pi."""
        return 2 * _length(D, d)

    def forward(self, theta: Tensor) -> Tensor:
        """P theta: (d,) -> (D,)."""
        x = F.pad(theta * self.B, (0, self.length - theta.shape[0]))
        x = walsh_hadamard(x, self.H).index_select(0, self.Pi) * self.G  # (L,)
        return walsh_hadamard(x, self.H)[: self.D] * self.scale


class Dense(Projection):
    """P of independent N(0, 1) entries, columns scaled to length 1 (Li et al. 2018)."""

    P: Tensor

    def __init__(self, D: int, d: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("P", F.normalize(torch.randn(D, d, generator=generator), dim=0), persistent=False)

    @staticmethod
    def entries(D: int, d: int) -> int:
        """Every entry of P."""
        return D * d

    def forward(self, theta: Tensor) -> Tensor:
        """P theta: (d,) -> (D,)."""
        return self.P @ theta


class Sparse(Projection):
    """P with k = round(sqrt(D)) entries +-1 / sqrt(k) a column, at random rows (Li et al. 2018)."""

    row: Tensor
    value: Tensor

    def __init__(self, D: int, d: int, generator: torch.Generator) -> None:
        super().__init__()
        self.D, k = D, round(math.sqrt(D))
        self.register_buffer("row", torch.randint(D, (d * k,), generator=generator), persistent=False)
        signs = 2.0 * torch.randint(2, (d, k), generator=generator) - 1
        self.register_buffer("value", signs / math.sqrt(k), persistent=False)

    @staticmethod
    def entries(D: int, d: int) -> int:
        """Places and signs."""
        return 2 * d * round(math.sqrt(D))

    def forward(self, theta: Tensor) -> Tensor:
        """P theta: (d,) -> (D,)."""
        parts = (theta.unsqueeze(1) * self.value).flatten()
        return theta.new_zeros(self.D).index_add(0, self.row, parts)


PROJECTIONS: dict[Kind, type[Projection]] = {"fastfood": Fastfood, "dense": Dense, "sparse": Sparse}


def hadamard(bits: int) -> Tensor:
    """Sylvester's matrix of +-1, (2^bits, 2^bits); its upper left quarter is that of one bit less."""
    H = torch.ones(1, 1)
    for _ in range(bits):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def walsh_hadamard(x: Tensor, H: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of x: (2^n,), as matrix products along groups of its n binary axes.

    Args:
        x: the vector.
        H: ``hadamard(bits)``; each product takes up to ``bits`` axes.
    """
    n, bits = x.shape[0].bit_length() - 1, H.shape[0].bit_length() - 1
    while n > 0:
        size = 2 ** min(bits, n)
        n -= min(bits, n)
        x = (x.view(size, -1).mT @ (H[:size, :size] / math.sqrt(size))).flatten()  # the axes that are done go last
    return x


def _length(D: int, d: int) -> int:
    return 1 << (max(D, d) - 1).bit_length()
