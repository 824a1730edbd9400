"""LoKr: a Kronecker product as a change of a weight (Edalati et al. 2022, as KronA; Yeh et al. 2023, as LoKr)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import InvalidValue
from deltatune.methods.checks import positive
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, WeightPatch, methods
from deltatune.methods.lanes import Lane
from deltatune.methods.reparameterization.matrix_view import MatrixView, acts_on_outputs, kaiming
from deltatune.structure.site import Site


@methods.register("lokr")
@dataclass(frozen=True)
class LoKr(Method):
    """W' = W + s C kron D with s = alpha / rank, C: (out_1, in_1), D: (out_2, in_2), out = out_1 out_2, in = in_1 in_2.

    Trains C = 0 and D, kaiming uniform; or their factors C = C_b C_a and D = D_b D_a of ``rank`` where that is less
    than half the longer side. On a linear map the product is never formed: with x as a matrix X: (in_1, in_2), the
    change is C X D^T. A convolution's kernel belongs to D: (out_2, in_2 * kernel).

    Args:
        rank: r of the factors, at least 1.
        alpha: the scale is alpha / rank, factored or not.
        factor: size of out_1 and in_1, or the nearest divisor below it; -1 for the divisor nearest to the square root.
        factor_both: C may be factored, too.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    learning_rate: ClassVar[float] = 5e-3
    source: ClassVar[str] = "arXiv:2309.14859"

    rank: int = 8
    alpha: float = 8.0
    factor: int = -1
    factor_both: bool = False

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha")
        if self.factor != -1 and self.factor < 1:
            raise InvalidValue(f"LoKr(factor={self.factor!r}) was asked for; `factor` must be at least 1, or -1 for the square root.")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site that has a matrix."""
        if not site.has_matrix:
            return []
        if acts_on_outputs(site):
            return [KroneckerLinear(Kronecker((), site.out_features, site.in_features, 1, self))]
        view = MatrixView.of(site)
        return [KroneckerWeight(view, Kronecker(view.stack, view.rows, view.columns // view.kernel, view.kernel, self))]


class Kronecker(nn.Module):
    """C and D, each whole or as two factors."""

    def __init__(self, stack: tuple[int, ...], rows: int, columns: int, kernel: int, method: LoKr) -> None:
        super().__init__()
        out_1, out_2 = divisors(rows, method.factor)
        in_1, in_2 = divisors(columns, method.factor)
        rank, self.scale = method.rank, method.alpha / method.rank
        self.in_1, self.in_2 = in_1, in_2
        if method.factor_both and rank < max(out_1, in_1) / 2:
            self.C_a, self.C_b = kaiming(*stack, rank, in_1), nn.Parameter(torch.zeros(*stack, out_1, rank))
        else:
            self.C = nn.Parameter(torch.zeros(*stack, out_1, in_1))
        if rank < max(out_2, in_2) / 2:
            self.D_a, self.D_b = kaiming(*stack, rank, in_2 * kernel), kaiming(*stack, out_2, rank)
        else:
            self.D = kaiming(*stack, out_2, in_2 * kernel)

    @property
    def left(self) -> Tensor:
        """C, (..., out_1, in_1)."""
        return self.C if "C" in self._parameters else self.C_b @ self.C_a

    @property
    def right(self) -> Tensor:
        """D, (..., out_2, in_2 * kernel)."""
        return self.D if "D" in self._parameters else self.D_b @ self.D_a

    def forward(self) -> Tensor:
        """s C kron D, (..., out, in * kernel)."""
        product = torch.einsum("...ab,...cd->...acbd", self.left, self.right)
        return self.scale * product.flatten(-2).flatten(-3, -2)

    def lane(self) -> Lane | None:
        """The factors as two matrices; None where a factor is whole."""
        if "C" in self._parameters or "D" in self._parameters:
            return None
        return Lane("low-rank", {"A": torch.kron(self.C_a, self.D_a).T, "B": self.scale * torch.kron(self.C_b, self.D_b).T}, (0.0,))


class KroneckerLinear(OutputPatch):
    """y + s (C kron D) x, as s C X D^T."""

    commutes = "add"

    def __init__(self, kronecker: Kronecker) -> None:
        super().__init__()
        self.kronecker = kronecker

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., in), (..., out) -> (..., out)."""
        kronecker = self.kronecker
        X = x.to(y.dtype).reshape(*x.shape[:-1], kronecker.in_1, kronecker.in_2)
        change = kronecker.left.to(y.dtype) @ (X @ kronecker.right.to(y.dtype).mT)  # (..., out_1, out_2)
        return y + kronecker.scale * change.flatten(-2)

    def lane(self) -> Lane | None:
        """(C_b C_a) kron (D_b D_a) = (C_b kron D_b) (C_a kron D_a); None where that is not of low rank."""
        return self.kronecker.lane()

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s C kron D."""
        return weight + self.kronecker().to(weight.dtype), bias


class KroneckerWeight(WeightPatch):
    """theta + s C kron D."""

    commutes = "add"

    def __init__(self, view: MatrixView, kronecker: Kronecker) -> None:
        super().__init__()
        self.parameter, self.view, self.kronecker = view.parameter, view, kronecker

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        return theta + self.view.write(self.kronecker(), theta)


def divisors(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of ``size``, the smaller first, unless ``factor`` divides it: that comes first then.

    >>> divisors(384), divisors(384, 4), divisors(12, 5), divisors(127)
    ((16, 24), (4, 96), (3, 4), (1, 127))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(divisor for divisor in range(bound, 0, -1) if size % divisor == 0)
    return first, size // first
