"""HiRA: a high-rank change of a weight, its entrywise product with a low-rank matrix (Huang et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.methods.checks import positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, WeightPatch, methods
from deltatune.methods.reparameterization.matrix_view import MatrixView, kaiming
from deltatune.structure.site import Site


@methods.register("hira")
@dataclass(frozen=True)
class HiRA(Method):
    """W' = W + W * (B A), entry by entry: the change may have the rank of W times that of B A.

    Trains A: (rank, in), kaiming uniform, and B: (out, rank) = 0, so a fresh delta is the identity to the bit. A convolution
    is one matrix (out, in * kernel), and an embedding (rows, width).

    Args:
        rank: r, at least 1.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    learning_rate: ClassVar[float] = 5e-3
    source: ClassVar[str] = "openreview.net/forum?id=TwJrTz9cRS"

    rank: int = 32

    def __post_init__(self) -> None:
        positive(self, "rank")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site that has a matrix."""
        return [ModulatedWeight(MatrixView.of(site), self.rank)] if site.has_matrix else []


class ModulatedWeight(WeightPatch):
    """theta + theta * (B A)."""

    commutes = "multiply"

    def __init__(self, view: MatrixView, rank: int) -> None:
        super().__init__()
        self.parameter, self.view = view.parameter, view
        self.hira_A = kaiming(*view.stack, rank, view.columns)
        self.hira_B = nn.Parameter(torch.zeros(*view.stack, view.rows, rank))

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        return theta + theta * self.view.write(self.hira_B @ self.hira_A, theta)
