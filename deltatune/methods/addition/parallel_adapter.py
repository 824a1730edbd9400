"""Parallel adapter: a bottleneck beside a sub-layer instead of behind it (He et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.methods.addition.bottleneck import ACTIVATIONS, Activation, Bottleneck, Dense
from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import BranchPatch, Family, Kind, Method, Patch, methods
from deltatune.methods.lanes import Lane
from deltatune.structure.site import Site


@methods.register("parallel-adapter")
@dataclass(frozen=True)
class ParallelAdapter(Method):
    """h <- h + f(x W_d + b_d) W_u + b_u, beside every attention and feed-forward network: x is its input and h its output.

    W_d: (d, r), kaiming uniform; W_u: (r, d) = 0. Trains W_d, b_d, W_u, b_u. A fresh adapter is the identity to
    the bit. A site is the last projection of a sub-layer; x comes from the first one of the same sub-layer.

    Args:
        bottleneck_dim: r, at least 1.
        activation: f; ``gelu_new`` is GELU's approximation by tanh.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "adapter-like"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.output?", "feed_forward.down?")
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2110.04366"

    bottleneck_dim: int = 24
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        positive(self, "bottleneck_dim")
        one_of(self, "activation", tuple(ACTIVATIONS))

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One adapter a sub-layer, whose input and output are equally wide, as a residual connects them."""
        if not site.has_matrix:
            return []
        return [Parallel(site.out_features, self.bottleneck_dim, self.activation)]


class Parallel(BranchPatch):
    """y + s (f(x W_d^T + b_d) W_u^T + b_u), with the matrices stored (out, in)."""

    commutes = "add"

    def __init__(self, width: int, r: int, activation: Activation, scale: float = 1.0) -> None:
        super().__init__()
        W_d = torch.empty(r, width)
        nn.init.kaiming_uniform_(W_d, a=math.sqrt(5))
        self.bottleneck = Bottleneck(Dense(W_d), Dense(torch.zeros(width, r)), activation)
        self.scale = scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., width), (..., width) -> (..., width)."""
        return y + self.scale * self.bottleneck(x.to(y.dtype))  # type: ignore[no-any-return]

    def lane(self) -> Lane | None:
        """The bottleneck, scaled."""
        return self.bottleneck.lane("input", self.scale)
