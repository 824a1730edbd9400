"""LoHa: the Hadamard product of two low-rank products as a change of a weight (Hyeon-Woo et al. 2022, as FedPara)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.methods.checks import positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, WeightPatch, methods
from deltatune.methods.reparameterization.matrix_view import MatrixView
from deltatune.structure.site import Site


@methods.register("loha")
@dataclass(frozen=True)
class LoHa(Method):
    """W' = W + s (B_1 A_1) * (B_2 A_2), entry by entry, with s = alpha / rank; its rank is up to rank^2.

    Trains A_i: (rank, in) and B_i: (out, rank). They start as in LyCORIS: A_i ~ N(0, 1), B_1 ~ N(0, 0.1^2), B_2 = 0. A
    convolution is one matrix (out, in * kernel).

    Args:
        rank: r of both products, at least 1.
        alpha: the scale is alpha / rank.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    learning_rate: ClassVar[float] = 5e-3
    source: ClassVar[str] = "arXiv:2108.06098"

    rank: int = 8
    alpha: float = 8.0

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site that has a matrix."""
        return [HadamardWeight(MatrixView.of(site), self)] if site.has_matrix else []


class HadamardWeight(WeightPatch):
    """theta + s (B_1 A_1) * (B_2 A_2)."""

    commutes = "add"

    def __init__(self, view: MatrixView, method: LoHa) -> None:
        super().__init__()
        self.parameter, self.view = view.parameter, view
        self.scale = method.alpha / method.rank
        self.A_1 = nn.Parameter(torch.randn(*view.stack, method.rank, view.columns))
        self.B_1 = nn.Parameter(0.1 * torch.randn(*view.stack, view.rows, method.rank))
        self.A_2 = nn.Parameter(torch.randn(*view.stack, method.rank, view.columns))
        self.B_2 = nn.Parameter(torch.zeros(*view.stack, view.rows, method.rank))

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        change = self.scale * (self.B_1 @ self.A_1) * (self.B_2 @ self.A_2)  # (..., out, in)
        return theta + self.view.write(change, theta)
