"""Pfeiffer adapter: one serial bottleneck a layer, behind the feed-forward network (Pfeiffer et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.addition.bottleneck import ACTIVATIONS, Serial, dense_bottleneck, reduced
from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.structure.site import Site


@methods.register("pfeiffer-adapter")
@dataclass(frozen=True)
class PfeifferAdapter(Method):
    """h <- h + f(h W_d + b_d) W_u + b_u, once a layer, on what the feed-forward network returns and ahead of its residual.

    W_d: (d, r) ~ N(0, 0.01), W_u: (r, d) = 0, with r = d / reduction. Trains W_d, b_d, W_u, b_u: 2 d r + r + d
    parameters a layer, half of Houlsby's. A fresh adapter is the identity to the bit.

    Args:
        reduction: d / r, at least 1.
        activation: f: ``gelu``, ``relu``, ``silu`` or ``tanh``.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "adapter-like"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("feed_forward.down",)
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2005.00247"

    reduction: int = 16
    activation: str = "relu"

    def __post_init__(self) -> None:
        positive(self, "reduction")
        one_of(self, "activation", tuple(ACTIVATIONS))

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One adapter a site that has a matrix, as wide as what the site returns."""
        if not site.has_matrix:
            return []
        width = site.out_features
        return [Serial(dense_bottleneck(width, reduced(width, self.reduction), self.activation))]
