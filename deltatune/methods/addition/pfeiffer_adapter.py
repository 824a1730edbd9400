"""Pfeiffer adapter: one serial bottleneck a layer, behind the feed-forward network (Pfeiffer et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from deltatune.methods.addition.bottleneck import ACTIVATIONS, Activation, Serial, dense_bottleneck, reduced
from deltatune.methods.addition.channels import channels
from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, methods
from deltatune.structure.site import Site


@methods.register("pfeiffer-adapter")
@dataclass(frozen=True)
class PfeifferAdapter(Method):
    """h <- h + f(h W_d + b_d) W_u + b_u, once a layer, on what the feed-forward network returns and ahead of its residual.

    W_d: (d, r) ~ N(0, 0.01^2), W_u: (r, d) = 0, with r = d / reduction. Trains W_d, b_d, W_u, b_u: 2 d r + r + d
    parameters a layer, half of Houlsby's. A fresh adapter is the identity to the bit.

    Asked for at norms or layers, it reads the residual stream, as in the paper: N(s + f(N(s) W_d + b_d) W_u + b_u) at a norm
    N, for models with their norms behind the residual, and h <- h + f(h W_d + b_d) W_u + b_u behind a layer for all others.

    Args:
        reduction: d / r, at least 1.
        activation: f; ``gelu_new`` is GELU's approximation by tanh.

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
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        positive(self, "reduction")
        one_of(self, "activation", tuple(ACTIVATIONS))

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One adapter a site that has a matrix, or is a norm or a layer, as wide as what the site returns."""
        is_norm = site.leaf == "norm" and site.parameter is None and "weight" in site.parameters
        width = site.weight.shape[0] if is_norm else channels(site)
        if not width:
            return []
        bottleneck = dense_bottleneck(width, reduced(width, self.reduction), self.activation)
        return [BehindNorm(site.module, bottleneck) if is_norm else Serial(bottleneck)]


class BehindNorm(OutputPatch):
    """N(x + U(f(D(y)))) with y = N(x): what is behind the norm decides what goes into it."""

    def __init__(self, norm: nn.Module, bottleneck: nn.Module) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self._norm = (norm,)  # in a tuple, so that it is no child: it is the site's own module

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        [norm] = self._norm
        normed: Tensor = norm.forward(x + self.bottleneck(y).to(x.dtype))  # not called: its hooks have run
        return normed
