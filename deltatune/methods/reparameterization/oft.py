"""OFT: the inputs of a linear map are rotated, block by block (Qiu et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.methods.checks import positive
from deltatune.methods.kinds import Family, InputPatch, Kind, Method, Patch, WeightPatch, methods
from deltatune.methods.reparameterization.matrix_view import MatrixView, acts_on_outputs
from deltatune.structure.site import Site


@methods.register("oft")
@dataclass(frozen=True)
class OFT(Method):
    """W' = W R^T, so y = W (R^T x) + b, with R = diag(R_1, ..., R_k) and R_i = (I - Q_i)(I + Q_i)^-1, Q_i = -Q_i^T.

    Trains the upper triangle of each Q_i = 0: block_size (block_size - 1) / 2 numbers for each of the k = in / block_size
    blocks. It rotates the input side, as PEFT does; on a linear map it edits x itself. A table of embeddings E becomes
    E R, its rows rotated. ``neumann_terms`` replaces R_i by the sum I + 2 Q + 2 Q^2 + ... + 2 Q^(n - 2) +
    Q^(n - 1), which tends to R_i^T: again as in PEFT, whose default it is with n = 5; only nearly orthogonal.

    Args:
        block_size: width of a block, at least 2; a divisor of the input's width (times the kernel's size).
        block_share: one R_i for all blocks.
        neumann_terms: n, at least 4; None for the exact inverse.

    Raises:
        InvalidValue: a field out of its range.
        Unsupported: the block size does not divide the width of a site's input.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    learning_rate: ClassVar[float] = 2e-3
    source: ClassVar[str] = "arXiv:2306.07280"

    block_size: int = 32
    block_share: bool = False
    neumann_terms: int | None = None

    def __post_init__(self) -> None:
        positive(self, "block_size")
        if self.block_size == 1:
            raise InvalidValue("OFT(block_size=1) was asked for; a block of one has no rotation. Choose a `block_size` of 2 or more.")
        if self.neumann_terms is not None and self.neumann_terms < 4:
            raise InvalidValue(f"OFT(neumann_terms={self.neumann_terms!r}) was asked for; `neumann_terms` must be at least 4.")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One rotation a site that has a matrix."""
        if not site.has_matrix:
            return []
        if acts_on_outputs(site) and site.rows is None:
            return [RotatedInput(Rotation((), self._blocks(site, site.in_features), self))]
        view = MatrixView.of(site)
        rotation = Rotation(view.stack, self._blocks(site, view.columns), self)
        return [RotatedWeight(view, rotation, table=isinstance(site.module, nn.Embedding))]

    def _blocks(self, site: Site, width: int) -> int:
        if width % self.block_size:
            fitting = [size for size in range(2, width + 1) if width % size == 0]
            nearest = min(fitting, key=lambda size: abs(size - self.block_size))
            raise Unsupported(
                f"{self} cannot sit at `{site.key}`: its input is {width} wide, no multiple of it. Choose block_size={nearest}."
            )
        return width // self.block_size


class Rotation(nn.Module):
    """R_1 ... R_k by Cayley's map."""

    places: Tensor

    def __init__(self, stack: tuple[int, ...], blocks: int, method: OFT) -> None:
        super().__init__()
        size = method.block_size
        self.blocks, self.size, self.terms = blocks, size, method.neumann_terms
        self.Q = nn.Parameter(torch.zeros(*stack, 1 if method.block_share else blocks, size * (size - 1) // 2))
        rows, columns = torch.triu_indices(size, size, 1)
        self.register_buffer("places", rows * size + columns, persistent=False)

    def forward(self) -> Tensor:
        """R, (..., k, block_size, block_size)."""
        with torch.autocast(self.Q.device.type, enabled=False):
            return self._cayley().expand(*self.Q.shape[:-2], self.blocks, self.size, self.size)

    def _cayley(self) -> Tensor:
        upper = self.Q.new_zeros(*self.Q.shape[:-1], self.size * self.size)
        upper = upper.index_copy(-1, self.places, self.Q).view(*self.Q.shape[:-1], self.size, self.size)
        Q = upper - upper.mT
        I = torch.eye(self.size, dtype=Q.dtype, device=Q.device)  # noqa: E741
        if self.terms is None:
            wide = torch.promote_types(Q.dtype, torch.float32)  # no half-precision solver
            solved: Tensor = torch.linalg.solve((I + Q).to(wide), (I - Q).to(wide), left=False)
            return solved.to(Q.dtype)
        power, R = I.expand_as(Q), I.expand_as(Q)
        for _ in range(self.terms - 2):
            power = power @ Q
            R = R + 2 * power
        return R + power @ Q

    def turn(self, x: Tensor) -> Tensor:
        """Row vectors x: (..., in) -> x R, block by block."""
        blocks = x.reshape(*x.shape[:-1], self.blocks, self.size)
        turned: Tensor = torch.einsum("...kb,kbc->...kc", blocks, self().to(x.dtype))
        return turned.flatten(-2)

    def turn_back(self, matrix: Tensor) -> Tensor:
        """W: (..., out, in) -> W R^T, block by block."""
        blocks = matrix.reshape(*matrix.shape[:-1], self.blocks, self.size)
        turned: Tensor = torch.einsum("...okc,...kbc->...okb", blocks, self().to(matrix.dtype))
        return turned.flatten(-2)


class RotatedInput(InputPatch):
    """x R."""

    def __init__(self, rotation: Rotation) -> None:
        super().__init__()
        self.rotation = rotation

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., in)."""
        return self.rotation.turn(x).to(x.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W R^T."""
        return self.rotation.turn_back(weight), bias


class RotatedWeight(WeightPatch):
    """W R^T; E R for a table of embeddings."""

    def __init__(self, view: MatrixView, rotation: Rotation, table: bool) -> None:
        super().__init__()
        self.parameter, self.view, self.rotation, self.table = view.parameter, view, rotation, table

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        turn = self.rotation.turn if self.table else self.rotation.turn_back
        return self.view.write(turn(self.view.read(theta)), theta).contiguous()  # in another layout products round otherwise
