"""SHiRA: a sparse change of a weight at fixed random places, of high rank (Bhardwaj et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.methods.checks import positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, WeightPatch, methods
from deltatune.methods.reparameterization.matrix_view import MatrixView
from deltatune.structure.site import Site


@methods.register("shira")
@dataclass(frozen=True)
class SHiRA(Method):
    """W' = W + S, where S is zero but at rank (out + in) random places: as many as LoRA of that rank trains.

    Trains the values, (rank (out + in),), which start at 0. The places are drawn from ``seed`` and never stored, so a
    file holds the values alone; without a seed they are drawn once and stored beside the values.

    Args:
        rank: r, at least 1: sets how many places, not the rank of S.
        seed: of the places; equally shaped weights share theirs. None for places that a file brings along.

    Raises:
        InvalidValue: a field out of its range.
        Unsupported: a site has fewer places than the rank asks for, or its weight is quantised.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    learning_rate: ClassVar[float] = 5e-3
    source: ClassVar[str] = "arXiv:2406.13175"

    rank: int = 8
    seed: int | None = 0

    def __post_init__(self) -> None:
        positive(self, "rank")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site that has a matrix."""
        if not site.has_matrix:
            return []
        view = MatrixView.of(site)
        size, places = view.rows * view.columns, self.rank * (view.rows + view.columns)
        if places > size:
            most = size // (view.rows + view.columns)
            raise Unsupported(f"{self} cannot sit at `{site.key}`: it asks for {places} places of {size}. Choose rank={most} or less.")
        return [SparseWeight(view, places, self.seed)]


class SparseWeight(WeightPatch):
    """theta + S."""

    commutes = "add"
    index: Tensor

    def __init__(self, view: MatrixView, places: int, seed: int | None) -> None:
        super().__init__()
        self.parameter, self.view = view.parameter, view
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        size = view.rows * view.columns
        draws = [torch.randperm(size, generator=generator)[:places].sort().values for _ in range(view.stack[0] if view.stack else 1)]
        index = torch.cat([k * size + draw for k, draw in enumerate(draws)])
        self.register_buffer("index", index, persistent=seed is None)
        self.values = nn.Parameter(torch.zeros(len(index)))

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        matrix = self.view.read(theta)
        changed = matrix.reshape(-1).index_add(0, self.index, self.values.to(theta.dtype))
        return self.view.write(changed.view(matrix.shape), theta).contiguous()  # in another layout products round otherwise
