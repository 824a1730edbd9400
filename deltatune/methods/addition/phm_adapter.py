"""PHM adapter: a serial bottleneck whose matrices are sums of Kronecker products (Zhang et al. 2021; Karimi Mahabadi et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.methods.addition.bottleneck import ACTIVATIONS, Activation, Bottleneck, Serial, glorot, reduced
from deltatune.methods.addition.kronecker import fresh_rule, kronecker_sum
from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.structure.site import Site


@methods.register("phm-adapter")
@dataclass(frozen=True)
class PHMAdapter(Method):
    """h <- h + f(h W_d + b_d) W_u + b_u with each W^T = sum_{i=1..n} A_i (x) B_i, behind attention and feed-forward network.

    A_i: (n, n), normal with variance 1 / n; B_i: (out / n, in / n), glorot uniform in W_d and 0 in W_u, so that a fresh
    adapter is the identity to the bit. r = d / reduction, rounded down to a multiple of n. Trains A_i, B_i and the
    biases: 2 (d r / n + n^3) + r + d an adapter. The official code starts all of them at random, A_i at N(0, 0.01^2).

    Args:
        n: number of Kronecker products.
        reduction: d / r, at least 1.
        activation: f; ``gelu_new`` is GELU's approximation by tanh.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "adapter-like"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.output?", "feed_forward.down?")
    learning_rate: ClassVar[float] = 3e-3
    source: ClassVar[str] = "arXiv:2102.08597"

    n: int = 4
    reduction: int = 32
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        positive(self, "n", "reduction")
        one_of(self, "activation", tuple(ACTIVATIONS))

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One adapter a site that has a matrix, as wide as what the site returns."""
        if not site.has_matrix:
            return []
        n, d = self.n, site.out_features
        r = reduced(d, self.reduction, n)
        D = PHM(r, d, fresh_rule(n), glorot(torch.empty(n, r // n, -(-d // n))))
        U = PHM(d, r, fresh_rule(n), torch.zeros(n, -(-d // n), r // n))
        return [Serial(Bottleneck(D, U, self.activation))]


class PHM(nn.Module):
    """h W^T + b with W = sum_i A_i (x) B_i, A: (n, n, n), B: (n, out / n, in / n), and b = 0 at the start."""

    def __init__(self, k: int, m: int, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.k, self.m = k, m  # out and in
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.b = nn.Parameter(torch.zeros(k))

    def forward(self, h: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        W, b = self.affine()
        return F.linear(h, W.to(h.dtype), b.to(h.dtype))

    def affine(self) -> tuple[Tensor, Tensor]:
        """W and b."""
        return kronecker_sum(self.A, self.B)[: self.k, : self.m], self.b
