"""Compacter: PHM adapters that share their A_i over the whole model and whose B_i have rank 1 (Karimi Mahabadi et al. 2021)."""

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
from deltatune.methods.kinds import Family, Kind, Method, Patch, SelectionPatch, methods
from deltatune.structure.site import Site


@dataclass(frozen=True)
class SharedRule(Method):
    """What Compacter and Compacter++ have in common: all but their places."""

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "adapter-like"
    kind: ClassVar[Kind] = "output"
    learning_rate: ClassVar[float] = 3e-3
    source: ClassVar[str] = "arXiv:2106.04647"

    n: int = 4
    reduction: int = 32
    rank: int = 1
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        positive(self, "n", "reduction", "rank")
        one_of(self, "activation", tuple(ACTIVATIONS))

    def share(self, sites: Sequence[Site]) -> nn.Module | None:
        """A_1, ..., A_n."""
        return Rule(self.n).to(sites[0].device)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One adapter a site that has a matrix, as wide as what the site returns; a norm trains in place."""
        if site.leaf == "norm":
            return [SelectionPatch(name) for name in site.parameters]
        if not site.has_matrix:
            return []
        assert isinstance(shared, Rule)
        n, rank, d = self.n, self.rank, site.out_features
        r = reduced(d, self.reduction, n)
        wide, thin = (n, -(-d // n), rank), (n, r // n, rank)
        D = Compact(shared, r, d, glorot(torch.empty(thin)), glorot(torch.empty(wide)))
        U = Compact(shared, d, r, torch.zeros(wide), glorot(torch.empty(thin)))
        return [Serial(Bottleneck(D, U, self.activation))]


@methods.register("compacter")
@dataclass(frozen=True)
class Compacter(SharedRule):
    """h <- h + f(h W_d + b_d) W_u + b_u with each W^T = sum_{i=1..n} A_i (x) (s_i t_i^T), behind attention and feed-forward network.

    A_i: (n, n), normal with variance 1 / n, one set for all sites and for W_d and W_u alike; s_i: (out / n, rank), t_i:
    (in / n, rank), glorot uniform but s_i = 0 in W_u, so that a fresh delta is the identity to the bit. r = d /
    reduction, rounded down to a multiple of n. Trains A_i once, and 2 rank (d + r) factors and r + d biases an adapter;
    the norms too, as in the paper, where ``where`` names them: ["attention.output", "feed_forward.down", "norm"]. The
    official code starts A_i at N(0, 0.0001^2) and all s_i at random: near the identity, but not equal to it.

    Args:
        n: number of Kronecker products.
        reduction: d / r, at least 1.
        rank: rank of each s_i t_i^T; 1 in the paper.
        activation: f; ``gelu_new`` is GELU's approximation by tanh.

    Raises:
        InvalidValue: a field out of its range.
    """

    where: ClassVar[tuple[str, ...]] = ("attention.output?", "feed_forward.down?")


class Rule(nn.Module):
    """A_1, ..., A_n: (n, n, n), one set for all sites."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.A = nn.Parameter(fresh_rule(n))

    def forward(self) -> Tensor:
        """A."""
        return self.A


class Compact(nn.Module):
    """h W^T + b with W = sum_i A_i (x) (s_i t_i^T), s: (n, out / n, rank), t: (n, in / n, rank), and b = 0 at the start."""

    def __init__(self, rule: Rule, k: int, m: int, s: Tensor, t: Tensor) -> None:
        super().__init__()
        self.k, self.m = k, m  # out and in
        self._rule = (rule,)  # in a tuple, so that it is no child: the delta owns it
        self.s, self.t = nn.Parameter(s), nn.Parameter(t)
        self.b = nn.Parameter(torch.zeros(k))

    def forward(self, h: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        W, b = self.affine()
        return F.linear(h, W.to(h.dtype), b.to(h.dtype))

    def affine(self) -> tuple[Tensor, Tensor]:
        """W and b."""
        W = kronecker_sum(self._rule[0]().to(self.s), self.s @ self.t.mT)
        return W[: self.k, : self.m], self.b
