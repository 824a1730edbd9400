"""The serial bottleneck adapter (Houlsby et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, methods
from deltatune.structure.site import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


@methods.register("adapter")
@dataclass(frozen=True)
class Adapter(Method):
    """h <- h + f(h W_d + b_d) W_u + b_u, behind the attention's output projection and behind the feed-forward network.

    W_d: (d, r), W_u: (r, d). Trains W_d, b_d, W_u, b_u. Both matrices start at N(0, init_std), so the fresh adapter is
    near the identity; ``init_std=0`` zeroes W_u, which makes it the identity to the bit.

    Args:
        bottleneck_dim: r, at least 1.
        activation: f: ``gelu``, ``relu``, ``silu`` or ``tanh``.
        init_std: spread of W_u at the start; 0 for an exact identity.

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
    activation: str = "gelu"
    init_std: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "bottleneck_dim")
        one_of(self, "activation", tuple(ACTIVATIONS))

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One adapter a site that has a matrix, as wide as what the site returns."""
        if not site.has_matrix:
            return []
        return [Bottleneck(site.out_features, self)]


class Bottleneck(OutputPatch):
    """y + f(y W_d^T + b_d) W_u^T + b_u, with the matrices stored (out, in)."""

    def __init__(self, width: int, method: Adapter) -> None:
        super().__init__()
        r = method.bottleneck_dim
        self.W_d = nn.Parameter(torch.randn(r, width) * (method.init_std or 0.01))
        self.b_d = nn.Parameter(torch.zeros(r))
        self.W_u = nn.Parameter(torch.randn(width, r) * method.init_std)
        self.b_u = nn.Parameter(torch.zeros(width))
        self.activation = method.activation

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        h = F.linear(y, self.W_d.to(y.dtype), self.b_d.to(y.dtype))  # (..., r)
        h = ACTIVATIONS[self.activation](h)
        return y + F.linear(h, self.W_u.to(y.dtype), self.b_u.to(y.dtype))
