"""LoReFT: hidden states edited within a low-rank subspace (Wu et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import InvalidValue
from deltatune.methods.addition.channels import channels
from deltatune.methods.checks import positive
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, TokenPatch, methods
from deltatune.methods.lanes import Lane
from deltatune.structure.site import Site


@methods.register("loreft")
@dataclass(frozen=True)
class LoReFT(Method):
    """y <- y + R^T (W y + b - R y) with R, W: (rank, hidden), R R^T = I, b: (rank,), behind every layer.

    Trains A, W and b: within the rows of R the hidden states become W y + b, beside them they stay. R is the orthonormal
    basis of A's rows (QR with a positive diagonal), so it stays orthonormal under any optimiser. A fresh R is random, W
    and b are uniform in +-1 / sqrt(hidden), so a fresh LoReFT is not the identity.

    Args:
        rank: r, at most hidden.
        first: edit only this many first tokens of each row, padding not counted; with ``last``, both.
        last: edit only this many last tokens of what the model is given: under a key-value cache the newest ones.
            All tokens are edited where both are 0.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "representation"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("layer",)
    identity: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 2e-3
    source: ClassVar[str] = "arXiv:2404.03592"

    rank: int = 8
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        positive(self, "rank")
        for field in ("first", "last"):
            if getattr(self, field) < 0:
                raise InvalidValue(f"LoReFT({field}={getattr(self, field)}) was asked for; `{field}` must be at least 0.")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site whose output has channels: a layer, a linear map, a convolution."""
        width = channels(site)
        if not width:
            return []
        if self.rank > width:
            raise InvalidValue(
                f"LoReFT(rank={self.rank}) was asked for at `{site.path}`, which is {width} wide. `rank` must be at most {width} there."
            )
        return [TokenEdit(width, self) if self.first or self.last else Edit(width, self)]


class Intervention(nn.Module):
    """h -> R^T (W h + b - R h)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, width)))
        self.W = nn.Parameter(torch.empty(rank, width).uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width)))
        self.b = nn.Parameter(torch.empty(rank).uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width)))

    @property
    def R(self) -> Tensor:
        """Orthonormal rows that span those of A: (rank, width)."""
        A = self.A.to(torch.promote_types(self.A.dtype, torch.float32))
        Q, upper = torch.linalg.qr(A.T)  # (width, rank), (rank, rank)
        R: Tensor = (Q * torch.where(upper.diagonal() < 0, -1.0, 1.0)).T  # so R = A for orthonormal A
        return R.to(self.A.dtype)

    def forward(self, y: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        R = self.R.to(y.dtype)
        return F.linear(F.linear(y, self.W.to(y.dtype) - R, self.b.to(y.dtype)), R.T)


class Edit(OutputPatch):
    """The intervention at every token."""

    def __init__(self, width: int, method: LoReFT) -> None:
        super().__init__()
        self.intervention = Intervention(width, method.rank)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y (..., width)."""
        edit: Tensor = self.intervention(y)
        return y + edit

    def lane(self) -> Lane:
        """A bottleneck without activation: D = (W - R)^T, c = b, U = R."""
        own = self.intervention
        R = own.R
        tensors = {"D": (own.W - R).T, "c": own.b, "U": R, "e": own.b.new_zeros(R.shape[1])}
        return Lane("bottleneck", tensors, ("identity", "output"))


class TokenEdit(TokenPatch):
    """The intervention at the first and last tokens."""

    def __init__(self, width: int, method: LoReFT) -> None:
        super().__init__()
        self.intervention = Intervention(width, method.rank)
        self.first, self.last = method.first, method.last

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Ranks (2, batch, seq), y (batch, seq, width)."""
        beginning, end = x.to(y.device).unbind()
        chosen: Tensor = ((beginning <= self.first) | (end <= self.last)) & (beginning > 0)
        edit: Tensor = self.intervention(y)
        return y + edit * chosen[..., None].to(y.dtype)
