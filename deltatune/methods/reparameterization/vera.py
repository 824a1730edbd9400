"""VeRA: two vectors a site around random matrices that all sites share (Kopiczko et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.methods.checks import fraction, positive
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, WeightPatch, methods
from deltatune.methods.lanes import Lane
from deltatune.methods.reparameterization.matrix_view import MatrixView, acts_on_outputs
from deltatune.structure.site import Site


@methods.register("vera")
@dataclass(frozen=True)
class VeRA(Method):
    """W' = W + diag(b) B diag(d) A, with random A: (rank, in) and B: (out, rank) that are frozen and common to all sites.

    Trains d: (rank,), from ``d_init``, and b: (out,) = 0. A and B are as large as the largest site needs, and each site
    takes their first columns and rows. They come from ``seed``, so files hold the vectors alone.

    Args:
        rank: r, at least 1.
        d_init: every entry of d at the start.
        dropout: on x, in training; only where VeRA runs on a linear map.
        seed: of A and B.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    learning_rate: ClassVar[float] = 1e-2
    source: ClassVar[str] = "arXiv:2310.11454"

    rank: int = 256
    d_init: float = 0.1
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "rank", "d_init")
        fraction(self, "dropout")

    def share(self, sites: Sequence[Site]) -> nn.Module:
        """A and B for the largest of the sites."""
        sizes = [_size(site) for site in sites if site.has_matrix]
        rows, columns = (max((size[k] for size in sizes), default=1) for k in range(2))
        return Bases(self.rank, rows, columns, self.seed)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One pair of vectors a site that has a matrix."""
        assert isinstance(shared, Bases)
        if not site.has_matrix:
            return []
        if acts_on_outputs(site):
            return [VectorLinear(site.in_features, site.out_features, shared, self)]
        return [VectorWeight(MatrixView.of(site), shared, self)]


class Bases(nn.Module):
    """A and B, kaiming uniform, the same for a seed on every machine (and in PEFT).

    Attributes:
        drawn: all that determines them.
    """

    A: Tensor
    B: Tensor

    def __init__(self, rank: int, rows: int, columns: int, seed: int) -> None:
        super().__init__()
        self.drawn = (seed, rank, rows, columns)
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            bound = math.sqrt(6 / shape[1])
            matrix = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, matrix, persistent=False)


class VectorLinear(OutputPatch):
    """y + b * (B (d * (A dropout(x))))."""

    commutes = "add"

    def __init__(self, in_features: int, out_features: int, bases: Bases, method: VeRA) -> None:
        super().__init__()
        self.in_features = in_features
        self.bases = (bases,)  # in a tuple, so that it is registered in the delta alone
        self.d = nn.Parameter(torch.full((method.rank,), method.d_init))
        self.b = nn.Parameter(torch.zeros(out_features))
        self.dropout = method.dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., in), (..., out) -> (..., out)."""
        A, B = self.bases[0].A[:, : x.shape[-1]].to(y), self.bases[0].B[: len(self.b)].to(y)
        x = F.dropout(x.to(y.dtype), self.dropout, self.training)
        return y + self.b.to(y.dtype) * F.linear(self.d.to(y.dtype) * F.linear(x, A), B)

    def lane(self) -> Lane:
        """The two vectors; A and B are the same for all deltas of one seed, rank and size."""
        bases = self.bases[0]
        own = (self.in_features, len(self.b))
        shared = {"A": bases.A[:, : own[0]].T, "B": bases.B[: own[1]].T}
        return Lane("vectors", {"d": self.d, "b": self.b}, (self.dropout * self.training, *bases.drawn, *own), shared)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + diag(b) B diag(d) A."""
        A, B = self.bases[0].A[:, : weight.shape[1]].to(weight), self.bases[0].B[: len(self.b)].to(weight)
        return weight + (self.b.to(weight.dtype)[:, None] * B) @ (self.d.to(weight.dtype)[:, None] * A), bias


class VectorWeight(WeightPatch):
    """theta + diag(b) B diag(d) A; a stack of matrices has a pair of vectors each."""

    commutes = "add"

    def __init__(self, view: MatrixView, bases: Bases, method: VeRA) -> None:
        super().__init__()
        self.parameter, self.view, self.bases = view.parameter, view, (bases,)
        self.d = nn.Parameter(torch.full((*view.stack, method.rank), method.d_init))
        self.b = nn.Parameter(torch.zeros(*view.stack, view.rows))

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        A, B = self.bases[0].A[:, : self.view.columns].to(self.d), self.bases[0].B[: self.view.rows].to(self.d)
        change = (self.b.unsqueeze(-1) * B) @ (self.d.unsqueeze(-1) * A)  # (..., out, in)
        return theta + self.view.write(change, theta)


def _size(site: Site) -> tuple[int, int]:
    """out and in of a site as the patches see it."""
    if acts_on_outputs(site):
        return site.out_features, site.in_features
    view = MatrixView.of(site)
    return view.rows, view.columns
