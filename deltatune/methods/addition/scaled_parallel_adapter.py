"""Scaled parallel adapter: a scaled bottleneck beside the feed-forward network (He et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.addition.bottleneck import ACTIVATIONS, Activation
from deltatune.methods.addition.parallel_adapter import Parallel
from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.structure.site import Site


@methods.register("scaled-parallel-adapter")
@dataclass(frozen=True)
class ScaledParallelAdapter(Method):
    """h <- h + s (f(x W_d + b_d) W_u + b_u), beside every feed-forward network: x is its input and h its output.

    W_d: (d, r), kaiming uniform; W_u: (r, d) = 0. Trains W_d, b_d, W_u, b_u: 2 d r + r + d parameters a layer. A fresh
    adapter is the identity to the bit. The paper's best modification for large budgets, and one half of MAM.

    Args:
        bottleneck_dim: r, at least 1; 512 in the paper.
        scale: s, greater than 0.
        activation: f; ``gelu_new`` is GELU's approximation by tanh.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "adapter-like"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("feed_forward.down",)
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2110.04366"

    bottleneck_dim: int = 64
    scale: float = 4.0
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        positive(self, "bottleneck_dim", "scale")
        one_of(self, "activation", tuple(ACTIVATIONS))

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One adapter a sub-layer, whose input and output are equally wide, as a residual connects them."""
        if not site.has_matrix:
            return []
        return [Parallel(site.out_features, self.bottleneck_dim, self.activation, self.scale)]
