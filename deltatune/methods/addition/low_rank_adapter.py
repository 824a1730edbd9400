"""Low-rank adapter: a serial bottleneck whose matrices are products of two thin ones (Karimi Mahabadi et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.methods.addition.bottleneck import ACTIVATIONS, Activation, Bottleneck, Serial, glorot, reduced
from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.structure.site import Site


@methods.register("low-rank-adapter")
@dataclass(frozen=True)
class LowRankAdapter(Method):
    """h <- h + f(h W_d + b_d) W_u + b_u with W_d^T = s_d t_d^T and W_u^T = s_u t_u^T, behind attention and feed-forward network.

    s_d: (r, rank), t_d: (d, rank), s_u: (d, rank), t_u: (r, rank), with r = d / reduction. Trains the factors and the
    biases: (rank + 1) (d + r) + rank (d + r) an adapter. All start glorot uniform but s_u = 0, so that a fresh adapter
    is the identity to the bit; in the paper's code s_u is no exception. The product is the matrix product, at any rank.

    Args:
        reduction: d / r, at least 1.
        rank: rank of each matrix, at least 1.
        activation: f; ``gelu_new`` is GELU's approximation by tanh.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "adapter-like"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.output?", "feed_forward.down?")
    learning_rate: ClassVar[float] = 3e-3
    source: ClassVar[str] = "arXiv:2106.04647"

    reduction: int = 32
    rank: int = 1
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        positive(self, "reduction", "rank")
        one_of(self, "activation", tuple(ACTIVATIONS))

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One adapter a site that has a matrix, as wide as what the site returns."""
        if not site.has_matrix:
            return []
        d = site.out_features
        r = reduced(d, self.reduction)
        D = LowRank(glorot(torch.empty(r, self.rank)), glorot(torch.empty(d, self.rank)))
        U = LowRank(torch.zeros(d, self.rank), glorot(torch.empty(r, self.rank)))
        return [Serial(Bottleneck(D, U, self.activation))]


class LowRank(nn.Module):
    """h t s^T + b, with s: (out, rank), t: (in, rank) and b = 0 at the start."""

    def __init__(self, s: Tensor, t: Tensor) -> None:
        super().__init__()
        self.s, self.t = nn.Parameter(s), nn.Parameter(t)
        self.b = nn.Parameter(torch.zeros(s.shape[0]))

    def forward(self, h: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(h @ self.t.to(h.dtype), self.s.to(h.dtype), self.b.to(h.dtype))

    def affine(self) -> tuple[Tensor, Tensor]:
        """W and b."""
        return self.s @ self.t.T, self.b
