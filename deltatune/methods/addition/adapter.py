"""The serial bottleneck adapter (Houlsby et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.addition.bottleneck import ACTIVATIONS, Activation, Serial, dense_bottleneck
from deltatune.methods.checks import not_negative, one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.structure.site import Site


@methods.register("adapter")
@dataclass(frozen=True)
class Adapter(Method):
    """h <- h + f(h W_d + b_d) W_u + b_u, behind the attention's output projection and behind the feed-forward network.

    W_d: (d, r), W_u: (r, d). Trains W_d, b_d, W_u, b_u. W_d starts at N(0, 0.01^2) and W_u at 0, so a fresh adapter is the
    identity to the bit; with ``init_std`` both start at N(0, init_std^2), near the identity, as in the paper. The
    paper trains the norms with it: ``[Adapter(), NormTuning()]`` does.

    Args:
        bottleneck_dim: r, at least 1.
        activation: f; ``gelu_new`` is GELU's approximation by tanh.
        init_std: standard deviation of W_d and W_u at the start; 0 for an exact identity.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "adapter-like"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.output?", "feed_forward.down?")
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:1902.00751"

    bottleneck_dim: int = 64
    activation: Activation = "gelu"
    init_std: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "bottleneck_dim")
        one_of(self, "activation", tuple(ACTIVATIONS))
        not_negative(self, "init_std")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One adapter a site that has a matrix, as wide as what the site returns."""
        if not site.has_matrix:
            return []
        return [Serial(dense_bottleneck(site.out_features, self.bottleneck_dim, self.activation, self.init_std))]
