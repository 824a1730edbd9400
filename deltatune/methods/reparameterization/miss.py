"""MiSS: one small matrix shared by all shards of a weight (Kang and Yin 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import Unsupported
from deltatune.methods.checks import fraction, positive
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, WeightPatch, methods
from deltatune.methods.reparameterization.matrix_view import MatrixView, acts_on_outputs
from deltatune.structure.site import Site


@methods.register("miss")
@dataclass(frozen=True)
class MiSS(Method):
    """W' = W + [D^T, D^T, ...]: the columns of W in shards of ``rank``, all with one change D: (rank, out) = 0.

    Trains D. On a linear map it runs as y + S D, where S = sum of the shards of x: (..., rank); the last shard is cut
    where rank does not divide in. With ``mini_rank`` the rows of D^T are shared, too: D = [M, M, ...], M: (rank, mini_rank).

    Args:
        rank: r, the width of a shard, at most the width of the input.
        dropout: on x, in training; only where MiSS runs on a linear map.
        mini_rank: width of M, a divisor of out; None for a D of full width.

    Raises:
        InvalidValue: a field out of its range.
        Unsupported: the rank is wider than a site's input, or mini_rank does not divide its output.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2409.15371"

    rank: int = 64
    dropout: float = 0.0
    mini_rank: int | None = None

    def __post_init__(self) -> None:
        positive(self, "rank")
        fraction(self, "dropout")
        if self.mini_rank is not None:
            positive(self, "mini_rank")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site that has a matrix."""
        if not site.has_matrix:
            return []
        if acts_on_outputs(site):
            return [ShardLinear(Shard((), *self._checked(site, site.out_features, site.in_features)), self.dropout)]
        view = MatrixView.of(site)
        return [ShardWeight(view, Shard(view.stack, *self._checked(site, view.rows, view.columns)))]

    def _checked(self, site: Site, rows: int, columns: int) -> tuple[int, int, int]:
        """rank, the width of what trains, and how often that repeats."""
        if self.rank > columns:
            raise Unsupported(f"{self} cannot sit at `{site.key}`: its input is {columns} wide. Choose rank={columns} or less.")
        width = self.mini_rank or rows
        if rows % width:
            raise Unsupported(f"{self} cannot sit at `{site.key}`: mini_rank does not divide its output, {rows} wide. Choose a divisor.")
        return self.rank, width, rows // width


class Shard(nn.Module):
    """D, whole or as copies of M side by side."""

    def __init__(self, stack: tuple[int, ...], rank: int, width: int, copies: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros(*stack, rank, width))
        self.copies = copies

    def forward(self) -> Tensor:
        """D, (..., rank, out)."""
        return self.D if self.copies == 1 else torch.cat([self.D] * self.copies, -1)

    def tiled(self, columns: int) -> Tensor:
        """[D^T, D^T, ...], (..., out, columns)."""
        D = self()
        return torch.cat([D.mT] * -(-columns // D.shape[-2]), -1)[..., :columns]


class ShardLinear(OutputPatch):
    """y + S D."""

    commutes = "add"

    def __init__(self, shard: Shard, dropout: float) -> None:
        super().__init__()
        self.shard, self.dropout = shard, dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., in), (..., out) -> (..., out)."""
        D = self.shard().to(y.dtype)
        x = F.dropout(x.to(y.dtype), self.dropout, self.training)
        x = F.pad(x, (0, -x.shape[-1] % D.shape[0]))
        S: Tensor = x.reshape(*x.shape[:-1], -1, D.shape[0]).sum(-2)  # (..., rank)
        moved: Tensor = y + S @ D
        return moved

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + [D^T, D^T, ...]."""
        return weight + self.shard.tiled(weight.shape[-1]).to(weight.dtype), bias


class ShardWeight(WeightPatch):
    """theta + [D^T, D^T, ...]."""

    commutes = "add"

    def __init__(self, view: MatrixView, shard: Shard) -> None:
        super().__init__()
        self.parameter, self.view, self.shard = view.parameter, view, shard

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        return theta + self.view.write(self.shard.tiled(self.view.columns), theta)
