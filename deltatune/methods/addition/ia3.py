"""(IA)^3: learned rescaling of keys, values and the feed-forward network's hidden layer (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.methods.kinds import Family, InputPatch, Kind, Method, OutputPatch, Patch, methods
from deltatune.methods.lanes import Lane
from deltatune.structure.site import Site


@methods.register("ia3")
@dataclass(frozen=True)
class IA3(Method):
    """K <- l_k * K, V <- l_v * V, and the input of the feed-forward network's second matrix <- l_ff * hidden.

    Trains l_k, l_v: (d,) and l_ff: (d_ff,), all ones at the start, so a fresh delta is the identity to the bit. Sites
    whose role ends in ``down`` are rescaled at their input, all others at their output. The folder follows Ding et
    al., who count vectors that multiply activations as added modules.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "adapter-like"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.key?", "attention.value?", "feed_forward.down?")
    learning_rate: ClassVar[float] = 3e-3
    source: ClassVar[str] = "arXiv:2205.05638"

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One vector a site that has a matrix."""
        if not site.has_matrix:
            return []
        if site.leaf == "down":
            return [ScaledInput(site.in_features)]
        return [ScaledOutput(site.out_features)]


class ScaledOutput(OutputPatch):
    """l * y."""

    commutes = "multiply"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return y * self.l.to(y.dtype)

    def lane(self) -> Lane:
        """l."""
        return Lane("scale", {"l": self.l})

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """diag(l) W and l * b."""
        scale = self.l.to(weight.dtype)
        return scale[:, None] * weight, None if bias is None else scale * bias


class ScaledInput(InputPatch):
    """l * x."""

    commutes = "multiply"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return x * self.l.to(x.dtype)

    def lane(self) -> Lane:
        """l."""
        return Lane("scale", {"l": self.l})

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W diag(l)."""
        return weight * self.l.to(weight.dtype), bias
