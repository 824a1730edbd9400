"""DoRA: LoRA on the direction of a weight, with its magnitude trained apart (Liu et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.methods.checks import positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, WeightPatch, methods
from deltatune.methods.lanes import Lane
from deltatune.methods.reparameterization.matrix_view import MatrixView, kaiming
from deltatune.methods.reparameterization.original import original
from deltatune.structure.site import Site


@methods.register("dora")
@dataclass(frozen=True)
class DoRA(Method):
    """W' = m V / ||V||_c with V = W + s B A and s = alpha / rank; ||.||_c is the norm of each row of (out, in).

    Trains m: (out, 1), from ||W||_c, A: (rank, in), kaiming uniform, and B: (out, rank) = 0. The gradient takes ||V||_c for a
    constant, as in the paper's section 4.3. A fresh delta is the identity to the bit, as m / ||V||_c is 1. An embedding
    is seen as (width, rows): one magnitude for each of its features.

    Args:
        rank: r, at least 1.
        alpha: the scale is alpha / rank, or alpha / sqrt(rank) with ``rank_stabilized``.
        rank_stabilized: rsLoRA's scale (Kalajdzievski 2023).

    Raises:
        InvalidValue: a field out of its range.
        Unsupported: a weight is quantised or offloaded, so it has no norm to read.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    reads_weights: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2402.09353"

    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site that has a matrix."""
        if not site.has_matrix:
            return []
        theta, view = original(site, self), MatrixView.of(site)
        if isinstance(site.module, nn.Embedding):
            view = replace(view, rows=view.columns, columns=view.rows, transposed=True)
        return [DecomposedWeight(view, theta, self)]


class DecomposedWeight(WeightPatch):
    """m (theta + s B A) / ||theta + s B A||_c."""

    def __init__(self, view: MatrixView, theta: Tensor, method: DoRA) -> None:
        super().__init__()
        self.parameter, self.view, self.scale = view.parameter, view, method.scale
        self.lora_A = nn.Parameter(kaiming(*view.stack, method.rank, view.columns).to(theta.device))
        self.lora_B = nn.Parameter(torch.zeros(*view.stack, view.rows, method.rank, device=theta.device))
        self.magnitude = nn.Parameter(self._norm(self._direction(theta)).detach())

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        V = self._direction(theta)
        return self.view.write(self.magnitude / self._norm(V.detach()) * V, theta)

    def lane_of(self, theta: Tensor) -> Lane | None:
        """g * (y - bias) + x A^T (diag(1 + g) s B)^T, with 1 + g = m / ||V||_c."""
        if not self.view.is_plain:
            return None
        ratio = self.magnitude / self._norm(self._direction(theta).detach())  # (out, 1)
        B = ratio * self.scale * self.lora_B
        return Lane("decomposed", {"A": self.lora_A.T, "B": B.T, "g": ratio.squeeze(1) - 1})

    def _direction(self, theta: Tensor) -> Tensor:
        """V, (..., out, in), in the finer precision of theta and the factors."""
        W = self.view.read(theta)
        return W.to(torch.promote_types(W.dtype, self.lora_B.dtype)) + self.scale * self.lora_B @ self.lora_A

    @staticmethod
    def _norm(V: Tensor) -> Tensor:
        """||V||_c, (..., out, 1); a row of zeros, which has no direction, stays one."""
        norm: Tensor = torch.linalg.vector_norm(V, dim=-1, keepdim=True)
        return norm.clamp_min(torch.finfo(V.dtype).tiny)
