"""Multi-head parallel adapter: a small bottleneck of its own for every attention head (He et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.methods.addition.bottleneck import ACTIVATIONS, Activation
from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import BranchInputPatch, Family, Kind, Method, Patch, methods
from deltatune.structure.site import Site


@methods.register("multi-head-parallel-adapter")
@dataclass(frozen=True)
class MultiHeadParallelAdapter(Method):
    """h_i <- h_i + s (f(x W_d,i + b_d,i) W_u,i + b_u,i) for every head i: x is the attention's input and h_i what the head computes.

    W_d,i: (d, r), kaiming uniform; W_u,i: (r, d / heads) = 0. Trains W_d, b_d, W_u, b_u: with r / heads in place of r,
    about half of what a parallel adapter has. It edits what the output projection is given, heads side by side. A
    fresh adapter is the identity to the bit.

    Args:
        bottleneck_dim: r of each head, at least 1.
        scale: s, greater than 0.
        activation: f; ``gelu_new`` is GELU's approximation by tanh.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "adapter-like"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.output",)
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2110.04366"

    bottleneck_dim: int = 4
    scale: float = 1.0
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        positive(self, "bottleneck_dim", "scale")
        one_of(self, "activation", tuple(ACTIVATIONS))

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One bottleneck a head of the attention that ends at the site.

        Raises:
            Unsupported: the site is no output projection of an attention whose number of heads is known.
        """
        if site.leaf != "output" or site.heads is None or site.in_features % site.heads:
            raise Unsupported(
                f"A bottleneck for every head was asked for at `{site.key}` (role {site.role}), which is no output projection of an "
                "attention that tells its number of heads. Choose sites with the role `attention.output`, or ParallelAdapter."
            )
        return [MultiHeadParallel(site.out_features, site.heads, site.in_features // site.heads, self)]


class MultiHeadParallel(BranchInputPatch):
    """h_i + s (f(x W_d,i^T + b_d,i) W_u,i^T + b_u,i), with the matrices of all heads stacked and stored (head, out, in)."""

    def __init__(self, d: int, heads: int, head_dim: int, method: MultiHeadParallelAdapter) -> None:
        super().__init__()
        r = method.bottleneck_dim
        bound = 1 / math.sqrt(d)
        self.W_d = nn.Parameter(torch.empty(heads, r, d).uniform_(-bound, bound))
        self.b_d = nn.Parameter(torch.zeros(heads, r))
        self.W_u = nn.Parameter(torch.zeros(heads, head_dim, r))
        self.b_u = nn.Parameter(torch.zeros(heads, head_dim))
        self.scale, self.activation = method.scale, method.activation

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """(..., d), (..., heads * head_dim) -> (..., heads * head_dim)."""
        W_d, b_d, W_u, b_u = (phi.to(h.dtype) for phi in (self.W_d, self.b_d, self.W_u, self.b_u))
        z = torch.einsum("...d,hrd->...hr", x.to(h.dtype), W_d) + b_d  # (..., heads, r)
        z = torch.einsum("...hr,hkr->...hk", ACTIVATIONS[self.activation](z), W_u) + b_u  # (..., heads, head_dim)
        return h + self.scale * z.flatten(-2)
