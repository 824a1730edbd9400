"""PiSSA: LoRA that starts at the principal singular values and vectors of the weight (Meng et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.methods.checks import fraction, not_negative, positive
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, WeightPatch, methods
from deltatune.methods.lanes import Lane
from deltatune.methods.reparameterization.matrix_view import MatrixView, acts_on_outputs
from deltatune.methods.reparameterization.original import original
from deltatune.structure.site import Site


@methods.register("pissa")
@dataclass(frozen=True)
class PiSSA(Method):
    """W' = (W - B_0 A_0) + B A, with B_0 A_0 = U_r S_r V_r^T the part of W = U S V^T with its r largest singular values.

    Trains A: (rank, in), from A_0 = S_r^(1/2) V_r^T, and B: (out, rank), from B_0 = U_r S_r^(1/2). The backbone keeps its
    bits: it runs as y + (x A^T) B^T - (x A_0^T) B_0^T, or on the weight where LoRA does, so a fresh delta is the identity
    to the bit. A_0 and B_0 are stored beside A and B, because W does not determine them where singular values are equal.

    Args:
        rank: r, at least 1; as much as the smaller side of a weight has, where that is less.
        dropout: on x, in training; only where it runs on a linear map.
        iterations: 0 computes the singular values exactly; more estimate them with that many subspace iterations, which
            is faster for wide weights.

    Raises:
        InvalidValue: a field out of its range.
        Unsupported: a weight is quantised or offloaded, so it has no singular values to read.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    reads_weights: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2404.02948"

    rank: int = 8
    dropout: float = 0.0
    iterations: int = 0

    def __post_init__(self) -> None:
        positive(self, "rank")
        fraction(self, "dropout")
        not_negative(self, "iterations")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site that has a matrix."""
        if not site.has_matrix:
            return []
        theta, view = original(site, self), MatrixView.of(site)
        A, B = self._principal(view.read(theta).float())
        return [PrincipalLinear(A, B, self.dropout)] if acts_on_outputs(site) else [PrincipalWeight(view, A, B)]

    def _principal(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """A_0 (..., rank, in) and B_0 (..., out, rank) of W (..., out, in)."""
        rank = min(self.rank, *W.shape[-2:])
        if self.iterations:
            U, S, V = torch.svd_lowrank(W, rank, niter=self.iterations)
        else:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            U, S, V = U[..., :rank], S[..., :rank], Vh.mT[..., :rank]
        root = S.sqrt().unsqueeze(-2)  # (..., 1, rank)
        return (V * root).mT.contiguous(), (U * root).contiguous()


class PrincipalLinear(OutputPatch):
    """y + (x A^T) B^T - (x A_0^T) B_0^T."""

    commutes = "add"
    lora_A: Tensor
    lora_B: Tensor
    start_A: Tensor
    start_B: Tensor

    def __init__(self, A: Tensor, B: Tensor, dropout: float) -> None:
        super().__init__()
        _hold(self, A, B)
        self.dropout = dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., in), (..., out) -> (..., out)."""
        x = F.dropout(x.to(y.dtype), self.dropout, self.training)
        moved = F.linear(F.linear(x, self.lora_A.to(y.dtype)), self.lora_B.to(y.dtype))
        return y + (moved - F.linear(F.linear(x, self.start_A.to(y.dtype)), self.start_B.to(y.dtype)))

    def lane(self) -> Lane:
        """x [A; A_0]^T [B, -B_0]^T, of twice the rank."""
        A, B = torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], 1)
        return Lane("low-rank", {"A": A.T, "B": B.T}, (self.dropout * self.training,))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + B A - B_0 A_0."""
        return weight + _change(self).to(weight.dtype), bias


class PrincipalWeight(WeightPatch):
    """theta + B A - B_0 A_0."""

    commutes = "add"
    lora_A: Tensor
    lora_B: Tensor
    start_A: Tensor
    start_B: Tensor

    def __init__(self, view: MatrixView, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.parameter, self.view = view.parameter, view
        _hold(self, A, B)

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        return theta + self.view.write(_change(self), theta)


def _hold(patch: Patch, A: Tensor, B: Tensor) -> None:
    patch.register_parameter("lora_A", nn.Parameter(A.clone()))
    patch.register_parameter("lora_B", nn.Parameter(B.clone()))
    patch.register_buffer("start_A", A)
    patch.register_buffer("start_B", B)


def _change(patch: PrincipalLinear | PrincipalWeight) -> Tensor:
    """B A - B_0 A_0, (..., out, in)."""
    return patch.lora_B @ patch.lora_A - patch.start_B @ patch.start_A
